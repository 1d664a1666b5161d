"""The cases of an experts backend, derived from what it declares.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core.answers import probed
from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS, ActivationSpec
from moe_core.errors import UnsupportedError
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.select import CANONICAL_LAYOUT, ExpertsCandidate
from moe_core.testing import claims
from moe_core.testing import experts_checks as checks
from moe_core.testing.case import Case, Tier
from moe_core.testing.experts_bench import COUNTS, ExpertsBench, Setting
from moe_core.testing.experts_checks import WEIGHT_LAYOUTS
from moe_core.testing.experts_unclaimed import device_of, planner_of, problem_of, unclaimed
from moe_core.testing.material import IDS, IDS_OF_SOMEBODY
from moe_core.testing.pairwise import Row, pairwise
from moe_core.types import ActivationFormat, Device, ExpertsCapabilities, GateUpLayout

EVERY = "every backend"
_SIZES = ((24, 20), (32, 32), (64, 64), (128, 128), (256, 256), (512, 512))
"""(H, I), the smallest that the backend and the scheme take."""


def experts_cases(candidate: ExpertsCandidate, *, device: torch.device | str = "cpu") -> list[Case]:
    """All cases for one experts backend, on one device."""
    return list(_Cases(ExpertsBench(probed(candidate), torch.device(device))).all())


@attrs.frozen(eq=False)
class _Cases:
    bench: ExpertsBench

    def all(self) -> Iterator[Case]:
        yield from self._declarations()
        if self.caps.routes_internally:
            yield from self._from_logits()
            return
        for batched in (False, True):
            takes = ActivationFormat.BATCHED if batched else ActivationFormat.STANDARD
            if takes in self.caps.owns:
                base = self.fit(Setting(batched=batched))
                runs = self.case(f"{base.format.value}: one call runs", "a step runs", EVERY, checks.runs, base)
                yield attrs.evolve(runs, opens=True)
                yield from self._activations(base)
                yield from self._sizes(base)
                yield from self._batches(base)
                yield from self._contract(base)
                yield from self._quantized(base)
        yield from self._combinations()

    @property
    def caps(self) -> ExpertsCapabilities:
        return self.bench.candidate.capabilities

    @property
    def schemes(self) -> list[QuantScheme]:
        """Declared ones whose methods are installed here, unquantized first."""
        methods = registry().quant_methods
        names = sorted(self.caps.schemes, key=lambda name: (name != UNQUANTIZED.name, name))
        return [methods[name].factory().scheme for name in names if name in methods]

    @property
    def specs(self) -> list[ActivationSpec]:
        """Every declared function in every declared layout, without limit and bias."""
        layouts = [layout for layout in GateUpLayout if layout in self.caps.gate_up_layouts]
        found = [ActivationSpec(f, layout) for f in GATED_FUNCTIONS if f in self.caps.activations for layout in layouts]
        if self.caps.ungated:
            found += [ActivationSpec(f, None) for f in UNGATED_FUNCTIONS if f in self.caps.activations]
        return found

    def fit(self, setting: Setting) -> Setting:
        """The nearest layer that it declares: a scheme, a dtype, an activation, sizes."""
        caps = self.caps
        if setting.scheme.name not in caps.schemes and self.schemes:
            setting = attrs.evolve(setting, scheme=self.schemes[0])
        if setting.dtype not in caps.dtypes:
            setting = attrs.evolve(setting, dtype=next(d for d in MODEL_DTYPES if d in caps.dtypes))
        if self.specs and attrs.evolve(setting.activation, limit=None, bias=False, alpha=1.702) not in self.specs:
            setting = attrs.evolve(setting, activation=self.specs[0])
        if caps.max_topk is not None and setting.top_k > caps.max_topk:
            setting = attrs.evolve(setting, top_k=caps.max_topk)
        bench = attrs.evolve(self.bench, candidate=claims.available(self.bench.candidate))
        device = device_of(caps)
        for hidden, inner in ((setting.hidden, setting.inner), *_SIZES):
            tried = attrs.evolve(setting, hidden=hidden, inner=inner)
            try:
                bench.plan(tried, device)
            except UnsupportedError:
                continue
            return tried
        return setting

    def case(self, name: str, duty: str, claim: str, check: Callable[..., None], *arguments: Any) -> Case:
        tier = Tier.REQUIRED if claim == EVERY else Tier.OPTIONAL
        return Case(name, duty, tier, claim, functools.partial(check, self.bench, *arguments))

    def _activations(self, base: Setting) -> Iterator[Case]:
        """Every function in every layout, with a clamp that bites, with biases, with another alpha."""
        where = base.format.value
        for spec in self.specs:
            shown = _spec(spec)
            yield self.case(
                f"{where}: {shown}",
                "activation",
                f"activation {spec.function}",
                checks.numbers,
                attrs.evolve(base, activation=spec),
                "activation",
            )
            if self.caps.bias:
                changed = attrs.evolve(base, activation=attrs.evolve(spec, bias=True))
                yield self.case(
                    f"{where}: {shown}, bias", "expert biases", "bias", checks.numbers, changed, "expert biases"
                )
            if self.caps.clamp and spec.gated:
                changed = attrs.evolve(base, activation=attrs.evolve(spec, limit=0.4))
                yield self.case(
                    f"{where}: {shown}, clamp", "activation clamp", "clamp", checks.numbers, changed, "activation clamp"
                )
            if spec.function == "swiglu_oai":
                changed = attrs.evolve(base, activation=attrs.evolve(spec, alpha=0.7))
                yield self.case(
                    f"{where}: {shown}, alpha = 0.7",
                    "activation",
                    "activation swiglu_oai",
                    checks.numbers,
                    changed,
                    "activation",
                )

    def _sizes(self, base: Setting) -> Iterator[Case]:
        """Dtypes, E and K at their limits, odd H and I, a rank's part of the experts or of each expert."""
        where, caps = base.format.value, self.caps
        most = min(caps.max_topk or base.experts, base.experts)
        sizes: dict[str, dict[str, Any]] = {
            "K = 1": {"top_k": 1},
            "the largest K": {"top_k": most},
            "E = 1": {"experts": 1, "top_k": 1},
            "E = 32": {"experts": 32},
            "half of the experts": {"parallel": "ep"},
            "half of each expert": {"parallel": "tp"},
            "other H and I": {"hidden": 40 * caps.hidden_alignment, "inner": 12 * caps.intermediate_alignment},
        }
        if caps.hidden_alignment == 1 and UNQUANTIZED.name in caps.schemes:
            sizes["odd H"] = {"hidden": 13}
            sizes["H = 1"] = {"hidden": 1}
        if caps.intermediate_alignment == 1 and UNQUANTIZED.name in caps.schemes:
            sizes["odd I"] = {"inner": 7}
        for what, changes in sizes.items():
            setting = self.fit(attrs.evolve(base, **changes))
            yield self.case(f"{where}: {what}", "rows", EVERY, checks.numbers, setting, "rows")
        for dtype in [dtype for dtype in MODEL_DTYPES if dtype in caps.dtypes]:
            setting = attrs.evolve(base, dtype=dtype)
            yield self.case(f"{where}: {_short(dtype)}", "rows", EVERY, checks.numbers, setting, "rows")

    def _batches(self, base: Setting) -> Iterator[Case]:
        """Every number of rows, every kind of ids or counts."""
        if base.batched:
            for counts in COUNTS:
                duty = "empty steps" if counts == "none" else "tokens_per_expert"
                setting = attrs.evolve(base, counts=counts)
                yield self.case(f"batched: counts {counts}", duty, EVERY, checks.numbers, setting, duty)
            return
        for rows in (0, 1, 2, 3, 33, 130):
            duty = "empty steps" if rows == 0 else "rows"
            yield self.case(f"standard: {rows} rows", duty, EVERY, checks.numbers, attrs.evolve(base, rows=rows), duty)
        duties = {"dropped": "dropped ids", "all dropped": "dropped ids", "duplicates": "duplicate ids"}
        for ids, rows in itertools.product(IDS, (9, 1)):
            setting, duty = attrs.evolve(base, ids=ids, rows=rows), duties.get(ids, "rows")
            if ids in ("duplicates", "mixed") and not self.caps.accepts_duplicate_ids:
                continue
            claim = "accepts_duplicate_ids" if duty == "duplicate ids" else EVERY
            if ids not in ("distinct", "duplicates", "every expert") and not self.caps.accepts_dropped_ids:
                continue
            yield self.case(f"standard: ids {ids}, {_rows(rows)}", duty, claim, checks.numbers, setting, duty)
            if rows == 9:
                yield self.case(
                    f"standard: ids {ids}, through the kernel", duty, claim, checks.through_the_kernel, setting
                )
        kinds = {"negative": (-1.5, 0.5), "zero": (0.0, 1.0), "large": (64.0, -3.0), "tiny": (1e-30, 1.0)}
        for what, values in kinds.items():
            yield self.case(
                f"standard: {what} router weights", "router weight", EVERY, checks.router_weights, base, values
            )
        if self.caps.router_weight_on_input:
            for rows, top_k in ((9, 2), (1, 2), (9, 3)):
                setting = self.fit(attrs.evolve(base, on_input=True, rows=rows, top_k=top_k))
                yield self.case(
                    f"standard: the weight on the input, K = {top_k}, {_rows(rows)}",
                    "router weight",
                    "router_weight_on_input",
                    checks.numbers,
                    setting,
                    "router weight",
                )
        for valid in (0, 1, 5, 9):
            yield self.case(
                f"standard: num_rows = {valid} of 9", "padding is not read", EVERY, checks.prefix, base, valid
            )

    def _contract(self, base: Setting) -> Iterator[Case]:
        """Memory, state, strides, determinism: what the interface promises beside the numbers."""
        where, ids = base.format.value, "dropped" if self.caps.accepts_dropped_ids else "distinct"
        loose = attrs.evolve(base, ids=ids)
        one = attrs.evolve(base, rows=1, counts="one row")
        for what, setting in {"": loose, ", one row": one}.items():
            yield self.case(
                f"{where}: inputs stay as they are{what}", "read-only inputs", EVERY, checks.reads_only, setting
            )
            yield self.case(
                f"{where}: workspaces hold anything{what}", "workspaces", EVERY, checks.workspaces_hold_nothing, setting
            )
            yield self.case(f"{where}: x and out are views{what}", "strides", EVERY, checks.out_is_a_view, setting)
        for value in (torch.nan, torch.inf):
            if ids == "dropped":
                yield self.case(
                    f"{where}: {value} in rows of nobody", "padding is not read", EVERY, checks.poisoned, loose, value
                )
            full = attrs.evolve(base, ids="every expert", counts="full")
            yield self.case(
                f"{where}: {value} in one row stays there",
                "padding is not read",
                EVERY,
                checks.spreads_nothing,
                full,
                value,
            )
        simple = {
            "workspace sizes": ("workspaces", checks.workspace_sizes),
            "launch ranges": ("honest claims", checks.launch_ranges),
            "calls of changing size": ("no state between steps", checks.sizes_in_turn),
            "two layers": ("no state between layers", checks.two_layers),
            "reloaded weights": ("reload", checks.reloaded),
            "other weights": ("reload", checks.weights_elsewhere),
            "inference mode": ("rows", checks.in_inference_mode),
        }
        for what, (duty, check) in simple.items():
            yield self.case(f"{where}: {what}", duty, EVERY, check, base)
        if base.batched:
            yield self.case(f"{where}: experts side by side", "strides", EVERY, checks.expert_stride, base)
        canonical = self.caps.weight_layout.get(UNQUANTIZED.name, CANONICAL_LAYOUT) == CANONICAL_LAYOUT
        if base.scheme is UNQUANTIZED and canonical:
            for layout in WEIGHT_LAYOUTS:
                yield self.case(f"{where}: weights {layout}", "strides", EVERY, checks.strided_weights, base, layout)
        if self.caps.deterministic:
            for dtype in [dtype for dtype in MODEL_DTYPES if dtype in self.caps.dtypes]:
                setting = attrs.evolve(base, dtype=dtype, deterministic=True, rows=33, counts="full")
                yield self.case(
                    f"{where}: deterministic, {_short(dtype)}",
                    "determinism",
                    "deterministic",
                    checks.same_each_time,
                    setting,
                )
        if self.caps.graph_capturable:
            yield self.case(f"{where}: a CUDA graph", "graph capture", "graph_capturable", checks.captured, base)

    def _quantized(self, base: Setting) -> Iterator[Case]:
        """Each scheme: its numbers, its biases, its own payload, its quantizer."""
        where = base.format.value
        for scheme in self.schemes:
            if scheme.weight is None:
                continue
            claim, setting = f"scheme {scheme.name}", self.fit(attrs.evolve(base, scheme=scheme))
            for dtype in [dtype for dtype in MODEL_DTYPES if dtype in self.caps.dtypes]:
                yield self.case(
                    f"{where}: {scheme.name}, {_short(dtype)}",
                    "rows",
                    claim,
                    checks.numbers,
                    attrs.evolve(setting, dtype=dtype),
                    "rows",
                )
            if self.caps.bias:
                spec = attrs.evolve(setting.activation, bias=True)
                yield self.case(
                    f"{where}: {scheme.name}, bias",
                    "expert biases",
                    claim,
                    checks.numbers,
                    attrs.evolve(setting, activation=spec),
                    "expert biases",
                )
            yield self.case(f"{where}: {scheme.name}, reloaded weights", "reload", claim, checks.reloaded, setting)
            yield self.case(
                f"{where}: {scheme.name}, inputs stay as they are",
                "read-only inputs",
                claim,
                checks.reads_only,
                setting,
            )
            if scheme.activation is None:
                continue
            yield self.case(
                f"{where}: {scheme.name}, the format's quantizer",
                "input quantization",
                claim,
                checks.quantizes_input,
                setting,
            )
            if scheme.name in self.caps.payloads:
                sent = attrs.evolve(setting, payload=True)
                yield self.case(
                    f"{where}: {scheme.name} on the wire",
                    "input quantization",
                    f"payload {scheme.name}",
                    checks.quantizes_input,
                    sent,
                )

    def _combinations(self) -> Iterator[Case]:
        """Every two declared values meet in some layer."""
        caps = self.caps
        duplicates = () if caps.accepts_duplicate_ids else ("duplicates", "mixed")
        dropped = () if caps.accepts_dropped_ids else ("dropped", "all dropped", "mixed", "one expert", "last expert")
        axes: dict[str, list[Any]] = {
            "batched": [f is ActivationFormat.BATCHED for f in sorted(caps.owns, key=lambda f: f.value, reverse=True)],
            "scheme": self.schemes or [UNQUANTIZED],
            "spec": self.specs,
            "dtype": [dtype for dtype in MODEL_DTYPES if dtype in caps.dtypes],
            "bias": [False, True] if caps.bias else [False],
            "limit": [None, 0.4] if caps.clamp else [None],
            "top_k": [1, 2, 5],
            "ids": [ids for ids in IDS_OF_SOMEBODY if ids not in duplicates + dropped],
            "counts": ["uneven", "all to one", "full"],
            "parallel": ["none", "ep"],
        }
        settings = map(self.fit, map(_setting, pairwise(axes, lambda row: row["limit"] is None or row["spec"].gated)))
        for name, setting in {f"together: {_described(setting)}": setting for setting in settings}.items():
            yield self.case(name, "rows", "any two declared values", checks.numbers, setting, "rows")

    def _from_logits(self) -> Iterator[Case]:
        base = self.fit(Setting())
        for tokens, dtype in itertools.product((0, 1, 9, 33), sorted(self.caps.dtypes, key=str)):
            setting = attrs.evolve(base, dtype=dtype)
            yield self.case(
                f"from logits: {tokens} tokens, {_short(dtype)}",
                "routing",
                "routes_internally",
                checks.from_logits,
                setting,
                tokens,
            )

    def _declarations(self) -> Iterator[Case]:
        bench = attrs.evolve(self.bench, candidate=claims.available(self.bench.candidate))
        caps, there = self.caps, device_of(self.caps)
        batched = ActivationFormat.STANDARD not in caps.owns
        base = self.fit(Setting(batched=batched))

        def planner(device: Device = there, **changes: Any) -> claims.Planner:
            return lambda: bench.plan(self.fit(attrs.evolve(base, **changes)), device)

        yield from claims.declaration_cases(self.bench.candidate, base.problem(there))
        for taken in sorted(caps.owns, key=lambda f: f.value):
            made = planner(batched=taken is ActivationFormat.BATCHED)
            yield claims.claimed(f"{taken.value} format", f"format {taken.value}", [made])
        for dtype in sorted(caps.dtypes, key=str):
            yield claims.claimed(_short(dtype), f"dtype {dtype}", [planner(dtype=dtype)])
        for device_type in sorted(caps.device_types):
            yield claims.claimed(device_type, f"device {device_type}", [planner(device_of(caps, device_type))])
        for spec in self.specs:
            yield claims.claimed(_spec(spec), f"activation {spec.function}", [planner(activation=spec)])
        for scheme_name in sorted(caps.schemes):
            known = [scheme for scheme in self.schemes if scheme.name == scheme_name]
            for scheme in known:
                yield claims.claimed(f"scheme {scheme.name}", f"scheme {scheme.name}", [planner(scheme=scheme)])
        flags: dict[str, dict[str, Any]] = {}
        if caps.deterministic:
            flags["deterministic"] = {"deterministic": True}
        if caps.router_weight_on_input and not batched:
            flags["router_weight_on_input"] = {"on_input": True, "top_k": 2}
        for flag, changes in flags.items():
            yield claims.claimed(flag, flag, [planner(**changes)])
        if caps.graph_capturable and "cuda" in caps.device_types:
            cuda = device_of(caps, "cuda")
            hidden, inner = 64 * caps.hidden_alignment, 64 * caps.intermediate_alignment
            settings = [attrs.evolve(base, dtype=dtype, hidden=hidden, inner=inner) for dtype in caps.dtypes]
            planners = [planner_of(bench, setting, cuda, {"cuda_graph": True}) for setting in settings]
            yield claims.claimed("a CUDA graph", "graph_capturable", planners)
        gated = next((spec for spec in self.specs if spec.gated), None)
        if caps.bias:
            with_bias = planner(activation=attrs.evolve(base.activation, bias=True))
            yield claims.one_owner("biases", "bias", with_bias)
        if caps.clamp and gated is not None:
            yield claims.one_owner("a clamp", "clamp", planner(activation=attrs.evolve(gated, limit=7.0)))
        layers: dict[str, dict[str, Any]] = {
            "a routed scale": {"routed_scaling_factor": 2.0},
            "padded H": {"padded_hidden_size": 2 * base.hidden},
        }
        for what, config in layers.items():
            yield claims.one_owner(what, EVERY, planner_of(bench, base, there, config))
        for what, setting, device, config in unclaimed(caps, base, there):
            yield claims.refused(
                what,
                "experts",
                bench.candidate,
                problem_of(setting, device, config),
                planner_of(bench, setting, device, config),
            )


def _setting(row: Row) -> Setting:
    spec = attrs.evolve(row["spec"], bias=row["bias"], limit=row["limit"])
    plain = {name: row[name] for name in ("batched", "scheme", "dtype", "top_k", "ids", "counts", "parallel")}
    return Setting(activation=spec, **plain)


def _spec(spec: ActivationSpec) -> str:
    return f"{spec.function}, {spec.gate_up_layout.value if spec.gate_up_layout else 'no gate'}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _rows(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _described(setting: Setting) -> str:
    batch = f"counts {setting.counts}" if setting.batched else f"ids {setting.ids}"
    extra = ", bias" if setting.activation.bias else ""
    extra += ", clamp" if setting.activation.limit else ""
    extra += ", half of the experts" if setting.parallel == "ep" else ""
    return (
        f"{setting.format.value}, {setting.scheme.name}, {_short(setting.dtype)}, {_spec(setting.activation)}{extra}, "
        f"{batch}, K = {setting.top_k}"
    )
