"""Enums and the small records that pass between stages.

Shape letters: T tokens on this rank · H hidden · I intermediate per rank · E experts, global · E_l local experts ·
K top-k · R received rows · C row capacity per local expert.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch

from moe_core import declared


class ActivationFormat(enum.Enum):
    """How the rows that the experts receive are laid out. The dispatch decides, the experts declare what they take."""

    STANDARD = "standard"
    """`[R, H]`, one row per token, with its ids and weights beside it."""
    BATCHED = "batched"
    """`[E_l, C, H]`, each expert's rows packed from row 0, with a count per expert."""


class GateUpLayout(enum.Enum):
    """Where gate and up stand among the 2I rows of `w13`.

    `ExpertWeights` always names it. A layer that owns its weights loads them by name ("gate", "up"), so for it the
    layout is only how it stores them.
    """

    GATE_UP = "gate_up"
    """Rows 0..I-1 are the gate, I..2I-1 the up projection."""
    UP_GATE = "up_gate"
    """Rows 0..I-1 are the up projection, I..2I-1 the gate."""
    INTERLEAVED = "interleaved"
    """Even rows are the gate, odd rows the up projection (gpt-oss)."""


class ExpertPlacement(enum.Enum):
    """Which rank holds expert e of E, on W ranks."""

    LINEAR = "linear"
    """Contiguous blocks in rank order; the first E mod W ranks hold one more."""
    ROUND_ROBIN = "round_robin"
    """Rank e mod W."""


class SharedExpertsOrder(enum.Enum):
    """When the shared experts run, relative to the routed ones."""

    NONE = "none"
    """There are no shared experts."""
    SEQUENTIAL = "sequential"
    """Before the routed experts, on the same stream."""
    INTERNAL = "internal"
    """Inside the kernel, between `finalize_start` and `finalize_receive`: hidden behind the combine."""
    MULTI_STREAM = "multi_stream"
    """On a stream of their own, beside the routed experts. CUDA only."""


class RoutedScaling(enum.Enum):
    """Who carries the routed scaling factor s."""

    ON_ROUTED = "on_routed"
    """routed · s + shared, for every dtype and with or without shared experts."""
    INVERSE_ON_SHARED = "inverse_on_shared"
    """routed + shared / s, for an engine that multiplies the layer's whole output by s itself (an fp16 overflow
    convention). Only by name, and refused where there are no shared experts to carry it."""


class Duty(enum.Enum):
    """Work that must be done exactly once in a step. Each plan holds a ledger: duty → the one stage that owns it."""

    INPUT_QUANTIZATION = "input quantization"
    ROUTER_WEIGHT = "router weight"
    TOPK_SUM = "top-k sum"
    ROUTED_SCALING = "routed scaling factor"
    EXPERT_BIAS = "expert biases"
    ACTIVATION_CLAMP = "activation clamp"
    CROSS_RANK_REDUCE = "cross-rank reduce"
    PADDING = "padding"
    UNPADDING = "unpadding"


STANDARD_EXPERTS_DUTIES = frozenset({Duty.ROUTER_WEIGHT, Duty.TOPK_SUM, Duty.EXPERT_BIAS, Duty.ACTIVATION_CLAMP})
"""What experts in STANDARD format own by contract: they return each row weighted and summed over its choices."""
BATCHED_EXPERTS_DUTIES = frozenset({Duty.EXPERT_BIAS, Duty.ACTIVATION_CLAMP})
"""What experts in BATCHED format own by contract: they return raw rows."""
BATCHED_FINALIZE_DUTIES = frozenset({Duty.ROUTER_WEIGHT, Duty.TOPK_SUM})
"""What a dispatch backend in BATCHED format owns by contract: its finalize weights and sums."""


GATED_FUNCTIONS = ("silu", "gelu", "gelu_tanh", "swiglu_oai")
UNGATED_FUNCTIONS = ("silu", "gelu", "relu2")
"""Names of the activation functions with a gate and without one; `ActivationSpec` has their formulas."""


MODEL_DTYPE_PAYLOAD = "model dtype"
"""The payload of a plan whose rows travel unquantized. Every other payload is the name of a quantization scheme."""


ROW_WISE_PAYLOAD = "row-wise schemes"
"""Of a dispatch: it quantizes rows by `formats`, in any scheme whose activations are quantized row by row."""


