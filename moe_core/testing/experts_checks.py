"""What an experts case asks: each function runs the backend on rows of its own making and raises `Violation`.

Shape letters: H hidden · E_l local experts · K top-k · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch

from moe_core.interfaces import WorkspaceShapes
from moe_core.kernel import MoEKernel
from moe_core.plugins import registry
from moe_core.testing import material
from moe_core.testing.case import Skip, Violation
from moe_core.testing.compare import Untouched, check_numbers, same_bits
from moe_core.testing.experts_bench import ExpertsBench, Rows, Setting, fill, quantized_terms
from moe_core.types import Device, Routing


def numbers(bench: ExpertsBench, setting: Setting, duty: str) -> None:
    """One call, against the truth."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    out = bench.run(setting, experts, loaded.weights, rows)
    bench.check(setting, out, rows, loaded, duty, explain=True)


def runs(bench: ExpertsBench, setting: Setting) -> None:
    """The experts are made, weights are loaded, and one call ends; its numbers are for other cases."""
    out = bench.run(setting, bench.make(setting), bench.load(setting).weights, bench.batch(setting))
    if out.isnan().all():
        raise Violation(
            "out is written whole",
            "apply left out as it was; write into it: out.copy_(total), not out = total (Experts.apply, docs/api.md)",
        )


def router_weights(bench: ExpertsBench, setting: Setting, values: tuple[float, ...]) -> None:
    """Weights are any float32: negative, zero, above 1, so small that the model dtype has no name for them."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    assert rows.routing is not None
    weights = torch.tensor(values).repeat(rows.routing.topk_weights.numel())[: rows.routing.topk_weights.numel()]
    rows = attrs.evolve(rows, routing=Routing(rows.routing.topk_ids, weights.view(rows.routing.topk_weights.shape)))
    bench.check(setting, bench.run(setting, experts, loaded.weights, rows), rows, loaded, "router weight")


def prefix(bench: ExpertsBench, setting: Setting, valid: int) -> None:
    """Rows from `num_rows` on hold nothing, whatever their ids say: they are not read and come out as zeros."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    assert rows.routing is not None
    past = (torch.arange(setting.rows) >= valid).unsqueeze(1)
    weights = rows.routing.topk_weights.masked_fill(past, torch.nan)
    rows = attrs.evolve(
        rows, x=rows.x.masked_fill(past, torch.nan), routing=Routing(rows.routing.topk_ids, weights), num_rows=valid
    )
    out = bench.run(setting, experts, loaded.weights, rows)
    bench.check(setting, out, rows, loaded, "padding is not read")


def poisoned(bench: ExpertsBench, setting: Setting, value: float) -> None:
    """NaN or Inf in rows of nobody changes no bit of the others."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    empty = rows.x.isnan()
    results = []
    for filler in (0.0, value):
        dirty = attrs.evolve(rows, x=rows.x.masked_fill(empty, filler))
        results.append(bench.run(setting, experts, loaded.weights, dirty))
        bench.check(setting, results[-1], dirty, loaded, "padding is not read")


def spreads_nothing(bench: ExpertsBench, setting: Setting, value: float) -> None:
    """NaN or Inf in one row reaches that row's result and no other."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    clean = bench.run(setting, experts, loaded.weights, rows)
    x = rows.x.clone()
    place = (0, 0) if setting.batched else (0,)
    x[place][1] = value
    out = bench.run(setting, experts, loaded.weights, attrs.evolve(rows, x=x))
    if bool(out[place].isfinite().all()):
        raise Violation("rows", f"a row with {value} in it came out finite")
    out[place] = clean[place]
    if rows.counts is not None:
        past = (torch.arange(x.shape[1]) >= rows.counts.unsqueeze(1)).unsqueeze(2)
        out, clean = out.masked_fill(past, 0.0), clean.masked_fill(past, 0.0)
    if not torch.allclose(out.double(), clean.double(), rtol=1e-3, atol=1e-3):
        raise Violation("padding is not read", f"{value} in one row changed another row's result")


