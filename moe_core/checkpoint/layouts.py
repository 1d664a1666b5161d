"""Rules: the Hub's own names of expert tensors → (MoE block, expert, projection), one rule per way of writing them.

Shape letters: E experts · H hidden · I intermediate.

A rule never guesses. The same two names stand for halves in one family and for interleaved rows in another, so rules
for fused tensors name the `model_type`s that they were checked against. Third parties pass rules of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import attrs

from moe_core.checkpoint.reader import Checkpoint
from moe_core.errors import CheckpointError

_BLOCK = r"(?P<block>.+?)"
_EXPERT = rf"^{_BLOCK}\.experts\.(?P<expert>\d+)\."
_EXPERTS_TENSOR = re.compile(r"(^|\.)experts\.|\.block_sparse_moe\.(input|output)_linear\.")
"""What can only be an expert's. `shared_experts.` is none of it: there the dot before "experts" is missing."""


@attrs.frozen
class ExpertTensor:
    """What one checkpoint tensor holds.

    Attributes:
        name: the tensor's name.
        block: the name of its MoE block, such as "model.layers.0.mlp".
        expert: whose it is; None: all experts', along dim 0.
        parts: what it is, in names of `RoutedExperts.load_expert`: ("gate",), or ("gate", "up") where fused.
        transposed: stored as `[…, in, out]`, not as `[…, out, in]`.
        interleaved: fused parts alternate along the output dim, where they else lie one after the other.
    """

    name: str
    block: str
    expert: int | None
    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False

    @property
    def is_bias(self) -> bool:
        return self.parts[0].endswith("_bias")


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


@attrs.frozen
class LayoutRule:
    """One way of writing experts down.

    Attributes:
        name: for people, with an example of the names it maps.
        pattern: a regular expression with the groups `block` and `part`, and `expert` unless all experts are in one.
        parts: what the group `part` can be → the names of `load_expert`.
        model_types: the only `model_type`s it holds for; empty: the names alone say it.
        transposed, interleaved: as in `ExpertTensor`.
    """

    name: str
    pattern: re.Pattern[str] = attrs.field(converter=_compile)
    parts: Mapping[str, tuple[str, ...]]
    model_types: frozenset[str] = frozenset()
    transposed: bool = False
    interleaved: bool = False

    def map(self, name: str, model_type: str) -> ExpertTensor | None:
        """What `name` holds, or None where this rule does not apply."""
        if self.model_types and model_type not in self.model_types:
            return None
        match = self.pattern.match(name)
        if match is None or match["part"] not in self.parts:
            return None
        found = match.groupdict()
        expert = None if found.get("expert") is None else int(found["expert"])
        return ExpertTensor(name, found["block"], expert, self.parts[found["part"]], self.transposed, self.interleaved)


def _one_per_projection(name: str, projections: Mapping[str, str], kinds: Mapping[str, str]) -> LayoutRule:
    """A rule for `BLOCK.experts.N.PROJECTION.SUFFIX`: projection → part, suffix → kind of tensor."""
    words = f"({'|'.join(projections)})"
    suffixes = f"({'|'.join(re.escape(suffix) for suffix in kinds)})"
    return LayoutRule(
        name=name,
        pattern=_EXPERT + rf"(?P<part>{words}\.{suffixes})$",
        parts={f"{p}.{suffix}": (part + kind,) for p, part in projections.items() for suffix, kind in kinds.items()},
    )


