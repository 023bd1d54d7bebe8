"""Attention to cached keys and values, with the same bits in every step."""
