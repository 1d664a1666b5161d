"""Benchmarks: each file is a command, such as `python -m benchmarks.experts`, and says at its top what it measures."""
