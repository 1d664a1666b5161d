"""Weights streamed from real checkpoints: the numbers equal transformers', and what doesn't fit is refused."""

from __future__ import annotations

import attrs
import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_core
from moe_core import CheckpointError, ExpertPlacement, MoEParallelConfig, QuantMethod, QuantScheme, QuantSpec
from moe_core.checkpoint import RULES, Checkpoint, LayoutRule, expert_blocks, load_experts
from moe_core.plugins import registry

transformers = pytest.importorskip("transformers")

FAMILIES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe", "nemotron_h"]
TOKENS = 11


def build(config, **arguments):
    return moe_core.build_runner(config, device="cpu", **arguments)


def experts_of(model):
    """transformers' experts modules, in layer order."""
    return [module for name, module in model.named_modules() if name.endswith(".experts")]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_transformers_from_the_same_checkpoint(name, sharded, checkpoints, families):
    folder, config = checkpoints(name, sharded), families[name].moe_config
    checkpoint = Checkpoint.open(folder)
    assert (len(checkpoint.files) > 1) == sharded
    theirs = experts_of(transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval())
    blocks = expert_blocks(checkpoint)
    assert families[name].block in blocks
    assert len(blocks) == len(theirs)
    generator = torch.Generator().manual_seed(0)
    for block, module in zip(sorted(blocks), theirs, strict=True):
        runner = build(config)
        load_experts(checkpoint, block, runner.routed_experts)
        hidden_states = torch.randn((TOKENS, config.hidden_size), generator=generator)
        logits = torch.randn((TOKENS, config.num_experts), generator=generator)
        routing = registry().find("routers", "softmax")(config).select_experts(logits)
        with torch.no_grad():
            expected = module(hidden_states, routing.topk_ids.long(), routing.topk_weights)
        assert expected.abs().max() > 1e-2
        torch.testing.assert_close(runner.forward(hidden_states, logits), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("placement", ExpertPlacement)
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_rank_reads_its_own_experts_only(name, placement, checkpoints, families, monkeypatch):
    checkpoint, config = (
        Checkpoint.open(checkpoints(name)),
        attrs.evolve(families[name].moe_config, placement=placement),
    )
    whole = build(config)
    load_experts(checkpoint, families[name].block, whole.routed_experts)
    read = count_reads(checkpoint, monkeypatch)
    rank = layer(config, MoEParallelConfig(ep_size=4, ep_rank=1))
    load_experts(checkpoint, families[name].block, rank)
    own = list(rank.expert_map.local_experts)
    assert len(own) == 2
    for mine, all_of_it in zip(rank.parameters(), whole.routed_experts.parameters(), strict=True):
        assert torch.equal(mine, all_of_it[own])
    assert sum(read) == sum(parameter.numel() for parameter in rank.parameters())


def layer(config, parallel):
    """The weights of one rank; no ranks are needed to fill them."""
    plan = moe_core.plan(config, parallel=parallel, device="cpu")
    method = registry().find("quant_methods", plan.scheme.name).factory()
    return type(build(config).routed_experts)(plan, method, torch.device("cpu"))


def count_reads(checkpoint, monkeypatch):
    """A list that grows by the elements of everything that is read."""
    read = []

    def counted(value):
        read.append(value.numel())
        return value

    class Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, index):
            return counted(self.inner[index])

    inner_slice, inner_tensor = checkpoint.slice, checkpoint.tensor
    monkeypatch.setattr(checkpoint, "slice", lambda name: Slice(inner_slice(name)))
    monkeypatch.setattr(checkpoint, "tensor", lambda name: counted(inner_tensor(name)))
    return read


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_tensor_parallel_shares_are_read_alone_and_put_together_the_whole(name, checkpoints, families, monkeypatch):
    checkpoint, family = Checkpoint.open(checkpoints(name)), families[name]
    whole = layer(family.moe_config, MoEParallelConfig())
    load_experts(checkpoint, family.block, whole)
    read = count_reads(checkpoint, monkeypatch)
    shares = []
    for rank in range(2):
        read.clear()
        shares.append(layer(family.moe_config, MoEParallelConfig(tp_size=2, tp_rank=rank)))
        load_experts(checkpoint, family.block, shares[rank])
        assert sum(read) == sum(parameter.numel() for parameter in shares[rank].parameters())
    assert torch.equal(torch.cat([share.w2 for share in shares], dim=2), whole.w2)
    if family.moe_config.activation.bias:  # gate and up alternate, so ranks follow one another
        assert torch.equal(torch.cat([share.w13 for share in shares], dim=1), whole.w13)
        assert torch.equal(torch.cat([share.w13_bias for share in shares], dim=1), whole.w13_bias)
        assert torch.equal(shares[0].w2_bias, whole.w2_bias)
        assert not shares[1].w2_bias.any()
        return
    gates, ups = zip(*(share.w13.chunk(2, dim=1) for share in shares), strict=True)
    assert torch.equal(torch.cat([*gates, *ups], dim=1), whole.w13)


def test_loading_again_writes_into_the_same_storage(checkpoints, families):
    checkpoint, family = Checkpoint.open(checkpoints("mixtral")), families["mixtral"]
    target = build(family.moe_config).routed_experts
    load_experts(checkpoint, family.block, target)
    before = target.w13.clone(), target.w13.data_ptr()
    target.w13.data.zero_()
    load_experts(checkpoint, family.block, target)
    assert torch.equal(target.w13, before[0])
    assert target.w13.data_ptr() == before[1]


