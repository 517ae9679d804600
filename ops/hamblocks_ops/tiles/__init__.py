"""Triton device functions that kernels share."""
