"""`MoEKernel`: one dispatch backend and the experts of a plan's ranges, joined into a step.

Shape letters: T tokens on this rank · H hidden · E experts, global · E_l local experts · K top-k · R received rows ·
C row capacity per local expert.

The kernel holds no weights and no shared experts: both are arguments. What the backends do not take (a dropped id,
another id dtype, physical ids) is arranged here, once, so that no backend arranges it differently.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import torch

from moe_core import forms
from moe_core.agreement import check_agreement
from moe_core.answers import footprint_of
from moe_core.errors import CollectiveError, MoEError
from moe_core.expert_map import ExpertMapManager
from moe_core.interfaces import Candidate, Experts, Group
from moe_core.select import Plan
from moe_core.types import (
    ActivationFormat,
    Dispatched,
    ExpertPlacement,
    ExpertsCapabilities,
    ExpertWeights,
    Routing,
    SharedExpertsOrder,
)

_ALIGNMENT = 256
"""Bytes. Workspaces start at multiples of this: enough for any vector load and for TMA descriptors."""
_MAX_CARVINGS = 1024
"""Row counts whose workspaces are remembered; serving meets few, a prefill of every length should not pile up."""


@attrs.define
class Flight:
    """One micro-batch between dispatch and combine."""

    dispatched: Dispatched
    routing: Routing
    out: torch.Tensor


class MoEKernel:
    """Runs prepare → experts → finalize. Made from a plan; replaced, never altered, when the plan changes.

    Args:
        plan: the layer's plan.
        group: its ranks; None: one rank.
        agree: compare the plan with those of the other ranks first. False: they have agreed on it (a copy, say, which
            not every rank need make).
        agreed: what the caller makes of the plan, and the ranks must make alike, to be compared with it.
    """

    def __init__(
        self, plan: Plan, group: Group | None = None, *, agree: bool = True, agreed: Mapping[str, Any] | None = None
    ) -> None:
        config, parallel = plan.config, plan.problem.parallel
        if agree and group is not None:
            _agree(plan, group, agreed or {})  # before the backends are made, which may enter collectives
        arguments = (config, parallel, plan.scheme, group, config.placement)
        self.plan = plan
        self.expert_map = ExpertMapManager(config.num_experts, parallel.ep_size, parallel.ep_rank, config.placement)
        self.prepare_finalize = forms.made_dispatch(plan.dispatch, arguments)
        self.experts = [forms.made_experts(item.candidate, arguments) for item in plan.ranges]
        for item, experts in zip(plan.ranges, self.experts, strict=True):
            if table := plan.launch.get(item.candidate.label):
                experts.use_launch(table)
        self._first_rows = [item.first_row for item in plan.ranges]
        self._accepts_dropped = [item.candidate.capabilities.accepts_dropped_ids for item in plan.ranges]
        self._maps_to_physical = (
            config.placement is ExpertPlacement.ROUND_ROBIN
            and parallel.ep_size > 1
            and plan.dispatch.capabilities.needs_round_robin_routing_tables
        )
        own = self.expert_map.local_experts
        self._own_expert = parallel.ep_rank * len(own) if self._maps_to_physical else own[0]
        self._weight_on_input = config.router_weight_on_input and config.top_k == 1
        # a first step may be a graph capture, and a table made inside one would be lost: make them now
        self.expert_map.expert_map(plan.problem.device.type)
        if self._maps_to_physical:
            self.expert_map.global_to_physical(plan.problem.device.type)
        self._in_flight = 0
        self._carvings: dict[tuple[int, int], _Carving] = {}
        for index, first in enumerate(self._first_rows):
            self._carving(index, max(first, 1))  # a malformed declaration is told now, and not in the first step

    def __call__(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        weights: ExpertWeights,
        *,
        shared_experts: Callable[[torch.Tensor], torch.Tensor] | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step.

        Args:
            hidden_states: `[T, H]`, any strides; never written.
            routing: global ids `[T, K]` with -1 = none, weights `[T, K]` float32.
            weights: the layer's weights.
            shared_experts: called once, at the moment that the plan's `shared_experts_order` names, with
                `shared_experts_input`.

        Returns:
            the routed output `[T, H]` (summed over this rank's experts only, unless `plan.output_is_reduced`), and
            the shared experts' output or None.
        """
        if shared_experts is None:
            flight = self.dispatch(hidden_states, routing)
            self.combine(flight, self.run_experts(flight, weights))()
            return flight.out, None
        assert shared_experts_input is not None, "shared experts come with their input"
        order, shared_out = self.plan.shared_experts_order, None
        if order is SharedExpertsOrder.SEQUENTIAL:
            shared_out = shared_experts(shared_experts_input)
        join = None
        if order is SharedExpertsOrder.MULTI_STREAM:
            join = on_side_stream(shared_experts, shared_experts_input)
        flight = self.dispatch(hidden_states, routing)
        finish = self.combine(flight, self.run_experts(flight, weights))
        if order is SharedExpertsOrder.INTERNAL:
            try:
                shared_out = shared_experts(shared_experts_input)
            finally:
                finish()  # the combine is under way: it ends, whatever the shared experts did
        else:
            finish()
        return flight.out, join() if join else shared_out

    def dispatch(self, hidden_states: torch.Tensor, routing: Routing) -> Flight:
        """First stage: bring the rows to their experts. Every flight goes on to `run_experts` and `combine`."""
        return self.dispatch_start(hidden_states, routing)()

    def dispatch_start(
        self, hidden_states: torch.Tensor, routing: Routing, out: torch.Tensor | None = None
    ) -> Callable[[], Flight]:
        """The same in two halves, the second of which waits for the rows; it is called exactly once.

        Args:
            hidden_states, routing: as for `__call__`; not written before the second half.
            out: `[T, H]`, where the combine shall write; None: the flight brings its own.
        """
        caps = self.plan.dispatch.capabilities
        if caps.max_in_flight is not None and self._in_flight >= caps.max_in_flight:
            raise MoEError(
                f"dispatch {self.plan.dispatch.name} holds {self._in_flight} micro-batches in flight and declares "
                f"max_in_flight = {caps.max_in_flight}; combine one before the next dispatch"
            )
        if self.plan.config.debug:
            self._check_inputs(hidden_states, routing)
        hidden_states, routing = self._admit(hidden_states, routing)
        if out is None:
            out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        try:
            receive = self.prepare_finalize.prepare_start(
                hidden_states,
                routing,
                num_experts=self.plan.config.num_experts,
                expert_map=None if self._maps_to_physical else self.expert_map.expert_map(hidden_states.device),
                payload=self.plan.payload,
            )
        except CollectiveError as error:
            error.during(f"prepare of {self.plan.dispatch.name}")
            raise
        self._in_flight += 1
        return functools.partial(self._arrive, receive, routing, out)

    def _arrive(self, receive: Callable[[], Dispatched], routing: Routing, out: torch.Tensor) -> Flight:
        """Second half of `dispatch`."""
        try:
            flight = Flight(receive(), routing, out)
        except BaseException as error:
            self._in_flight -= 1
            if isinstance(error, CollectiveError):
                error.during(f"prepare of {self.plan.dispatch.name}")
            raise
        if self.plan.config.debug:
            try:
                self._check_dispatched(flight.dispatched)
            except MoEError:
                self._release(flight)
                raise
        return flight

    def run_experts(self, flight: Flight, weights: ExpertWeights) -> torch.Tensor:
        """Second stage: STANDARD `[R, H]`, or BATCHED `[E_l, C, H]`."""
        dispatched = flight.dispatched
        try:
            standard = self.plan.activation_format is ActivationFormat.STANDARD
            rows = dispatched.x.shape[0 if standard else 1]
            index = bisect.bisect_right(self._first_rows, rows) - 1
            if standard:
                if not self._accepts_dropped[index]:
                    dispatched = _redirect_dropped(dispatched)
                dispatched = _with_contiguous_choices(dispatched)
            expert_out = self.prepare_finalize.expert_output(dispatched, flight.out)
            if expert_out is None:
                shape = (*dispatched.x.shape[:-1], flight.out.shape[-1])  # a packed payload has another last extent
                expert_out = dispatched.x.new_empty(shape, dtype=flight.out.dtype)
            if dispatched.x.numel():
                workspaces = self._workspaces(index, rows, dispatched.x.device)
                returned: Any = self.experts[index].apply(dispatched, weights, workspaces, expert_out)
                if returned is not None and self.plan.config.debug:
                    raise MoEError(
                        f"{forms.who('experts', self.plan.ranges[index].candidate)}: apply returned a "
                        f"{type(returned).__name__}; expected None, and the result in out (Experts.apply, docs/api.md)"
                    )
            return expert_out
        except BaseException:
            self._release(flight)
            raise

    def combine(self, flight: Flight, expert_out: torch.Tensor) -> Callable[[], None]:
        """Third stage, first half: start the combine. Calling the result ends it; then `flight.out` is written."""
        try:
            receive = self.prepare_finalize.finalize_start(
                expert_out, flight.dispatched.handle, flight.routing, flight.out
            )
        except BaseException as error:
            self._release(flight)
            if isinstance(error, CollectiveError):
                error.during(f"finalize of {self.plan.dispatch.name}")
            raise

        def finish() -> None:
            self._in_flight -= 1  # not before: until then the backend's buffer is taken
            try:
                receive()
            except CollectiveError as error:
                error.during(f"finalize of {self.plan.dispatch.name}")
                raise

        return finish

    def abandon(self, flight: Flight) -> None:
        """Give a dispatched micro-batch up that will not be combined, because something else has failed."""
        self._release(flight)

    def run_from_logits(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, weights: ExpertWeights
    ) -> torch.Tensor:
        """A step of experts that route by themselves (`plan.routes_internally`): `[T, H]`, `[T, E]` → `[T, H]`."""
        if hidden_states.stride(-1) != 1:
            hidden_states = hidden_states.contiguous()
        out = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
        rows = hidden_states.shape[0]
        if rows:
            index = bisect.bisect_right(self._first_rows, rows) - 1
            workspaces = self._workspaces(index, rows, hidden_states.device)
            self.experts[index].apply_from_logits(hidden_states, router_logits, weights, workspaces, out)
        return out

    def check(self) -> None:
        """Raise what a step could not raise without a host sync."""
        self.prepare_finalize.check()

    def workspace_bytes(self, rows: int) -> int:
        """The workspaces of a step at a row bound, in bytes: exactly what the kernel allocates for its experts."""
        return self._carving(bisect.bisect_right(self._first_rows, rows) - 1, rows).total

    def _release(self, flight: Flight) -> None:
        self._in_flight -= 1
        if isinstance(flight.dispatched, Dispatched):  # else debug mode has just said that it is not
            self.prepare_finalize.release(flight.dispatched.handle)

    def _admit(self, hidden_states: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, Routing]:
        """Give the dispatch what it declared: unit stride in H, its id dtype, physical ids, no -1, weight 1."""
        caps = self.plan.dispatch.capabilities
        ids, weights = routing.topk_ids, routing.topk_weights
        if hidden_states.stride(-1) != 1:
            hidden_states = hidden_states.contiguous()
        if self._weight_on_input:
            hidden_states = (hidden_states * torch.where(ids < 0, 0.0, weights)).to(hidden_states.dtype)
            weights = torch.ones_like(weights)
        if self._maps_to_physical:
            ids = self.expert_map.remap_to_physical(ids)
        if caps.id_dtype is not None:
            ids = ids.to(caps.id_dtype)
        if not caps.accepts_dropped_ids:
            ids, weights, hidden_states = _without_dropped(ids, weights, hidden_states, self._own_expert)
        return hidden_states, Routing(ids, weights)

    def _workspaces(self, index: int, rows: int, device: torch.device) -> Mapping[str, torch.Tensor]:
        carving = self._carving(index, rows)
        if not carving.total:
            return {}
        return _Workspaces(carving, torch.empty(carving.total, dtype=torch.uint8, device=device))

    def _carving(self, index: int, rows: int) -> _Carving:
        key = (index, rows)
        if key not in self._carvings:
            if len(self._carvings) >= _MAX_CARVINGS:
                self._carvings.clear()
            candidate = self.plan.ranges[index].candidate
            shapes = forms.workspace_shapes(candidate, self.experts[index], rows, self.plan.activation_format)
            self._carvings[key] = _Carving.of(shapes)
        return self._carvings[key]

    def _check_inputs(self, hidden_states: torch.Tensor, routing: Routing) -> None:
        """Debug mode: what would else be an illegal access or a wrong number. Reads values on the host."""
        config, ids = self.plan.config, routing.topk_ids
        tokens = hidden_states.shape[0]
        for name, tensor in (("topk_ids", ids), ("topk_weights", routing.topk_weights)):
            if tuple(tensor.shape) != (tokens, config.top_k):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; expected (T, K) = ({tokens}, {config.top_k})"
                )
        if tokens and (int(ids.max()) >= config.num_experts or int(ids.min()) < -1):
            raise ValueError(
                f"topk_ids range from {int(ids.min())} to {int(ids.max())}; legal ids are -1 to num_experts - 1 = "
                f"{config.num_experts - 1}"
            )
        if not self.plan.dispatch.capabilities.accepts_duplicate_ids:
            rows = ids.sort(dim=1).values
            if bool(((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).any()):
                raise ValueError(
                    f"a row of topk_ids holds an id twice, which dispatch {self.plan.dispatch.name} forbids"
                )

    def _check_dispatched(self, dispatched: Dispatched) -> None:
        """Debug mode: hold a backend to the contract of `Dispatched`."""
        misfit = forms.misfit(self.plan, dispatched, self.expert_map.num_local_experts)
        if misfit is not None:
            raise MoEError(f"{forms.who('dispatch', self.plan.dispatch)}: {misfit.text}")


def row_bound(plan: Plan, tokens: int) -> int | None:
    """The row bound, by which ranges go, at T tokens on every rank; None: the dispatch does not declare it."""
    declared = footprint_of(plan.dispatch, plan.problem, plan.payload, tokens)
    if declared is not None:
        return declared.rows
    stays = plan.activation_format is ActivationFormat.STANDARD and plan.problem.parallel.ep_size == 1
    return tokens if stays else None


def workspace_bytes(
    candidate: Candidate[ExpertsCapabilities], experts: Experts, rows: int, activation_format: ActivationFormat
) -> int:
    """The workspaces of a step at a row bound, in bytes: exactly what a kernel allocates for a candidate's experts."""
    return _Carving.of(forms.workspace_shapes(candidate, experts, rows, activation_format)).total


def workspace_bytes_by_name(
    candidate: Candidate[ExpertsCapabilities], experts: Experts, rows: int, activation_format: ActivationFormat
) -> dict[str, int]:
    """The same, workspace by workspace, each with what aligns the next one."""
    shapes = forms.workspace_shapes(candidate, experts, rows, activation_format)
    return {name: _Carving.of({name: shape}).total for name, shape in shapes.items()}


def _agree(plan: Plan, group: Group, agreed: Mapping[str, Any]) -> None:
    """Hold the group to the plan, and the ranks' plans to one another."""
    parallel = plan.problem.parallel
    name, size, rank = ("tp", parallel.tp_size, parallel.tp_rank)
    if parallel.ep_size > 1:
        name, size, rank = "ep", parallel.ep_size, parallel.ep_rank
    if size == 1 or getattr(group, "store", None) is None:  # without a store nothing can be told outside a collective
        return
    misfit = ""
    if (group.size, group.rank) != (size, rank):
        misfit = (
            f"the group is rank {group.rank} of {group.size}, and MoEParallelConfig says {name}_rank = {rank}, "
            f"{name}_size = {size}: pass the group of the ranks that share this layer's experts"
        )
    fingerprint = {**plan.fingerprint(), **agreed, "group": misfit or "as planned"}  # told to all, so that all end
    check_agreement(group, fingerprint, plan.advice())
    if misfit:
        raise MoEError(misfit)


@attrs.frozen
class _Carving:
    """How one allocation is cut into workspaces.

    Attributes:
        total: bytes.
        pieces: name → (dtype, shape, strides, offset in elements of that dtype).
    """

    total: int
    pieces: Mapping[str, tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> _Carving:
        pieces, offset = {}, 0
        for name, (shape, dtype) in shapes.items():
            strides, size = [], 1
            for extent in reversed(shape):
                strides.append(size)
                size *= extent
            pieces[name] = (dtype, shape, tuple(reversed(strides)), offset // dtype.itemsize)
            offset += -(-size * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return cls(offset, pieces)


class _Workspaces(Mapping[str, torch.Tensor]):
    """One allocation, cut where it is read: a view costs host time on every step, and most kernels read few of them."""

    __slots__ = ("_carving", "_cut", "_storage", "_typed")

    def __init__(self, carving: _Carving, storage: torch.Tensor) -> None:
        self._carving = carving
        self._storage = storage
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._cut: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self._cut.get(name)
        if found is None:
            dtype, shape, strides, offset = self._carving.pieces[name]
            typed = self._typed.get(dtype)
            if typed is None:
                typed = self._typed[dtype] = self._storage.view(dtype)
            found = self._cut[name] = typed.as_strided(shape, strides, offset)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._carving.pieces)

    def __len__(self) -> int:
        return len(self._carving.pieces)


def _without_dropped(
    ids: torch.Tensor, weights: torch.Tensor, hidden_states: torch.Tensor, own_expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Send each -1 to its row's first valid id with weight 0; a row of nothing but -1 to `own_expert`, as zeros."""
    dropped = ids < 0
    first = ids.gather(1, (~dropped).to(torch.int8).argmax(dim=1, keepdim=True))
    empty = first < 0
    ids = torch.where(dropped, torch.where(empty, own_expert, first), ids)
    return ids, torch.where(dropped, 0.0, weights), hidden_states.masked_fill(empty, 0.0)


def _redirect_dropped(dispatched: Dispatched) -> Dispatched:
    """The same for experts that take no -1, after the dispatch: local ids, so the own expert is 0."""
    assert dispatched.topk_ids is not None and dispatched.topk_weights is not None
    ids, weights, x = _without_dropped(dispatched.topk_ids, dispatched.topk_weights, dispatched.x, 0)
    return attrs.evolve(dispatched, x=x, topk_ids=ids, topk_weights=weights)


def _with_contiguous_choices(dispatched: Dispatched) -> Dispatched:
    """The same with contiguous ids and weights: a dispatch may hand over views on the rows that it received."""
    ids, weights = dispatched.topk_ids, dispatched.topk_weights
    assert ids is not None and weights is not None
    if ids.is_contiguous() and weights.is_contiguous():
        return dispatched
    return attrs.evolve(dispatched, topk_ids=ids.contiguous(), topk_weights=weights.contiguous())


_side_streams: dict[torch.device, Any] = {}


def on_side_stream(run: Callable[[torch.Tensor], torch.Tensor], value: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start `run(value)` on a second stream; the result waits for it and hands its output to the current stream."""
    stream = _side_streams.get(value.device)
    if stream is None:
        stream = _side_streams[value.device] = torch.cuda.Stream(value.device)
    current = torch.cuda.current_stream(value.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = run(value)
    value.record_stream(stream)

    def join() -> torch.Tensor:
        current.wait_stream(stream)
        result.record_stream(current)
        return result

    return join
