"""A plugin as an author wrote it for plugin API (1, 0). Frozen: every later core of major version 1 loads and runs it.

It uses each hook once, every required argument of a registration and none of the optional ones, and only names that the
API page lists.
"""

import attrs
import torch
import torch.nn.functional as F

from moe_core import (
    ActivationFormat,
    DispatchCapabilities,
    Dispatched,
    Duty,
    Experts,
    ExpertsCapabilities,
    ExpertWeights,
    GateUpLayout,
    PrepareAndFinalize,
    QuantMethod,
    QuantScheme,
    QuantSpec,
    Router,
    Routing,
    hookimpl,
)

moe_core_api = (1, 0)


@attrs.define
class Handle:
    consumed: bool = False


class Stay(PrepareAndFinalize):
    def prepare(self, hidden_states, routing, *, num_experts, expert_map, payload):
        assert payload == "model dtype"
        ids = routing.topk_ids if expert_map is None else expert_map[routing.topk_ids]
        return Dispatched(x=hidden_states, handle=Handle(), topk_ids=ids, topk_weights=routing.topk_weights)

    def finalize(self, expert_out, handle, routing, out):
        assert not handle.consumed
        handle.consumed = True
        out.copy_(expert_out)


class Loop(Experts):
    def workspace_shapes(self, rows, activation_format):
        return {"total": ((rows, self.hidden), torch.float32)}

    def __init__(self, config):
        self.hidden = config.hidden_size

    def apply(self, dispatched, weights, workspaces, out):
        assert isinstance(weights, ExpertWeights)
        total = workspaces["total"].zero_()
        w13, w2 = weights.w13.float(), weights.w2.float()
        if weights.w13_scale is not None:
            w13, w2 = w13 * weights.w13_scale, w2 * weights.w2_scale
        for expert in range(w13.shape[0]):
            row, choice = torch.where(dispatched.topk_ids == expert)
            gate, up = F.linear(dispatched.x[row].float(), w13[expert]).chunk(2, dim=1)
            result = F.linear(F.silu(gate) * up, w2[expert])
            total.index_add_(0, row, result * dispatched.topk_weights[row, choice].unsqueeze(1))
        out.copy_(total)


SCHEME = QuantScheme("frozen_fp8", QuantSpec("float8_e4m3fn", (1, -1)))


class Fp8Rows(QuantMethod):
    scheme = SCHEME

    def create_weights(self, layer):
        experts, hidden, inner = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
        for name, shape in (("w13", (experts, 2 * inner, hidden)), ("w2", (experts, hidden, inner))):
            layer.register_weight(name, torch.zeros(shape, dtype=torch.float8_e4m3fn, device=layer.device))
            layer.register_weight(f"{name}_scale", torch.zeros(*shape[:2], 1, device=layer.device))

    def load_expert(self, layer, expert, name, tensor):
        inner = layer.intermediate_size
        rows = {"gate": slice(0, inner), "up": slice(inner, 2 * inner), "down": slice(None)}[name]
        target = "w2" if name == "down" else "w13"
        scale = tensor.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-10) / 448.0
        layer.get_parameter(target).data[expert, rows] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        layer.get_parameter(f"{target}_scale").data[expert, rows] = scale

    def pack_weights(self, layer):
        pass


class First(Router):
    """The first K experts, all equally."""

    def __init__(self, config):
        self.top_k = config.top_k

    def select_experts(self, router_logits, correction_bias=None):
        tokens = router_logits.shape[0]
        ids = torch.arange(self.top_k, device=router_logits.device).expand(tokens, -1).contiguous()
        return Routing(ids, torch.full((tokens, self.top_k), 1 / self.top_k, device=router_logits.device))


@hookimpl
def moe_core_register_prepare_finalize(register):
    capabilities = DispatchCapabilities(
        activation_format=ActivationFormat.STANDARD,
        dtypes=frozenset({torch.float32}),
        device_types=frozenset({"cpu"}),
    )
    register("frozen_stay", lambda config, parallel, scheme, group, placement: Stay(), capabilities)


@hookimpl
def moe_core_register_experts(register):
    capabilities = ExpertsCapabilities(
        owns={
            ActivationFormat.STANDARD: frozenset(
                {Duty.ROUTER_WEIGHT, Duty.TOPK_SUM, Duty.EXPERT_BIAS, Duty.ACTIVATION_CLAMP}
            )
        },
        dtypes=frozenset({torch.float32}),
        device_types=frozenset({"cpu"}),
        activations=frozenset({"silu"}),
        gate_up_layouts=frozenset({GateUpLayout.GATE_UP}),
        schemes=frozenset({"unquantized", SCHEME.name}),
    )
    register("frozen_loop", lambda config, parallel, scheme, group, placement: Loop(config), capabilities)


@hookimpl
def moe_core_register_quant_methods(register):
    register(SCHEME.name, Fp8Rows)


@hookimpl
def moe_core_register_routers(register):
    register("frozen_first", First)


@hookimpl
def moe_core_register_runners(register):
    from moe_core.runner import MoERunner

    register("frozen_runner", MoERunner)
