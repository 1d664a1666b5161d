"""Expert weights from Hugging Face checkpoint folders, in the Hub's own layouts: opened, checked, streamed, converted.

`Checkpoint.open(folder)`, then `load_experts(checkpoint, "model.layers.0.mlp", runner.routed_experts)` per layer;
`Conversion(checkpoint, form).write(folder)` for a folder with packed experts.
"""

from moe_core.checkpoint.consistency import check_experts
from moe_core.checkpoint.converting import Conversion, Form
from moe_core.checkpoint.header import TensorInfo
from moe_core.checkpoint.layouts import RULES, ExpertTensor, LayoutRule, expert_blocks, map_experts, packed_rules
from moe_core.checkpoint.loading import load_experts
from moe_core.checkpoint.reader import Checkpoint, quantization_config

__all__ = [
    "RULES",
    "Checkpoint",
    "Conversion",
    "ExpertTensor",
    "Form",
    "LayoutRule",
    "TensorInfo",
    "check_experts",
    "expert_blocks",
    "load_experts",
    "map_experts",
    "packed_rules",
    "quantization_config",
]
