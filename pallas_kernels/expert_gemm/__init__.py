"""Expert GEMM: the received rows through the experts of this rank's slots."""
