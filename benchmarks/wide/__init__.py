"""Ranks as processes, each with a GPU of its own where there are enough: what they measure."""
