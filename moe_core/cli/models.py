"""From a checkpoint folder to a transformers model whose MoE blocks run through a plan. Nothing is downloaded."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from moe_core.checkpoint import Checkpoint, check_experts, quantization_config
from moe_core.checkpoint.reader import CONFIG_FILE, read_config, read_json
from moe_core.cli import formats, output
from moe_core.errors import CheckpointError, MoEError, UnsupportedError
from moe_core.interfaces import Group
from moe_core.select import Plan

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SHOWN = 5
_REPORT_LINES = 12
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


@attrs.frozen(kw_only=True)
class LoadOptions:
    """What `run` and `demo` can ask for; None: the checkpoint or selection decides."""

    dispatch: str | None = None
    experts: str | None = None
    scheme: str | None = None
    dtype: torch.dtype | None = None
    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    trust_remote_code: bool = False
    debug: bool = False
    group: Group | None = None
    """The ranks that the experts are spread over."""


@attrs.define
class LoadedModel:
    """A model, ready to generate through its plans.

    Attributes:
        folder: where it came from.
        model: the transformers model, with our experts switched on.
        tokenizer: None where the folder has none.
        plans: experts module → its plan.
        theirs, ours: what `set_experts_implementation` takes to switch to transformers' own experts, and back to ours.
            `theirs` is empty where transformers has none for these weights.
        notes: what the user was told while it was loaded.
        beside: where `theirs` is empty, a model of the same values whose experts transformers can run; None: no such.
    """

    folder: Path
    model: Any
    tokenizer: Any
    plans: dict[str, Plan]
    theirs: dict[str, str | None]
    ours: dict[str, str | None]
    notes: list[str]
    beside: Any = None

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)


def need_transformers() -> None:
    """
    Raises:
        MoEError: transformers is not installed.
    """
    try:
        import transformers  # noqa: F401, PLC0415 - an extra
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MoEError('this command needs transformers: pip install "moe-core[hf]"') from error


def load_config(source: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder, or of a config file of any name.

    Raises:
        CheckpointError: it can't be read.
        UnsupportedError: transformers does not know the model, or only by code that the folder brings.
    """
    need_transformers()
    from transformers import CONFIG_MAPPING, AutoConfig  # noqa: PLC0415 - an extra

    values = read_json(source) if source.is_file() else read_config(source)
    model_type, file = values.get("model_type"), source if source.is_file() else source / CONFIG_FILE
    if model_type in CONFIG_MAPPING:  # also where the folder brings code too: transformers' own class is taken
        try:
            return CONFIG_MAPPING[model_type].from_json_file(file)
        except Exception as error:  # its validators raise types of their own
            raise CheckpointError(f"{file}: transformers refuses it: {error}; fetch the file again") from error
    if "auto_map" not in values:
        import transformers  # noqa: PLC0415 - an extra

        raise UnsupportedError(
            f"{file}: model_type {model_type!r} is unknown to transformers {transformers.__version__}; try "
            f"pip install --upgrade transformers. {supported()}"
        )
    if not trust_remote_code:
        raise UnsupportedError(
            f"{file}: model_type {model_type!r} runs only with code that the checkpoint brings (auto_map), which is "
            "never run unasked; read that code, then use moe-core run --trust-remote-code if you trust it"
        )
    return AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=True)


def prepare_config(
    source: Path, config: Any, checkpoint: Checkpoint | None = None, scheme: str | None = None
) -> formats.Reading:
    """Decide how the weights are read, and tell the config, which the bridge asks, if they will be dequantized.

    Args:
        source, checkpoint: as for `formats.decide`.
        config: transformers' own.
        scheme: what the experts are to run in; None: the first scheme that reads the format.

    Raises:
        UnsupportedError: nothing that is installed reads them.
    """
    reading = formats.decide(source, config.to_dict() if checkpoint is None else checkpoint.config, checkpoint, scheme)
    if reading.dequantize:
        config.quantization_config = {"quant_method": reading.dequantize, "dequantize": True}
    return reading


def supported() -> str:
    """The architectures that the bridge covers, as a sentence."""
    from moe_core.integrations.transformers import supported_architectures  # noqa: PLC0415 - needs transformers

    return f"Supported here: {', '.join(supported_architectures())}"


def load_model(folder: Path, options: LoadOptions) -> LoadedModel:
    """Check a checkpoint folder, load it with transformers, and switch its MoE blocks to our plans.

    What can be refused is refused in this order, cheapest first: the folder, its code, its format, its architecture and
    the backends asked for; weights are read last.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or does not fit the model that its config describes.
        UnsupportedError: its format, code or architecture is not supported, or a backend can't do what was asked.
    """
    checkpoint = Checkpoint.open(folder)
    size, files = output.mebibytes(checkpoint.num_bytes), len(checkpoint.files)
    of_them = "1 file" if files == 1 else f"{files} files"
    notes = [f"{folder}: {checkpoint.model_type}, {len(checkpoint)} tensors in {of_them}, {size}"]
    config = load_config(folder, options.trust_remote_code)
    if "auto_map" in checkpoint.config and not options.trust_remote_code:
        own = config.model_type
        notes.append(f"the checkpoint brings code (auto_map); it is not run, transformers' own {own} is")
    reading = prepare_config(folder, config, checkpoint, options.scheme)
    # a plugin's format may well store one expert in another way than the next
    if not (reading.scheme and quantization_config(folder, checkpoint.config)):
        check_experts(checkpoint)
    notes += [reading.note] if reading.note else []
    from moe_core.integrations.transformers import attach, layer_plans  # noqa: PLC0415 - needs transformers

    if options.group is not None and reading.dequantize:
        raise UnsupportedError(
            f"{folder}: only transformers reads its weights ({reading.dequantize}, dequantized), and it would read all "
            "experts on every rank; run one process"
        )
    if reading.scheme or options.group is not None:
        for line in notes:
            output.note(line)
        return _load_packed(folder, config, options, notes)
    if not options.trust_remote_code:  # a plan that can't be made is refused before gigabytes are read
        config.dtype = options.dtype or config.dtype
        layer_plans(config, dispatch=options.dispatch, experts=options.experts, device=options.device)
    for line in notes:
        output.note(line)
    output.note("loading the weights …")
    with output.progress_bars_of_transformers():
        model = _read_weights(folder, config, options, formats.transformers_config(reading))
    theirs = model.get_experts_implementation()
    plans = attach(model, dispatch=options.dispatch, experts=options.experts, debug=options.debug)
    return LoadedModel(folder, model, _tokenizer(folder), plans, theirs, model.get_experts_implementation(), notes)


