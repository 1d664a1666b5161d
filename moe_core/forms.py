"""Has what a plugin hands over the form that the contract gives it? Asked at build time, in debug mode and by the kit.

Only types, shapes and dtypes are looked at, never values: nothing here waits for a device.

Shape letters: H hidden · E_l local experts · K top-k · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from moe_core import formats
from moe_core.config import MoEConfig
from moe_core.declared import API_PAGE, HOOKS_PAGE, shown
from moe_core.errors import PluginError
from moe_core.interfaces import (
    Candidate,
    Experts,
    MoERunnerInterface,
    PrepareAndFinalize,
    Router,
    RouterFactory,
    RunnerFactory,
    WorkspaceShapes,
)
from moe_core.plugins import QuantMethodEntry, registry
from moe_core.quant import QuantMethod, QuantScheme
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
    backend: PrepareAndFinalize = _made(_DISPATCH, who("dispatch", candidate), candidate.factory, arguments)
    return backend


def made_experts(candidate: Candidate[ExpertsCapabilities], arguments: tuple[Any, ...]) -> Experts:
    """The same of experts."""
    backend: Experts = _made(_EXPERTS, who("experts", candidate), candidate.factory, arguments)
    return backend


def made_method(entry: QuantMethodEntry) -> QuantMethod:
    """The same of a quantization method, which must be of the scheme that it was registered for."""
    named = f"scheme {entry.scheme!r} ({entry.plugin}, {_METHOD.hook})"
    method: QuantMethod = _made(_METHOD, named, entry.factory, ())
    scheme: Any = getattr(method, "scheme", None)
    if not isinstance(scheme, QuantScheme) or scheme.name != entry.scheme:
        raise PluginError(f"{named}: its factory returned a method of scheme {shown(scheme)}; {_METHOD.expected}")
    return method


def made_router(factory: RouterFactory, config: MoEConfig, named: str) -> Router:
    """The same of a router. `named`: what a message calls it, see `registered_as`.

    Raises:
        PluginError: as above. What it says of its parameters, which are a user's, is raised as it is.
    """
    router: Router = _made(_ROUTER, named, factory, (config,))
    return router


def made_runner(factory: RunnerFactory, named: str, *arguments: Any, **by_name: Any) -> MoERunnerInterface:
    """The same of a runner, from the arguments of `MoERunner`. What it says of these is raised as it is."""
    runner: MoERunnerInterface = _made(_RUNNER, named, factory, arguments, by_name)
    return runner


def registered_as(kind: str, name: str) -> str:
    """What a message calls a "router" or "runner" of a name: with its plugin and its hook."""
    labels = [record.label for record in registry().plugins if f"{kind}:{name}" in record.registers]
    contract = {"router": _ROUTER, "runner": _RUNNER}[kind]
    return f"{kind} {name!r} ({labels[0] if labels else 'unknown'}, {contract.hook})"


def claimed(entry: QuantMethodEntry, config: Mapping[str, Any]) -> QuantMethod | str:
    """A scheme's method for a checkpoint's `quantization_config`, or why it is not read.

    A function of a plugin that raises, or answers something else, is a reason against its own scheme.
    """
    assert entry.from_checkpoint_config is not None, "who reads no checkpoints is not asked"
    try:
        answer: Any = entry.from_checkpoint_config(config)
    except Exception as error:  # noqa: BLE001 - others may read this checkpoint
        says = f"raised {type(error).__name__}: {error}"
    else:
        if isinstance(answer, QuantMethod | str):
            return answer
        says = f"answered {shown(answer)}"
    return f"its from_checkpoint_config {says}; expected a QuantMethod or a reason ({HOOKS_PAGE})"


@attrs.frozen
class _Contract:
    """What a factory must be.

    Attributes:
        kind: the class of what it makes.
        hook: through which it is registered.
        call: how it is called.
        of_users: some of its arguments are a user's, and a TypeError may be about those.
    """

    kind: type[Any]
    hook: str
    call: str
    of_users: bool = False

    @property
    def expected(self) -> str:
        made = f"moe_core.{self.kind.__name__}, with all of its abstract methods"
        return f"expected {self.call} -> {made} ({API_PAGE})"


_BACKEND = "factory(config, parallel, scheme, group, placement)"
_DISPATCH = _Contract(PrepareAndFinalize, "moe_core_register_prepare_finalize", _BACKEND)
_EXPERTS = _Contract(Experts, "moe_core_register_experts", _BACKEND)
_METHOD = _Contract(QuantMethod, "moe_core_register_quant_methods", "factory(), for the scheme that is registered,")
_ROUTER = _Contract(Router, "moe_core_register_routers", "factory(config)", of_users=True)
_RUNNER = _Contract(
    MoERunnerInterface, "moe_core_register_runners", "a factory that takes what MoERunner takes", of_users=True
)


def _made(
    contract: _Contract,
    named_as: str,
    factory: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any] | None = None,
) -> Any:
    try:
        made = factory(*arguments, **(named or {}))
    except TypeError as error:  # so Python tells of a wrong signature and of a class that lacks a method
        inside = error.__traceback__ is not None and error.__traceback__.tb_next is not None
        if contract.of_users and inside and "abstract class" not in str(error):
            raise
        raise PluginError(f"{named_as}: its factory raised TypeError: {error}; {contract.expected}") from error
    if not isinstance(made, contract.kind):
        raise PluginError(f"{named_as}: its factory returned {_named(made)}; {contract.expected}")
    return made


def who(kind: str, candidate: Candidate[Any]) -> str:
    """A backend in a message: its name, the plugin that it is from, and the hook that it came through."""
    hook = _DISPATCH.hook if kind == "dispatch" else _EXPERTS.hook
    return f"{kind} {candidate.name!r} ({candidate.plugin}, {hook})"


def workspace_shapes(
    candidate: Candidate[ExpertsCapabilities], experts: Experts, rows: int, activation_format: ActivationFormat
) -> WorkspaceShapes:
    """What experts, made by their candidate's factory, declare of their scratch memory.

    Raises:
        PluginError: it is no mapping of names to (shape, dtype).
    """
    shapes: Any = experts.workspace_shapes(rows, activation_format)
    asked = f"{who('experts', candidate)}: workspace_shapes({rows}, {activation_format.value})"
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
