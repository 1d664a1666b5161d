"""Has what a plugin hands over the form that the contract gives it? Asked at build time, in debug mode and by the kit.

Only types, shapes and dtypes are looked at, never values: nothing here waits for a device.

Shape letters: H hidden · E_l local experts · K top-k · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.errors import PluginError
from moe_core.interfaces import Candidate, Experts, PrepareAndFinalize, WorkspaceShapes
from moe_core.select import Plan
from moe_core.types import (
    MODEL_DTYPE_PAYLOAD,
    ActivationFormat,
    DispatchCapabilities,
    Dispatched,
    ExpertsCapabilities,
)

_IDS = (torch.int32, torch.int64)


def made_dispatch(candidate: Candidate[DispatchCapabilities], arguments: tuple[Any, ...]) -> PrepareAndFinalize:
    """The dispatch backend that a candidate's factory makes of `arguments`, those of a `BackendFactory`.

    Raises:
        PluginError: the factory can't be called so, makes something else, or its class lacks a method.
    """
    backend: PrepareAndFinalize = _made("dispatch", candidate, PrepareAndFinalize, arguments)
    return backend


def made_experts(candidate: Candidate[ExpertsCapabilities], arguments: tuple[Any, ...]) -> Experts:
    """The same of experts."""
    backend: Experts = _made("experts", candidate, Experts, arguments)
    return backend


def _made(kind: str, candidate: Candidate[Any], contract: type[Any], arguments: tuple[Any, ...]) -> Any:
    who = f"{kind} {candidate.name!r} ({candidate.plugin})"
    expected = (
        f"expected factory(config, parallel, scheme, group, placement) -> moe_core.{contract.__name__}, with all of "
        "its abstract methods (docs/api.md)"
    )
    try:
        backend = candidate.factory(*arguments)
    except TypeError as error:  # so Python tells of a wrong signature and of a class that lacks a method
        raise PluginError(f"{who}: its factory raised TypeError: {error}; {expected}") from error
    if not isinstance(backend, contract):
        raise PluginError(f"{who}: its factory returned {_named(backend)}; {expected}")
    return backend


def workspace_shapes(who: str, experts: Experts, rows: int, activation_format: ActivationFormat) -> WorkspaceShapes:
    """What experts declare of their scratch memory. `who`: they, in the message.

    Raises:
        PluginError: it is no mapping of names to (shape, dtype).
    """
    shapes: Any = experts.workspace_shapes(rows, activation_format)
    asked = f"{who}: workspace_shapes({rows}, {activation_format.value})"
    expected = "expected a mapping of names to (shape, torch.dtype) (Experts.workspace_shapes, docs/api.md)"
    if not isinstance(shapes, Mapping):
        raise PluginError(f"{asked} returned {_named(shapes)}; {expected}")
    for name, declared in shapes.items():
        if not _is_workspace(declared):
            raise PluginError(f"{asked} declares {name!r} as {declared!r}; {expected}")
    return shapes


def _is_workspace(declared: Any) -> bool:
    if not isinstance(declared, tuple) or len(declared) != 2:
        return False
    shape, dtype = declared
    extents = isinstance(shape, tuple | list) and all(isinstance(extent, int) and extent >= 0 for extent in shape)
    return extents and isinstance(dtype, torch.dtype)


@attrs.frozen
class Misfit:
    """What does not fit the contract of `Dispatched`.

    Attributes:
        field: of `Dispatched`; "" if it is none at all.
        text: what came, what was expected, and where that is written.
    """

    field: str
    text: str


def misfit(plan: Plan, dispatched: Any, num_local_experts: int) -> Misfit | None:
    """The first thing about what `prepare` returned that is not as the plan has it; None: all is."""
    if not isinstance(dispatched, Dispatched):
        return Misfit("", f"prepare returned {_named(dispatched)}; expected a moe_core.Dispatched (docs/api.md)")
    columns, dtype = _payload(plan)
    x = dispatched.x
    if plan.activation_format is ActivationFormat.BATCHED:
        found = _unlike("x", x, (num_local_experts, "C", columns), dtype) or _unlike(
            "tokens_per_expert", dispatched.tokens_per_expert, (num_local_experts,), torch.int32
        )
    else:
        found = _unlike("x", x, ("R", columns), dtype) or _choices(dispatched)
    if found is not None:
        return found
    if x.numel() and x.stride(-1) != 1:
        return _misfit("x", f"of strides {x.stride()}", "unit stride in H")
    scales = plan.payload != MODEL_DTYPE_PAYLOAD
    if scales != isinstance(dispatched.x_scale, torch.Tensor):
        expected = f"{'a tensor' if scales else 'None'} with payload {plan.payload!r}"
        return _misfit("x_scale", _described(dispatched.x_scale), expected)
    return None


def _choices(dispatched: Dispatched) -> Misfit | None:
    """STANDARD: a row of ids and weights for each row of x."""
    rows, ids, num_rows = dispatched.x.shape[0], dispatched.topk_ids, dispatched.num_rows
    found = _unlike("topk_ids", ids, (rows, "K"), *_IDS)
    if found is not None or ids is None:
        return found
    found = _unlike("topk_weights", dispatched.topk_weights, tuple(ids.shape), torch.float32)
    return found or (None if num_rows is None else _unlike("num_rows", num_rows, (1,), torch.int32))


def _payload(plan: Plan) -> tuple[int, torch.dtype]:
    """(extent, dtype) of a row of x as the plan's payload carries it."""
    hidden, spec = plan.config.experts_hidden_size, plan.scheme.activation
    if plan.payload == MODEL_DTYPE_PAYLOAD or spec is None:
        return hidden, plan.config.dtype
    return hidden // formats.codes_per_byte(spec), formats.storage_dtype(spec)


def _unlike(field: str, value: Any, shape: tuple[int | str, ...], *dtypes: torch.dtype) -> Misfit | None:
    """`shape` has a letter where any extent will do."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    expected = f"[{', '.join(map(str, shape))}] {' or '.join(names)}"
    if not isinstance(value, torch.Tensor):
        return _misfit(field, _described(value), expected)
    fits = value.dim() == len(shape) and all(
        isinstance(wanted, str) or wanted == extent for wanted, extent in zip(shape, value.shape, strict=True)
    )
    if fits and value.dtype in dtypes:
        return None
    return _misfit(field, _described(value), expected)


def _misfit(field: str, came: str, expected: str) -> Misfit:
    return Misfit(field, f"prepare returned {field} {came}; expected {expected} (Dispatched.{field}, docs/api.md)")


def _described(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor):
        return f"of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"


def _named(value: Any) -> str:
    return "None" if value is None else f"an object of type {type(value).__name__}"
