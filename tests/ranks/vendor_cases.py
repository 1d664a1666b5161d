"""Layers over the vendors' dispatches, run through their emulations, and what each rank must get to the last rounding.

Shape letters: T tokens on one rank · H hidden · I intermediate · E experts · K top-k · W ranks.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import attrs
import torch
from rank_cases import TOKENS

import moe_core
from moe_core import ExpertPlacement, MoEConfig, MoEParallelConfig, RouterSpec, formats
from moe_core.expert_map import ExpertMapManager
from moe_core.plugins import registry
from moe_core.reference import moe_reference
from moe_core.types import MODEL_DTYPE_PAYLOAD, Dispatched

E, K, H, I, M = 8, 3, 256, 128, 9


@attrs.frozen
class VendorCase:
    """
    Attributes:
        dispatch: "nixl_ep" or "mori".
        world: W.
        tokens: a key of `TOKENS`.
        scheme: of the weights.
        placement: which rank holds which expert.
        version: whose ways the emulation has; "": the newest.
        hidden: H; NIXL EP pads 256 to 2048 on the wire.
        shared: shared experts, which run while the combine is under way where the dispatch is split.
    """

    dispatch: str
    world: int
    tokens: str = "unequal"
    scheme: str = "unquantized"
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    version: str = ""
    hidden: int = H
    shared: bool = False

    @property
    def name(self) -> str:
        """What the emulation is registered as."""
        return f"{self.dispatch}_{self.version or 'emulated'}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return TOKENS[self.tokens][: self.world]


VERSIONS = {"nixl_ep": ("1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.1"), "mori": ("1.1.0", "1.2.0", "1.2.1", "1.2.2")}


def register_emulations() -> list[Any]:
    """Both emulations, and each under the name of every version."""
    import moe_mori.emulation
    import moe_nixl_ep.emulation

    if "nixl_ep_emulated" in registry().dispatch:
        return []
    records = [
        moe_core.register_plugin(moe_nixl_ep.emulation, name="nixl_ep_emulation"),
        moe_core.register_plugin(moe_mori.emulation, name="mori_emulation"),
    ]
    module = types.ModuleType("emulated_versions")
    module.moe_core_api = (1, 0)

    @moe_core.hookimpl
    def moe_core_register_prepare_finalize(register: Any) -> None:
        for version in VERSIONS["nixl_ep"]:
            make = functools.partial(moe_nixl_ep.emulation.make_emulated, version=version)
            register(f"nixl_ep_{version}", make, moe_nixl_ep.emulation.capabilities(version), priority=-1000)
        for version in VERSIONS["mori"]:
            parsed = tuple(map(int, version.split(".")))
            make = functools.partial(moe_mori.emulation.make_emulated, version=parsed)
            register(f"mori_{version}", make, moe_mori.emulation.capabilities(parsed), priority=-1000)

    module.moe_core_register_prepare_finalize = moe_core_register_prepare_finalize
    return [*records, moe_core.register_plugin(module)]


def choose(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different ids in a row, some of nobody, some rows of nobody; NaN is the weight of what isn't there."""
    weights, ids = logits.float().topk(top_k, dim=1)
    dropped = (logits[:, 1:2] < -0.6) & (torch.arange(top_k) == top_k - 1)
    ids = ids.masked_fill(dropped | (logits[:, 2:3] > 1.2), -1)
    return ids, weights.sigmoid().masked_fill(ids < 0, torch.nan)


def build(case: VendorCase, group: Any = None, **changes: Any) -> Any:
    """The layer on one rank of the group, or whole on one rank."""
    config = MoEConfig(
        num_experts=E,
        top_k=K,
        hidden_size=case.hidden,
        intermediate_size=I,
        dtype=torch.bfloat16,
        router=RouterSpec.of("custom", function=choose),
        placement=case.placement if group is not None else ExpertPlacement.LINEAR,
        max_tokens_per_rank=M,
        has_shared_experts=case.shared and group is not None,
        debug=True,
    )
    arguments: dict[str, Any] = {}
    if group is not None:
        parallel = MoEParallelConfig.fold(dp_size=group.size, dp_rank=group.rank, expert_parallel=True)
        arguments = {"parallel": parallel, "group": group, "dispatch": case.name}
        if case.shared:
            arguments["shared_experts"] = shared_module(case.hidden)
    runner = moe_core.build_runner(
        attrs.evolve(config, **changes), scheme=case.scheme, device="cpu", **({"dispatch": "local"} | arguments)
    )
    generator = torch.Generator().manual_seed(3)
    for expert in range(E):
        for name, shape in {"gate": (I, case.hidden), "up": (I, case.hidden), "down": (case.hidden, I)}.items():
            values = torch.randn(shape, generator=generator) * shape[1] ** -0.5
            runner.routed_experts.load_expert(expert, name, values)
    runner.routed_experts.pack_weights()
    return runner


