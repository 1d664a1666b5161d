"""Measures, on this machine, what selection cannot know: which experts, with which launch parameters, are the fastest.

Shape letters: T tokens · H hidden · I intermediate · E experts · K top-k.

One layer with random weights is built by its plan. At each T every experts backend that may stand in the plan first
searches its launch parameters (`Experts.launch_search`), then is compared with the truth, then timed. Each result is
stored at once, so that an interrupted run goes on where it ended. Compiling takes longer than measuring: what the
searches will ask for is compiled by other processes meanwhile.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.answers import refusal
from moe_core.emulated import EmulatedExperts
from moe_core.errors import MoEError
from moe_core.forms import made_experts, made_method
from moe_core.interfaces import Experts
from moe_core.kernel import MoEKernel, row_bound
from moe_core.plugins import registry
from moe_core.quant import UNQUANTIZED
from moe_core.ranges import ExpertsCandidate, ExpertsRange, contenders
from moe_core.reference import moe_reference
from moe_core.routed_experts import RoutedExperts
from moe_core.select import Plan
from moe_core.timing import host_us, step_us
from moe_core.tuned import NOT_TUNED, Tuned, TunedFormat, TunedPoint, read_tuned, write_tuned
from moe_core.types import ActivationFormat, Device, Dispatched, ExpertWeights, Routing

TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative Frobenius error against the reference in fp32, of unquantized layers."""
QUANTIZED_TOLERANCE = 3e-2
"""The same of quantized ones, against the scheme's emulation: where a value falls between two of the format's, the last
bit of what was quantized decides."""
CHECKED_TOKENS = 32
INPUT_AMAX = 5.0
"""What static input scales are made for: inputs are normally distributed, and activations are smaller."""
GRAPH_UP_TO = 1024
"""Above this T the host is faster than the device, and a graph would only cost memory."""
INPUT_SETS = 8
"""Inputs rotate, so that no activation is in a cache by accident."""
MAX_PROCESSES = 16
"""That compile beside one another unless asked otherwise: each holds a torch of its own, some hundred megabytes."""
LOST = "left the device or the process unusable"
"""How a failure begins that a later run does not try again unless it is asked to."""


class DeviceLostError(MoEError):
    """A kernel left the device unusable for this process. What was measured before is stored."""


@attrs.frozen
class _Case:
    """One T and the row bound that it makes; inputs, and what the first set's first rows must give (`[N, H]` fp32)."""

    tokens: int
    rows: int
    inputs: tuple[tuple[torch.Tensor, Routing], ...]
    truth: torch.Tensor


def nothing_to_tune(plan: Plan) -> str:
    """Why there is nothing to measure for a plan; "": there is."""
    rivals = contenders(plan.fitting)
    if len(rivals) > 1 or any(_searches(_make(candidate, plan)) for candidate in rivals):
        return ""
    return f"no experts but {rivals[0].name} come into question, and these have no launch parameters to search"