@attrs.frozen
class Availability:
    """A probe's answer. `reason` is one line that a user can act on, empty when `ok`."""

    ok: bool = attrs.field(validator=declared.FLAG)
    reason: str = attrs.field(default="", validator=declared.TEXT)


@attrs.frozen
class Device:
    """What a plan is made for. Built from a description, so that a plan can be made without the device.

    Attributes:
        type: a torch device type, "cpu" or "cuda".
        compute_capability: (major, minor) of a CUDA device, None elsewhere.
        name: for people and for the key of tuned tables.
    """

    type: str
    compute_capability: tuple[int, int] | None = None
    name: str = ""

    @classmethod
    def of(cls, device: torch.device | str) -> Device:
        """Describe a real device (this asks the driver where the type is "cuda")."""
        device = torch.device(device)
        if device.type != "cuda":
            return cls(device.type, None, device.type)
        return cls("cuda", torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))


@attrs.define
class Routing:
    """A router's answer.

    Attributes:
        topk_ids: `[T, K]` int32 or int64, global expert ids; -1 = no expert.
        topk_weights: `[T, K]` float32; the value beside a -1 is ignored.
    """

    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@attrs.define
class Dispatched:
    """What `prepare` returns: the rows that this rank's experts work on.

    Attributes:
        x: STANDARD `[R, H]` or BATCHED `[E_l, C, H]`; unit stride in H, other strides free; never written by anyone.
        handle: opaque to everyone but the `finalize` of the object that made it, which consumes it exactly once.
        x_scale: scales of a quantized payload, None when `x` is in the model dtype. A scale means x ≈ q · scale.
        topk_ids: STANDARD only, int32 or int64 `[R, K]`, local ids or -1. Any strides, here and below: experts get
            contiguous ones.
        topk_weights: STANDARD only, `[R, K]` float32.
        num_rows: STANDARD only, int32 `[1]` on the device: the valid prefix of R. None: every row may hold data, and
            rows whose ids are all -1 are empty.
        tokens_per_expert: BATCHED only, int32 `[E_l]` on the device. Rows past the count hold anything, also NaN.
    """

    x: torch.Tensor
    handle: Any
    x_scale: torch.Tensor | None = None
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    num_rows: torch.Tensor | None = None
    tokens_per_expert: torch.Tensor | None = None


@attrs.frozen(eq=False)
class WeightLayout:
    """A kernel's own order of packed weights: a transform of one expert's bytes into the same storage, and back.

    Both functions write in place. They take one expert's tensors by their names in `ExpertWeights` ("w13", "w13_scale",
    "w2", "w2_scale", without the dim of experts) and the `gate_up_layout`; `pack` raises ValueError with a reason for
    values that the layout can't hold.

    Attributes:
        name: what capability records call it.
        pack: from the order in which weights are loaded into the kernel's.
        unpack: the exact way back.
    """

    name: str
    pack: Callable[[Mapping[str, torch.Tensor], GateUpLayout | None], None]
    unpack: Callable[[Mapping[str, torch.Tensor], GateUpLayout | None], None]


@attrs.frozen(eq=False)
class ExpertWeights:
    """Views on one layer's weights, as experts read them. Building one copies nothing.

    Attributes:
        w13: `[E_l, 2I, H]` (or `[E_l, I, H]` without a gate); any strides, so a transposed checkpoint is a view.
        w2: `[E_l, H, I]`; any strides.
        gate_up_layout: where gate and up stand in the 2I rows as they are stored now (packing may have moved them, so
            this and not the `ActivationSpec` tells an experts backend); None without a gate.
        w13_bias: `[E_l, 2I]` (or `[E_l, I]`), or None.
        w2_bias: `[E_l, H]`, or None.
        w13_scale, w2_scale: scales of packed weights, or None. w ≈ q · scale · global scale. Where a scheme's group is
            one row: `[E_l, 2I, groups]` (rows as in w13) and `[E_l, H, groups]`. Where it is several: w13's halves keep
            grids of their own, `[E_l, 2, row groups of I, groups]` in the order of the halves (without a gate
            `[E_l, 1, …]`), and w2's is `[E_l, row groups of H, groups]`. fp32, or e4m3 under a global scale.
        w13_global_scale, w2_global_scale: the second level, `[E_l, 2]` (by half) and `[E_l, 1]`, or None. float64, so
            that a format that stores the inverse in fp32 is divided by to the same bits.
        w13_input_scale, w2_input_scale: what checkpoints say about the input of each projection, `[E_l, 2]` and
            `[E_l, 1]`, or None: its static scale, or its second-level scale (then float64).
        layout: the order that packed weights and their scales have been brought into; None: as they were loaded.
    """

    w13: torch.Tensor
    w2: torch.Tensor
    gate_up_layout: GateUpLayout | None
    w13_bias: torch.Tensor | None = None
    w2_bias: torch.Tensor | None = None
    w13_scale: torch.Tensor | None = None
    w2_scale: torch.Tensor | None = None
    w13_global_scale: torch.Tensor | None = None
    w2_global_scale: torch.Tensor | None = None
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None
    layout: WeightLayout | None = None


