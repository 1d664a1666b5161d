"""Shared GPU ops, a leaf: imports only torch, and Triton at the first launch.

Every op has a `…_torch` twin that says what it computes. Launch parameters come from pure functions (`_launch.py`) or
from a plan that the caller passes in; nothing here reads a file or the environment.
"""

from moe_core.ops._launch import (
    ExpertsPlan,
    ExpertsProblem,
    GroupedConfig,
    ResidentConfig,
    ScanConfig,
    SlotsConfig,
    SpecializedConfig,
    TileConfig,
    batched_config,
    config_for,
    default_plan,
)
from moe_core.ops._tuned import choose_plan
from moe_core.ops.activation import Activation, activate_torch
from moe_core.ops.batched import BatchedExpertsLauncher, batched_workspace, experts_batched, experts_batched_torch
from moe_core.ops.experts import ExpertsLauncher, experts_problem, experts_step, experts_step_torch, experts_workspace
from moe_core.ops.routing import RouteSpec, topk_route, topk_route_torch

__all__ = [
    "Activation",
    "BatchedExpertsLauncher",
    "ExpertsLauncher",
    "ExpertsPlan",
    "ExpertsProblem",
    "GroupedConfig",
    "ResidentConfig",
    "RouteSpec",
    "ScanConfig",
    "SlotsConfig",
    "SpecializedConfig",
    "TileConfig",
    "activate_torch",
    "batched_config",
    "batched_workspace",
    "choose_plan",
    "config_for",
    "default_plan",
    "experts_batched",
    "experts_batched_torch",
    "experts_problem",
    "experts_step",
    "experts_step_torch",
    "experts_workspace",
    "topk_route",
    "topk_route_torch",
]
