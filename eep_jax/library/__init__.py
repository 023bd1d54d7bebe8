"""Elastic expert layers inside the Flax model of a user; README.md beside it has an example.

`eep_jax` exports its public names. `config`, `supervise` and `admin_client` load no JAX.
"""