@attrs.frozen
class Rejection:
    """Why one candidate of a pair can't be used. `candidate` is "dispatch x", "experts y" or "pair"."""

    candidate: str
    reason: str


@attrs.frozen
class PairReport:
    """One row of the table: a pair and what came of it.

    Attributes:
        dispatch, experts: names.
        priority: (dispatch priority, experts priority), the order in which pairs are walked.
        rejections: all reasons against it; empty: it could run.
        chosen: selection takes it. A pair without rejections that isn't chosen lost by priority; one that is chosen and
            has some can't be built, which only `explain` and `plan` find out before it is.
    """

    dispatch: str
    experts: str
    priority: tuple[int, int]
    rejections: tuple[Rejection, ...] = ()
    chosen: bool = False

    @property
    def verdict(self) -> str:
        if self.rejections:
            return "refused"
        return "chosen" if self.chosen else "outranked"

    @property
    def unbuildable(self) -> bool:
        """Selection takes it, and a backend of it can't be built."""
        return self.chosen and bool(self.rejections)


@attrs.frozen
class LaunchRange:
    """Which kernels of an experts backend serve the row bounds from `first_row` on.

    Attributes:
        first_row: T in STANDARD format, C in BATCHED.
        what: the kernels and their launch parameters, in one line for people.
        source: where these come from (a shipped table, what this user measured, heuristics).
    """

    first_row: int
    what: str
    source: str


@attrs.frozen(kw_only=True)
class DispatchFootprint:
    """What one step of one layer costs one rank in its dispatch: rows and bytes.

    Attributes:
        rows: the row bound that the experts get: R of STANDARD format, C of BATCHED. No routing brings more of them.
        dispatch_wire_bytes, combine_wire_bytes: what this rank receives from other ranks in `prepare` and in
            `finalize`, padding included; of routing that is not padded away, the mean over uniform routing.
        held_bytes: what `prepare` allocates and `finalize` releases: rows, scales, ids, counts, the handle. Where the
            routing decides, it and `scratch_bytes` are the most that any routing brings.
        scratch_bytes: the most that either of them has allocated at any moment, beyond `held_bytes`.
        buffer_bytes: what lives as long as the backend: symmetric or vendor memory, whether layers share it or not.
        own_output: `expert_output` gives the experts a place (counted above, or the layer's output); if not, the core
            allocates one as large as the rows in the model dtype.
    """

    rows: int
    dispatch_wire_bytes: int = 0
    combine_wire_bytes: int = 0
    held_bytes: int = 0
    scratch_bytes: int = 0
    buffer_bytes: int = 0
    own_output: bool = False


Footprint = Callable[[Any, str, int], DispatchFootprint]
"""`footprint(problem, payload, tokens)`: pure host arithmetic; `tokens` is T, the same on every rank."""

Refuse = Callable[[Any], str | None]
"""`refuse(problem) -> reason or None`: pure, for what the fields of a capability record can't say."""

Priority = int | tuple[tuple[int, int], ...]
"""Higher wins. `((first_row, priority), …)`, rising: another priority from so many rows on. For experts that is the row
bound of a step; for a dispatch, which is a constant of a plan, `max_tokens_per_rank` (0 where it is not set).
"""


def priority_at(priority: Priority, rows: int) -> int:
    """The priority that holds for a row bound of `rows` (an int holds everywhere)."""
    if isinstance(priority, int):
        return priority
    return next((value for first, value in reversed(priority) if rows >= first), priority[0][1])


