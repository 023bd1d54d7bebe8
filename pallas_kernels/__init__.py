"""Dispatch, expert GEMM and combine: knows arrays, addresses and layouts, and nothing of models."""
