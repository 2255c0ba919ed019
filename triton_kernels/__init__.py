"""Triton kernels and their launchers, one module for each op family."""