def reads_only(bench: ExpertsBench, setting: Setting) -> None:
    """`out` and the workspaces are written, nothing else."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    dispatched = bench.delivered(setting, rows)
    seen = Untouched(**material.tensors_of(dispatched), **material.tensors_of(loaded.weights))
    out = bench.run(setting, experts, loaded.weights, rows, dispatched=dispatched)
    seen.check("apply")
    bench.check(setting, out, rows, loaded, "rows")


def workspaces_hold_nothing(bench: ExpertsBench, setting: Setting) -> None:
    """The result has the same bits whatever the workspaces hold: NaN, zeros, ones in every bit but the sign."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    results = [bench.run(setting, experts, loaded.weights, rows, fill_byte=byte) for byte in (255, 0, 127)]
    for out in results:
        bench.check(setting, out, rows, loaded, "workspaces")
    kept = _kept(rows, results[0])
    if not all(same_bits(results[0][kept], out[kept]) for out in results[1:]):
        raise Violation("workspaces", "what stood in the workspaces before changes the result")


def _kept(rows: Rows, out: torch.Tensor) -> torch.Tensor:
    """bool over the rows of `out` that must be written."""
    if rows.counts is None:
        return torch.ones(out.shape[0], dtype=torch.bool)
    return torch.arange(out.shape[1]) < rows.counts.unsqueeze(1)


def workspace_sizes(bench: ExpertsBench, setting: Setting) -> None:
    """Host arithmetic: the same answer each time, in ints and dtypes."""
    experts = bench.make(setting)
    for rows in (0, 1, 2, 64, 4096):
        shapes: WorkspaceShapes = experts.workspace_shapes(rows, setting.format)
        if dict(shapes) != dict(experts.workspace_shapes(rows, setting.format)):
            raise Violation("workspaces", f"workspace_shapes({rows}) gives another answer the second time")
        for name, (shape, dtype) in shapes.items():
            if not isinstance(dtype, torch.dtype) or not all(type(extent) is int and extent >= 0 for extent in shape):
                shown = f"workspace {name!r} at {rows} rows is {shape!r}, {dtype!r}"
                raise Violation("workspaces", f"{shown}; the contract is (shape of ints, torch.dtype)")


def launch_ranges(bench: ExpertsBench, setting: Setting) -> None:
    """What it says of its kernels, for `explain`: ranges from row 0 up, the same answer each time."""
    experts, device = bench.make(setting), Device.of(bench.device)
    ranges = experts.launch_ranges(setting.format, device)
    first_rows = [item.first_row for item in ranges]
    if first_rows != sorted(set(first_rows)) or (ranges and first_rows[0] != 0):
        raise Violation("honest claims", f"launch_ranges begin at rows {first_rows}; the contract is from 0, rising")
    if ranges != experts.launch_ranges(setting.format, device):
        raise Violation("honest claims", "launch_ranges gives another answer the second time")


def sizes_in_turn(bench: ExpertsBench, setting: Setting) -> None:
    """One object, calls of changing size: nothing of one is left for the next."""
    experts, loaded = bench.make(setting), bench.load(setting)
    for seed, (rows, counts) in enumerate([(9, "uneven"), (2, "one row"), (17, "full"), (0, "none"), (5, "uneven")]):
        changed = attrs.evolve(setting, rows=rows, counts=counts)
        batch = bench.batch(changed, seed)
        out = bench.run(changed, experts, loaded.weights, batch)
        bench.check(changed, out, batch, loaded, "no state between steps")


def two_layers(bench: ExpertsBench, setting: Setting) -> None:
    """Two objects with weights of their own, in turns."""
    made = [(bench.make(setting), bench.load(setting, seed)) for seed in (0, 1)]
    for seed in range(2):
        for experts, loaded in made:
            batch = bench.batch(setting, seed)
            out = bench.run(setting, experts, loaded.weights, batch)
            bench.check(setting, out, batch, loaded, "no state between layers")