def _load_packed(folder: Path, config: Any, options: LoadOptions, notes: list[str]) -> LoadedModel:
    """Experts that moe-core loads itself: packed ones, as they are stored, and those that are spread over ranks."""
    from moe_core.integrations.transformers import packed  # noqa: PLC0415 - needs transformers
    from moe_core.integrations.transformers.spread import most_tokens, parallel_over  # noqa: PLC0415 - the same

    arguments: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    if options.device.type != "cpu":
        arguments["device_map"] = str(options.device)  # layers are planned for where they are
    if options.group is not None:
        arguments["parallel"] = parallel_over(options.group, options.dispatch)
        arguments["group"] = options.group
        arguments["max_tokens_per_rank"] = most_tokens(options.dispatch)
    output.note("loading the weights …")
    loading = output.progress_so_far("loading experts")
    with output.progress_bars_of_transformers(), _LoadReport(), loading as progress:
        model, info = packed.from_pretrained(
            folder,
            scheme=options.scheme,
            dispatch=options.dispatch,
            experts=options.experts,
            debug=options.debug,
            progress=progress,
            auto_class=_model_class(config),
            dtype=options.dtype or "auto",
            **arguments,
        )
    _check_loading(folder, {**info, "mismatched_keys": info.get("mismatched_keys") or ()})
    ours = model.get_experts_implementation()
    return LoadedModel(folder, model.eval(), _tokenizer(folder), packed.packed_plans(model), {}, ours, notes)


def _model_class(config: Any) -> Any:
    """What config.json names, where transformers has it (a multimodal model, say), else its type's causal model."""
    import transformers  # noqa: PLC0415 - an extra

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None and getattr(found, "can_generate", lambda: False)():
            return found
    return transformers.AutoModelForCausalLM


def _read_weights(folder: Path, config: Any, options: LoadOptions, quantization_config: Any) -> Any:
    auto_class = _model_class(config)
    arguments: dict[str, Any] = {
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # only to have them all listed: they are refused below
        "dtype": options.dtype or "auto",
    }
    if quantization_config is not None:
        arguments["quantization_config"] = quantization_config
    if options.trust_remote_code:
        arguments["trust_remote_code"] = True
    report = _LoadReport()
    with report:
        try:
            model, info = auto_class.from_pretrained(folder, **arguments)
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{folder}: transformers cannot load it: {report.text or error}") from error
    _check_loading(folder, info)
    if quantization_config is not None and options.dtype is not None:
        _cast_dequantized(model, options.dtype)
    return model.to(options.device).eval()


def _cast_dequantized(model: Any, dtype: torch.dtype) -> None:
    """transformers 5.17 leaves what it dequantized in bfloat16, whatever dtype the rest of the model is loaded in."""
    for parameter in model.parameters():
        if parameter.dtype is torch.bfloat16:
            parameter.data = parameter.data.to(dtype)


class _LoadReport(logging.Handler):
    """Keeps what transformers logs about a load, which it else prints, and of which its error says nothing."""

    _logger = logging.getLogger("transformers")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: list[str] = []
        self._others: list[logging.Handler] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(_COLOURS.sub("", record.getMessage()))

    @property
    def text(self) -> str:
        """What it says, without its padding and without tracebacks."""
        lines = [" ".join(line.split()) for text in self._lines for line in text.splitlines() if not line[:1].isspace()]
        kept = [line for line in lines if line and not line.startswith(("Traceback", "Notes:", "- ", "Key |", "---"))]
        return "\n".join(kept[:_REPORT_LINES])

    def __enter__(self) -> _LoadReport:
        self._others, self._logger.handlers = self._logger.handlers, [self]
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.handlers = self._others


def _check_loading(folder: Path, info: Mapping[str, Any]) -> None:
    """Nothing may be missing, left over or of another shape; what the model declares ignorable is gone already."""
    mismatched = [f"{name} (file {tuple(there)}, model {tuple(here)})" for name, there, here in info["mismatched_keys"]]
    problems = {
        "of another shape than the model": sorted(mismatched),
        "missing in the checkpoint (transformers would fill them with random numbers)": sorted(info["missing_keys"]),
        "in the checkpoint, but not in the model": sorted(info["unexpected_keys"]),
    }
    found = [f"{len(names)} {what}: {_shown(names)}" for what, names in problems.items() if names]
    found += [str(message) for message in info.get("error_msgs") or ()]
    if found:
        raise CheckpointError(
            f"{folder}: the weights do not fit the model of its {CONFIG_FILE}: {'; '.join(found)}. Fetch weights and "
            "config of one version again"
        )


def _shown(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None. Never one with code of its own: prompts can be given as ids."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - an extra

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the model still runs by ids
        output.note(f"the tokenizer cannot be used ({type(error).__name__}: {error}); give the prompt as --prompt-ids")
        return None
