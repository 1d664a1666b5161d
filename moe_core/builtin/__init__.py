"""The default backends, registered through the same hooks as everybody else's.

Declarations only: the implementations are imported by the factories, when a plan that uses them is built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch

from moe_core.builtin.grouped_mm import GROUPED_MM_ALIGNMENT
from moe_core.builtin.unquantized import UnquantizedMethod
from moe_core.config import GATED_FUNCTIONS, MODEL_DTYPES, UNGATED_FUNCTIONS, MoEConfig, MoEParallelConfig, Problem
from moe_core.errors import MoEError
from moe_core.hookspecs import hookimpl
from moe_core.quant import QuantScheme
from moe_core.types import (
    BATCHED_EXPERTS_DUTIES,
    MODEL_DTYPE_PAYLOAD,
    ROW_WISE_PAYLOAD,
    STANDARD_EXPERTS_DUTIES,
    ActivationFormat,
    Availability,
    DispatchCapabilities,
    DispatchFootprint,
    ExpertPlacement,
    ExpertsCapabilities,
    GateUpLayout,
)

if TYPE_CHECKING:  # the implementations are imported when a factory runs
    from moe_core.builtin.local import LocalPrepareAndFinalize
    from moe_core.builtin.torch_experts import TorchExperts
    from moe_core.builtin.triton_experts import TritonExperts
    from moe_core.interfaces import Group, PrepareAndFinalize

moe_core_api = (1, 0)


def _refuse_torch_experts(problem: Problem) -> str | None:
    """Under capture the experts may not ask the device for counts, and only bf16 grouped_mm can do without."""
    config, device = problem.config, problem.device
    if not config.cuda_graph or device.type != "cuda":
        return None
    sizes = (config.experts_hidden_size, problem.local_intermediate_size)
    aligned = not any(size % GROUPED_MM_ALIGNMENT for size in sizes)
    if config.dtype is torch.bfloat16 and aligned and (device.compute_capability or (0, 0)) >= (8, 0):
        return None
    return (
        "in a CUDA graph this needs torch's grouped_mm, which takes bfloat16, sizes in multiples of "
        f"{GROUPED_MM_ALIGNMENT} and compute capability 8.0; here dtype = {config.dtype}, H = "
        f"{config.experts_hidden_size}, I = {problem.local_intermediate_size}, device {device.compute_capability}"
    )


def _footprint_local(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    from moe_core.builtin.local import footprint  # noqa: PLC0415 - only when it is asked for

    return footprint(problem, payload, tokens)


LOCAL = DispatchCapabilities(
    activation_format=ActivationFormat.STANDARD,
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    placements=frozenset(ExpertPlacement),
    max_ep_size=None,  # with ep_size > 1 selection asks for replicated tokens, because carries_tokens is False
    max_in_flight=None,
    overlap_safe=True,
    graph_capturable=True,
    deterministic=True,
    footprint=_footprint_local,
)


def _gathers(parallel: MoEParallelConfig) -> bool:
    """If not, nobody's tokens are missing anywhere; with several ranks the sum over them is then the runner's."""
    return parallel.ep_size * parallel.tp_size > 1 and not parallel.tokens_are_replicated


def _refuse_all_gather(problem: Problem) -> str | None:
    """Without a bound of T the ranks tell each other their T, and a GPU would have to be waited for."""
    config, parallel = problem.config, problem.parallel
    if not _gathers(parallel) or config.max_tokens_per_rank is not None:
        return None
    if problem.device.type == "cpu" and not config.cuda_graph:
        return None
    return (
        "max_tokens_per_rank = None: the ranks would have to tell each other their token counts on every step, which "
        f"waits for the device (device {problem.device.type}, cuda_graph = {config.cuda_graph}); set it in MoEConfig"
    )


def _footprint_all_gather(problem: Problem, payload: str, tokens: int) -> DispatchFootprint:
    if not _gathers(problem.parallel):
        return _footprint_local(problem, payload, tokens)
    from moe_core.builtin.all_gather import footprint  # noqa: PLC0415 - only when it is asked for

    return footprint(problem, payload, tokens)


ALL_GATHER = attrs.evolve(
    LOCAL,
    carries_tokens=True,
    output_reduced=True,
    local_if_replicated=True,
    gathers_tokens=True,
    payloads=frozenset({MODEL_DTYPE_PAYLOAD, ROW_WISE_PAYLOAD}),
    split=True,
    refuse=_refuse_all_gather,
    footprint=_footprint_all_gather,
)

TORCH_EXPERTS = ExpertsCapabilities(
    owns={
        ActivationFormat.STANDARD: STANDARD_EXPERTS_DUTIES,
        ActivationFormat.BATCHED: BATCHED_EXPERTS_DUTIES,
    },
    dtypes=frozenset(MODEL_DTYPES),
    device_types=frozenset({"cpu", "cuda"}),
    activations=frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS),
    gate_up_layouts=frozenset(GateUpLayout),
    ungated=True,
    clamp=True,
    bias=True,
    router_weight_on_input=True,
    accepts_dropped_ids=True,
    accepts_duplicate_ids=True,
    graph_capturable=True,
    deterministic=True,
    refuse=_refuse_torch_experts,
)


TRITON_EXPERTS = attrs.evolve(
    TORCH_EXPERTS, device_types=frozenset({"cuda"}), min_compute_capability=(8, 0), refuse=None
)


def _probe_triton() -> Availability:
    if importlib.util.find_spec("triton") is None:
        return Availability(
            False,
            'triton is not installed: pip install "moe-core[triton]" (CUDA and ROCm builds of torch bring their own)',
        )
    return Availability(True)


def _make_local(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> LocalPrepareAndFinalize:
    from moe_core.builtin.local import LocalPrepareAndFinalize  # noqa: PLC0415 - only when it is used

    return LocalPrepareAndFinalize()


def _make_all_gather(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> PrepareAndFinalize:
    if not _gathers(parallel):
        from moe_core.builtin.local import LocalPrepareAndFinalize  # noqa: PLC0415 - only when it is used

        return LocalPrepareAndFinalize(scheme)
    if group is None:
        raise MoEError("dispatch all_gather moves tokens between ranks, and group is None: pass the layer's Group")
    from moe_core.builtin.all_gather import AllGatherPrepareAndFinalize  # noqa: PLC0415 - only when it is used

    return AllGatherPrepareAndFinalize(group, max_tokens=config.max_tokens_per_rank, scheme=scheme)


def _make_torch_experts(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> TorchExperts:
    from moe_core.builtin.torch_experts import TorchExperts  # noqa: PLC0415 - only when it is used

    return TorchExperts(config, parallel)


def _make_triton_experts(
    config: MoEConfig,
    parallel: MoEParallelConfig,
    scheme: QuantScheme,
    group: Group | None,
    placement: ExpertPlacement,
) -> TritonExperts:
    from moe_core.builtin.triton_experts import TritonExperts  # noqa: PLC0415 - only when it is used

    return TritonExperts(config, parallel)


@hookimpl
def moe_core_register_prepare_finalize(register: Callable[..., None]) -> None:
    register("local", _make_local, LOCAL, priority=0)
    register("all_gather", _make_all_gather, ALL_GATHER, priority=-5)


@hookimpl
def moe_core_register_experts(register: Callable[..., None]) -> None:
    register("torch", _make_torch_experts, TORCH_EXPERTS, priority=0)
    register("triton", _make_triton_experts, TRITON_EXPERTS, _probe_triton, priority=100)


@hookimpl
def moe_core_register_quant_methods(register: Callable[..., None]) -> None:
    register("unquantized", UnquantizedMethod)
