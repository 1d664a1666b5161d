"""Shared GPU ops, a leaf: imports only torch, and Triton at the first launch.

Every op has a `…_torch` twin that says what it computes. Launch parameters come from pure functions (`_launch.py`) or
from a plan that the caller passes in; nothing here reads a file or the environment.
"""

from moe_core.ops._compile import compile_only
from moe_core.ops._fp8_launch import (
    Fp8GroupedConfig,
    Fp8SpecializedConfig,
    Fp8StreamConfig,
    fp8_batched_config,
    fp8_plan,
)
from moe_core.ops._fp8_quantize import QuantizeRows
from moe_core.ops._fp8_weights import FP8_ALIGNMENT, FP8_GROUP, Fp8Format, Fp8Weights
from moe_core.ops._launch import (
    AlternatingConfig,
    ExpertsPlan,
    ExpertsProblem,
    GroupedConfig,
    ScanConfig,
    SlotsConfig,
    TileConfig,
    batched_config,
    config_for,
    default_plan,
)
from moe_core.ops._nvfp4_layout import pack_nvfp4_matrix, unpack_nvfp4_matrix
from moe_core.ops._runtime import KernelLaunch
from moe_core.ops._search import config_from_json, config_to_json, search_launch
from moe_core.ops._tuned import choose_plan, measured_plan, sourced_plan
from moe_core.ops.activation import Activation, activate_torch
from moe_core.ops.batched import BatchedExpertsLauncher, batched_workspace, experts_batched, experts_batched_torch
from moe_core.ops.contiguous import ContiguousRows, PaddedRows, RowQuantization, contiguous_workspace, padded_workspace
from moe_core.ops.experts import ExpertsLauncher, experts_problem, experts_step, experts_step_torch, experts_workspace
from moe_core.ops.fp8 import Fp8BatchedLauncher, Fp8ExpertsLauncher, fp8_batched_workspace, fp8_workspace
from moe_core.ops.nvfp4 import (
    Nvfp4BatchedLauncher,
    Nvfp4ExpertsLauncher,
    Nvfp4Weights,
    nvfp4_batched_workspace,
    nvfp4_experts_torch,
)
from moe_core.ops.routing import RouteSpec, topk_route, topk_route_torch

__all__ = [
    "FP8_ALIGNMENT",
    "FP8_GROUP",
    "Activation",
    "AlternatingConfig",
    "BatchedExpertsLauncher",
    "ContiguousRows",
    "ExpertsLauncher",
    "ExpertsPlan",
    "ExpertsProblem",
    "Fp8BatchedLauncher",
    "Fp8ExpertsLauncher",
    "Fp8Format",
    "Fp8GroupedConfig",
    "Fp8SpecializedConfig",
    "Fp8StreamConfig",
    "Fp8Weights",
    "GroupedConfig",
    "KernelLaunch",
    "Nvfp4BatchedLauncher",
    "Nvfp4ExpertsLauncher",
    "Nvfp4Weights",
    "PaddedRows",
    "QuantizeRows",
    "RouteSpec",
    "RowQuantization",
    "ScanConfig",
    "SlotsConfig",
    "TileConfig",
    "activate_torch",
    "batched_config",
    "batched_workspace",
    "choose_plan",
    "compile_only",
    "config_for",
    "config_from_json",
    "config_to_json",
    "contiguous_workspace",
    "default_plan",
    "experts_batched",
    "experts_batched_torch",
    "experts_problem",
    "experts_step",
    "experts_step_torch",
    "experts_workspace",
    "fp8_batched_config",
    "fp8_batched_workspace",
    "fp8_plan",
    "fp8_workspace",
    "measured_plan",
    "nvfp4_batched_workspace",
    "nvfp4_experts_torch",
    "pack_nvfp4_matrix",
    "padded_workspace",
    "search_launch",
    "sourced_plan",
    "topk_route",
    "topk_route_torch",
    "unpack_nvfp4_matrix",
]
