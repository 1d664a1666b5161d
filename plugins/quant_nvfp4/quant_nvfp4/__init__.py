"""NVFP4 experts for moe-core: schemes, the checkpoints that hold them, and experts that run them anywhere."""

__version__ = "0.1.0"
