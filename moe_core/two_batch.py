"""`TwoBatchRunner`: a layer's tokens in two micro-batches, one of which travels while the other one's experts run.

Shape letters: T tokens on this rank · H hidden · M the largest T of any rank (`MoEConfig.max_tokens_per_rank`).

    wire      dispatch A │ dispatch B │ combine A │ combine B
    experts              │ A          │ B         │ (shared experts, where the plan hides them)

Both micro-batches are dispatched on every rank and on every step, whatever T is, since the ranks must enter the same
collectives in the same order and know only their own T.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import attrs
import torch

from moe_core.errors import MoEError, UnsupportedError
from moe_core.hookspecs import PLUGIN_API, hookimpl
from moe_core.kernel import Flight, MoEKernel, on_side_stream
from moe_core.runner import MoERunner
from moe_core.select import Plan
from moe_core.types import Routing, SharedExpertsOrder

moe_core_api = PLUGIN_API


class TwoBatchRunner(MoERunner):
    """`MoERunner` with two micro-batches in flight: dual-batch overlap.

    A row's result is that of the default runner, as far as the experts' result for a row does not depend on how many
    rows they get at once. What is gained is the time on the wire; what it costs is experts that are launched twice, on
    half of the rows: it pays where many tokens travel far. `build_runner(…, runner="two_batch")` makes one.

    Raises:
        UnsupportedError: the plan's dispatch holds fewer than two micro-batches, or its experts route by themselves.
    """

    def _kernel_of(self, plan: Plan, *, agree: bool = True) -> MoEKernel:
        """A kernel for half of the tokens: buffers of M / 2 rows, and the other ranks asked whether they halve too."""
        limit = plan.dispatch.capabilities.max_in_flight
        if plan.routes_internally:
            raise UnsupportedError(
                "runner two_batch: the experts of this plan take logits and route by themselves, so nothing is "
                "dispatched that could be hidden; use runner = 'default'"
            )
        if limit is not None and limit < 2:
            raise UnsupportedError(
                f"runner two_batch holds 2 micro-batches in flight, and dispatch {plan.dispatch.name} declares "
                f"max_in_flight = {limit}; use runner = 'default', or a dispatch that holds more"
            )
        self._plan = plan
        return MoEKernel(_halved(plan), self._group, agree=agree, agreed={"micro-batches": 2})

    @property
    def plan(self) -> Plan:
        return self._plan

    def _run_kernel(
        self, routed_in: torch.Tensor, routing: Routing, shared_in: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        order, shared_out, join = self.plan.shared_experts_order, None, None
        if order is SharedExpertsOrder.SEQUENTIAL:
            shared_out = self._shared(shared_in)
        elif order is SharedExpertsOrder.MULTI_STREAM:
            assert shared_in is not None, "shared experts come with their input"
            join = on_side_stream(self._shared, shared_in)
        out = torch.empty(routed_in.shape, dtype=routed_in.dtype, device=routed_in.device)
        step = _Step(self._kernel, routed_in, routing, out)
        try:
            step.start(0)
            step.receive(0)
            step.start(1)
            step.run_experts(0, self.routed_experts.weights)
            step.receive(1)
            step.run_experts(1, self.routed_experts.weights)
            step.finish(0)
            if order is SharedExpertsOrder.INTERNAL:
                shared_out = self._shared(shared_in)
            step.finish(1)
        except BaseException:
            step.abandon()
            raise
        return out, join() if join else shared_out

    def _shared(self, shared_in: torch.Tensor | None) -> torch.Tensor:
        assert self._shared_experts is not None and shared_in is not None, "shared experts come with their input"
        shared_out: torch.Tensor = self._shared_experts(shared_in)
        return shared_out


class _Step:
    """The two micro-batches of a step, each in the stage that it has come to. Lives as long as the step."""

    def __init__(self, kernel: MoEKernel, x: torch.Tensor, routing: Routing, out: torch.Tensor) -> None:
        half = -(-x.shape[0] // 2)
        self.kernel = kernel
        self.parts = [
            (x[rows], Routing(routing.topk_ids[rows], routing.topk_weights[rows]), out[rows])
            for rows in (slice(half), slice(half, None))
        ]
        self.arrivals: dict[int, Callable[[], Flight]] = {}
        self.flights: dict[int, Flight] = {}
        self.ends: dict[int, Callable[[], None]] = {}

    def start(self, number: int) -> None:
        self.arrivals[number] = self.kernel.dispatch_start(*self.parts[number])

    def receive(self, number: int) -> None:
        self.flights[number] = self.arrivals.pop(number)()

    def run_experts(self, number: int, weights: Any) -> None:
        """And start the combine."""
        flight = self.flights.pop(number)  # from here on the kernel frees its slot, whatever fails
        self.ends[number] = self.kernel.combine(flight, self.kernel.run_experts(flight, weights))

    def finish(self, number: int) -> None:
        self.ends.pop(number)()

    def abandon(self) -> None:
        """After an error, which is the one to be raised: end what is under way, so that no slot stays taken."""
        for number in [*self.ends]:
            with contextlib.suppress(MoEError):
                self.finish(number)
        for number in [*self.arrivals]:
            with contextlib.suppress(MoEError):
                self.receive(number)
        for flight in self.flights.values():
            self.kernel.abandon(flight)


def _halved(plan: Plan) -> Plan:
    """The same plan for micro-batches: M / 2 rows a rank, rounded up."""
    config = plan.config
    if config.max_tokens_per_rank is None:
        return plan
    config = attrs.evolve(config, max_tokens_per_rank=-(-config.max_tokens_per_rank // 2))
    return attrs.evolve(plan, problem=attrs.evolve(plan.problem, config=config))


@hookimpl
def moe_core_register_runners(register: Callable[..., None]) -> None:
    register("two_batch", TwoBatchRunner)
