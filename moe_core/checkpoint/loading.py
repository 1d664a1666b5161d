"""`load_experts`: streams one MoE block's experts from a checkpoint into a `RoutedExperts`, expert by expert.

Shape letters: E experts, global · H hidden · I intermediate of a whole expert.

Names, shapes and dtypes are checked by the headers first, so a checkpoint that doesn't fit is refused before a byte is
copied. Then only the experts of this rank are read, one after the other: the peak is one layer plus one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from moe_core.checkpoint.layouts import RULES, ExpertTensor, LayoutRule, map_experts, packed_rules
from moe_core.checkpoint.reader import Checkpoint
from moe_core.errors import CheckpointError
from moe_core.quant import split_part, upright
from moe_core.routed_experts import RoutedExperts

_PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_PARTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
_WEIGHTS = _PARTS[:3]
_SHOWN = 5


def load_experts(
    checkpoint: Checkpoint,
    prefix: str,
    routed_experts: RoutedExperts,
    rules: Sequence[LayoutRule] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill a layer's weights and pack them; nothing further is to be done before the first step.

    A packed layer takes packed checkpoints of its scheme as they are. Floating-point ones it quantizes on the way, one
    expert after the other, if its method was asked for by name and not made from a checkpoint's config.

    Args:
        checkpoint: where from.
        prefix: the MoE block's name in the checkpoint, such as "model.layers.0.mlp" (see `expert_blocks`).
        routed_experts: where to; it decides which experts are read, and how they are split over ranks. Only this
            rank's part of a tensor is read where each expert has tensors of its own.
        rules: how names are mapped; None: `RULES` and, for a packed layer, what its method calls its scales.
        progress: called with (experts done, experts of this rank) after each one.

    Raises:
        CheckpointError: no such block, a tensor that no rule maps, a missing or superfluous expert, projection or
            scale, a wrong shape, or a packed dtype that the layer's quantization method does not read.
    """
    method = routed_experts.quant_method
    if rules is None:
        rules = (*RULES, *packed_rules(method.checkpoint_suffixes))
    tensors = _tensors_of(checkpoint, prefix, rules)
    sources = _index(checkpoint, prefix, tensors, routed_experts)
    if method.scheme.weight is None:  # a packed format's shapes are known to its method alone
        for tensor in tensors:
            _check_shape(checkpoint, tensor, routed_experts)
    own = routed_experts.expert_map.local_experts
    for done, expert in enumerate(own, 1):
        for tensor in sources[expert]:
            try:
                _load(checkpoint, tensor, expert, routed_experts)
            except CheckpointError as error:
                raise CheckpointError(
                    f"{checkpoint.info(tensor.name).file}: tensor {tensor.name!r}: {error}"
                ) from error
        if progress is not None:
            progress(done, len(own))
    routed_experts.pack_weights()


def _load(checkpoint: Checkpoint, tensor: ExpertTensor, expert: int, layer: RoutedExperts) -> None:
    """One tensor of one expert. Only this rank's part of it is read."""
    shape = checkpoint.shape(tensor.name)
    own = shape if tensor.expert is not None else shape[1:]
    if not own:  # one scale for all parts, or for all experts too
        value = checkpoint.slice(tensor.name)[expert] if shape else checkpoint.tensor(tensor.name)
        for part in tensor.parts:
            layer.load_expert(expert, part, value)
        return
    flipped = tensor.transposed and not tensor.is_bias
    for parts, index in _pieces(tensor, own[::-1] if flipped else own, layer):
        cut = index[::-1] if flipped else index
        where = cut if tensor.expert is not None else (expert, *cut)
        whole = all(piece == slice(None) for piece in where)
        value = checkpoint.tensor(tensor.name) if whole else checkpoint.slice(tensor.name)[where]
        for place, part in enumerate(parts):
            piece = value.T if flipped else value
            layer.load_expert(expert, part, piece if len(parts) == 1 else piece[place :: len(parts)], sharded=True)


def _pieces(
    tensor: ExpertTensor, shape: tuple[int, ...], layer: RoutedExperts
) -> Iterator[tuple[tuple[str, ...], tuple[slice, ...]]]:
    """What is read at once of one expert's tensor, upright `[N, …]`: parts whose rows alternate in it, and where."""
    count = len(tensor.parts)
    if count == 1:
        yield tensor.parts, layer.shard_index(tensor.parts[0], shape)
        return
    rows = shape[0] // count
    for place, part in enumerate(tensor.parts):
        index = layer.shard_index(part, (rows, *shape[1:]))
        first, end, _ = index[0].indices(rows)
        if tensor.interleaved:  # all parts are cut alike, so one piece holds this rank's rows of each
            yield tensor.parts, (slice(count * first, count * end), *index[1:])
            return
        yield (part,), (slice(place * rows + first, place * rows + end), *index[1:])


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
    projections = list(_WEIGHTS) if config.activation.gated else list(_WEIGHTS[1:])
    method = layer.quant_method
    plain = method.scheme.weight is None  # a packed scheme's method knows its scales' names itself
    kinds = method.required_kinds(_is_packed(checkpoint, tensors))
    wanted = [part + kind for kind in kinds for part in projections]
    if config.activation.bias:
        wanted += [f"{part}_bias" for part in projections]
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
            for part in map(upright, tensor.parts):
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
    missing = [(e, part) for e in sources for part in wanted if (e, part) not in seen]
    if missing:
        names = [_missing_name(layer, *item, seen) for item in missing]
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        raise CheckpointError(
            f"{checkpoint.folder}: under {prefix!r} there is no tensor for {shown}; the checkpoint is incomplete, or "
            f"of another model than the layer's config ({config.num_experts} experts)"
        )
    return sources


def _is_packed(checkpoint: Checkpoint, tensors: Sequence[ExpertTensor]) -> bool:
    weights = [tensor for tensor in tensors if tensor.parts[0] in _WEIGHTS]
    return any(checkpoint.dtype(tensor.name) not in _PLAIN_DTYPES for tensor in weights)


def _missing_name(layer: RoutedExperts, expert: int, part: str, seen: dict[tuple[int, str], str]) -> str:
    """What is missing; of a scale also which names it would have, beside which weight."""
    projection, kind = split_part(part)
    names = [name for name, held in layer.quant_method.checkpoint_suffixes.items() if upright(held) == kind]
    beside = seen.get((expert, projection))
    if not kind or not names or beside is None:
        return f"expert {expert} {part}"
    stem = beside.rpartition(".")[0]
    return f"expert {expert} {part} ({' or '.join(f'{stem}.{name}' for name in names)})"


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
