"""A dispatch backend on virtual ranks, between a batch and the float64 experts: what every dispatch case stands on.

Shape letters: T tokens on one rank · H hidden · E experts · K top-k · W ranks · M `max_tokens_per_rank`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import attrs
import torch

from moe_core import formats
from moe_core.config import ActivationSpec, MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import UnsupportedError
from moe_core.expert_map import ExpertMapManager
from moe_core.forms import misfit
from moe_core.group import TorchGroup
from moe_core.kernel import Flight, MoEKernel
from moe_core.quant import UNQUANTIZED, QuantScheme
from moe_core.select import DispatchCandidate, Plan, select
from moe_core.testing import material
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import Explanations, Truth, check_numbers
from moe_core.testing.launched import run_as_rank
from moe_core.testing.material import Problem64
from moe_core.testing.oracle import oracle_experts
from moe_core.testing.virtual import Faults, VirtualGroup, run_on_ranks
from moe_core.types import Device, ExpertPlacement, ExpertWeights, Routing

M = 6
"""The largest T of any rank, and what `max_tokens_per_rank` says."""
TOKENS = {
    "unequal": (3, 6, 1, 5),
    "equal": (4, 4, 4, 4),
    "full": (M, M, M, M),
    "one": (1, 1, 1, 1),
    "one in all": (0, 1, 0, 0),
    "none on some": (5, 0, 6, 0),
    "none": (0, 0, 0, 0),
}
INNER = 4
"""I: the experts are not what is tested."""
TIMEOUT_S = 10.0
PLAIN = ActivationSpec("silu")
Result = TypeVar("Result")


@attrs.frozen(kw_only=True)
class Setting:
    """One layer and one kind of batch.

    Attributes:
        world: W.
        tokens: a key of `TOKENS`.
        ids: one of `material.IDS`.
        topology: "own": each rank has tokens of its own. "replicated": all have the same. "split": each has rows of
            its own, and a part of every expert (sp_size = tp_size = W).
        experts, top_k, hidden: E, K, H.
        bounded: `max_tokens_per_rank` is set.
        id_dtype: of the ids that come in.
        on_input: router weight on the input (K = 1).
        poison: what stands in rows of the experts' output that hold nothing.
        deterministic: as in `MoEConfig`.
    """

    world: int = 1
    tokens: str = "unequal"
    ids: str = "distinct"
    topology: str = "own"
    experts: int = 7
    top_k: int = 3
    hidden: int = 24
    dtype: torch.dtype = torch.float32
    placement: ExpertPlacement = ExpertPlacement.LINEAR
    scheme: QuantScheme = UNQUANTIZED
    bounded: bool = True
    id_dtype: torch.dtype = torch.int64
    on_input: bool = False
    poison: float = torch.nan
    deterministic: bool = False

    def sizes(self, batch: int = 0) -> tuple[int, ...]:
        """T of each rank, of the `batch`-th batch: later ones are other in size where sizes differ."""
        sizes = TOKENS[self.tokens]
        turned = tuple(sizes[(rank + batch) % len(sizes)] for rank in range(self.world))
        return (sum(turned),) * self.world if self.topology == "replicated" else turned

    @property
    def ranks(self) -> str:
        """How names of cases tell W."""
        return "1 rank" if self.world == 1 else f"{self.world} ranks"

    @property
    def most(self) -> int:
        return M * self.world if self.topology == "replicated" else M

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=INNER * (self.world if self.topology == "split" else 1),
            dtype=self.dtype,
            activation=PLAIN,
            placement=self.placement,
            max_tokens_per_rank=self.most if self.bounded else None,
            router_weight_on_input=self.on_input,
            deterministic=self.deterministic,
        )

    def parallel(self, rank: int) -> MoEParallelConfig:
        if self.topology == "own":
            return MoEParallelConfig.fold(dp_size=self.world, dp_rank=rank, expert_parallel=True)
        split = self.topology == "split"
        return MoEParallelConfig.fold(
            tp_size=self.world, tp_rank=rank, expert_parallel=not split, sequence_parallel=split
        )

    def problem(self, rank: int, device: Device) -> Problem:
        return Problem(
            config=self.config,
            parallel=self.parallel(rank),
            scheme=self.scheme,
            device=device,
            routing_is_external=True,
        )

    @property
    def weights(self) -> ExpertWeights:
        return _weights(self.experts, self.hidden, self.config.intermediate_size, self.dtype)

    def batch(self, rank: int, number: int = 0) -> tuple[torch.Tensor, Routing]:
        """Hidden states and routing of one rank, on the CPU; a function of the setting alone."""
        source = 0 if self.topology == "replicated" else rank
        size = self.sizes(number)[rank]
        x = material.tokens(size, self.hidden, self.dtype, source, number)
        routing = material.choose(self.ids, size, self.experts, self.top_k, source, number)
        nobody = (routing.topk_ids < 0).all(dim=1, keepdim=True)
        x = x.masked_fill(nobody, torch.nan)  # a token of no expert may hold anything
        return x, Routing(routing.topk_ids.to(self.id_dtype), routing.topk_weights)

    def problem64(self, rank: int, number: int = 0, x: torch.Tensor | None = None) -> Problem64:
        given, routing = self.batch(rank, number)
        return Problem64(given if x is None else x, routing, self.weights, PLAIN, self.on_input)


@functools.lru_cache(maxsize=64)
def _weights(experts: int, hidden: int, inner: int, dtype: torch.dtype) -> ExpertWeights:
    return material.random_weights(experts, hidden, inner, PLAIN, dtype)


_DUTY_OF_FIELD = {"tokens_per_expert": "tokens_per_expert", "x_scale": "input quantization"}
"""Which duty a field of `Dispatched` is of, where it has one of its own."""


def check_form(plan: Plan, dispatched: Any, num_local_experts: int) -> None:
    """Raises `Violation` if what `prepare` returned has not the form that the plan wants."""
    if found := misfit(plan, dispatched, num_local_experts):
        raise Violation(_DUTY_OF_FIELD.get(found.field, "shapes and dtypes"), found.text)


class WatchedKernel(MoEKernel):
    """Looks at the form of what arrived, before the reference computes with it."""

    def run_experts(self, flight: Flight, weights: ExpertWeights) -> torch.Tensor:
        check_form(self.plan, flight.dispatched, self.expert_map.num_local_experts)
        return super().run_experts(flight, weights)


@attrs.frozen(eq=False)
class Rank:
    """One rank's layer around the backend under test."""

    setting: Setting
    group: VirtualGroup | TorchGroup
    kernel: MoEKernel
    weights: ExpertWeights
    device: torch.device

    def batch(self, number: int = 0) -> tuple[torch.Tensor, Routing]:
        x, routing = self.setting.batch(self.group.rank, number)
        return x.to(self.device), Routing(routing.topk_ids.to(self.device), routing.topk_weights.to(self.device))

    def dispatch(self, number: int = 0) -> Flight:
        return self.kernel.dispatch(*self.batch(number))

    def land(self, flight: Flight) -> torch.Tensor:
        self.kernel.combine(flight, self.kernel.run_experts(flight, self.weights))()
        return flight.out

    def run(self, number: int = 0) -> torch.Tensor:
        return self.land(self.dispatch(number))

    @property
    def backend(self) -> Any:
        return self.kernel.prepare_finalize

    @property
    def _by_physical_ids(self) -> bool:
        wants = self.kernel.plan.dispatch.capabilities.needs_round_robin_routing_tables
        return wants and self.setting.placement is ExpertPlacement.ROUND_ROBIN and self.setting.world > 1

    @property
    def named(self) -> dict[str, Any]:
        """What the kernel gives `prepare` by name."""
        table = None if self._by_physical_ids else self.kernel.expert_map.expert_map(self.device)
        return {"num_experts": self.setting.experts, "expert_map": table, "payload": self.kernel.plan.payload}

    def admitted(self, number: int = 0) -> tuple[torch.Tensor, Routing]:
        """A batch of valid, different ids, as the kernel hands it to `prepare`: physical where tables are wanted."""
        x, routing = self.batch(number)
        ids = routing.topk_ids
        if self._by_physical_ids:
            ids = self.kernel.expert_map.remap_to_physical(ids)
        dtype = self.kernel.plan.dispatch.capabilities.id_dtype
        return x, Routing(ids if dtype is None else ids.to(dtype), routing.topk_weights)