def test_scales_of_a_packed_scheme_reach_its_method(copied, families):
    """A plugin brings its rule; shapes, dtypes and names beyond gate, up and down are its method's own matter."""
    got = {}

    class Packed(QuantMethod):
        scheme = QuantScheme("packed", weight=QuantSpec("uint8", (-1, -1)))

        def create_weights(self, layer):
            layer.register_weight("w13", torch.zeros(1))

        def load_expert(self, layer, expert, name, tensor):
            got[expert, name] = tuple(tensor.shape)

        def pack_weights(self, layer):
            got["packed"] = True

    def pack(tensors):
        for name in [name for name in tensors if ".experts." in name]:
            tensors[name] = tensors[name][:, ::2].to(torch.uint8).contiguous()
            tensors[f"{name}_scale"] = torch.ones(())

    folder, family = copied("qwen3_moe"), families["qwen3_moe"]
    rewrite(folder, pack)
    rule = LayoutRule(
        name="packed scales",
        pattern=r"^(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)_proj\.weight_scale$",
        parts={part: (f"{part}_scale",) for part in ("gate", "up", "down")},
    )
    plan = moe_core.plan(family.moe_config, device="cpu")
    plan = attrs.evolve(plan, problem=attrs.evolve(plan.problem, scheme=Packed.scheme))
    target = type(build(family.moe_config).routed_experts)(plan, Packed(), torch.device("cpu"))
    load_experts(Checkpoint.open(folder), family.block, target, rules=[*RULES, rule])
    assert got.pop("packed")
    assert len(got) == 8 * 6
    assert (got[3, "gate"], got[3, "down"], got[3, "up_scale"]) == ((32, 32), (64, 16), ())


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


EXPERT = "model.layers.0.mlp.experts.3"
DAMAGE = {
    "missing projection": (
        lambda tensors: tensors.pop(f"{EXPERT}.up_proj.weight"),
        r"under 'model.layers.0.mlp' there is no tensor for expert 3 up;.*incomplete",
    ),
    "missing expert": (
        lambda tensors: [tensors.pop(f"{EXPERT}.{part}_proj.weight") for part in ("gate", "up", "down")],
        r"no tensor for expert 3 gate, expert 3 up, expert 3 down",
    ),
    "wrong shape": (
        lambda tensors: tensors.update({f"{EXPERT}.down_proj.weight": torch.zeros(64, 31)}),
        r"model\.safetensors: tensor '.*experts\.3\.down_proj\.weight' has shape \(64, 31\); expected \(64, 32\)",
    ),
    "an expert too many": (
        lambda tensors: tensors.update({"model.layers.0.mlp.experts.8.down_proj.weight": torch.zeros(64, 32)}),
        r"experts\.8\.down_proj\.weight': expert 8 of a layer with experts 0 to 7",
    ),
    "unmapped": (
        lambda tensors: tensors.update({f"{EXPERT}.fc1.weight": torch.zeros(64, 32)}),
        r"(?s)tensor 'model.layers.0.mlp.experts.3.fc1.weight' \(model_type 'qwen3_moe'\).*no rule maps it.*w1,w3,w2",
    ),
    "a bias": (
        lambda tensors: tensors.update({f"{EXPERT}.up_proj.bias": torch.zeros(32)}),
        r"experts\.3\.up_proj\.bias': it would be 'up_bias', which this layer's activation has not",
    ),
    "two layouts": (
        lambda tensors: tensors.update({f"{EXPERT}.w1.weight": torch.zeros(32, 64)}),
        r"both hold 'gate' of expert 3",
    ),
    "packed": (
        lambda tensors: tensors.update({f"{EXPERT}.up_proj.weight": torch.zeros(32, 64).to(torch.float8_e4m3fn)}),
        r"experts\.3\.up_proj\.weight' is packed \(F8_E4M3\).*scheme 'unquantized'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_does_not_fit_is_refused_before_anything_is_copied(damage, copied, families):
    change, message = DAMAGE[damage]
    folder = copied("qwen3_moe")
    rewrite(folder, change)
    target = build(families["qwen3_moe"].moe_config).routed_experts
    with pytest.raises(CheckpointError, match=message):
        load_experts(Checkpoint.open(folder), families["qwen3_moe"].block, target)
    assert not any(parameter.any() for parameter in target.parameters())


def test_unknown_block_is_an_error_that_lists_the_known(checkpoints, families):
    target = build(families["qwen3_moe"].moe_config).routed_experts
    known = (
        r"no experts under 'model.layers.7.mlp'; MoE blocks of this checkpoint: model.layers.0.mlp, model.layers.1.mlp"
    )
    with pytest.raises(CheckpointError, match=known):
        load_experts(Checkpoint.open(checkpoints("qwen3_moe")), "model.layers.7.mlp", target)


def test_fused_tensor_of_another_shape_names_both(checkpoints, families):
    config = attrs.evolve(families["gpt_oss"].moe_config, intermediate_size=24)
    with pytest.raises(CheckpointError, match=r"down_proj' has shape \(8, 32, 64\); expected \(8, 24, 64\)"):
        load_experts(Checkpoint.open(checkpoints("gpt_oss")), families["gpt_oss"].block, build(config).routed_experts)
