"""Runners that are wrong in one way each, derived from the default one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moe_core.interfaces import MoERunnerInterface
from moe_core.testing import registered
from moe_core.testing.runner import runner_cases
from moe_core.types import Routing
from tests.conformance.mutant import Mutant

Runner: Any = registered("runner", "default")
MUTANTS: list[Mutant] = []


def wrong(name: str, *duties: str) -> Callable[[type], type]:
    def register(kind: type) -> type:
        MUTANTS.append(Mutant(name, duties, functools.partial(runner_cases, kind)))
        return kind

    return register


wrong("is none", "a step runs")(lambda *_, **__: None)


@wrong("forgets the routed scale", "routed scaling factor")
class NoScale(Runner):
    def _assemble(self, routed, shared):
        factor = self.plan.config.routed_scaling_factor
        return super()._assemble(routed / factor, shared)


@wrong("scales twice in fp16", "routed scaling factor")
class ScalesTwice(Runner):
    def _assemble(self, routed, shared):
        half = routed.dtype is torch.float16
        return super()._assemble(routed * self.plan.config.routed_scaling_factor if half else routed, shared)


@wrong("forgets the shared experts", "shared experts")
class NoShared(Runner):
    def _assemble(self, routed, shared):
        return super()._assemble(routed, None if shared is None else shared * 0)


@wrong("adds the shared experts twice", "shared experts")
class SharedTwice(Runner):
    def _assemble(self, routed, shared):
        return super()._assemble(routed, None if shared is None else shared + shared)


@wrong("feeds the shared experts with the hidden states", "shared experts")
class SharedInputIgnored(Runner):
    def forward(self, hidden_states, router_logits=None, shared_experts_input=None, num_valid_tokens=None):
        return super().forward(hidden_states, router_logits, None, num_valid_tokens)


@wrong("adds whole shared experts on every rank", "shared experts", "cross-rank reduce")
class SharedPerRank(Runner):
    def _assemble(self, routed, shared):
        out = super()._assemble(routed, shared)
        size = 1 if self._group is None else self._group.size
        return out if shared is None or self._shared_experts.output_is_partial else out + (size - 1) * shared


@wrong("does not reduce", "cross-rank reduce")
class NoReduce(Runner):
    def _all_reduce(self, tensor, group):
        super()._all_reduce(tensor, group)
        return tensor


@wrong("reduces twice", "cross-rank reduce")
class ReducesTwice(Runner):
    def _all_reduce(self, tensor, group):
        return super()._all_reduce(super()._all_reduce(tensor, group), group)


@wrong("does not unpad", "padding", "shapes and dtypes", "unpadding")
class NoUnpad(Runner):
    def _unpad(self, routed):
        return routed


@wrong("pads with ones", "padding", "rows")
class PadsWithOnes(Runner):
    def _pad(self, tokens):
        padded = super()._pad(tokens)
        return torch.cat([padded[:, 1:], padded[:, :1]], dim=1) if padded.shape[1] != tokens.shape[1] else padded


@wrong("runs padding tokens", "padding is not read")
class RunsPadding(Runner):
    def forward(self, hidden_states, router_logits=None, shared_experts_input=None, num_valid_tokens=None):
        return super().forward(hidden_states, router_logits, shared_experts_input, None)


@wrong("ignores the correction bias", "routing")
class NoBias(Runner):
    def __init__(self, *given, correction_bias=None, **named):
        super().__init__(*given, **named)


@wrong("takes its gate's logits in reverse", "routing")
class GateReversed(Runner):
    def _logits(self, tokens, router_logits):
        logits = super()._logits(tokens, router_logits)
        return logits.flip(1) if self.gate is not None else logits


@wrong("skips the output transform", "routed transforms", "shapes and dtypes")
class NoTransform(Runner):
    def __init__(self, *given, routed_output_transform=None, **named):
        super().__init__(*given, **named)


@wrong("gives no rows for no tokens", "empty steps", "shapes and dtypes")
class FailsOnEmpty(Runner):
    def forward(self, hidden_states, *rest):
        assert hidden_states.numel()
        return super().forward(hidden_states, *rest)


@wrong("flattens leading dims", "shapes and dtypes")
class Flattens(Runner):
    def forward(self, hidden_states, *rest):
        return super().forward(hidden_states, *rest).reshape(-1, hidden_states.shape[-1])


@wrong("drops the last token", "rows", "shared experts")
class DropsAToken(Runner):
    def run_step(self, routed_in, *rest):
        routed, shared = super().run_step(routed_in, *rest)
        routed[-1:] = 0
        return routed, shared


@wrong("answers in float32", "shapes and dtypes")
class AnswersInFloat32(Runner):
    def forward(self, *given):
        return super().forward(*given).float()


@wrong("writes hidden_states", "read-only inputs")
class WritesInput(Runner):
    def forward(self, hidden_states, *rest):
        out = super().forward(hidden_states, *rest)
        hidden_states.mul_(1)
        return out


@wrong("returns its input's memory", "read-only inputs")
class AliasesInput(Runner):
    def forward(self, hidden_states, *rest):
        out = super().forward(hidden_states, *rest)
        if out.shape == hidden_states.shape and out.numel():
            return hidden_states.copy_(out)
        return out


@wrong("gives out one buffer", "read-only inputs")
class OneBuffer(Runner):
    def forward(self, *given):
        out = super().forward(*given)
        buffer = self.__dict__.get("kit_buffer")
        if buffer is None or buffer.shape != out.shape:
            self.__dict__["kit_buffer"] = buffer = out.clone()
        return buffer.copy_(out)


@wrong("remembers the size of the first step", "no state between steps")
class RemembersSize(Runner):
    def forward(self, *given):
        out = super().forward(*given)
        first = self.__dict__.setdefault("kit_first", out.shape[0] if out.dim() > 1 else 1)
        if out.dim() > 1 and out.shape[0] > max(first, 1):
            out[first:] = 0
        return out


_weights: dict[int, Any] = {}


@wrong("shares weights between layers", "no state between layers")
class SharesWeights(Runner):
    def forward(self, *given):
        out = super().forward(*given)
        last, _weights[0] = _weights.get(0), id(self)
        return out * 1.01 if last not in (None, id(self)) and torch.equal(out, out) and out.numel() else out


@wrong("other bits each time", "determinism")
class NotDeterministic(Runner):
    def forward(self, *given):
        calls = self.__dict__["kit_calls"] = self.__dict__.get("kit_calls", 0) + 1
        out = super().forward(*given)
        return out * (1 + 2 * torch.finfo(out.dtype).eps) if calls % 2 else out


@wrong("keeps the first weights", "reload")
class KeepsWeights(Runner):
    def run_step(self, *given):
        kept = self.__dict__.setdefault("kit_weights", {})
        layer = self.routed_experts
        if not kept:
            kept.update({name: p.data.clone() for name, p in layer.named_parameters()})
        now = {name: p.data.clone() for name, p in layer.named_parameters()}
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(kept[name])
        out = super().run_step(*given)
        for name, parameter in layer.named_parameters():
            parameter.data.copy_(now[name])
        return out


@wrong("keeps its plan when the method changes", "reload")
class KeepsPlan(Runner):
    def replace_quant_method(self, method):
        return


@wrong("copies share their weights", "copies")
class ShallowCopies(Runner):
    def __deepcopy__(self, memo):
        return self


@wrong("its state dict lacks the experts", "copies")
class NoState(Runner):
    def state_dict(self, *given, **named):
        return {k: v for k, v in super().state_dict(*given, **named).items() if "routed_experts" not in k}

    def load_state_dict(self, state, strict=True, assign=False):
        return super().load_state_dict(state, strict=False)


@wrong("fails where gradients are on", "rows")
class FailsUnderGrad(Runner):
    def forward(self, *given):
        assert not torch.is_grad_enabled()
        return super().forward(*given)


@wrong("thinks that rows lie side by side", "strides")
class ContiguousRows(Runner):
    def forward(self, hidden_states, *rest):
        if not torch.compiler.is_compiling() and hidden_states.dim() == 2:
            whole = torch.empty(0, dtype=hidden_states.dtype).set_(hidden_states.untyped_storage())
            size = hidden_states.numel()
            if hidden_states.dtype is torch.float32 and whole.numel() >= size:
                hidden_states = whole[hidden_states.storage_offset() :][:size].view(hidden_states.shape)
        return super().forward(hidden_states, *rest)


@wrong("says the contrary about its gate", "honest claims")
class SaysContrary(Runner):
    @property
    def is_internal_router(self):
        return False

    def _logits(self, tokens, router_logits):
        return self.gate(tokens) if self.gate is not None else super()._logits(tokens, router_logits)


@wrong("hides its shared experts", "honest claims")
class HidesShared(Runner):
    @property
    def shared_experts(self):
        return None


@wrong("hides its plan", "honest claims", "reload", "rows")
class HidesPlan(Runner):
    @property
    def plan(self):
        class Half:
            def __getattr__(_, name):
                return getattr(self._kernel.plan, name)

        return Half()


@wrong("its check raises", "honest claims")
class CheckRaises(Runner):
    def check(self):
        raise RuntimeError("nothing to check")


@wrong("takes what it must refuse", "refusals")
class TakesAnything(Runner):
    def forward(self, hidden_states, router_logits=None, *rest):
        try:
            return super().forward(hidden_states, router_logits, *rest)
        except ValueError:
            return hidden_states.clone()


@wrong("puts the weight on both sides", "router weight")
class WeightTwice(Runner):
    def run_step(self, routed_in, logits, shared_in, num_valid_tokens):
        routed, shared = super().run_step(routed_in, logits, shared_in, num_valid_tokens)
        config = self.plan.config
        if config.router_weight_on_input and routed.shape[0]:
            routing: Routing = self._router.select_experts(logits, self.correction_bias)
            routed = routed * (1 + routing.topk_weights[:, :1]).to(routed.dtype)
        return routed, shared


@wrong("breaks the graph", "fakes")
class BreaksGraph(Runner):
    def forward(self, hidden_states, *rest):
        if bool((hidden_states != hidden_states).any()):
            return hidden_states
        return super().forward(hidden_states, *rest)


@wrong("its fakes have another form", "fakes")
class OtherFakes(Runner):
    def forward(self, hidden_states, *rest):
        out = super().forward(hidden_states, *rest)
        return out.t().contiguous().t() if torch.compiler.is_compiling() else out


assert issubclass(Runner, MoERunnerInterface)