def _members(kind: type[enum.Enum], *, may_be_empty: bool = False) -> declared.Rule:
    return declared.set_of(declared.instance_of(kind, kind.__name__), kind.__name__, may_be_empty=may_be_empty)


_DTYPE = declared.instance_of(torch.dtype, "a torch.dtype")
_ID_DTYPE = declared.Rule(
    "an integer torch.dtype",
    lambda value: _DTYPE.holds(value) and not (value.is_floating_point or value.is_complex or value is torch.bool),
)
_FORMAT = declared.instance_of(ActivationFormat, "an ActivationFormat")
_DUTIES = _members(Duty, may_be_empty=True)
_FUNCTIONS = frozenset(GATED_FUNCTIONS + UNGATED_FUNCTIONS)
_LEGAL_FUNCTION = declared.Rule("the name of an activation function", lambda name: name in _FUNCTIONS)

_RULES: dict[str, declared.Rule] = {
    "ActivationFormat": _FORMAT,
    "Footprint | None": declared.optional(declared.FUNCTION),
    "Mapping[ActivationFormat, frozenset[Duty]]": declared.mapping_of(
        _FORMAT, _DUTIES, "ActivationFormat to a frozenset of Duty"
    ),
    "Mapping[str, str]": declared.mapping_of(declared.NAME, declared.NAME, "scheme names to names of layouts"),
    "Refuse | None": declared.optional(declared.FUNCTION),
    "bool": declared.FLAG,
    "frozenset[Duty]": _DUTIES,
    "frozenset[ExpertPlacement]": _members(ExpertPlacement),
    "frozenset[GateUpLayout]": _members(GateUpLayout, may_be_empty=True),
    "frozenset[int] | None": declared.optional(declared.set_of(declared.COUNT, "ints >= 1")),
    "frozenset[str]": declared.set_of(declared.NAME, "names"),
    "frozenset[torch.dtype]": declared.set_of(_DTYPE, "torch.dtype"),
    "int": declared.COUNT,
    "int | None": declared.optional(declared.COUNT),
    "torch.dtype | None": declared.optional(_ID_DTYPE),
    "tuple[int, int] | None": declared.optional(declared.VERSION),
}
"""What a field of a capability record must be, by its annotation."""


@attrs.frozen(kw_only=True, field_transformer=declared.checked_by(_RULES))
class DispatchCapabilities:
    """What a dispatch backend declares. Every field defaults to "no" or to "the least"; what isn't claimed isn't used.

    Attributes:
        activation_format: the format that `prepare` produces.
        dtypes: model dtypes that it can carry.
        device_types: torch device types it runs on.
        payloads: what can be on the wire: `MODEL_DTYPE_PAYLOAD`, names of quantization schemes, `ROW_WISE_PAYLOAD`.
        owns: the duties (see `Duty`) that its finalize does.
        id_dtype: the dtype that expert ids are cast to, once, before `prepare`; None: takes int32 and int64.
        accepts_dropped_ids: takes -1. If not, the core redirects -1 to a valid id with weight 0.
        accepts_duplicate_ids: an id may stand twice in a row; the weights add.
        placements: expert placements it can serve.
        needs_round_robin_routing_tables: under ROUND_ROBIN it wants physical ids, so that rank = id // E_l; the core
            remaps. If not, it takes logical ids together with `expert_map`.
        needs_equal_shares: every rank must hold the same number of experts.
        min_ep_size, max_ep_size: numbers of ranks it can serve; None: no upper limit.
        carries_tokens: tokens of one rank reach experts of another. If not, ep_size > 1 needs replicated tokens.
        output_reduced: `finalize` already sums over the ep ranks.
        local_if_replicated: where every rank has the same tokens, it moves none and leaves the sum over ranks to the
            runner, as a backend that carries no tokens does; `output_reduced` then speaks of the other case only.
        gathers_tokens: every rank gets every rank's tokens and `finalize` sums their rows over the ranks, so that it
            also serves sequence-parallel ranks that split each expert (tp_size > 1 with sp_size > 1).
        split: the start/receive forms do real work in two halves.
        max_in_flight: handles that may be alive at once per instance; None: any number.
        shared_in_flight: the handles of all instances in a group count together for `max_in_flight`, because they share
            buffers; a `prepare` beyond it is refused.
        overlap_safe: shared experts may run between start and receive, or on another stream.
        graph_capturable, deterministic: as the words say, at every supported size.
        max_topk, max_tokens_per_rank: upper limits; None: none.
        hidden_sizes: the only hidden sizes it takes; None: any. A backend that pads on the wire takes any.
        min_compute_capability: (major, minor) of CUDA devices; None: any.
        refuse: one more pure predicate over the `Problem`, for what no field can say.
        footprint: its bytes on the wire and in memory, for `plan` and `explain`; None: not declared, and so not shown.
    """

    activation_format: ActivationFormat
    dtypes: frozenset[torch.dtype]
    device_types: frozenset[str]
    payloads: frozenset[str] = frozenset({MODEL_DTYPE_PAYLOAD})
    owns: frozenset[Duty] = frozenset()
    id_dtype: torch.dtype | None = None
    accepts_dropped_ids: bool = False
    accepts_duplicate_ids: bool = False
    placements: frozenset[ExpertPlacement] = frozenset({ExpertPlacement.LINEAR})
    needs_round_robin_routing_tables: bool = False
    needs_equal_shares: bool = False
    min_ep_size: int = 1
    max_ep_size: int | None = 1
    carries_tokens: bool = False
    output_reduced: bool = False
    local_if_replicated: bool = False
    gathers_tokens: bool = False
    split: bool = False
    max_in_flight: int | None = 1
    shared_in_flight: bool = False
    overlap_safe: bool = False
    graph_capturable: bool = False
    deterministic: bool = False
    max_topk: int | None = None
    max_tokens_per_rank: int | None = None
    hidden_sizes: frozenset[int] | None = None
    min_compute_capability: tuple[int, int] | None = None
    refuse: Refuse | None = None
    footprint: Footprint | None = None


