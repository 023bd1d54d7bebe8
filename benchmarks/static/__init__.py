"""What elastic serving is compared with: the same model on a fixed mesh, by XLA collectives."""
