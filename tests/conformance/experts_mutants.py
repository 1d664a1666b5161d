"""Experts backends that are wrong in one way each, as thin wrappers around `torch` and `fp8_torch`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.interfaces import Experts
from moe_core.testing import registered
from moe_core.testing.experts import experts_cases
from moe_core.testing.material import mapped
from moe_core.types import GateUpLayout, LaunchRange
from tests.conformance.mutant import Mutant


class Wrapped(Experts):
    """A backend around another one; a mutant overrides one step, or what the inner one is made from."""

    config: Any

    def __init__(self, make: Callable[..., Any], config: Any, parallel: Any, scheme: Any, *rest: Any) -> None:
        self.config, self.parallel = config, parallel
        self.inner = make(*self.made_from(config, parallel, scheme), *rest)

    def made_from(self, config, parallel, scheme):
        return config, parallel, scheme

    def workspace_shapes(self, rows, activation_format):
        return self.inner.workspace_shapes(rows, activation_format)

    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)


MUTANTS: list[Mutant] = []


def wrong(base: str, name: str, *duties: str, **claims: Any) -> Callable[[type[Wrapped]], type[Wrapped]]:
    """Make a mutant of the decorated class around the backend `base`; `claims` change what it declares."""

    def register(kind: type[Wrapped]) -> type[Wrapped]:
        MUTANTS.append(Mutant(f"{base}: {name}", duties, functools.partial(cases_of, base, kind, claims)))
        return kind

    return register


def cases_of(base: str, kind: Callable[..., Any], claims: dict[str, Any]) -> list[Any]:
    candidate = registered("experts", base)
    changes = {name: value for name, value in claims.items() if name != "probe"}
    mutated = attrs.evolve(
        candidate,
        capabilities=attrs.evolve(candidate.capabilities, **changes),
        probe=claims.get("probe", candidate.probe),
        factory=functools.partial(kind, candidate.factory),
    )
    return experts_cases(mutated)


def batched(dispatched: Any) -> bool:
    return dispatched.tokens_per_expert is not None


@wrong("fp8_torch", "ignores the router weight", "router weight")
@wrong("torch", "ignores the router weight", "router weight")
class IgnoresWeight(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if not batched(dispatched):
            dispatched = attrs.evolve(dispatched, topk_weights=torch.ones_like(dispatched.topk_weights))
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "applies the router weight twice", "router weight")
class AppliesWeightTwice(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if not batched(dispatched):
            dispatched = attrs.evolve(dispatched, topk_weights=dispatched.topk_weights.square())
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "says of its kernels what can't be", "honest claims")
class FallingRanges(Wrapped):
    def launch_ranges(self, activation_format, device):
        return LaunchRange(8, "many rows", "measured"), LaunchRange(0, "few rows", "measured")


@wrong("torch", "puts the weight on the output though asked for the input", "router weight")
class WeightOnOutput(Wrapped):
    def made_from(self, config, parallel, scheme):
        return attrs.evolve(config, router_weight_on_input=False), parallel, scheme


@wrong("torch", "takes gate for up", "gate/up layout")
class SwapsGateAndUp(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        swapped = {GateUpLayout.GATE_UP: GateUpLayout.UP_GATE, GateUpLayout.UP_GATE: GateUpLayout.GATE_UP}
        layout = swapped.get(weights.gate_up_layout, weights.gate_up_layout)
        self.inner.apply(dispatched, attrs.evolve(weights, gate_up_layout=layout), workspaces, out)


@wrong("torch", "reads interleaved weights as halves", "gate/up layout")
class HalvesOnly(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if weights.gate_up_layout is GateUpLayout.INTERLEAVED:
            weights = attrs.evolve(weights, gate_up_layout=GateUpLayout.GATE_UP)
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "forgets the first bias", "expert biases")
class NoFirstBias(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, attrs.evolve(weights, w13_bias=None), workspaces, out)


@wrong("fp8_torch", "forgets the second bias", "expert biases")
class NoSecondBias(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, attrs.evolve(weights, w2_bias=None), workspaces, out)


def _with(config: Any, **changes: Any) -> Any:
    return attrs.evolve(config, activation=attrs.evolve(config.activation, **changes))


@wrong("torch", "forgets the clamp", "activation clamp")
class NoClamp(Wrapped):
    def made_from(self, config, parallel, scheme):
        return _with(config, limit=None), parallel, scheme


@wrong("torch", "knows one alpha", "activation")
class OneAlpha(Wrapped):
    def made_from(self, config, parallel, scheme):
        return _with(config, alpha=1.702), parallel, scheme


@wrong("torch", "takes tanh for erf", "activation")
class TanhForErf(Wrapped):
    def made_from(self, config, parallel, scheme):
        function = config.activation.function
        tanh = function == "gelu" and config.activation.gated
        return _with(config, function="gelu_tanh" if tanh else function), parallel, scheme


@wrong("torch", "ends at relu where it should square", "activation")
class SiluForRelu(Wrapped):
    def made_from(self, config, parallel, scheme):
        function = config.activation.function
        return _with(config, function="silu" if function == "relu2" else function), parallel, scheme


@wrong("torch", "writes past its workspace", "workspaces")
class OverrunsWorkspace(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        space = workspaces["act"]
        space.as_strided((1,), (1,), space.storage_offset() + space.numel()).zero_()


@wrong("torch", "reads its workspace before it writes it", "workspaces")
class ReadsWorkspace(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        stale = 0 * workspaces["x"].float().sum()
        self.inner.apply(dispatched, weights, workspaces, out)
        if out.numel():
            out += stale.to(out.dtype)


@wrong("torch", "declares another workspace each time", "workspaces")
class GrowingWorkspace(Wrapped):
    asked = 0

    def workspace_shapes(self, rows, activation_format):
        self.asked += 1
        return {**self.inner.workspace_shapes(rows, activation_format), "more": ((self.asked,), torch.float32)}


@wrong("torch", "declares its workspaces in tensors", "workspaces")
class TensorSizes(Wrapped):
    def workspace_shapes(self, rows, activation_format):
        shapes = self.inner.workspace_shapes(rows, activation_format)
        return {name: (tuple(float(e) for e in shape), dtype) for name, (shape, dtype) in shapes.items()}


@wrong("torch", "writes beside out", "out is written whole")
class WritesBeside(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()


@wrong("torch", "gives the name out to another tensor", "out is written whole")
class NeverWrites(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, torch.empty_like(out))


@wrong("torch", "leaves rows of nobody unwritten", "dropped ids", "padding is not read")
class LeavesRows(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        before = out.clone()
        self.inner.apply(dispatched, weights, workspaces, out)
        if not batched(dispatched):
            torch.where((dispatched.topk_ids < 0).all(dim=1, keepdim=True), before, out, out=out)


@wrong("torch", "ignores num_rows", "padding is not read")
class IgnoresNumRows(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(attrs.evolve(dispatched, num_rows=None), weights, workspaces, out)


@wrong("torch", "takes -1 as the last expert", "dropped ids")
class TakesMinusOne(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if not batched(dispatched):
            ids = dispatched.topk_ids
            dispatched = attrs.evolve(
                dispatched,
                topk_ids=torch.where(ids < 0, weights.w13.shape[0] - 1, ids),
                topk_weights=dispatched.topk_weights.nan_to_num(0.5),
                x=dispatched.x.nan_to_num(0.0),
            )
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "reads the weight beside -1", "dropped ids", "padding is not read")
class ReadsWeightOfNobody(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if not batched(dispatched):
            out += (0 * dispatched.topk_weights.sum(dim=1, keepdim=True)).to(out.dtype)


@wrong("torch", "counts equal ids once", "duplicate ids")
class DuplicatesOnce(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if not batched(dispatched):
            ids = dispatched.topk_ids.clone()
            for k in range(1, ids.shape[1]):
                ids[:, k].masked_fill_((ids[:, :k] == ids[:, k : k + 1]).any(dim=1), -1)
            dispatched = attrs.evolve(dispatched, topk_ids=ids)
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "sums only the first two choices", "top-k sum", "rows")
class TwoChoices(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if not batched(dispatched):
            ids = dispatched.topk_ids.clone()
            ids[:, 2:] = -1
            dispatched = attrs.evolve(dispatched, topk_ids=ids)
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "computes one row too few of each expert", "tokens_per_expert")
class OneRowTooFew(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if batched(dispatched):
            dispatched = attrs.evolve(dispatched, tokens_per_expert=(dispatched.tokens_per_expert - 1).clamp(min=0))
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "writes x", "read-only inputs")
class WritesX(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        dispatched.x.mul_(1)


@wrong("torch", "writes its weights", "read-only inputs")
class WritesWeights(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        weights.w2.data[0, 0, 0] += 1


@wrong("torch", "writes the ids", "read-only inputs")
class WritesIds(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        given = dispatched.tokens_per_expert if batched(dispatched) else dispatched.topk_ids
        given.clamp_(min=0)


@wrong("fp8_torch", "writes into packed weights", "read-only inputs")
class WritesPacked(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if weights.w13_scale is not None:
            weights.w13_scale.mul_(1)


@wrong("torch", "remembers the first weights it saw", "reload")
class RemembersWeights(Wrapped):
    seen = None

    def apply(self, dispatched, weights, workspaces, out):
        self.seen = self.seen or mapped(weights, lambda tensor: tensor.clone())
        self.inner.apply(dispatched, self.seen, workspaces, out)


@wrong("fp8_torch", "remembers weights by their address", "reload")
class RemembersAddress(Wrapped):
    seen: Any = (None, None)

    def apply(self, dispatched, weights, workspaces, out):
        if self.seen[0] != weights.w13.data_ptr():
            self.seen = weights.w13.data_ptr(), mapped(weights, lambda tensor: tensor.clone())
        self.inner.apply(dispatched, self.seen[1], workspaces, out)


_last: dict[str, int] = {}


@wrong("torch", "shares derived weights between layers", "no state between layers")
class SharesWeights(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if _last.get("experts") not in (None, id(self)):
            out.mul_(1.01)
        _last["experts"] = id(self)


@wrong("torch", "gives the last result again for as many rows", "no state between steps", "no state between layers")
class GivesLastResult(Wrapped):
    last = None

    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if self.last is not None and self.last.shape == out.shape and out.shape[0] > 1:
            out.copy_(self.last)
        self.last = out.clone()


@wrong("torch", "stops at the rows of the first call", "no state between steps")
class StopsAtFirst(Wrapped):
    most = None

    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        rows = int(dispatched.tokens_per_expert.max()) if batched(dispatched) else out.shape[0]
        self.most = max(rows, 1) if self.most is None else self.most
        (out[:, self.most :] if batched(dispatched) else out[self.most :]).zero_()


@wrong("torch", "other bits each time", "determinism")
class NotDeterministic(Wrapped):
    calls = 0

    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        self.calls += 1
        if self.calls % 2 == 0:
            out.mul_(1 + 2 * torch.finfo(out.dtype).eps)


@wrong("torch", "fails without rows", "empty steps")
class FailsOnEmpty(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        rows = int(dispatched.tokens_per_expert.sum()) if batched(dispatched) else out.shape[0]
        assert rows > 0
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "thinks that rows of x lie side by side", "strides")
class ContiguousX(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        x = dispatched.x
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        flat = whole[x.storage_offset() :][: x.numel()].view(x.shape)
        self.inner.apply(attrs.evolve(dispatched, x=flat), weights, workspaces, out)


@wrong("torch", "thinks that weights lie side by side", "strides")
class ContiguousWeights(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        def flat(tensor):
            whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
            return whole[tensor.storage_offset() :][: tensor.numel()].view(tensor.shape)

        self.inner.apply(dispatched, mapped(weights, flat), workspaces, out)


@wrong("torch", "cannot take weights that require a gradient", "strides")
class NoGradient(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if weights.w13.requires_grad:
            raise RuntimeError("out= does not support automatic differentiation")
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "cannot run in inference mode", "rows")
class NoInference(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        assert not weights.w13.is_inference(), "inference tensors do not track version counter"
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "lets one row's NaN into all", "padding is not read")
class SpreadsNan(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        first = dispatched.x[0, :1] if batched(dispatched) else dispatched.x[:1]
        out += (0 * first.float().sum()).to(out.dtype) if _someone(dispatched) else 0


def _someone(dispatched: Any) -> bool:
    if batched(dispatched):
        return bool(dispatched.tokens_per_expert[0] > 0)
    return bool(dispatched.topk_ids.shape[0]) and bool((dispatched.topk_ids[0] >= 0).any())


@wrong("torch", "reads rows past the counts", "padding is not read", "tokens_per_expert")
class ReadsPadding(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if dispatched.x.numel():
            out += (0 * dispatched.x.float().sum()).to(out.dtype)


@wrong("torch", "stops after 64 rows", "rows")
class SixtyFourRows(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        if not batched(dispatched):
            out[64:].zero_()


@wrong("torch", "has 16 experts", "rows", "top-k sum", "router weight", "dropped ids")
class SixteenExperts(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        if weights.w13.shape[0] > 16:
            weights = mapped(weights, lambda tensor: torch.cat([tensor[:16], 0 * tensor[16:]]))
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "sizes its workspaces for a whole expert", "rows")
class WholeExperts(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        assert weights.w2.shape[2] == self.config.intermediate_size
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "thinks that it holds all experts", "rows")
class AllExperts(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        assert weights.w13.shape[0] == self.config.num_experts
        self.inner.apply(dispatched, weights, workspaces, out)


@wrong("torch", "takes an even H for granted", "rows")
class EvenHidden(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(dispatched, weights, workspaces, out)
        out[..., out.shape[-1] // 2 * 2 :].zero_()


@wrong("torch", "takes an even I for granted", "rows")
class EvenInner(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        w2 = weights.w2.clone()
        w2[..., w2.shape[2] // 2 * 2 :] = 0
        self.inner.apply(dispatched, attrs.evolve(weights, w2=w2), workspaces, out)


@wrong("torch", "computes in bfloat16", "rows", "activation")
class LowPrecision(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        x = dispatched.x.bfloat16().to(dispatched.x.dtype)
        self.inner.apply(attrs.evolve(dispatched, x=x), weights, workspaces, out)


@wrong("fp8_torch", "takes one expert's scales for all", "rows")
class OneScale(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        scale = weights.w13_scale
        changed = scale if scale is None else scale[:1].expand_as(scale)
        self.inner.apply(dispatched, attrs.evolve(weights, w13_scale=changed), workspaces, out)


@wrong("fp8_torch", "does not quantize activations", "input quantization")
class NoQuantization(Wrapped):
    def made_from(self, config, parallel, scheme):
        return config, parallel, attrs.evolve(scheme, activation=None)

    def apply(self, dispatched, weights, workspaces, out):
        self.inner.apply(attrs.evolve(dispatched, x_scale=None), weights, workspaces, out)


@wrong("fp8_torch", "scales its payload wrongly", "input quantization")
class WrongPayloadScale(Wrapped):
    def apply(self, dispatched, weights, workspaces, out):
        scale = dispatched.x_scale
        changed = attrs.evolve(dispatched, x_scale=None if scale is None else scale * 1.5)
        self.inner.apply(changed, weights, workspaces, out)
