"""`Checkpoint`: a Hugging Face folder (config.json and safetensors), checked by its headers, read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moe_core.checkpoint.header import TensorInfo, read_header
from moe_core.errors import CheckpointError, MoEError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MODELOPT_FILE = "hf_quant_config.json"

_FOREIGN_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack")
_SHOWN_NAMES = 5


class Checkpoint:
    """The tensors of a checkpoint folder, by their own names. Nothing in the folder is ever written or run.

    Make one with `Checkpoint.open`. Shapes and dtypes come from the headers; `tensor` and `slice` read data, and only
    what they are asked for. Usable as a context manager, which closes the files.

    Args:
        folder: where it lies.
        config: the contents of config.json.
        tensors: what the headers say, by tensor name.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, TensorInfo]) -> None:
        self.folder = folder
        self.config = config
        self._tensors = tensors
        self._open_files: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and every header, and check that all the tensors that should be there are.

        Raises:
            CheckpointError: something is missing, cut short or contradictory; the text names the file or tensor and
                says what to do.
        """
        folder = Path(folder)
        return cls(folder, read_config(folder), _read_tensors(folder))

    @property
    def model_type(self) -> str:
        """`model_type` of config.json, "" if it has none."""
        return str(self.config.get("model_type", ""))

    @property
    def names(self) -> list[str]:
        """Every tensor's name, sorted."""
        return sorted(self._tensors)

    @property
    def num_bytes(self) -> int:
        """What the tensors hold together."""
        return sum(info.num_bytes for info in self._tensors.values())

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self._tensors.values()})

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def infos(self) -> list[TensorInfo]:
        """What the headers say about every tensor."""
        return list(self._tensors.values())

    def info(self, name: str) -> TensorInfo:
        """What the header says about a tensor.

        Raises:
            CheckpointError: there is none of that name.
        """
        if name not in self._tensors:
            raise CheckpointError(
                f"{self.folder}: no tensor {name!r} among its {len(self)}; its names begin with {_shown(self.names)}"
            )
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self.info(name).torch_dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one whole tensor."""
        tensor: torch.Tensor = self._file_of(name).get_tensor(name)
        return tensor

    def slice(self, name: str) -> Any:
        """A view to be indexed, such as `checkpoint.slice(name)[3]`: only the bytes asked for are read."""
        return self._file_of(name).get_slice(name)

    def _file_of(self, name: str) -> Any:
        try:
            from safetensors import safe_open  # noqa: PLC0415 - an extra: headers alone need no safetensors
        except ModuleNotFoundError as error:
            raise MoEError('reading weights needs safetensors: pip install "moe-core[hf]"') from error
        file = self.info(name).file
        if file not in self._open_files:
            self._open_files[file] = safe_open(str(file), framework="pt")
        return self._open_files[file]

    def close(self) -> None:
        """Let go of the files; reading again opens them again."""
        self._open_files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.folder)!r}, {self.model_type}, {len(self)} tensors in {len(self.files)} files)"


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a folder's config.json.

    Raises:
        CheckpointError: there is no folder, no file, or no JSON object in it.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder}: {kind}; expected a checkpoint folder with {CONFIG_FILE} and safetensors files. Nothing is ever "
            "downloaded: fetch it first, for example with hf download"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"{folder}: no {CONFIG_FILE}, so this is not a Hugging Face checkpoint folder; pass the one that holds it"
        )
    return read_json(folder / CONFIG_FILE)


def quantization_config(source: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization config of a model: in config.json, there under its text_config, or in ModelOpt's own file.

    Args:
        source: the checkpoint folder, or a config file alone.
        config: the contents of config.json.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found and isinstance(config.get("text_config"), Mapping):
        found = config["text_config"].get("quantization_config")
    if not found and (file := source / MODELOPT_FILE).is_file():
        found = {"quant_method": "modelopt", **read_json(file).get("quantization", {})}
    return dict(found) if found else None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is not there, or it is something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # JSONDecodeError says line and column; a UnicodeDecodeError is one too
        raise CheckpointError(f"{file}: is not valid JSON ({error}); fetch the file again") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise CheckpointError(f"{file}: holds a JSON {kind}, expected an object; fetch the file again")
    return content


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        raise CheckpointError(_no_weights(folder))
    index = folder / INDEX_FILE
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map (tensor name → file); fetch the file again")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(weight_map.values())):
        found = _read_shard(index, str(shard), sum(file == shard for file in weight_map.values()))
        for name, info in found.items():
            if weight_map.get(name) != shard:
                raise CheckpointError(
                    f"{info.file}: holds tensor {name!r}, which {INDEX_FILE} places in "
                    f"{weight_map.get(name, 'no file')}; index and shards are of "
                    "different versions: fetch all of them again"
                )
        tensors |= found
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: does not hold tensor {missing[0]!r}, which {INDEX_FILE} places there "
            f"({len(missing)} such: {_shown(missing)}); index and shards are of different versions: fetch all of them "
            "again"
        )
    return tensors


def _read_shard(index: Path, shard: str, num_tensors: int) -> dict[str, TensorInfo]:
    if Path(shard).name != shard:  # an index may not point out of its folder
        raise CheckpointError(f"{index}: names the shard {shard!r}; expected a plain file name in the same folder")
    if not (index.parent / shard).is_file():
        raise CheckpointError(
            f"{index.parent}: shard {shard} is missing, and {num_tensors} tensors with it; fetch it into the folder"
        )
    return read_header(index.parent / shard)


def _no_weights(folder: Path) -> str:
    foreign = sorted(file.name for pattern in _FOREIGN_WEIGHTS for file in folder.glob(pattern))
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    expected = f"{folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE}"
    if others:
        why = "without the index nobody knows whether they are all"
        return f"{expected}, but {_shown(others)}: {why}; fetch {INDEX_FILE}"
    if foreign:
        return (
            f"{expected}, only {_shown(foreign)}. Weights are read from safetensors only (a .bin file is a pickle, "
            "which can run code); fetch the safetensors files, or convert where you trust them, with transformers' "
            "save_pretrained"
        )
    return f"{expected}: the weights are missing; fetch the safetensors files into the folder"


def _shown(names: list[str]) -> str:
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