def shared_module(hidden: int) -> torch.nn.Module:
    module = torch.nn.Linear(hidden, hidden, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    module.weight.data = torch.eye(hidden, dtype=torch.bfloat16) * 0.5
    return module


def batch(case: VendorCase, rank: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens = case.sizes[rank]
    return torch.randn(tokens, case.hidden, generator=generator).bfloat16(), torch.randn(tokens, E, generator=generator)


def run(group: Any, case: VendorCase) -> list[torch.Tensor]:
    """Two layers that share a buffer, two steps each; one layer's outputs, which equal the other's."""
    layers = [build(case, group) for _ in range(2)]
    outs = []
    for step in range(2):
        x, logits = batch(case, group.rank, step)
        before = x.clone()
        out, again = (layer(x, logits) for layer in layers)
        assert torch.equal(out, again) or close(out, again, out.abs() * 2**-7)
        assert torch.equal(x, before), "inputs are read only"
        outs.append(out)
    for layer in layers:
        layer.check()
    return outs


def expected(case: VendorCase, rank: int, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a rank must get: by the backend's own rounding points, how far off it may be, and in fp64.

    The experts' last bit depends on how many rows they get at once, so a part that is rounded before the sum may be the
    next bf16 number: 2⁻⁷ of it at most. (That the combine's own bits are right is tested with experts that are exact.)

    Returns:
        bf16 `[T, H]`; Σ 2⁻⁷ · |part| `[T, H]`, over what the backend rounds before it sums; fp64 `[T, H]`.
    """
    single = build(case)
    x, logits = batch(case, rank, step)
    ids, scores = choose(logits, K)
    parts = _rounded_parts(case, single, x, ids, scores)
    total = torch.zeros(x.shape)
    for part, weight in parts:
        total = (part.double() * weight.double() + total.double()).float()
    bound = sum((2**-7 * (part.float() * weight).abs() for part, weight in parts), torch.zeros(x.shape))
    out = total.bfloat16()
    truth = moe_reference(
        x, ids, scores, _plain_weights(single), single.plan.config.activation, compute_dtype=torch.float64
    )
    if case.shared:
        out, truth = out + x * 0.5, truth + x.double() * 0.5
        bound = bound + out.abs().float() * 2**-8
    return out, bound, truth


def close(out: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor) -> bool:
    return bool(((out.float() - wanted.float()).abs() <= bound).all())


def _rounded_parts(
    case: VendorCase, single: Any, x: torch.Tensor, ids: torch.Tensor, scores: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What is in bf16 before the combine's one sum, in its order, each with the weight that the combine multiplies."""
    rows, scale = _payload(case, x, single.plan.scheme)
    if case.dispatch == "nixl_ep":  # a row for each choice, weighed by the combine
        ones = torch.ones_like(scores[:, :1])
        return [
            (
                _experts(single, rows, scale, ids[:, k : k + 1], ones),
                scores[:, k : k + 1].masked_fill(ids[:, k : k + 1] < 0, 0),
            )
            for k in range(K)
        ]
    owner = torch.full((E,), -1)
    for rank in range(case.world):
        own = ExpertMapManager(E, case.world, rank, case.placement).local_experts
        owner[list(own)] = rank
    owners = torch.where(ids < 0, -1, owner[ids.clamp(min=0)])
    by_rank = [_experts(single, rows, scale, ids.masked_fill(owners != rank, -1), scores) for rank in range(case.world)]
    parts = []
    for k in range(K):  # MoRI sums ranks in the order in which the ids name them, each once
        first = (owners[:, k : k + 1] >= 0) & ~(owners[:, :k] == owners[:, k : k + 1]).any(dim=1, keepdim=True)
        part = torch.stack(by_rank).gather(0, owners[:, k].clamp(min=0).view(1, -1, 1).expand(1, *x.shape))[0]
        parts.append((part, first.float()))
    return parts


def _payload(case: VendorCase, x: torch.Tensor, scheme: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the experts receive, by whoever quantizes it."""
    from moe_nixl_ep.emulation import quantize
    from moe_nixl_ep.limits import FP8_PAYLOADS

    if case.dispatch == "nixl_ep" and case.scheme in FP8_PAYLOADS:
        return quantize(x, FP8_PAYLOADS[case.scheme])
    spec = scheme.activation
    if case.dispatch == "mori" and spec is not None and spec.row_wise:
        return formats.quantize(x, spec)
    return x, None


def _experts(
    single: Any, rows: torch.Tensor, scale: torch.Tensor | None, ids: torch.Tensor, scores: torch.Tensor
) -> torch.Tensor:
    """The experts' own rows on one rank, weighed and summed in fp32 and rounded to bf16 once."""
    out = torch.zeros(rows.shape[0], single.plan.config.hidden_size, dtype=torch.bfloat16)
    if rows.shape[0]:
        dispatched = Dispatched(x=rows, handle=None, x_scale=scale, topk_ids=ids, topk_weights=scores)
        kernel = single.kernel
        kernel.experts[0].apply(
            dispatched, single.routed_experts.weights, kernel._workspaces(0, rows.shape[0], rows.device), out
        )
    return out


def _plain_weights(single: Any) -> Any:
    from moe_core.emulated import dequantize_weights

    weights, spec = single.routed_experts.weights, single.plan.scheme.weight
    return weights if spec is None else dequantize_weights(weights, spec)


def payload_of(case: VendorCase) -> str:
    """What the plan must have chosen to put on the wire."""
    carried = {"nixl_ep": ("fp8_block", "fp8_block_ue8m0"), "mori": ("fp8_block", "fp8_block_ue8m0", "fp8_channel")}
    return case.scheme if case.scheme in carried[case.dispatch] else MODEL_DTYPE_PAYLOAD
