"""Kernels in Python: one folder per language, imported only when chosen (see `lfm_fast/ops`)."""
