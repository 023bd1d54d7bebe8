"""Computation of a decoder with Flax NNX: attention, router, experts, caches, and their memory.

`decoder` stacks the layers and `moe_block` runs their experts, dense or spread over ranks;
`expert_bank` holds a rank's experts in its slab; `memory` computes what a rank needs, without JAX.
`families` reads models as Hugging Face stores them.
"""
