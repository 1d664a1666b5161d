"""Dispatch for moe-core by MoRI's `mori.ops`: one copy of a row per rank that has one of its experts."""

__version__ = "0.1.0"
