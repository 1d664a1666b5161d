"""Batched dispatch for moe-core: every local expert's rows in a block of their own, on one rank."""

__version__ = "0.1.0"
