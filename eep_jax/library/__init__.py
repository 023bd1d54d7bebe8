"""Elastic expert layers inside a model that is not ours; see the README, "Inside your own model".

Import from the modules: `elastic_moe` (the layer), `config` and `supervise` (no JAX), `rank`.
"""
