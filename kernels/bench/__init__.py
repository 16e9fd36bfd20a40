"""Benchmarks of ``dalr_kernels``: not part of the installed package, run from a checkout."""
