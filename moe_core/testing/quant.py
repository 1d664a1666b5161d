"""The cases of a quantization method: what it stores is what it was given, wherever and however it was given.

Shape letters: E_l local experts · H hidden · I intermediate per rank.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core.config import ActivationSpec
from moe_core.plugins import QuantMethodEntry
from moe_core.quant import QuantScheme
from moe_core.testing import quant_checks as checks
from moe_core.testing.case import Case, Tier, run_case
from moe_core.testing.quant_bench import DTYPES, QuantBench, Setting
from moe_core.testing.quant_checks import SOURCES
from moe_core.types import ExpertPlacement, GateUpLayout

EVERY = "every method"


def quant_cases(entry: QuantMethodEntry, *, device: torch.device | str = "cpu") -> list[Case]:
    """All cases for one quantization method, as it was registered."""
    return list(_Cases(QuantBench(entry, torch.device(device))).all())


@attrs.frozen(eq=False)
class _Cases:
    bench: QuantBench

    def all(self) -> Iterator[Case]:
        scheme = self.case("declaration: its scheme", "honest claims", EVERY, checks.names_its_scheme)
        yield attrs.evolve(scheme, opens=True)
        if run_case(scheme).bad:  # nothing else can be asked, not even for what
            return
        yield from self._declarations()
        base = self.bench.fit(Setting())
        yield from self._values(base)
        yield from self._storage(base)
        yield from self._spread(base)
        yield from self._errors(base)
        if self.scheme.weight is not None:
            yield from self._packed(base)

    @property
    def scheme(self) -> QuantScheme:
        return self.bench.scheme

    def case(self, name: str, duty: str, claim: str, check: Callable[..., None], *arguments: Any) -> Case:
        tier = Tier.REQUIRED if claim == EVERY else Tier.OPTIONAL
        return Case(name, duty, tier, claim, functools.partial(check, self.bench, *arguments))

    def _declarations(self) -> Iterator[Case]:
        yield self.case("declaration: the input of its experts", "honest claims", EVERY, checks.says_how_input_is)
        yield self.case("declaration: what a checkpoint must hold", "honest claims", EVERY, checks.needs_the_weight)
        for kind in checks.FOREIGN_CONFIGS:
            yield self.case(f"refused: {kind}", "refusals", EVERY, checks.declines, kind)

    def _values(self, base: Setting) -> Iterator[Case]:
        """Every tensor comes back: in every layout, with biases, in every dtype, of unusual values."""
        specs = [ActivationSpec("silu", layout) for layout in GateUpLayout] + [ActivationSpec("relu2", None)]
        for spec, dtype in itertools.product(specs, DTYPES):
            shown = f"{_layout(spec)}, {_short(dtype)}"
            setting = attrs.evolve(base, activation=spec, dtype=dtype)
            yield self.case(f"values: {shown}", "values", EVERY, checks.values, setting)
            biased = attrs.evolve(setting, activation=attrs.evolve(spec, bias=True))
            yield self.case(f"values: {shown}, bias", "expert biases", EVERY, checks.values, biased)
        for source, dtype in itertools.product(DTYPES, DTYPES):
            if source is not dtype:
                setting = attrs.evolve(base, dtype=dtype, source=source)
                yield self.case(
                    f"values: {_short(source)} into {_short(dtype)}", "values", EVERY, checks.values, setting
                )
        for kind in SOURCES:
            yield self.case(f"values: {kind} tensors", "values", EVERY, checks.unusual_values, base, kind)
        for layout in checks.LAYOUTS:
            yield self.case(
                f"values: from tensors that lie {layout}", "strides", EVERY, checks.strided_source, base, layout
            )
        for spec in specs:
            setting = attrs.evolve(base, activation=spec)
            yield self.case(f"values: in any order, {_layout(spec)}", "values", EVERY, checks.any_order, setting)
            yield self.case(f"values: padded H, {_layout(spec)}", "padding", EVERY, checks.padded, setting)
        yield self.case("values: one expert", "values", EVERY, checks.values, attrs.evolve(base, experts=1))
        yield self.case("values: many experts", "values", EVERY, checks.values, attrs.evolve(base, experts=19))

    def _storage(self, base: Setting) -> Iterator[Case]:
        """Storage is made once and keeps its address."""
        for layout in (GateUpLayout.GATE_UP, GateUpLayout.INTERLEAVED):
            setting = attrs.evolve(base, activation=ActivationSpec("silu", layout, bias=True))
            shown = layout.value
            yield self.case(f"storage: form, {shown}", "shapes and dtypes", EVERY, checks.storage_form, setting)
            yield self.case(f"reload: same addresses, {shown}", "reload", EVERY, checks.reloads, setting)
            yield self.case(f"reload: one expert, {shown}", "reload", EVERY, checks.reloads_one, setting)
            yield self.case(f"packing again, {shown}", "reload", EVERY, checks.packs_again, setting)
            yield self.case(f"state dict, {shown}", "reload", EVERY, checks.state_dict, setting)
            yield self.case(f"two layers, {shown}", "no state between layers", EVERY, checks.two_layers, setting)
            yield self.case(
                f"the layer's own attributes, {shown}", "read-only inputs", EVERY, checks.leaves_the_layer, setting
            )
            yield self.case(f"tensors stay as they are, {shown}", "read-only inputs", EVERY, checks.reads_only, setting)
            yield self.case(f"same bytes each time, {shown}", "determinism", EVERY, checks.same_each_time, setting)
            yield self.case(f"a move to its own dtype, {shown}", "reload", EVERY, checks.moved, setting)

    def _spread(self, base: Setting) -> Iterator[Case]:
        """A rank's part is a part of the whole."""
        for placement, experts, world in itertools.product(ExpertPlacement, (6, 7), (2, 3)):
            setting = attrs.evolve(base, placement=placement, experts=experts)
            yield self.case(
                f"expert parallel: {experts} experts on {world} ranks, {placement.value}",
                "expert map",
                EVERY,
                checks.of_ranks,
                setting,
                world,
            )
        for layout, bias in itertools.product((*GateUpLayout, None), (False, True)):
            spec = ActivationSpec("silu", layout, bias=bias)
            setting = attrs.evolve(base, activation=spec)
            yield self.case(
                f"tensor parallel: {_layout(spec)}{', bias' if bias else ''}",
                "tensor-parallel parts",
                EVERY,
                checks.of_parts,
                setting,
            )

    def _errors(self, base: Setting) -> Iterator[Case]:
        for what in checks.BAD_TENSORS:
            yield self.case(f"refused: {what}", "refusals", EVERY, checks.refuses_tensor, base, what)

    def _packed(self, base: Setting) -> Iterator[Case]:
        """Of schemes with scales: a packed checkpoint is taken bit by bit, and what is missing is missed."""
        claim = "quantized weights"
        for dtype in DTYPES:
            setting = attrs.evolve(base, dtype=dtype)
            yield self.case(f"packed checkpoint, {_short(dtype)}", "values", claim, checks.packed, setting)
        for part in ("gate", "up", "down"):
            yield self.case(f"missing: {part} of one expert", "refusals", claim, checks.misses, base, part)
        layouts = itertools.product(self.bench.entry.factory().layouts, (*GateUpLayout, None))
        for layout, gate_up in layouts:
            setting = attrs.evolve(base, activation=ActivationSpec("silu", gate_up))
            name = f"weight layout {layout}, {_layout(setting.activation)}"
            yield self.case(name, "weight layout", f"layout {layout}", checks.laid_out, setting, layout)
        for value in (torch.nan, torch.inf):
            yield self.case(f"values: {value} is not hidden", "values", claim, checks.hides_nothing, base, value)


def _layout(spec: ActivationSpec) -> str:
    return spec.gate_up_layout.value if spec.gate_up_layout else "no gate"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
