"""`RoutedExperts`: loading expert by expert, split over ranks, with errors that name the tensor."""

from __future__ import annotations

import pytest
import torch

import moe_core
from moe_core import ActivationSpec, CheckpointError, ExpertPlacement, GateUpLayout, MoEError, MoEParallelConfig
from moe_core.routed_experts import RoutedExperts

H, I = 24, 16


def layer(config, parallel=MoEParallelConfig(), **changes):
    runner = moe_core.build_runner(config(**changes), parallel=parallel, device="cpu", group=object())
    return runner.routed_experts


@pytest.mark.parametrize("layout", [*GateUpLayout, None])
def test_projections_land_where_the_layout_says(config, layout):
    spec = ActivationSpec("silu", layout, bias=True)
    made = layer(config, activation=spec)
    gate, up, down = torch.randn(I, H), torch.randn(I, H), torch.randn(H, I)
    parts = {"up": up, "down": down} | ({"gate": gate} if layout else {})
    for name, tensor in parts.items():
        assert made.load_expert(3, name, tensor)
        assert made.load_expert(3, f"{name}_bias", tensor[:, 0])
    expected = {
        GateUpLayout.GATE_UP: torch.cat([gate, up]),
        GateUpLayout.UP_GATE: torch.cat([up, gate]),
        GateUpLayout.INTERLEAVED: torch.stack([gate, up], 1).reshape(2 * I, H),
        None: up,
    }[layout]
    torch.testing.assert_close(made.w13[3], expected)
    torch.testing.assert_close(made.w13_bias[3], expected[:, 0])
    torch.testing.assert_close(made.w2[3], down)
    assert made.w13[2].eq(0).all(), "no other expert is touched"


@pytest.mark.parametrize("placement", list(ExpertPlacement))
def test_a_rank_keeps_its_own_experts_in_local_order(config, placement):
    made = layer(config, MoEParallelConfig(ep_size=4, ep_rank=1), placement=placement)
    kept = [e for e in range(6) if made.load_expert(e, "down", torch.full((H, I), float(e)))]
    assert kept == ([2, 3] if placement is ExpertPlacement.LINEAR else [1, 5])
    assert made.w2[:, 0, 0].tolist() == kept


def test_tensor_parallel_ranks_hold_their_slices_and_the_down_bias_once(config):
    gate, down, bias = torch.randn(I, H), torch.randn(H, I), torch.randn(H)
    for rank in range(2):
        made = layer(config, MoEParallelConfig(tp_size=2, tp_rank=rank), activation=ActivationSpec(bias=True))
        made.load_expert(0, "gate", gate)
        made.load_expert(0, "down", down)
        made.load_expert(0, "down_bias", bias)
        half = slice(rank * I // 2, (rank + 1) * I // 2)
        torch.testing.assert_close(made.w13[0, : I // 2], gate[half])
        torch.testing.assert_close(made.w2[0], down[:, half])
        torch.testing.assert_close(made.w2_bias[0], bias if rank == 0 else torch.zeros(H))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gate", (I, H + 1), r"'gate' has shape \(16, 25\); expected \(16, 24\)"),
        ("down", (I, H), r"'down' has shape \(16, 24\); expected \(24, 16\)"),
        ("w1", (I, H), "'w1': unquantized experts have gate, up, down"),
        ("up_bias", (I,), "'up_bias', but the layer's activation declares no bias"),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_lost(config, name, shape, message):
    made = layer(config)
    made.load_expert(1, "down", torch.ones(H, I))
    before = {key: value.clone() for key, value in made.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        made.load_expert(1, name, torch.full(shape, 7.0))
    assert all(made.state_dict()[key].equal(value) for key, value in before.items())


def test_an_expert_that_does_not_exist_is_named(config):
    with pytest.raises(CheckpointError, match="expert 6: this layer has experts 0 to 5"):
        layer(config).load_expert(6, "down", torch.ones(H, I))


def test_a_method_of_another_scheme_is_refused(config):
    from moe_core.builtin.unquantized import UnquantizedMethod

    class Other(UnquantizedMethod):
        scheme = moe_core.QuantScheme("other")

    with pytest.raises(MoEError, match="scheme 'other' for a plan of scheme 'unquantized'"):
        RoutedExperts(moe_core.plan(config(), device="cpu"), Other(), torch.device("cpu"))


def test_views_are_made_again_after_a_move(config):
    made = layer(config)
    first = made.weights
    assert made.weights is first
    made.to("cpu")
    assert made.weights is not first
    assert made.weights.w13.data_ptr() == made.w13.data_ptr()


@pytest.mark.parametrize(("move", "what"), [("half", "torch.float16 on cpu"), ("meta", "torch.float32 on meta")])
def test_a_layer_cannot_move_away_from_its_plan(config, move, what):
    made = layer(config)
    with pytest.raises(MoEError, match=rf"planned for torch.float32 on cpu and cannot become {what}: build it with"):
        made.half() if move == "half" else made.to(move)
    assert made.w13.dtype == torch.float32


def test_loading_a_state_dict_never_rebinds(config):
    made = layer(config)
    views, address = made.weights, made.w2.data_ptr()
    state = {name: torch.full_like(tensor, 3.0) for name, tensor in made.state_dict().items()}
    made.load_state_dict(state, assign=True)
    assert made.w2.data_ptr() == address
    assert views.w2.eq(3).all()


def test_repr_says_what_it_holds(config):
    assert "experts=3 of 6, hidden=24, intermediate=16, scheme=unquantized" in repr(
        layer(config, MoEParallelConfig(ep_size=2))
    )
