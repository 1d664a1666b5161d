"""FP8 (e4m3) experts for moe-core: schemes, the checkpoints that hold them, and experts that run them anywhere."""

__version__ = "0.1.0"
