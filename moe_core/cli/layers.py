"""The MoE layers that `plan` and `explain` speak of: of a model's config, or of a shape that is typed in."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import attrs

from moe_core.cli import models, output
from moe_core.cli.bench_layer import SHAPES
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.forms import made_method
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.select import Plan
from moe_core.types import Device

SHAPE_HELP = "E=256,K=8,H=7168,I=2048 (and, if you like, dtype=float16, layers=58)"
_SIZES = {"E": "num_experts", "K": "top_k", "H": "hidden_size", "I": "intermediate_size"}
SPREADS = {
    "ep": "experts shared out, each rank with tokens of its own",
    "ep-replicated": "experts shared out, all ranks with the same tokens",
    "tp": "every expert split over all ranks, which have the same tokens",
}


@attrs.frozen(kw_only=True)
class Layers:
    """Layers that are alike.

    Attributes:
        title: whose they are.
        count: how many.
        config: one of them.
        scheme: how their weights are stored.
        routing_is_external: ids and weights come from the model's own router.
        own_gate: they run by their module's own functions, of which nothing is known.
        note: what a reader must know; "" if nothing.
    """

    title: str
    count: int
    config: MoEConfig
    scheme: QuantScheme = UNQUANTIZED
    routing_is_external: bool = False
    own_gate: bool = False
    note: str = ""

    def __str__(self) -> str:
        config, dtype = self.config, str(self.config.dtype).removeprefix("torch.")
        layers = "1 layer" if self.count == 1 else f"{self.count} layers"
        return (
            f"{self.title}: {layers} of {config.num_experts} experts, top {config.top_k}, H = {config.hidden_size}, "
            f"I = {config.intermediate_size}, {dtype}, scheme {self.scheme.name}"
        )

    def problem(self, world: int, spread: str, max_tokens: int, device: Device) -> Problem:
        """One of these layers on one of `world` ranks: on rank 0, which holds the most experts."""
        config = attrs.evolve(self.config, max_tokens_per_rank=max_tokens)
        return Problem(
            config=config,
            parallel=spread_over(world, spread, config),
            scheme=self.scheme,
            device=device,
            routing_is_external=self.routing_is_external,
        )


def spread_over(world: int, spread: str, config: MoEConfig) -> MoEParallelConfig:
    """How a layer is spread over `world` ranks. Where there are more ranks than experts, in groups (see `groups`).

    Raises:
        ValueError: the experts' I can't be split so.
    """
    if spread == "tp":
        if config.intermediate_size % world:
            raise ValueError(
                f"--spread tp: I = {config.intermediate_size} can't be split over {world} ranks; pass a divisor of it"
            )
        return MoEParallelConfig(tp_size=world)
    ranks = max(size for size in range(1, min(world, config.num_experts) + 1) if world % size == 0)
    return MoEParallelConfig(ep_size=ranks, dp_size=ranks if spread == "ep" else 1)


def groups(world: int, parallel: MoEParallelConfig) -> int:
    """How many groups of ranks hold all experts each, and have nothing to do with one another."""
    return world // max(parallel.ep_size, parallel.tp_size)


def layers_of(source: str, scheme: str | None) -> list[Layers]:
    """From a checkpoint folder, a config file, or a shape.

    Args:
        source: what was typed.
        scheme: the scheme to plan for; None: the checkpoint's own, or unquantized.

    Raises:
        ValueError: a shape that can't be read.
    """
    shape = typed_shape(source)
    if shape is None:
        return _of_model(Path(source), scheme)
    return [attrs.evolve(shape, scheme=_named(scheme) or UNQUANTIZED)]


def typed_shape(source: str) -> Layers | None:
    """The layers of a shape that is typed in, or named as `bench` and `tune` name it; None: it is a path.

    Raises:
        ValueError: a shape that can't be read.
    """
    if Path(source).exists():
        return None
    if (named := SHAPES.get(source)) is not None:
        sizes = MoEConfig(
            num_experts=named.experts,
            top_k=named.top_k,
            hidden_size=named.hidden,
            intermediate_size=named.intermediate,
        )
        return Layers(title=source, count=1, config=sizes)
    if "=" in source:
        return _typed(source)
    if Path(source).name == source and not Path(source).suffix:
        close = difflib.get_close_matches(source, SHAPES, n=1)
        raise ValueError(
            f"{source!r} is no folder here and no shape{f'; did you mean {close[0]!r}?' if close else ''}; shapes by "
            f"name: {', '.join(SHAPES)}; or pass {SHAPE_HELP}"
        )
    return None


def _named(scheme: str | None) -> QuantScheme | None:
    if scheme is None:
        return None
    return made_method(registry().find("quant_methods", scheme)).scheme


def _typed(text: str) -> Layers:
    """`E=256,K=8,…` → one kind of layers."""
    values = dict(part.partition("=")[::2] for part in text.replace(" ", "").split(","))
    unknown = set(values) - {*_SIZES, "dtype", "layers"}
    missing = [name for name in _SIZES if name not in values]
    numbers = {name: value for name, value in values.items() if name != "dtype"}
    wrong = [f"{name}={value}" for name, value in numbers.items() if not (value.isascii() and value.isdigit())]
    dtype = values.get("dtype", "bfloat16")
    if unknown or missing or wrong or dtype not in models.DTYPES:
        raise ValueError(
            f"shape {text!r}: "
            + "; ".join(
                filter(
                    None,
                    [
                        f"unknown {', '.join(sorted(unknown))}" if unknown else "",
                        f"missing {', '.join(missing)}" if missing else "",
                        f"not a number: {', '.join(wrong)}" if wrong else "",
                        "" if dtype in models.DTYPES else f"dtype {dtype!r} is none of {', '.join(models.DTYPES)}",
                    ],
                )
            )
            + f"; pass {SHAPE_HELP}"
        )
    sizes: dict[str, Any] = {field: int(values[name]) for name, field in _SIZES.items()}
    return Layers(
        title="shape",
        count=int(values.get("layers", "1")),
        config=MoEConfig(**sizes, dtype=models.DTYPES[dtype]),
    )


def _of_model(source: Path, scheme: str | None) -> list[Layers]:
    config = models.load_config(source)
    reading = models.prepare_config(source, config)
    if reading.note:
        output.note(reading.note)
    from moe_core.integrations.transformers import layer_plans  # noqa: PLC0415 - needs transformers

    if reading.scheme:
        config.quantization_config = None  # planned in its scheme, as `run` will
    # any device: the plans are made again for the one that is asked for, and a CPU runs every layer
    plans = layer_plans(config, device="cpu", scheme=scheme or reading.scheme or None)
    alike: dict[tuple[MoEConfig, str], list[Plan]] = {}
    for plan in plans.values():
        alike.setdefault((plan.config, plan.scheme.name), []).append(plan)
    return [
        Layers(
            title=config.model_type,
            count=len(same),
            config=same[0].config,
            scheme=same[0].scheme,
            routing_is_external=True,
            own_gate=bool(getattr(same[0], "own_gate", False)),
            note="; ".join(getattr(same[0], "notes", ())),
        )
        for same in alike.values()
    ]