def reloaded(bench: ExpertsBench, setting: Setting) -> None:
    """Other weights in the same storage are other weights: nothing derived from the old ones survives."""
    experts, loaded, other = bench.make(setting), bench.load(setting, 0), bench.load(setting, 1)
    rows = bench.batch(setting)
    bench.check(setting, bench.run(setting, experts, loaded.weights, rows), rows, loaded, "rows")
    addresses = {name: tensor.data_ptr() for name, tensor in loaded.layer.named_parameters()}
    fill(loaded.layer, 1)
    if {name: tensor.data_ptr() for name, tensor in loaded.layer.named_parameters()} != addresses:
        raise Violation("reload", "packing the weights again moved them")
    out = bench.run(setting, experts, loaded.layer.weights, rows)
    bench.check(setting, out, rows, attrs.evolve(loaded, true=other.true), "reload")


def weights_elsewhere(bench: ExpertsBench, setting: Setting) -> None:
    """The record that is handed in is the one that is read, also when it is another than last time."""
    experts, first, second = bench.make(setting), bench.load(setting, 0), bench.load(setting, 1)
    rows = bench.batch(setting)
    for loaded in (first, second, first):
        bench.check(setting, bench.run(setting, experts, loaded.weights, rows), rows, loaded, "reload")


def same_each_time(bench: ExpertsBench, setting: Setting) -> None:
    """The same bits in the same object, in another one, and after other rows."""
    loaded, rows = bench.load(setting), bench.batch(setting)
    experts, other = bench.make(setting), bench.make(setting)
    results = [bench.run(setting, experts, loaded.weights, rows) for _ in range(3)]
    bench.run(setting, other, loaded.weights, bench.batch(setting, 7))
    results.append(bench.run(setting, other, loaded.weights, rows))
    kept = _kept(rows, results[0])
    for out in results[1:]:
        if not same_bits(results[0][kept], out[kept]):
            raise Violation("determinism", "other bits for the same inputs")


def out_is_a_view(bench: ExpertsBench, setting: Setting) -> None:
    """x and out may be views of wider buffers (a dispatch pads H on the wire): what is beside them stays as it is."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    out = bench.run(setting, experts, loaded.weights, rows, pad=8)
    bench.check(setting, out, rows, loaded, "strides")


def expert_stride(bench: ExpertsBench, setting: Setting) -> None:
    """BATCHED x may be a view in which experts, not rows, lie side by side."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    x = rows.x.transpose(0, 1).contiguous().transpose(0, 1)
    dispatched = attrs.evolve(bench.delivered(setting, rows), x=x.to(bench.device))
    out = bench.run(setting, experts, loaded.weights, rows, dispatched=dispatched)
    bench.check(setting, out, rows, loaded, "strides")


WEIGHT_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda w: w.transpose(-1, -2).contiguous().transpose(-1, -2) if w.dim() == 3 else w,
    "rows apart": lambda w: torch.cat([w, torch.full_like(w, 9)], dim=-1)[..., : w.shape[-1]],
    "experts apart": lambda w: torch.stack([w, torch.full_like(w, 9)], dim=1)[:, 0],
    "requiring a gradient": lambda w: w.clone().requires_grad_(),
}
"""Ways in which weights may lie in memory: a foreign module's parameters are read where they are."""


def strided_weights(bench: ExpertsBench, setting: Setting, layout: str) -> None:
    """The same numbers, however the weights lie."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    weights = material.mapped(loaded.weights, WEIGHT_LAYOUTS[layout])
    with torch.enable_grad():
        out = bench.run(setting, experts, weights, rows).detach()
    bench.check(setting, out, rows, loaded, "strides")


def in_inference_mode(bench: ExpertsBench, setting: Setting) -> None:
    """Weights and rows may be inference tensors, which count no versions and can't be written in place outside."""
    with torch.inference_mode():
        experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
        out = bench.run(setting, experts, loaded.weights, rows)
    bench.check(setting, out.clone(), rows, loaded, "rows")


