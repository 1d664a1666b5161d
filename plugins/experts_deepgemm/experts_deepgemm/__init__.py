"""DeepGEMM's grouped GEMMs as experts for moe-core: bf16 and FP8 in 128×128 blocks, on Hopper."""

__version__ = "0.1.0"
