"""Combine: the experts' results back to the owner of the token, weighted and summed."""
