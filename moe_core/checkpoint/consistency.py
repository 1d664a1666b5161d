"""`check_experts`: are a checkpoint's experts whole and of one shape? By the headers alone, without knowing the model.

A loader that stacks experts finds out too, but then says so in terms of its own stacking, not of the tensor at fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moe_core.checkpoint.layouts import RULES, ExpertTensor, LayoutRule
from moe_core.checkpoint.reader import Checkpoint
from moe_core.errors import CheckpointError


def check_experts(checkpoint: Checkpoint, rules: Sequence[LayoutRule] = RULES) -> None:
    """Check every MoE block that has one tensor per expert. Names that no rule maps are left to whoever loads them.

    Raises:
        CheckpointError: an expert lacks a projection that others have, or has it in another shape or dtype.
    """
    blocks: dict[str, dict[str, dict[int, ExpertTensor]]] = {}
    for name in checkpoint.names:
        tensor = next((found for rule in rules if (found := rule.map(name, checkpoint.model_type))), None)
        if tensor is not None and tensor.expert is not None:
            parts = blocks.setdefault(tensor.block, {})
            parts.setdefault("+".join(tensor.parts), {})[tensor.expert] = tensor
    for block, parts in blocks.items():
        experts = range(1 + max(expert for tensors in parts.values() for expert in tensors))
        for part, tensors in parts.items():
            missing = [expert for expert in experts if expert not in tensors]
            if missing:
                raise CheckpointError(
                    f"{checkpoint.folder}: block {block!r} has experts up to {experts[-1]}, but no tensor for {part!r} "
                    f"of expert {missing[0]} ({len(missing)} missing); the checkpoint is incomplete: fetch it again"
                )
            _check_alike(checkpoint, part, list(tensors.values()))


def _check_alike(checkpoint: Checkpoint, part: str, tensors: list[ExpertTensor]) -> None:
    infos = [checkpoint.info(tensor.name) for tensor in tensors]
    (usual, _), *others = Counter((info.shape, info.dtype) for info in infos).most_common()
    for info in infos:
        if others and (info.shape, info.dtype) != usual:
            raise CheckpointError(
                f"{info.file}: tensor {info.name!r} has shape {info.shape} ({info.dtype}); expected {usual[0]} "
                f"({usual[1]}), as {part!r} of the block's other experts; fetch the file again"
            )
