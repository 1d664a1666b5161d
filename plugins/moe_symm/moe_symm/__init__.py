"""Dispatch for moe-core between the GPUs of one host, in Triton over torch symmetric memory."""

__version__ = "0.1.0"
