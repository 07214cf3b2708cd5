"""Triton kernels, one file per row of the op table; `kernel` of each takes the arguments of its row."""