class Tuner:
    """Tunes the layer of a plan, on the plan's device, which must be this machine's.

    Args:
        plan: of one rank; its own measurements, if it has any, are kept and completed.
        device: where to measure.
        transposed: the weights' columns are contiguous, not their rows: as transformers stores gpt-oss. Unquantized
            layers only.
        search: also search launch parameters.
        again: measure anew what is stored already.
        tell: is given a line for people at every result.
        processes: that compile beside one another, where something is to be compiled.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        *,
        transposed: bool = False,
        search: bool = True,
        again: bool = False,
        tell: Callable[[str], None] = lambda line: None,
        processes: int | None = None,
    ) -> None:
        self.plan = plan
        self.rivals = contenders(plan.fitting)
        self._device = device
        self._transposed = transposed
        self._search_launch = search
        self._again = again
        self._tell = tell
        self._processes = processes or min(os.cpu_count() or 1, MAX_PROCESSES)
        self._pool: ProcessPoolExecutor | None = None
        self._compiling: dict[tuple[int, str, str], Future[None]] = {}
        known = read_tuned(plan.problem)
        self.tuned = NOT_TUNED if known.complaint else known

    @torch.no_grad()
    def run(self, tokens: Sequence[int], step: Callable[[], None] = lambda: None) -> Tuned:
        """Measure at these T, in rising order; `step` is called after each. Of T with one row bound, at the largest.

        Returns:
            all that is known of the layer now.

        Raises:
            DeviceLostError: a kernel broke the device; run again to go on with what comes after it.
        """
        by_bound = {row_bound(self.plan, t) or t: t for t in sorted(set(tokens))}
        missing = {r: t for r, t in by_bound.items() if not all(self._point(r).knows(c.label) for c in self.rivals)}
        for _ in range(len(set(tokens)) - len(missing)):
            step()
        if not missing:
            return self.tuned
        routed = self._make_layer()
        # before packing: the truth reads weights as they were loaded
        cases = [self._make_case(tokens, rows, routed.weights) for rows, tokens in missing.items()]
        routed.pack_weights()
        weights = _transposed(routed.weights) if self._transposed else routed.weights
        try:
            self._compile_ahead(cases, weights)
            for case in cases:
                self._measure(case, weights)
                step()
        finally:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
                self._pool = None
        return read_tuned(self.plan.problem)

    @property
    def _format(self) -> ActivationFormat:
        return self.plan.activation_format

    @property
    def _known(self) -> TunedFormat:
        return self.tuned.of(self._format)

    def _point(self, rows: int) -> TunedPoint:
        """What is known at one row bound. What failed without harm may run today, and counts as unknown."""
        found = next((point for point in self._known.points if point.rows == rows), None)
        if found is None or self._again:
            return TunedPoint(rows, {})
        return attrs.evolve(found, failures={k: v for k, v in found.failures.items() if v.startswith(LOST)})

    def _store(self, measured: TunedFormat) -> None:
        self.tuned = Tuned({**self.tuned.formats, self._format: measured})
        write_tuned(self.plan.problem, self.tuned)

    def _measure(self, case: _Case, weights: ExpertWeights) -> None:
        """Every rival at one T; stored after each."""
        before = self._point(case.rows)
        times, failures = dict(before.microseconds), dict(before.failures)

        def store() -> None:
            self._store(self._known.with_point(TunedPoint(case.rows, dict(times), dict(failures))))

        for candidate in self.rivals:
            label = candidate.label
            if label in times or label in failures:
                continue
            failures[label] = LOST  # replaced below, unless it does
            store()
            try:
                times[label] = self._tune(candidate, case, weights)
                del failures[label]
            except KeyboardInterrupt:
                del failures[label]
                store()
                raise
            except Exception as error:
                failures[label] = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                if _is_lost(self._device):
                    failures[label] = f"{LOST}: {failures[label]}"
                    store()
                    raise DeviceLostError(
                        f"experts {candidate.name} at T = {case.tokens} {failures[label]}. All results are stored, "
                        "this one as a failure; run the command again to go on after it"
                    ) from error
            store()
            result = f"{times[label]:.1f} us" if label in times else f"skipped: {failures[label]}"
            self._tell(f"T = {case.tokens}: {candidate.name} {result}")

    def _tune(self, candidate: ExpertsCandidate, case: _Case, weights: ExpertWeights) -> float:
        """Microseconds of one rival at one T, with the best launch parameters that it has."""
        kernel = MoEKernel(_alone(self.plan, candidate, self.tuned))
        if self._search_launch and _searches(kernel.experts[0]):
            self._search(candidate, kernel, case, weights)
        return self._time(kernel, candidate, case, weights)

    def _search(self, candidate: ExpertsCandidate, kernel: MoEKernel, case: _Case, weights: ExpertWeights) -> None:
        """Find the launch parameters of one backend at one T, store them, and leave the backend with them."""
        experts, best, fastest, tried, failed = kernel.experts[0], None, math.inf, 0, 0
        experts.use_launch(())
        search = experts.launch_search(case.rows, self._format, weights)
        batch = next(search, None)
        while batch is not None:
            self._wait_for_compiled(candidate, batch, case.rows)
            times = []
            for parameters in batch:
                experts.use_launch(((case.rows, parameters),))
                try:
                    times.append(self._time(kernel, candidate, case, weights, quick=True))
                except Exception:
                    if _is_lost(self._device):
                        raise
                    times.append(math.inf)
                if times[-1] < fastest:
                    best, fastest = parameters, times[-1]
            tried, failed = tried + len(times), failed + times.count(math.inf)
            try:
                batch = search.send(times)
            except StopIteration:
                break
        self._tell(f"T = {case.tokens}: {candidate.name}, {tried} launch parameters tried, {failed} could not run")
        if best is not None:
            self._store(self._known.with_launch(candidate.label, case.rows, best))
        experts.use_launch(self._known.launch.get(candidate.label, ()))

    def _time(
        self,
        kernel: MoEKernel,
        candidate: ExpertsCandidate,
        case: _Case,
        weights: ExpertWeights,
        *,
        quick: bool = False,
    ) -> float:
        """Microseconds of the experts' part of a step, after its result was found right.

        Raises:
            MoEError: it was wrong.
        """
        self._check(kernel, case, weights)
        limit = kernel.plan.dispatch.capabilities.max_in_flight
        flights = [kernel.dispatch(*item) for item in case.inputs[:limit]]
        calls = [functools.partial(kernel.run_experts, flight, weights) for flight in flights]
        if self._device.type == "cuda":
            graph = case.tokens <= GRAPH_UP_TO and _capturable(self.plan, candidate)
            time = step_us(calls, graph=graph, pause=0.02 if quick else 0.2)
        else:
            time = host_us(calls)
        for flight, call in zip(flights, calls, strict=True):
            kernel.combine(flight, call())()
        return time

    def _check(self, kernel: MoEKernel, case: _Case, weights: ExpertWeights) -> None:
        """One step, compared with the truth.

        Raises:
            MoEError: the result is wrong.
        """
        kernel(*case.inputs[1], weights)  # so that what lies in memory that nobody writes is no right result of before
        flight = kernel.dispatch(*case.inputs[0])
        flight.out.fill_(torch.nan)
        kernel.combine(flight, kernel.run_experts(flight, weights))()
        error = float((flight.out[: case.truth.shape[0]].float() - case.truth).norm() / case.truth.norm())
        right = TOLERANCE[self.plan.config.dtype] if self.plan.scheme == UNQUANTIZED else QUANTIZED_TOLERANCE
        if not error <= right or not bool(flight.out.isfinite().all()):
            raise MoEError(f"wrong result: relative error {error:.1e}, at most {right:.0e} is right")

    def _compile_ahead(self, cases: Sequence[_Case], weights: ExpertWeights) -> None:
        """Start to compile, in processes beside one another, what the searches of all cases may ask for."""
        if self._device.type != "cuda" or not self._search_launch or self._processes < 2:
            return
        self._pool = ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn"))
        problem, shapes = self.plan.problem, _described(weights)
        for case, candidate in itertools.product(cases, self.rivals):
            if self._point(case.rows).knows(candidate.label):
                continue
            for parameters in _rehearsed(_make(candidate, self.plan), case.rows, self._format, weights):
                job = (candidate.name, problem, parameters, case.rows, self._format, shapes)
                key = case.rows, candidate.label, repr(parameters)
                self._compiling[key] = self._pool.submit(_compile_one, job)
        if self._compiling:
            self._tell(f"compiling {len(self._compiling)} sets of launch parameters in {self._processes} processes")

    def _wait_for_compiled(self, candidate: ExpertsCandidate, batch: Sequence[Any], rows: int) -> None:
        """Until a batch is compiled; what failed there will fail again, and be noted, where it is measured."""
        here = {key[2]: future for key, future in self._compiling.items() if key[:2] == (rows, candidate.label)}
        asked = {repr(parameters) for parameters in batch}
        # Not foreseen: another combination of kernels that are being compiled, all but a few.
        wanted = [here[key] for key in asked] if asked <= here.keys() else here.values()
        try:
            for future in wanted:
                future.result()
        except BrokenProcessPool:
            self._tell("a compiling process died; from here on, kernels are compiled as they are measured")
            self._compiling.clear()

    def _make_layer(self) -> RoutedExperts:
        """Random weights of unit gain, loaded as a checkpoint's would be; not packed yet."""
        config, problem = self.plan.config, self.plan.problem
        if self._transposed and self.plan.scheme != UNQUANTIZED:
            raise MoEError(f"transposed weights of scheme {self.plan.scheme.name}: only unquantized ones can be")
        method = made_method(registry().find("quant_methods", self.plan.scheme.name))
        routed = RoutedExperts(self.plan, method, self._device)
        hidden, inner = config.experts_hidden_size, problem.local_intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"up": (inner, hidden), "down": (hidden, inner)}
        if config.activation.gated:
            shapes["gate"] = (inner, hidden)
        if config.activation.bias:
            shapes |= {f"{name}_bias": shape[:1] for name, shape in list(shapes.items())}
        activation = self.plan.scheme.activation
        reads_input_scale = "_input_scale" in method.required_kinds(packed=False)
        generator = torch.Generator(self._device).manual_seed(0)
        for expert in range(config.num_experts):
            for name, shape in shapes.items():
                values = torch.randn(shape, generator=generator, device=self._device, dtype=torch.float32)
                routed.load_expert(expert, name, (values / math.sqrt(shape[-1])).to(config.dtype))
                if reads_input_scale and activation is not None and "bias" not in name:
                    of = formats.global_scale_of if activation.second_level else formats.scale_of
                    routed.load_expert(expert, f"{name}_input_scale", of(torch.tensor(INPUT_AMAX), activation))
        return routed

    def _make_case(self, tokens: int, rows: int, weights: ExpertWeights) -> _Case:
        config, device = self.plan.config, self._device
        inputs = []
        for seed in range(INPUT_SETS if tokens <= GRAPH_UP_TO else 2):
            generator = torch.Generator().manual_seed(1000 * tokens + seed)
            ids = torch.rand(tokens, config.num_experts, generator=generator).topk(config.top_k, dim=1).indices
            router_weights = torch.softmax(torch.randn(tokens, config.top_k, generator=generator), dim=1)
            x = torch.randn(tokens, config.experts_hidden_size, generator=generator).to(config.dtype)
            inputs.append((x.to(device), Routing(ids.to(device), router_weights.to(device))))
        return _Case(tokens, rows, tuple(inputs), self._truth(*inputs[0], weights))

    def _truth(self, x: torch.Tensor, routing: Routing, weights: ExpertWeights) -> torch.Tensor:
        """By the reference; of a quantized layer by the scheme's formulas, which may look at all tokens at once."""
        config, scheme = self.plan.config, self.plan.scheme
        ids, router_weights = routing.topk_ids, routing.topk_weights
        if scheme.activation is None or scheme.activation.row_wise:
            x, ids, router_weights = x[:CHECKED_TOKENS], ids[:CHECKED_TOKENS], router_weights[:CHECKED_TOKENS]
        if scheme == UNQUANTIZED:
            on_input = config.router_weight_on_input
            return moe_reference(x, ids, router_weights, weights, config.activation, router_weight_on_input=on_input)
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        dispatched = Dispatched(x, None, topk_ids=ids, topk_weights=router_weights)
        EmulatedExperts(config, scheme).apply(dispatched, weights, {}, out)
        return out[:CHECKED_TOKENS]


