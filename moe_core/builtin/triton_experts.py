"""Experts on a GPU, by the Triton ops of `moe_core.ops`.

Shape letters: H hidden · I intermediate per rank · E_l local experts · K top-k · R received rows ·
C row capacity per local expert.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from moe_core import ops
from moe_core.config import MoEConfig, MoEParallelConfig, Problem
from moe_core.interfaces import Experts, WorkspaceShapes
from moe_core.types import ActivationFormat, Device, Dispatched, ExpertWeights, LaunchRange


class TritonExperts(Experts):
    """STANDARD and BATCHED, bf16, fp16 and fp32, every activation, weights as they lie (also transposed views).

    What is known of the layer is prepared once per weights record; a step then costs a few launches of host time.
    """

    def __init__(self, config: MoEConfig, parallel: MoEParallelConfig) -> None:
        spec, problem = config.activation, Problem(config=config, parallel=parallel)
        layout = spec.gate_up_layout
        self._dtype = config.dtype
        self._top_k = config.top_k
        self._weight_on_input = config.router_weight_on_input and config.top_k > 1  # K = 1 is done by the kernel
        self._activation = ops.Activation(spec.function, layout and layout.value, spec.limit, spec.alpha)
        self._problem = ops.ExpertsProblem(
            num_experts=problem.num_local_experts,
            top_k=config.top_k,
            hidden_size=config.experts_hidden_size,
            intermediate_size=problem.local_intermediate_size,
            itemsize=config.dtype.itemsize,
            gated=spec.gated,
            interleaved=self._activation.gate_up_layout == "interleaved",
            all_experts=config.num_experts,
        )
        self._measured: tuple[tuple[int, Any], ...] = ()
        self._bound: ExpertWeights | None = None
        self._launch: Any = None

    def workspace_shapes(self, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
        """The rows between the GEMMs, the rows before the sum over K, and the index arrays of the sort.

        They follow from the layer's sizes alone: launch parameters and the strides of the weights change no buffer.
        """
        if activation_format is ActivationFormat.BATCHED:
            return ops.batched_workspace(self._problem, self._dtype, rows)
        return ops.experts_workspace(self._problem, self._dtype, rows)

    def apply(
        self,
        dispatched: Dispatched,
        weights: ExpertWeights,
        workspaces: Mapping[str, torch.Tensor],
        out: torch.Tensor,
    ) -> None:
        """See `Experts.apply`. Launches on the current stream and never waits for it."""
        counts = dispatched.tokens_per_expert  # a plan has one format, so one launcher a layer
        if weights is not self._bound:
            self._launch = self._bind_standard(weights) if counts is None else self._bind_batched(weights)
            self._bound = weights
        if counts is not None:
            self._launch(dispatched.x, counts, workspaces, out)
            return
        ids, router_weights = dispatched.topk_ids, dispatched.topk_weights
        assert ids is not None and router_weights is not None, "STANDARD format comes with ids and weights"
        self._launch(dispatched.x, ids, router_weights, workspaces, out, dispatched.num_rows)

    def launch_ranges(self, activation_format: ActivationFormat, device: Device) -> tuple[LaunchRange, ...]:
        """The kernels of each range of T. Interleaved weights may lie either way, so both are shown."""
        problem = self._problem
        if device.compute_capability is not None:
            problem = replace(problem, capability=device.compute_capability)
        if activation_format is ActivationFormat.BATCHED:
            return (LaunchRange(0, f"grouped, {_shown(ops.batched_config(problem, 128))} at C = 128", "heuristics"),)
        if not problem.interleaved:
            return tuple(self._ranges(problem, device, ""))
        turned = replace(problem, w13_unit="n", w2_unit="n")
        return (
            *self._ranges(problem, device, "contiguous rows: "),
            *self._ranges(turned, device, "contiguous columns: "),
        )

    def _ranges(self, problem: ops.ExpertsProblem, device: Device, prefix: str) -> Iterator[LaunchRange]:
        first = 0
        for end, config, source in ops.sourced_plan(problem, device.name, self._configs(problem)):
            yield LaunchRange(first, f"{prefix}{config.path}, {_shown(config)}", source)
            first = first if end is None else end + 1

    def launch_search(
        self, rows: int, activation_format: ActivationFormat, weights: ExpertWeights
    ) -> Generator[Sequence[Any], Sequence[float], None]:
        """See `Experts.launch_search`. BATCHED format has heuristics only."""
        if activation_format is ActivationFormat.BATCHED:
            return
        problem = self._launcher(weights)().problem
        search = ops.search_launch(problem, rows, torch.cuda.get_device_name(weights.w13.device))
        configs = next(search, None)
        while configs is not None:
            times = yield [ops.config_to_json(config, problem) for config in configs]
            try:
                configs = search.send(times)
            except StopIteration:
                return

    def compile_launch(
        self, parameters: Any, rows: int, activation_format: ActivationFormat, weights: ExpertWeights, device: Device
    ) -> None:
        """Fill Triton's cache with the kernels of a step."""
        major, minor = device.compute_capability or (9, 0)
        x = torch.empty(rows, self._problem.hidden_size, dtype=self._dtype, device="meta")
        ids = torch.empty(rows, self._top_k, dtype=torch.int32, device="meta")
        dispatched = Dispatched(x, None, topk_ids=ids, topk_weights=ids.float())
        shapes = self.workspace_shapes(rows, activation_format)
        spaces = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes.items()}
        self.use_launch(((rows, parameters),))
        with ops.compile_only(10 * major + minor):
            self.apply(dispatched, weights, spaces, torch.empty_like(x))

    def use_launch(self, table: Sequence[tuple[int, Any]]) -> None:
        """See `Experts.use_launch`. What was found for weights with other strides is left out."""
        self._measured = tuple(table)
        self._bound = None

    def _configs(self, problem: ops.ExpertsProblem) -> list[tuple[int, Any]]:
        found = ((rows, ops.config_from_json(stored, problem)) for rows, stored in self._measured)
        return [(rows, config) for rows, config in found if config is not None]

    def _bind_standard(self, weights: ExpertWeights) -> ops.ExpertsLauncher:
        """Prepare the launches for a weights record. Records are compared by identity, so a new one binds anew."""
        make = self._launcher(weights)
        launcher = make()
        if configs := self._configs(launcher.problem):
            launcher = make(plan=ops.measured_plan(launcher.plan, configs))
        return launcher

    def _launcher(self, weights: ExpertWeights) -> functools.partial[ops.ExpertsLauncher]:
        return functools.partial(
            ops.ExpertsLauncher,
            weights.w13.detach(),
            weights.w2.detach(),
            top_k=self._top_k,
            activation=self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
            weight_on_input=self._weight_on_input,
            all_experts=self._problem.all_experts,
        )

    def _bind_batched(self, weights: ExpertWeights) -> ops.BatchedExpertsLauncher:
        return ops.BatchedExpertsLauncher(
            weights.w13.detach(),
            weights.w2.detach(),
            activation=self._activation,
            bias13=weights.w13_bias,
            bias2=weights.w2_bias,
        )


def _shown(config: Any) -> str:
    """A configuration in one line: "up 32x64x128, down alternating 128, …" for tiles, each field by its name."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            sizes = [str(getattr(value, name)) for name in ("block_m", "block_n", "block_k") if hasattr(value, name)]
            kind = type(value).__name__.removesuffix("Config").lower()
            value = ("" if kind == "tile" else f"{kind} ") + "x".join(sizes)
        if field.name != "path":
            parts.append(f"{field.name} {value}")
    return ", ".join(parts)