@attrs.frozen(kw_only=True, field_transformer=declared.checked_by(_RULES))
class ExpertsCapabilities:
    """What an experts backend declares. Every field defaults to "no" or to "the least".

    Attributes:
        owns: the formats that it takes, each with the duties it does there (usually `STANDARD_EXPERTS_DUTIES`,
            `BATCHED_EXPERTS_DUTIES`).
        dtypes: model dtypes that it computes in.
        device_types: torch device types it runs on.
        activations: names of activation functions (see `ActivationSpec.function`).
        gate_up_layouts: layouts of w13 that it reads; only asked where the activation has a gate.
        ungated: runs activations without a gate.
        clamp: honours `ActivationSpec.limit`.
        bias: adds expert biases.
        schemes: names of the quantization schemes it runs; a scheme is a (weight, activation) pair.
        payloads: what it accepts from a dispatch.
        weight_layout: the name of the layout it reads, per scheme name; a scheme not named here is read as loaded.
        router_weight_on_input: applies the router weight to its input, for any K (K = 1 needs no backend).
        accepts_dropped_ids, accepts_duplicate_ids: as in `DispatchCapabilities`; STANDARD only.
        routes_internally: takes logits (`apply_from_logits`) instead of ids.
        graph_capturable, deterministic: as the words say.
        max_topk: upper limit; None: none.
        hidden_alignment, intermediate_alignment: H and I must be multiples of these.
        min_compute_capability: (major, minor) of CUDA devices; None: any.
        refuse: one more pure predicate over the `Problem`, for what no field can say.
    """

    owns: Mapping[ActivationFormat, frozenset[Duty]]
    dtypes: frozenset[torch.dtype]
    device_types: frozenset[str]
    activations: frozenset[str] = attrs.field(
        validator=declared.set_of(_LEGAL_FUNCTION, f"names among {', '.join(sorted(_FUNCTIONS))}")
    )
    gate_up_layouts: frozenset[GateUpLayout] = frozenset()
    ungated: bool = False
    clamp: bool = False
    bias: bool = False
    schemes: frozenset[str] = frozenset({"unquantized"})
    payloads: frozenset[str] = frozenset({MODEL_DTYPE_PAYLOAD})
    weight_layout: Mapping[str, str] = attrs.field(factory=dict)
    router_weight_on_input: bool = False
    accepts_dropped_ids: bool = False
    accepts_duplicate_ids: bool = False
    routes_internally: bool = False
    graph_capturable: bool = False
    deterministic: bool = False
    max_topk: int | None = None
    hidden_alignment: int = 1
    intermediate_alignment: int = 1
    min_compute_capability: tuple[int, int] | None = None
    refuse: Refuse | None = None
