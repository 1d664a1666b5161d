"""`Conversion`: a checkpoint whose experts are packed, from one in floating point. Expert by expert, all or nothing.

Shape letters: N, K rows and columns of a projection.

What is packed is the experts' projections; every other tensor is copied as it is, and the `quantization_config` says so
by name. A `Form` says what a format calls its tensors; the arithmetic is `moe_core.formats`, by a scheme's `QuantSpec`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.checkpoint.consistency import check_experts
from moe_core.checkpoint.layouts import ExpertTensor, expert_blocks
from moe_core.checkpoint.reader import CONFIG_FILE, Checkpoint
from moe_core.checkpoint.writer import ShardWriter, layout_bytes
from moe_core.errors import CheckpointError, UnsupportedError
from moe_core.quant import QuantSpec, upright

MAX_SHARD_BYTES = 4 << 30
_WEIGHTS = ("gate", "up", "down")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CHUNK = 1 << 16
"""Elements that are quantized at once; the intermediates are several times that."""
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")


@attrs.frozen
class Form:
    """How a format writes experts down.

    Attributes:
        spec: what the bytes stand for.
        suffixes: kind of tensor (as in `QuantMethod.load_expert`) → what stands for "weight" in its name. A kind
            "_inverse_…" is stored as 1 / value.
        config: names of the linear layers that stay as they are → the `quantization_config`.
    """

    spec: QuantSpec
    suffixes: Mapping[str, str]
    config: Callable[[list[str]], dict[str, Any]]

    def layout(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The tensors of one projection `[N, K]` whose weight is called `name`."""
        rows, columns = shape
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for kind in self.suffixes:
            if kind == "":
                packed = (rows, columns // formats.codes_per_byte(self.spec))
                found[self.name(name, kind)] = (formats.storage_dtype(self.spec), packed)
            elif kind == "_scale":
                grid = formats.scale_shape(self.spec.group_shape, rows, columns)
                found[self.name(name, kind)] = (formats.scale_dtype(self.spec), grid)
            else:
                found[self.name(name, kind)] = (torch.float32, (1,))
        return found

    def name(self, weight: str, kind: str) -> str:
        """What a tensor is called that belongs to the projection `weight`."""
        return f"{weight.removesuffix('.weight')}.{self.suffixes[kind]}"


class Conversion:
    """A checkpoint as it will be written. Making one checks everything that can be checked without reading weights.

    Args:
        source: a floating-point checkpoint with one tensor per projection of an expert.
        form: the format.

    Attributes:
        num_experts: how many will be packed, in all layers together.
        num_bytes: of all weights afterwards.

    Raises:
        UnsupportedError: the source is quantized already, or keeps its experts in a layout that the format has not.
        CheckpointError: it has no experts, or they are not whole.
    """

    def __init__(self, source: Checkpoint, form: Form) -> None:
        self._source, self._form = source, form
        self._experts = _experts(source, form)
        self._packed = {tensor.name for parts in self._experts.values() for tensor in parts.values()}
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name in source.names:
            if name in self._packed:
                self._layout |= form.layout(name, source.shape(name))
            else:
                self._layout[name] = (source.dtype(name), source.shape(name))
        self.num_experts, self.num_bytes = len(self._experts), layout_bytes(self._layout)

    @property
    def config(self) -> dict[str, Any]:
        """The new config.json."""
        linear = {name.removesuffix(".weight") for name in self._kept() if _is_linear(self._source, name)}
        return {**self._source.config, "quantization_config": self._form.config(sorted(linear | {"lm_head"}))}

    def write(
        self, folder: Path, on_expert: Callable[[], None] | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Write `folder`, which appears whole or not at all.

        Args:
            folder: new, or empty.
            on_expert: called after each expert.
            max_shard_bytes: of one file.

        Raises:
            CheckpointError: the folder is not empty, the disk has no room, or a weight is NaN or Inf.
        """
        with _whole_or_nothing(folder, self.num_bytes) as partial:
            writer = ShardWriter(partial, self._layout, max_shard_bytes)
            try:
                for name in self._kept():
                    writer.write(name, self._source.tensor(name))
                for parts in self._experts.values():
                    _write_expert(self._source, parts, self._form, writer)
                    if on_expert is not None:
                        on_expert()
                writer.close()
            finally:
                writer.abandon()
            (partial / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
            _copy_others(self._source.folder, partial)
            Checkpoint.open(partial).close()  # every header, as whoever loads it will read them

    def _kept(self) -> list[str]:
        return [name for name in self._source.names if name not in self._packed]


def _experts(source: Checkpoint, form: Form) -> dict[tuple[str, int], dict[str, ExpertTensor]]:
    """(block, expert) → part → its tensor, all of them fit to be packed."""
    if any(source.config.get(key) for key in ("quantization_config", "compression_config")):
        raise UnsupportedError(
            f"{source.folder}: is quantized already (quantization_config); convert the floating-point checkpoint that "
            "it was made from"
        )
    check_experts(source)
    experts: dict[tuple[str, int], dict[str, ExpertTensor]] = {}
    for tensors in expert_blocks(source).values():
        for tensor in tensors:
            if tensor.expert is None or len(tensor.parts) > 1 or tensor.transposed:
                raise UnsupportedError(
                    f"{source.folder}: tensor {tensor.name!r} (model_type {source.model_type!r}) holds several experts "
                    "or is transposed, and the format names one tensor per projection of an expert; models with such "
                    "experts are not converted"
                )
            if tensor.parts[0] in _WEIGHTS:
                _check(source, tensor.name, form.spec)
                experts.setdefault((tensor.block, tensor.expert), {})[tensor.parts[0]] = tensor
    if not experts:
        raise CheckpointError(f"{source.folder}: no experts among its {len(source)} tensors; nothing to convert")
    return dict(sorted(experts.items()))


def _check(source: Checkpoint, name: str, spec: QuantSpec) -> None:
    shape, dtype = source.shape(name), source.dtype(name)
    if dtype not in _FLOATS:
        raise UnsupportedError(f"{source.folder}: tensor {name!r} is {dtype}; expected floating point")
    group = spec.group_shape[1]
    if formats.codes_per_byte(spec) > 1 and shape[1] % group:
        raise UnsupportedError(
            f"{source.folder}: tensor {name!r} has shape {shape}; {spec.dtype} packs groups of {group} columns, so "
            f"their number must be a multiple of {group}"
        )


def _is_linear(source: Checkpoint, name: str) -> bool:
    return name.endswith(".weight") and len(source.shape(name)) == 2


def _write_expert(source: Checkpoint, parts: Mapping[str, ExpertTensor], form: Form, writer: ShardWriter) -> None:
    """One expert. Its gate and up share their second-level scale: kernels that join the two read only one."""
    weights = {part: source.tensor(tensor.name) for part, tensor in parts.items()}
    largest = {part: _largest(source, parts[part].name, weight) for part, weight in weights.items()}
    joined = [part for part in ("gate", "up") if part in largest]
    if len(joined) == 2:
        largest |= dict.fromkeys(joined, torch.maximum(*(largest[part] for part in joined)))
    for part, weight in weights.items():
        for kind, tensor in _pack(weight, largest[part], form).items():
            writer.write(form.name(parts[part].name, kind), tensor)


def _largest(source: Checkpoint, name: str, weight: torch.Tensor) -> torch.Tensor:
    amax = torch.stack([rows.abs().amax() for rows in _chunks(weight, 1)]).amax().to(torch.float32)
    if not bool(amax.isfinite()):  # also NaN: amax passes it on
        raise CheckpointError(f"{source.folder}: tensor {name!r} holds NaN or Inf; it would spread over whole groups")
    return amax


@torch.no_grad()
def _pack(weight: torch.Tensor, amax: torch.Tensor, form: Form) -> dict[str, torch.Tensor]:
    """One projection `[N, K]`: kind → tensor, as it is stored."""
    spec = form.spec
    stored: dict[str, torch.Tensor] = {}
    top = None
    if spec.second_level:
        (kind,) = (kind for kind in form.suffixes if upright(kind) == "_global_scale")
        top = formats.global_scale_of(amax, spec)
        inverse = upright(kind) != kind
        held = (1 / top if inverse else top).to(torch.float32)
        top = 1 / held.to(torch.float64) if inverse else held.to(torch.float64)  # what a reader will find
        stored[kind] = held.reshape(1)
    q, scales = zip(
        *(formats.quantize(rows, spec, global_scale=top) for rows in _chunks(weight, spec.group_shape[0])), strict=True
    )
    return {"": torch.cat(q), "_scale": torch.cat(scales), **stored}


def _chunks(weight: torch.Tensor, group: int) -> Iterator[torch.Tensor]:
    """Whole groups of rows, few at a time."""
    rows = max(_CHUNK // weight.shape[1], 1)
    yield from weight.split(-(-rows // group) * group)


@contextlib.contextmanager
def _whole_or_nothing(target: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside the target, which becomes the target at the end, or is removed on any exception."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already; name a new folder, or an empty one")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes:
        raise CheckpointError(
            f"{target}: {num_bytes / 2**30:.1f} GiB are needed, and {free / 2**30:.1f} GiB are free there"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, generation settings, licence: every file beside the weights that was not written here."""
    for file in sorted(source.iterdir()):
        weights = any(file.match(pattern) for pattern in _NOT_COPIED)
        if file.is_file() and not weights and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
