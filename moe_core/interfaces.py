"""The contract: what a dispatch backend, an experts backend, a router and a runner must do.

Shape letters: T tokens on this rank · H hidden · I intermediate per rank · E experts, global · E_l local experts ·
K top-k · R received rows · C row capacity per local expert · W ranks.

Three rules hold for every method here: state between stages is the returned `handle`, nothing is kept on `self`;
no tensor that was handed in is written, except `out` and the workspaces; T = 0 and R = 0 are valid.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import attrs
import torch

from moe_core.config import MoEConfig, MoEParallelConfig
from moe_core.quant import QuantMethod, QuantScheme
from moe_core.types import (
    ActivationFormat,
    Availability,
    Device,
    DispatchCapabilities,
    Dispatched,
    Duty,
    ExpertPlacement,
    ExpertsCapabilities,
    ExpertWeights,
    LaunchRange,
    Priority,
    Routing,
)

Finish = Callable[[], torch.Tensor]
"""The second half of a collective: waits, and returns its result. Called exactly once."""


class Group(Protocol):
    """The ranks that share a layer. Plugins talk to this, never to a global.

    Collectives are entered by every rank in the same order. Three have a form in two halves, for work in between:
    `…_start` enters the collective and returns its `Finish`; until that has been called, the tensor that was passed in
    may not be written. On a device the wait is the current stream's, not the host's.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def torch_group(self) -> Any | None:
        """The `torch.distributed` group behind it, or None."""

    @property
    def store(self) -> Any:
        """A key-value store that all ranks see, with `torch.distributed.Store`'s `set`, `get`, `add` and `wait`."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, as a new tensor of the same shape and dtype."""

    def all_gather(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """All ranks' tensors, concatenated along dim 0 in rank order; `sizes`: their lengths, if unequal."""

    def all_gather_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        """The same in two halves."""

    def reduce_scatter(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> torch.Tensor:
        """The sum over ranks of the part of dim 0 that is this rank's."""

    def reduce_scatter_start(self, tensor: torch.Tensor, sizes: list[int] | None = None) -> Finish:
        """The same in two halves."""

    def all_to_all(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Send `send[r]` rows of dim 0 to rank r in turn, receive `receive[r]` rows from it, in rank order."""

    def all_to_all_start(self, tensor: torch.Tensor, send: list[int], receive: list[int]) -> Finish:
        """The same in two halves."""

    def barrier(self) -> None: ...

    def await_device(self, stage: str) -> None:
        """Wait for what the device was given, in the group's timeout; `CollectiveError` with the stage if it is not
        done, as where a collective's partner is missing. Nothing to wait for where collectives end on the host.
        """


class PrepareAndFinalize(abc.ABC):
    """A dispatch backend: brings rows to experts (prepare) and results back (finalize)."""

    @abc.abstractmethod
    def prepare(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Dispatched:
        """Dispatch this rank's tokens.

        Args:
            hidden_states: `[T, H]` in the model dtype, any strides. Never written: it may be the residual stream.
            routing: ids `[T, K]` in the declared `id_dtype`, already physical where the backend wants tables;
                -1 = none, if it accepts that. Weights `[T, K]` float32.
            num_experts: E, global.
            expert_map: int32 `[E]` on the device, id → local index on this rank or -1. None: this rank holds all, or
                the ids are physical already.
            payload: what goes over the wire: `plan.payload`.

        Returns:
            the rows for this rank's experts; its `handle` goes to exactly one `finalize` of this object.
        """

    @abc.abstractmethod
    def finalize(self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor) -> None:
        """Combine.

        Args:
            expert_out: STANDARD `[R, H]`, weighted and summed over this rank's experts. BATCHED `[E_l, C, H]`, raw.
            handle: from this object's `prepare`; consumed.
            routing: the very `Routing` that `prepare` was given.
            out: `[T, H]`, written whole.
        """

    def prepare_start(
        self,
        hidden_states: torch.Tensor,
        routing: Routing,
        *,
        num_experts: int,
        expert_map: torch.Tensor | None,
        payload: str,
    ) -> Callable[[], Dispatched]:
        """First half of `prepare`; calling what it returns is the second. Override both halves with `split = True`."""
        dispatched = self.prepare(
            hidden_states, routing, num_experts=num_experts, expert_map=expert_map, payload=payload
        )
        return lambda: dispatched

    def finalize_start(
        self, expert_out: torch.Tensor, handle: Any, routing: Routing, out: torch.Tensor
    ) -> Callable[[], None]:
        """First half of `finalize`; after calling what it returns, `out` is written."""
        self.finalize(expert_out, handle, routing, out)
        return lambda: None

    def expert_output(self, dispatched: Dispatched, out: torch.Tensor) -> torch.Tensor | None:
        """Where the experts shall write: a buffer of this backend's, or `out` itself. None: the core allocates."""
        return None

    def release(self, handle: Any) -> None:
        """Give back what a handle holds, when an exception means that its `finalize` will never come."""

    def check(self) -> None:
        """Raise what a step could not raise without a host sync, a `CapacityError` say."""


WorkspaceShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name → (shape, dtype). The core allocates all of a step's workspaces at once and hands them over by name."""


class Experts(abc.ABC):
    """An experts backend: w13, activation, w2 on the rows that a dispatch delivers."""

    @abc.abstractmethod
    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """Scratch memory for a step. Host arithmetic only: no device values, so graphs can be captured.

        Args:
            rows: STANDARD: R, the length of `Dispatched.x`. BATCHED: C, the capacity per local expert.
            activation_format: which of the two.
        """

    @abc.abstractmethod
    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """Run the experts.

        Args:
            dispatched: the rows; ids and weights are contiguous. Rows past `num_rows` or past an expert's count, and
                rows whose ids are all -1, may hold NaN and must not reach any result.
            weights: this layer's weights, as views.
            workspaces: as declared, uninitialised.
            out: STANDARD `[R, H]`: every row is written, rows without an expert with zeros. BATCHED `[E_l, C, H]`:
                rows past the count need not be written.
        """

    def apply_from_logits(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """Route and run in one: only of backends that declare `routes_internally`. Shapes `[T, H]`, `[T, E]`."""
        raise NotImplementedError(f"{type(self).__name__} does not route internally")

    def launch_ranges(self, activation_format: ActivationFormat, device: Device) -> tuple[LaunchRange, ...]:
        """Which kernels serve which row bounds on a device, for `explain`; the device need not be here. (): one way."""
        return ()

    def launch_search(
        self, rows: int, activation_format: ActivationFormat, weights: ExpertWeights
    ) -> Generator[Sequence[Any], Sequence[float], None]:
        """Search for the best launch parameters at a row bound; `moe-core tune` runs it.

        It runs with invented times too: what it may ask for is compiled before it is measured.

        Yields:
            lists of launch parameters (whatever JSON can hold) to be measured. What comes back is the time of a step
            with each, in microseconds; infinity: it failed, or its result was wrong.
        """
        yield from ()

    def compile_launch(
        self, parameters: Any, rows: int, activation_format: ActivationFormat, weights: ExpertWeights, device: Device
    ) -> None:
        """Compile for a device what a step with these launch parameters needs. `weights` are on "meta".

        Runs in a process of its own, which never touches the device; only what is compiled to disk is of use.
        """

    def use_launch(self, table: Sequence[tuple[int, Any]]) -> None:
        """Run with measured launch parameters from now on: (row bound, what `launch_search` yielded), rising."""


class Router(abc.ABC):
    """Turns logits into ids and weights."""

    owns: ClassVar[frozenset[Duty]] = frozenset()
    """`{Duty.ROUTED_SCALING}` if the weights already carry the routed scaling factor."""

    @abc.abstractmethod
    def select_experts(self, router_logits: torch.Tensor, correction_bias: torch.Tensor | None = None) -> Routing:
        """Choose K experts for each token.

        Args:
            router_logits: `[T, E]` in any floating dtype.
            correction_bias: `[E]` float32, added to the scores for choosing only (DeepSeek-V3), or None.
                A router that has no use for one raises `ValueError`.

        Returns:
            ids `[T, K]` and weights `[T, K]` float32, both new tensors.
        """

    def for_device(self, device: torch.device, num_experts: int) -> Router:
        """What routes in this one's place where the logits are on `device`; asked once, when a layer is built."""
        return self


class MoERunnerInterface(abc.ABC):
    """One MoE layer, ready to run: routing, experts, shared experts, scaling and reduction.

    A runner is a `torch.nn.Module` too (so that it moves, saves and loads with its model); the interface does not
    derive from it, so that an engine can bring a runner of its own kind.
    """

    @abc.abstractmethod
    def forward(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
        num_valid_tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the layer.

        Args:
            hidden_states: `[..., H]`, never written.
            router_logits: `[..., E]`; None exactly when the runner holds the gate (`is_internal_router`).
            shared_experts_input: `[..., H_s]`, what the shared experts read; None: `hidden_states` as given.
            num_valid_tokens: int `[1]` on the device: rows from there on are padding, get id -1, are not counted in
                any load and come out with their routed part zero. None: all rows are real.

        Returns:
            `[..., H]`, in the dtype of `hidden_states`, a new tensor.
        """

    @property
    @abc.abstractmethod
    def is_internal_router(self) -> bool:
        """The runner holds the gate and computes the logits itself. (`plan.routes_internally` is another fact.)"""

    @property
    @abc.abstractmethod
    def shared_experts(self) -> torch.nn.Module | None: ...

    @property
    @abc.abstractmethod
    def plan(self) -> Any:
        """The `Plan` in force."""

    @abc.abstractmethod
    def replace_quant_method(self, method: QuantMethod) -> None:
        """Swap the quantization method and rebuild the plan; nothing that was derived from the old one survives."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise what a step could not raise without a host sync (see `CapacityError`)."""


BackendFactory = Callable[
    [MoEConfig, MoEParallelConfig, QuantScheme, Group | None, ExpertPlacement],
    Any,  # PrepareAndFinalize or Experts, by the hook it is registered through
]
"""`factory(config, parallel, scheme, group, placement)`: called at build time, imports the heavy parts."""
RouterFactory = Callable[[MoEConfig], Router]
"""`factory(config)`: validates `config.router.params`."""
RunnerFactory = Callable[..., MoERunnerInterface]


CapabilitiesT = TypeVar("CapabilitiesT", DispatchCapabilities, ExpertsCapabilities)


def always_available() -> Availability:
    """The probe of a backend that needs nothing but torch."""
    return Availability(True)


@attrs.frozen(kw_only=True)
class Candidate(Generic[CapabilitiesT]):
    """A backend as it was registered.

    Attributes:
        name: what people type.
        plugin: "distribution version" that registered it, for messages and fingerprints.
        factory: makes the backend, at build time.
        capabilities: what it declares.
        probe: can it run here? Cheap, imports no vendor library, never initialises CUDA.
        priority: higher wins.
        availability: the probe's answer, filled in when a plan is made.
    """

    name: str
    plugin: str
    factory: BackendFactory
    capabilities: CapabilitiesT
    probe: Callable[[], Availability] = always_available
    priority: Priority = 0
    availability: Availability = Availability(True)

    @property
    def label(self) -> str:
        """The name with the distribution and version that it comes from: whom a measurement is of."""
        return f"{self.name} ({self.plugin})"