def _make(candidate: ExpertsCandidate, plan: Plan) -> Experts:
    arguments = (plan.config, plan.problem.parallel, plan.scheme, None, plan.config.placement)
    return made_experts(candidate, arguments)


def _searches(experts: Experts) -> bool:
    return type(experts).launch_search is not Experts.launch_search


def _alone(plan: Plan, candidate: ExpertsCandidate, tuned: Tuned) -> Plan:
    """The plan with one candidate for every row bound, and the launch parameters that are known."""
    return attrs.evolve(plan, ranges=(ExpertsRange(0, candidate, "being measured"),), tuned=tuned)


def _capturable(plan: Plan, candidate: ExpertsCandidate) -> bool:
    """Whether the candidate would be accepted for a layer that is captured in a CUDA graph."""
    caps = candidate.capabilities
    problem = attrs.evolve(plan.problem, config=attrs.evolve(plan.config, cuda_graph=True))
    return caps.graph_capturable and not refusal(candidate, problem)


def _is_lost(device: torch.device) -> bool:
    """Whether an error has left the device so that every further call on it fails."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def _transposed(weights: ExpertWeights) -> ExpertWeights:
    """The same values with contiguous columns."""
    turned = {name: getattr(weights, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("w13", "w2")}
    return attrs.evolve(weights, **turned)


def _described(weights: ExpertWeights) -> dict[str, Any]:
    """A record's fields, with (shape, strides, dtype) for each tensor: what another process compiles for."""
    fields = {field.name: getattr(weights, field.name) for field in attrs.fields(ExpertWeights)}
    return {
        name: (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }


def _rehearsed(experts: Experts, rows: int, activation_format: ActivationFormat, weights: ExpertWeights) -> list[Any]:
    """What a search may ask for: all that it does when the first of each batch is the fastest, and when the last is."""
    found: dict[str, Any] = {}
    for direction in (1.0, -1.0) if _searches(experts) else ():
        try:
            search = experts.launch_search(rows, activation_format, weights)
            batch = next(search)
            while True:
                found |= {repr(parameters): parameters for parameters in batch}
                batch = search.send([1000.0 + direction * place for place in range(len(batch))])
        except Exception:  # noqa: BLE001 - its end, or what it will raise again where its backend is measured
            continue
    return list(found.values())


def _compile_one(job: tuple[Any, ...]) -> None:
    """In a process of its own: compile one set of launch parameters."""
    name, problem, parameters, rows, activation_format, described = job
    device: Device = problem.device
    arguments = (problem.config, problem.parallel, problem.scheme, None, problem.config.placement)
    experts = made_experts(registry().find("experts", name), arguments)
    fields: dict[str, Any] = {
        key: torch.empty_strided(value[0], value[1], dtype=value[2], device="meta") if type(value) is tuple else value
        for key, value in described.items()
    }
    try:
        experts.compile_launch(parameters, rows, activation_format, ExpertWeights(**fields), device)
    except Exception:  # noqa: BLE001 - see `Tuner._wait_for_compiled`
        return
