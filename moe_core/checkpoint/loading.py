"""`load_experts`: streams one MoE block's experts from a checkpoint into a `RoutedExperts`, expert by expert.

Shape letters: E experts, global · H hidden · I intermediate of a whole expert.

Names, shapes and dtypes are checked by the headers first, so a checkpoint that doesn't fit is refused before a byte is
copied. Then only the experts of this rank are read, one after the other: the peak is one layer plus one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from moe_core.checkpoint.layouts import RULES, ExpertTensor, LayoutRule, map_experts
from moe_core.checkpoint.reader import Checkpoint
from moe_core.errors import CheckpointError
from moe_core.routed_experts import RoutedExperts

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_SHOWN = 5


def load_experts(
    checkpoint: Checkpoint, prefix: str, routed_experts: RoutedExperts, rules: Sequence[LayoutRule] = RULES
) -> None:
    """Fill a layer's weights and pack them; nothing further is to be done before the first step.

    Args:
        checkpoint: where from.
        prefix: the MoE block's name in the checkpoint, such as "model.layers.0.mlp" (see `expert_blocks`).
        routed_experts: where to; it decides which experts are read, and how they are split over ranks.
        rules: how names are mapped.

    Raises:
        CheckpointError: no such block, a tensor that no rule maps, a missing or superfluous expert or projection, a
            wrong shape, or a packed dtype that the layer's quantization method does not read.
    """
    tensors = _tensors_of(checkpoint, prefix, rules)
    sources = _index(checkpoint, prefix, tensors, routed_experts)
    if routed_experts.quant_method.scheme.weight is None:  # a packed format's shapes are known to its method alone
        for tensor in tensors:
            _check_shape(checkpoint, tensor, routed_experts)
    for expert in routed_experts.expert_map.local_experts:
        for tensor in sources[expert]:
            for part, value in _read(checkpoint, tensor, expert):
                routed_experts.load_expert(expert, part, value)
    routed_experts.pack_weights()


def _tensors_of(checkpoint: Checkpoint, prefix: str, rules: Sequence[LayoutRule]) -> list[ExpertTensor]:
    below = [name for name in checkpoint.names if name.startswith(f"{prefix}.")]
    tensors = map_experts(below, checkpoint.model_type, rules).get(prefix)
    if not tensors:
        known = list(map_experts(checkpoint.names, checkpoint.model_type, rules))
        shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
        raise CheckpointError(
            f"{checkpoint.folder}: no experts under {prefix!r}; MoE blocks of this checkpoint: {shown or 'none'}"
        )
    return tensors


def _index(
    checkpoint: Checkpoint, prefix: str, tensors: Sequence[ExpertTensor], layer: RoutedExperts
) -> dict[int, list[ExpertTensor]]:
    """Global expert → its tensors; complete, and each part once."""
    config = layer.config
    wanted = ["gate", "up", "down"] if config.activation.gated else ["up", "down"]
    if config.activation.bias:
        wanted += [f"{part}_bias" for part in wanted]
    plain = layer.quant_method.scheme.weight is None  # a packed scheme's method knows its scales' names itself
    seen: dict[tuple[int, str], str] = {}
    sources: dict[int, list[ExpertTensor]] = {expert: [] for expert in range(config.num_experts)}
    for tensor in tensors:
        experts = sources if tensor.expert is None else [tensor.expert]
        for expert in experts:
            if expert not in sources:
                raise CheckpointError(
                    f"tensor {tensor.name!r}: expert {expert} of a layer with experts 0 to {config.num_experts - 1}; "
                    "the checkpoint and the layer's config are of different models"
                )
            for part in tensor.parts:
                if part not in wanted and (plain or part in _PARTS):
                    raise CheckpointError(
                        f"tensor {tensor.name!r}: it would be {part!r}, which this layer's activation has not "
                        f"({config.activation}); the checkpoint and the layer's config are of different models"
                    )
                if (expert, part) in seen:
                    raise CheckpointError(
                        f"tensors {seen[expert, part]!r} and {tensor.name!r} both hold {part!r} of expert {expert}; "
                        "the checkpoint mixes two layouts"
                    )
                seen[expert, part] = tensor.name
            sources[expert].append(tensor)
    missing = [f"expert {e} {part}" for e in sources for part in wanted if (e, part) not in seen]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else "")
        raise CheckpointError(
            f"{checkpoint.folder}: under {prefix!r} there is no tensor for {shown}; the checkpoint is incomplete, or "
            f"of another model than the layer's config ({config.num_experts} experts)"
        )
    return sources


def _check_shape(checkpoint: Checkpoint, tensor: ExpertTensor, layer: RoutedExperts) -> None:
    """Held against the layer's config, for every expert, also those of other ranks."""
    info = checkpoint.info(tensor.name)
    expected = expected_shape(tensor, layer)
    if info.shape != expected:
        raise CheckpointError(
            f"{info.file}: tensor {tensor.name!r} has shape {info.shape}; expected {expected} (E = "
            f"{layer.config.num_experts}, H = {layer.config.hidden_size}, I = {layer.config.intermediate_size})"
        )
    if info.torch_dtype not in _PLAIN_DTYPES:
        raise CheckpointError(
            f"{info.file}: tensor {tensor.name!r} is packed ({info.dtype}), and the layer's scheme "
            f"{layer.quant_method.scheme.name!r} takes plain floating point; build the layer with the scheme of the "
            "checkpoint's quantization_config"
        )


def expected_shape(tensor: ExpertTensor, layer: RoutedExperts) -> tuple[int, ...]:
    """The shape that a plain floating-point tensor of a layer must have in the checkpoint."""
    hidden, inner = layer.config.hidden_size, layer.config.intermediate_size
    down = tensor.parts[0].startswith("down")
    rows, columns = (hidden, inner) if down else (len(tensor.parts) * inner, hidden)
    shape: tuple[int, ...] = (rows,) if tensor.is_bias else (columns, rows) if tensor.transposed else (rows, columns)
    return shape if tensor.expert is not None else (layer.config.num_experts, *shape)


def _read(checkpoint: Checkpoint, tensor: ExpertTensor, expert: int) -> Iterator[tuple[str, torch.Tensor]]:
    """One expert's parts of one tensor: biases `[I]` or `[H]`, gate and up `[I, H]`, down `[H, I]`."""
    value = checkpoint.tensor(tensor.name) if tensor.expert is not None else checkpoint.slice(tensor.name)[expert]
    if tensor.transposed and not tensor.is_bias:
        value = value.T
    count = len(tensor.parts)
    for index, part in enumerate(tensor.parts):
        if count == 1:  # also a scale without dims
            yield part, value
        elif tensor.interleaved:
            yield part, value[index::count]
        else:
            yield part, value.chunk(count)[index]