_PLAIN_KINDS = {"weight": "", "bias": "_bias"}
_PROJECTIONS = (
    (
        (
            "one matrix per expert, BLOCK.experts.N.{gate,up,down}_proj.weight (Qwen, DeepSeek, OLMoE, GLM-4, Ernie, "
            "HunYuan, dots1, Jamba; NemotronH without gate_proj)"
        ),
        {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"},
    ),
    (
        "one matrix per expert, BLOCK.experts.N.{w1,w3,w2}.weight (Mixtral, Phi-MoE, MiniMax-M2, LFM2-MoE)",
        {"w1": "gate", "w3": "up", "w2": "down"},
    ),
)

RULES: tuple[LayoutRule, ...] = (
    *(_one_per_projection(name, projections, _PLAIN_KINDS) for name, projections in _PROJECTIONS),
    LayoutRule(
        name="all experts in one, BLOCK.block_sparse_moe.{input,output}_linear.weight (GraniteMoE)",
        pattern=r"^(?P<block>.+\.block_sparse_moe)\.(?P<part>(input|output)_linear\.weight)$",
        parts={"input_linear.weight": ("gate", "up"), "output_linear.weight": ("down",)},
        model_types=frozenset({"granitemoe", "granitemoehybrid", "granitemoeshared", "granitemoeswa"}),
    ),
    LayoutRule(
        name="all experts in one, transposed, gate and up interleaved, BLOCK.experts.{gate_up,down}_proj[_bias] "
        "(gpt-oss)",
        pattern=rf"^{_BLOCK}\.experts\.(?P<part>(gate_up|down)_proj(_bias)?)$",
        parts={
            "gate_up_proj": ("gate", "up"),
            "gate_up_proj_bias": ("gate_bias", "up_bias"),
            "down_proj": ("down",),
            "down_proj_bias": ("down_bias",),
        },
        model_types=frozenset({"gpt_oss"}),
        transposed=True,
        interleaved=True,
    ),
    LayoutRule(
        name="all experts in one, transposed, gate before up, BLOCK.experts.{gate_up,down}_proj (Llama 4)",
        pattern=rf"^{_BLOCK}\.experts\.(?P<part>(gate_up|down)_proj)$",
        parts={"gate_up_proj": ("gate", "up"), "down_proj": ("down",)},
        model_types=frozenset({"llama4", "llama4_text"}),
        transposed=True,
    ),
)
"""The built-in rules, tried in this order."""


def packed_rules(suffixes: Mapping[str, str]) -> tuple[LayoutRule, ...]:
    """Rules for the further tensors of packed projections, beside each `….weight` that `RULES` know.

    Args:
        suffixes: as in `QuantMethod.checkpoint_suffixes`.
    """
    if not suffixes:
        return ()
    one_each = (
        _one_per_projection(f"{', '.join(suffixes)} beside {name}", projections, suffixes)
        for name, projections in _PROJECTIONS
    )
    both = {f"gate_up_proj_{suffix}": (f"gate{kind}", f"up{kind}") for suffix, kind in suffixes.items()}
    fused = LayoutRule(
        name=f"all experts in one, BLOCK.experts.{{gate_up,down}}_proj_ and {', '.join(suffixes)} (gpt-oss, packed)",
        pattern=rf"^{_BLOCK}\.experts\.(?P<part>(gate_up|down)_proj_({'|'.join(map(re.escape, suffixes))}))$",
        parts=both | {f"down_proj_{suffix}": (f"down{kind}",) for suffix, kind in suffixes.items()},
        model_types=frozenset({"gpt_oss"}),
        transposed=True,
        interleaved=True,
    )
    return (*one_each, fused)


def map_experts(
    names: Iterable[str], model_type: str, rules: Sequence[LayoutRule] = RULES
) -> dict[str, list[ExpertTensor]]:
    """Every expert tensor among `names`, by MoE block.

    Args:
        names: tensor names of a checkpoint; those that are no expert's are left out.
        model_type: as config.json has it.
        rules: tried in order; the first that applies decides.

    Raises:
        CheckpointError: an expert's tensor that no rule maps; it names the tensor and the rules.
    """
    blocks: dict[str, list[ExpertTensor]] = {}
    for name in names:
        if not _EXPERTS_TENSOR.search(name):
            continue
        mapped = next((found for rule in rules if (found := rule.map(name, model_type))), None)
        if mapped is None:
            known = "\n".join(f"  - {rule.name}" for rule in rules)
            raise CheckpointError(
                f"tensor {name!r} (model_type {model_type!r}) belongs to experts, and no rule maps it. The rules are:\n"
                f"{known}\nA format of its own (a quantized one, say) needs the plugin that reads it, or rules passed "
                "by the caller (see moe_core.checkpoint.LayoutRule)"
            )
        blocks.setdefault(mapped.block, []).append(mapped)
    return blocks


def expert_blocks(checkpoint: Checkpoint, rules: Sequence[LayoutRule] = RULES) -> dict[str, list[ExpertTensor]]:
    """Every MoE block of a checkpoint, by its name there, such as "model.layers.0.mlp", with its expert tensors."""
    return map_experts(checkpoint.names, checkpoint.model_type, rules)
