"""Expert weights from Hugging Face checkpoint folders, in the Hub's own layouts: opened, checked and streamed.

`Checkpoint.open(folder)`, then `load_experts(checkpoint, "model.layers.0.mlp", runner.routed_experts)` per layer.
"""

from moe_core.checkpoint.consistency import check_experts
from moe_core.checkpoint.header import TensorInfo
from moe_core.checkpoint.layouts import RULES, ExpertTensor, LayoutRule, expert_blocks, map_experts, packed_rules
from moe_core.checkpoint.loading import load_experts
from moe_core.checkpoint.reader import Checkpoint

__all__ = [
    "RULES",
    "Checkpoint",
    "ExpertTensor",
    "LayoutRule",
    "TensorInfo",
    "check_experts",
    "expert_blocks",
    "load_experts",
    "map_experts",
    "packed_rules",
]
