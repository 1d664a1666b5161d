"""The kernels around a library's grouped GEMMs against their twins, on poisoned memory."""

import pytest
import torch
from case import poisoned, relative_error

from moe_core.ops import Activation, ContiguousRows, ExpertsProblem, PaddedRows, RowQuantization, contiguous
from moe_core.ops.activation import activate_torch

HIDDEN, INNER, EXPERTS, TOP_K = 256, 128, 3, 2
FP8, UE8M0 = RowQuantization(), RowQuantization(power_of_two=True)
ACTIVATIONS = {
    "silu": Activation(),
    "up_gate": Activation("gelu_tanh", "up_gate", limit=0.7),
    "interleaved": Activation("swiglu_oai", "interleaved", limit=1.0),
    "ungated": Activation("relu2", None),
}


def problem(activation):
    return ExpertsProblem(EXPERTS, TOP_K, HIDDEN, INNER, gated=activation.gated)


def rows(*shape, seed=0):
    """Rows that fp8 holds exactly under their groups' scales: the interpreter has no carry where it rounds up."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 127, shape, generator=generator, dtype=torch.uint8)
    groups = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 128))
    groups[..., 0] = 448
    powers = torch.randint(-4, 3, groups.shape[:-1], generator=generator).unsqueeze(-1)
    x = torch.ldexp(groups, powers).flatten(-2).half()
    x[..., 0, :128] = 0
    return x


def check_rows(got, got_scale, expected, quantize):
    """Bit by bit."""
    if quantize is None:
        assert torch.equal(got, expected)
        return
    q, scale = contiguous.quantize_rows_torch(expected, quantize)
    assert torch.equal(got_scale, scale)
    assert torch.equal(got.view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("quantize", [None, FP8, UE8M0], ids=["copy", "fp32 scales", "powers of two"])
@pytest.mark.parametrize(("tokens", "num_rows"), [(1, None), (7, 5), (130, None)])
def test_rows_reach_their_blocks(tokens, num_rows, quantize):
    layer = ContiguousRows(problem(Activation()), Activation(), quantize)
    shapes = contiguous.contiguous_workspace(problem(Activation()), torch.float16, tokens, quantize)
    workspace = poisoned(shapes, "cpu")
    x = rows(tokens, HIDDEN)
    ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    count = None if num_rows is None else torch.tensor([num_rows], dtype=torch.int32)
    layer.gather(x, None, ids, count, workspace)
    slot_of_row, expert_of_row = contiguous.gather_rows_torch(ids, EXPERTS, count)
    assert torch.equal(workspace["expert_of_row"], expert_of_row)
    used = slot_of_row >= 0
    first = 0
    for expert, end in enumerate(workspace["ends"].tolist()):
        assert end - first == int((expert_of_row == expert).sum())
        first = -(-end // contiguous.BLOCK_ROWS) * contiguous.BLOCK_ROWS
    assert torch.equal(workspace["row_of_slot"][slot_of_row[used]].long(), used.nonzero().flatten())
    scale = None
    if quantize is not None:
        scale = contiguous.transposed_scale(workspace["x_scale"], HIDDEN // 128)[used]
    check_rows(workspace["x"][used], scale, x[slot_of_row[used] // TOP_K], quantize)


@pytest.mark.parametrize("carried", [False, True])
def test_batched_rows_reach_whole_blocks(carried):
    capacity, counts = 5, torch.tensor([5, 0, 3], dtype=torch.int32)
    layer = PaddedRows(problem(Activation()), Activation(), FP8)
    shapes = contiguous.padded_workspace(problem(Activation()), torch.float16, capacity, FP8)
    workspace = poisoned(shapes, "cpu")
    x = rows(EXPERTS, capacity, HIDDEN)
    q, scale = contiguous.quantize_rows_torch(x, FP8)
    layer.gather(*((q, scale) if carried else (x, None)), counts, workspace)
    got = workspace["x"].view(EXPERTS, -1, HIDDEN)
    got_scale = contiguous.transposed_scale(workspace["x_scale"], HIDDEN // 128, EXPERTS)
    for expert, count in enumerate(counts.tolist()):
        check_rows(got[expert, :count], got_scale[expert, :count], x[expert, :count], FP8)
        assert not torch.isfinite(got_scale[expert, count:]).any()  # rows that do not count are not written


def test_nan_and_infinity_are_carried_on():
    layer = PaddedRows(problem(Activation()), Activation(), FP8)
    workspace = poisoned(contiguous.padded_workspace(problem(Activation()), torch.float16, 1, FP8), "cpu")
    x = torch.ones(EXPERTS, 1, HIDDEN, dtype=torch.float16)
    x[0, 0, 5], x[1, 0, 130] = torch.nan, torch.inf
    layer.gather(x, None, torch.ones(EXPERTS, dtype=torch.int32), workspace)
    scale = contiguous.transposed_scale(workspace["x_scale"], HIDDEN // 128, EXPERTS)[:, 0]
    assert scale.isnan().tolist() == [[True, False], [False, True], [False, False]]


@pytest.mark.parametrize("quantize", [None, FP8], ids=["plain", "fp8"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, quantize):
    activation, counts = ACTIVATIONS[name], torch.tensor([4, 0, 2], dtype=torch.int32)
    layer = PaddedRows(problem(activation), activation, quantize)
    workspace = poisoned(contiguous.padded_workspace(problem(activation), torch.float16, 4, quantize), "cpu")
    h = workspace["h"].view(EXPERTS, -1, workspace["h"].shape[1])
    h[:, :4] = torch.randn(EXPERTS, 4, h.shape[2], generator=torch.Generator().manual_seed(2)).half()
    layer.activate(counts, workspace)
    for expert, count in enumerate(counts.tolist()):
        expected = activate_torch(h[expert, :count].float(), activation)
        if quantize is None:
            assert relative_error(workspace["act"].view(EXPERTS, -1, INNER)[expert, :count], expected) <= 1e-3
            continue
        # The values are a GPU test: see `rows`.
        scale = contiguous.transposed_scale(workspace["act_scale"], INNER // 128, EXPERTS)[expert, :count]
        torch.testing.assert_close(scale, contiguous.quantize_rows_torch(expected, quantize)[1], rtol=1e-3, atol=0)


def test_a_whole_step_with_the_gemms_in_torch():
    """The GEMMs of a step, block by block as a library would, between our kernels: the dense answer comes out."""
    tokens, activation = 9, Activation()
    layer = ContiguousRows(problem(activation), activation)
    workspace = poisoned(contiguous.contiguous_workspace(problem(activation), torch.float16, tokens), "cpu")
    generator = torch.Generator().manual_seed(3)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * INNER**-0.5
    x = torch.randn(tokens, HIDDEN, generator=generator).half()
    ids = torch.randint(-1, EXPERTS, (tokens, TOP_K), generator=generator, dtype=torch.int32)
    router = torch.rand(tokens, TOP_K, generator=generator)
    out = torch.full((tokens, HIDDEN), torch.nan, dtype=torch.float16)
    layer.gather(x, None, ids, None, workspace)
    for source, weight, target in (("x", w13, "h"), ("act", w2, "y")):
        for row, expert in enumerate(workspace["expert_of_row"].tolist()):
            if expert >= 0:
                workspace[target][row] = (workspace[source][row].float() @ weight[expert].T).half()
        if target == "h":
            layer.activate(workspace)
    layer.reduce(ids, router, None, workspace, out)
    from moe_core.ops import experts_step_torch

    expected = experts_step_torch(x, ids, router, w13.half(), w2.half(), activation=activation)
    assert relative_error(out, expected) <= 2e-3
