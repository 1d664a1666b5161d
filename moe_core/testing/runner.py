"""The cases of a runner: one MoE layer from hidden states to output.

Shape letters: T tokens on this rank · H hidden · E experts.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch

from moe_core.errors import MoEError
from moe_core.interfaces import MoERunnerInterface, RunnerFactory
from moe_core.select import Plan
from moe_core.testing.case import Case, Skip, Tier, Violation
from moe_core.testing.compare import Untouched, same_bits
from moe_core.testing.runner_bench import TWIN, RunnerBench, Setting, fill, method_of
from moe_core.types import SharedExpertsOrder

EVERY = "every runner"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEQUENTIAL, INTERNAL = SharedExpertsOrder.SEQUENTIAL, SharedExpertsOrder.INTERNAL


def runner_cases(factory: RunnerFactory, *, device: torch.device | str = "cpu") -> list[Case]:
    """All cases for one runner, as it is registered."""
    bench = RunnerBench(factory, torch.device(device))
    first = attrs.evolve(_case(bench, "one is made", "a step runs", is_made), opens=True)
    return [first, *_numbers(bench), *_contract(bench), *_compiled(bench)]


def _case(
    bench: RunnerBench, name: str, duty: str, check: Callable[..., None], *arguments: Any, claim: str = EVERY
) -> Case:
    tier = Tier.REQUIRED if claim == EVERY else Tier.OPTIONAL
    return Case(name, duty, tier, claim, functools.partial(check, bench, *arguments))


def _numbers(bench: RunnerBench) -> Iterator[Case]:
    """Every duty of the runner alone, then together."""
    for tokens, dtype in itertools.product((0, 1, 5, 33), DTYPES):
        duty = "rows" if tokens else "empty steps"
        shown = f"T = {tokens}, {str(dtype).removeprefix('torch.')}"
        yield _case(bench, f"numbers: {shown}", duty, numbers, Setting(tokens=tokens, dtype=dtype), duty)
        full = Setting(tokens=tokens, dtype=dtype, shared=SEQUENTIAL, scale=2.5, padded=32)
        yield _case(bench, f"numbers: {shown}, shared, scaled, padded", duty, numbers, full, duty)
    settings: dict[str, tuple[str, Setting]] = {
        "two leading dims": ("shapes and dtypes", Setting(leading=(2, 3))),
        "an empty leading dim": ("empty steps", Setting(leading=(2, 0))),
        "no leading dims": ("shapes and dtypes", Setting(leading=())),
        "a gate of its own": ("routing", Setting(gate=True)),
        "a correction bias": ("routing", Setting(bias=True)),
        "padded H": ("padding", Setting(padded=32)),
        "padded H by one": ("padding", Setting(hidden=13, padded=14)),
        "the weight on the input": ("router weight", Setting(on_input=True)),
        "latent": ("routed transforms", Setting(latent=True)),
        "latent, padded": ("routed transforms", Setting(latent=True, padded=16)),
        "latent, scaled, shared": ("routed transforms", Setting(latent=True, scale=3.0, shared=SEQUENTIAL)),
    }
    for scale, dtype in itertools.product((0.5, 2.5), DTYPES):
        shown = f"{scale}, {str(dtype).removeprefix('torch.')}"
        settings[f"scale {shown}"] = ("routed scaling factor", Setting(scale=scale, dtype=dtype))
        with_shared = Setting(scale=scale, dtype=dtype, shared=SEQUENTIAL)
        settings[f"scale {shown}, shared"] = ("routed scaling factor", with_shared)
        settings[f"scale {shown}, inverse"] = ("routed scaling factor", attrs.evolve(with_shared, inverse=True))
    for order in (SEQUENTIAL, INTERNAL):
        settings[f"shared experts, {order.value}"] = ("shared experts", Setting(shared=order))
        settings[f"shared experts, {order.value}, input of their own"] = (
            "shared experts",
            Setting(shared=order, shared_input=True),
        )
        settings[f"shared experts, {order.value}, padded H"] = ("unpadding", Setting(shared=order, padded=32))
        settings[f"shared experts, {order.value}, no tokens"] = ("empty steps", Setting(shared=order, tokens=0))
    for valid in (0, 2, 5):
        settings[f"{valid} of 5 tokens are real"] = ("padding is not read", Setting(valid=valid))
        both = Setting(valid=valid, shared=SEQUENTIAL, scale=2.0)
        settings[f"{valid} of 5 tokens are real, shared, scaled"] = ("padding is not read", both)
    for name, (duty, setting) in settings.items():
        yield _case(bench, f"numbers: {name}", duty, numbers, setting, duty)
    for world, scale, shared in itertools.product((2, 3), (1.0, 2.0), (None, SEQUENTIAL, INTERNAL)):
        for partial in (False, True) if shared else (False,):
            setting = Setting(world=world, scale=scale, shared=shared, partial=partial)
            shown = f"{world} ranks, scale {scale}"
            if shared:
                shown += f", {'split' if partial else 'whole'} shared experts {shared.value}"
            yield _case(
                bench,
                f"numbers: {shown}",
                "cross-rank reduce",
                numbers,
                setting,
                "cross-rank reduce",
                claim="several ranks",
            )


def _contract(bench: RunnerBench) -> Iterator[Case]:
    shared = Setting(shared=SEQUENTIAL, scale=2.0, padded=32)
    for name, setting in {"": Setting(), ", shared, scaled, padded": shared, ", latent": Setting(latent=True)}.items():
        yield _case(bench, f"inputs stay as they are{name}", "read-only inputs", reads_only, setting)
        yield _case(bench, f"a new tensor{name}", "read-only inputs", new_tensor, setting)
        yield _case(bench, f"steps of changing size{name}", "no state between steps", sizes_in_turn, setting)
        yield _case(bench, f"two layers{name}", "no state between layers", two_layers, setting)
        yield _case(bench, f"same bits each time{name}", "determinism", same_each_time, setting)
        yield _case(bench, f"reloaded weights{name}", "reload", reloaded, setting)
        yield _case(bench, f"another quantization method{name}", "reload", replaced, setting)
        yield _case(bench, f"a deep copy{name}", "copies", copied, setting)
        yield _case(bench, f"a state dict{name}", "copies", state_dict, setting)
        yield _case(bench, f"weights that require no gradient{name}", "rows", under_grad, setting)
    for layout in ("rows apart", "transposed"):
        yield _case(bench, f"strides: hidden states {layout}", "strides", strided, Setting(), layout)
    yield _case(bench, "is_internal_router", "honest claims", internal_router)
    yield _case(bench, "its plan", "honest claims", has_plan)
    yield _case(bench, "its shared experts", "honest claims", has_shared)
    for what in (
        "logits and a gate",
        "neither logits nor a gate",
        "another H",
        "another dtype",
        "logits of another E",
        "logits of another T",
    ):
        yield _case(bench, f"refused: {what}", "refusals", refuses, what)
    yield _case(bench, "check", "honest claims", checks_nothing)


def _compiled(bench: RunnerBench) -> Iterator[Case]:
    settings = {
        "plain": Setting(),
        "shared, scaled, padded": Setting(shared=SEQUENTIAL, scale=2.0, padded=32),
        "latent": Setting(latent=True, shared=SEQUENTIAL),
        "padding rows": Setting(valid=3),
    }
    for name, setting in settings.items():
        yield _case(bench, f"compiled: {name}", "fakes", compiled, setting, claim="torch.compile")


def is_made(bench: RunnerBench) -> None:
    """From what `MoERunner` takes; what it computes is for other cases."""
    bench.build(Setting())


def numbers(bench: RunnerBench, setting: Setting, duty: str) -> None:
    for out in bench.run(setting):
        wanted = (*setting.shape, setting.hidden)
        if tuple(out.shape) != wanted or out.dtype != setting.dtype:
            raise Violation("shapes and dtypes", f"out is {tuple(out.shape)} {out.dtype}, not {wanted} {setting.dtype}")
        bench.check(setting, out, duty)


def reads_only(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    x, logits, _ = (tensor.to(bench.device) for tensor in setting.inputs())
    seen = Untouched(hidden_states=x, router_logits=logits)
    runner.forward(x, logits)
    seen.check("forward")


def new_tensor(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    x, logits, _ = (tensor.to(bench.device) for tensor in setting.inputs())
    out = runner.forward(x, logits)
    if out.untyped_storage().data_ptr() in (x.untyped_storage().data_ptr(), logits.untyped_storage().data_ptr()):
        raise Violation("read-only inputs", "the output is the memory of an input")
    kept = out.clone()
    bench.step(setting, runner, 3)
    if not same_bits(out, kept):
        raise Violation("read-only inputs", "the next step changed the last output")


def sizes_in_turn(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    for seed, tokens in enumerate((5, 1, 0, 17, 5)):
        changed = attrs.evolve(setting, tokens=tokens)
        bench.check(changed, bench.step(changed, runner, seed), "no state between steps", seed=seed)


def two_layers(bench: RunnerBench, setting: Setting) -> None:
    runners = [bench.build(setting, seed=seed) for seed in (0, 1)]
    for step in range(2):
        for weights, runner in enumerate(runners):
            out = bench.step(setting, runner, step)
            bench.check(setting, out, "no state between layers", seed=step, weights=weights)


def same_each_time(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    first = bench.step(setting, runner)
    for other in (runner, bench.build(setting)):
        if not same_bits(bench.step(setting, other), first):
            raise Violation("determinism", "other bits for the same inputs")


def reloaded(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    bench.step(setting, runner)
    fill(_layer(runner), setting, 1)
    bench.check(setting, bench.step(setting, runner), "reload", weights=1)


def _layer(runner: Any) -> Any:
    layer = getattr(runner, "routed_experts", None)
    if layer is None:
        raise Skip("keeps its RoutedExperts to itself")
    return layer


def replaced(bench: RunnerBench, setting: Setting) -> None:
    """The plan is another one, the weights are empty and to be loaded, and nothing of the old ones is used."""
    runner = bench.build(setting)
    before = runner.plan
    runner.replace_quant_method(method_of(TWIN))
    if runner.plan is before or runner.plan.scheme != TWIN:
        raise Violation(
            "reload", f"after replace_quant_method the plan is of scheme {runner.plan.scheme.name!r}, not {TWIN.name!r}"
        )
    fill(_layer(runner), setting, 1)
    bench.check(setting, bench.step(setting, runner), "reload", weights=1)


def copied(bench: RunnerBench, setting: Setting) -> None:
    runner = bench.build(setting)
    other = copy.deepcopy(runner)
    fill(_layer(other), setting, 1)
    bench.check(setting, bench.step(setting, runner), "copies")
    bench.check(setting, bench.step(setting, other), "copies", weights=1)


def state_dict(bench: RunnerBench, setting: Setting) -> None:
    runner, other = bench.build(setting, seed=0), bench.build(setting, seed=1)
    file = io.BytesIO()
    torch.save(runner.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    bench.check(setting, bench.step(setting, other), "copies")


def under_grad(bench: RunnerBench, setting: Setting) -> None:
    """Inference code forgets `no_grad` at times: the numbers are the same."""
    runner = bench.build(setting)
    with torch.enable_grad():
        out = bench.step(setting, runner)
    bench.check(setting, out.detach(), "rows")


def strided(bench: RunnerBench, setting: Setting, layout: str) -> None:
    runner = bench.build(setting)
    x, logits, _ = setting.inputs()
    view = torch.cat([x, x], dim=1)[:, : setting.hidden] if layout == "rows apart" else x.T.contiguous().T
    bench.check(setting, runner.forward(view.to(bench.device), logits.to(bench.device)), "strides")


def internal_router(bench: RunnerBench) -> None:
    for gate in (False, True):
        if bench.build(Setting(gate=gate)).is_internal_router is not gate:
            raise Violation(
                "honest claims",
                f"is_internal_router is not {gate}, and the runner was given {'a' if gate else 'no'} gate",
            )


def has_plan(bench: RunnerBench) -> None:
    runner = bench.build(Setting(scale=2.0, padded=32))
    if not isinstance(runner, MoERunnerInterface) or not isinstance(runner.plan, Plan):
        raise Violation("honest claims", "it is no MoERunnerInterface with a plan")


def has_shared(bench: RunnerBench) -> None:
    if (
        bench.build(Setting()).shared_experts is not None
        or bench.build(Setting(shared=SEQUENTIAL)).shared_experts is None
    ):
        raise Violation("honest claims", "shared_experts is not what the runner was given")


def refuses(bench: RunnerBench, what: str) -> None:
    gate = what == "logits and a gate"
    runner = bench.build(Setting(gate=gate))
    x, logits, _ = (tensor.to(bench.device) for tensor in Setting().inputs())
    given: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {
        "logits and a gate": (x, logits),
        "neither logits nor a gate": (x, None),
        "another H": (x[:, :-1], logits),
        "another dtype": (x.double(), logits),
        "logits of another E": (x, logits[:, :-1]),
        "logits of another T": (x, logits[:-1]),
    }
    try:
        runner.forward(*given[what])
    except (ValueError, MoEError):
        return
    raise Violation("refusals", f"{what}: the step ran")


def checks_nothing(bench: RunnerBench) -> None:
    runner = bench.build(Setting())
    bench.step(Setting(), runner)
    runner.check()


def compiled(bench: RunnerBench, setting: Setting) -> None:
    """Under `torch.compile` without a break the layer gives the same: its fakes say what its ops do."""
    runner = bench.build(setting)
    torch._dynamo.reset()
    step = torch.compile(runner.forward, backend="aot_eager", fullgraph=True, dynamic=True)
    for seed, tokens in enumerate((5, 7)):
        changed = attrs.evolve(setting, tokens=tokens)
        x, logits, _ = (tensor.to(bench.device) for tensor in changed.inputs(seed))
        valid = None if setting.valid is None else torch.tensor([setting.valid], device=bench.device)
        out = step(x, logits, None, valid)
        wanted = runner.forward(x, logits, None, valid)
        if out.shape != wanted.shape or out.dtype != wanted.dtype or out.stride() != wanted.stride():
            raise Violation("fakes", f"compiled it gives {tuple(out.shape)} {out.dtype}, else {tuple(wanted.shape)}")
        bench.check(changed, out, "fakes", seed=seed)