def quantizes_input(bench: ExpertsBench, setting: Setting) -> None:
    """What goes into the GEMMs has been through the format's quantizer: exact arithmetic would be the wrong answer."""
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    out = bench.run(setting, experts, loaded.weights, rows)
    bench.check(setting, out, rows, loaded, "input quantization")
    problem, got = bench.problem64(setting, out, rows, loaded)
    spec = setting.scheme.activation
    assert spec is not None, "asked of schemes that quantize activations only"
    wanted, exact = quantized_terms(problem, spec, setting.dtype).sum(0), problem.truth.value
    off, apart = float((got - wanted).norm()), float((exact - wanted).norm())
    if off > 0.5 * apart:
        raise Violation(
            "input quantization",
            f"the result is {off:.3g} from what the format's quantizer gives, which is {apart:.3g} from exact "
            "arithmetic: activations seem not to be quantized as the scheme says",
        )


def through_the_kernel(bench: ExpertsBench, setting: Setting) -> None:
    """As a layer runs it: the core carves the workspaces, and redirects -1 where the backend takes none."""
    plan, loaded, rows = bench.possible(setting), bench.load(setting), bench.batch(setting)
    kernel = MoEKernel(plan)
    assert rows.routing is not None
    x = rows.x.to(bench.device)
    routing = Routing(rows.routing.topk_ids.to(bench.device), rows.routing.topk_weights.to(bench.device))
    for _ in range(2):
        out, _ = kernel(x, routing, loaded.weights)
        bench.check(setting, out.cpu(), rows, loaded, "dropped ids")


def from_logits(bench: ExpertsBench, setting: Setting, tokens: int) -> None:
    """Experts that route by themselves do what the layer's router would have chosen."""
    plan, loaded = bench.possible(setting), bench.load(setting)
    kernel, config = MoEKernel(plan), plan.config
    x = material.tokens(tokens, setting.hidden, setting.dtype, 1)
    logits = torch.randn(tokens, config.num_experts, generator=material.generator(8))
    out = kernel.run_from_logits(x.to(bench.device), logits.to(bench.device), loaded.weights)
    routing = registry().find("routers", config.router.name)(config).select_experts(logits)
    problem = material.Problem64(x, routing, loaded.true, setting.activation, setting.on_input)
    steps = 64.0 if setting.dtype is torch.float32 else 12.0
    check_numbers(out.cpu(), problem.truth, duty="routing", steps=steps, explanations=problem.expert_explanations())


def captured(bench: ExpertsBench, setting: Setting) -> None:
    """A step can be captured in a CUDA graph, and a replay follows its inputs."""
    if bench.device.type != "cuda":
        raise Skip("CUDA graphs need a CUDA device")
    experts, loaded, rows = bench.make(setting), bench.load(setting), bench.batch(setting)
    dispatched = bench.delivered(setting, rows)
    bound = rows.x.shape[1 if setting.batched else 0]
    spaces = {n: g.tensor for n, g in bench.workspaces(setting, experts, bound, 255).items()}
    out = torch.full((*rows.x.shape[:-1], setting.hidden), torch.nan, dtype=setting.dtype, device=bench.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        experts.apply(dispatched, loaded.weights, spaces, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        experts.apply(dispatched, loaded.weights, spaces, out)
    for seed in (0, 1):
        batch = bench.batch(setting, seed)
        fresh = bench.delivered(setting, batch)
        for name in ("x", "topk_ids", "topk_weights", "tokens_per_expert"):
            if getattr(fresh, name) is not None:
                getattr(dispatched, name).copy_(getattr(fresh, name))
        out.fill_(torch.nan)
        graph.replay()
        bench.check(setting, out.cpu(), batch, loaded, "graph capture")