@attrs.frozen(eq=False)
class DispatchBench:
    """The backend under test and what it may be asked.

    Attributes:
        candidate: the backend, probed.
        device: where it runs.
        ranks: the largest W to try, on virtual ranks.
        launched: the group of this process, where a launcher started the ranks; None: they are virtual.
    """

    candidate: DispatchCandidate
    device: torch.device
    ranks: int = 4
    launched: TorchGroup | None = None

    @property
    def described(self) -> Device:
        return Device.of(self.device)

    def plan(self, setting: Setting, rank: int = 0, device: Device | None = None) -> Plan:
        """Raises `UnsupportedError` where the backend can't run it."""
        problem = setting.problem(rank, device or self.described)
        return select(problem, [self.candidate], [oracle_experts(PLAIN, setting.scheme, setting.poison)])

    def possible(self, setting: Setting) -> Plan:
        """The plan of rank 0; `Skip` with the backend's own reason where it refuses."""
        try:
            return self.plan(setting)
        except UnsupportedError as error:
            reasons = dict.fromkeys(item.reason for report in error.rejections for item in report.rejections)
            raise Skip("; ".join(reasons)) from None

    def rank(self, setting: Setting, group: VirtualGroup | TorchGroup) -> Rank:
        kernel = WatchedKernel(self.plan(setting, group.rank), group)
        if setting.topology == "split":
            own = material.mapped(
                material.part_of_inner(setting.weights, group.rank, group.size), lambda t: t.to(self.device)
            )
        else:
            held = ExpertMapManager(setting.experts, setting.world, group.rank, setting.placement).local_experts
            own = material.of_experts(setting.weights, held, self.device)
        return Rank(setting, group, kernel, own, self.device)

    def on_ranks(
        self,
        setting: Setting,
        work: Callable[[Rank], Result],
        *,
        faults: Faults | None = None,
        timeout_s: float | None = None,
        return_errors: bool = False,
    ) -> list[Result]:
        """`work(rank)` on W ranks at once, each with a layer of its own."""
        self.possible(setting)
        if self.launched is not None and faults is not None:
            raise Skip("faults are asked on virtual ranks")

        @torch.no_grad()
        def body(group: VirtualGroup | TorchGroup) -> Result:
            rank = self.rank(setting, group)
            result = work(rank)
            if not return_errors:
                rank.kernel.check()
            return result

        if self.launched is not None:
            return run_as_rank(self.launched, body, return_errors=return_errors)
        return run_on_ranks(
            setting.world, body, faults=faults, timeout_s=timeout_s or TIMEOUT_S, return_errors=return_errors
        )

    def check(
        self, setting: Setting, outs: list[torch.Tensor], duty: str, number: int = 0, *, explain: bool = False
    ) -> None:
        """Hold every rank's output of batch `number` to the truth; where the runner is to sum them, their sum.

        `explain`: look for the mistake that gives such numbers, and name its duty instead.
        """
        ranks = range(setting.world)
        if self.possible(setting).output_is_reduced:
            for rank in ranks:
                where = f"rank {rank}:" if setting.world > 1 else ""
                self._check_rank(setting, outs[rank], rank, duty, number, where, explain)
            return
        if setting.topology != "replicated":
            raise Violation(
                "cross-rank reduce",
                "each rank has tokens of its own, and the declaration leaves the sum over ranks to the runner, which "
                "would add other ranks' tokens to them; finalize must sum, and output_reduced say so",
            )
        for rank, out in enumerate(outs):
            _check_form(setting, out, setting.sizes(number)[rank], f"rank {rank}:")
        total = torch.stack([out.cpu().to(torch.float64) for out in outs]).sum(0)
        self._check_rank(setting, total, 0, duty, number, "the sum over ranks:", explain)

    def _check_rank(
        self, setting: Setting, out: torch.Tensor, rank: int, duty: str, number: int, where: str, explain: bool
    ) -> None:
        if out.dtype != torch.float64:
            _check_form(setting, out, setting.sizes(number)[rank], where)
        truth, explanations = expected(setting, rank, number)
        steps = 4.0 + setting.world + 2 * setting.top_k
        check_numbers(
            out.cpu(),
            truth,
            duty=duty,
            steps=steps,
            dtype=setting.dtype,
            where=where,
            explanations=explanations if explain else None,
        )


