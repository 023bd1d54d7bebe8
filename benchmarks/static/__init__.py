"""Baselines of elastic serving: the same model on a fixed mesh, by XLA collectives."""
