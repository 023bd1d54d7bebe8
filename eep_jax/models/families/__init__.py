"""Families of MoE decoders as Hugging Face stores them. Imports NumPy but no JAX.

One file per family maps its `config.json` to a ModelConfig, and each of our weights to its key in
the safetensors files. `registry` selects the family by `architectures[0]`.
"""
