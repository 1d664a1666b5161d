"""Benchmarks: `python -m benchmarks.experts`, `python -m benchmarks.tune_experts`."""