def _check_form(setting: Setting, out: torch.Tensor, size: int, where: str) -> None:
    if tuple(out.shape) != (size, setting.hidden) or out.dtype != setting.dtype:
        raise Violation(
            "shapes and dtypes",
            f"{where} out is {tuple(out.shape)} {out.dtype}, not {(size, setting.hidden)} {setting.dtype}",
        )


def expected(setting: Setting, rank: int, number: int = 0) -> tuple[Truth, Explanations]:
    """The truth about one rank's batch, and what common mistakes would make of it."""
    x, _ = setting.batch(rank, number)
    spec = setting.scheme.activation
    if spec is not None:
        x = formats.quantize_dequantize(x, spec)  # on the wire in the scheme's own bits
    if setting.on_input:
        # the kernel rounds the product to the model dtype before anybody sees it
        _, routing = setting.batch(rank, number)
        weight = routing.topk_weights.masked_fill(routing.topk_ids < 0, 0.0)
        once = Problem64(
            (x * weight).to(setting.dtype),
            Routing(routing.topk_ids, torch.ones_like(weight)),
            setting.weights,
            PLAIN,
        )
        return once.truth, once.explanations()
    problem = setting.problem64(rank, number, x)
    found = dict(problem.explanations())
    for other in range(setting.world if setting.world > 1 and setting.topology != "split" else 0):
        held = ExpertMapManager(setting.experts, setting.world, other, setting.placement).local_experts
        ids = problem.routing.topk_ids
        lost = functools.reduce(torch.logical_or, [ids == expert for expert in held])
        found[f"cross-rank reduce: what rank {other}'s experts give is missing"] = functools.partial(
            _sum_of, problem, ids.masked_fill(lost, -1)
        )
        found[f"cross-rank reduce: only what rank {other}'s experts give is there"] = functools.partial(
            _sum_of, problem, ids.masked_fill(~lost, -1)
        )
    if setting.world > 1:
        found["cross-rank reduce: it was summed once too often"] = lambda: setting.world * _sum_of(problem)
    return problem.truth, found


def _sum_of(problem: Problem64, ids: torch.Tensor | None = None) -> torch.Tensor:
    return problem.terms(ids).sum(0)
