"""Sizes that configurations and kernels share. Imports nothing, so that decisions may import it."""

SCALE_CHANNELS = 128  # channels of an fp8 row that share one float32 scale
WIDTH_MULTIPLE = 64  # on a GPU D is a multiple of this, and F in the bank
