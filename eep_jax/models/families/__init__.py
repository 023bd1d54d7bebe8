"""Families of MoE decoders as Hugging Face stores them. NumPy and values only, no JAX.

One file per family: what its `config.json` means as a ModelConfig, and under which key each of our
weights is in its safetensors files. `registry` finds the family by `architectures[0]`.
"""
