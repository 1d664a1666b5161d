"""Scores and top-k of a router in one kernel: one warp per token.

T tokens · E experts (padded to E_P, a power of 2) · K top-k (padded to K_P).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit
def _drop_groups(choice, valid, e, SIZE: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, KEEP: tl.constexpr):
    """-inf in place of the choices outside the KEEP best groups; a group is worth the sum of its two best."""
    group = tl.arange(0, GP)
    worth = tl.full((GP,), float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        mine = tl.where(valid & (e // SIZE == g), choice, float("-inf"))
        best = tl.max(mine, 0)
        at = tl.min(tl.where(mine == best, e, e.shape[0]), 0)
        worth = tl.where(group == g, best + tl.max(tl.where(e == at, float("-inf"), mine), 0), worth)
    # Of equal groups the first wins, as everywhere here.
    ahead = (worth[None, :] > worth[:, None]) | ((worth[None, :] == worth[:, None]) & (group[None, :] < group[:, None]))
    rank = tl.sum(ahead.to(tl.int32), 1)
    for g in tl.static_range(GROUPS):
        dropped = tl.sum(tl.where(group == g, rank, 0), 0) >= KEEP
        choice = tl.where(dropped & (e // SIZE == g), float("-inf"), choice)
    return choice


@triton.jit
def topk_route_kernel(
    logits, bias, ids, weights, stride_logits, epsilon,
    E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr, GROUPS: tl.constexpr, GP: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ids and weights [T, K] of one token per program, best first; of equal choices the lowest id wins."""
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EP)
    valid = e < E
    logit = tl.load(logits + token * stride_logits + e, mask=valid, other=float("-inf")).to(tl.float32)
    if SCORING == "softmax":
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    elif SCORING == "sigmoid":
        score = tl.sigmoid(logit)
    else:
        score = logit
    choice = score
    if bias is not None:
        choice += tl.load(bias + e, mask=valid, other=0).to(tl.float32)
    if KEEP < GROUPS:
        choice = _drop_groups(choice, valid, e, E // GROUPS, GROUPS, GP, KEEP)
    k = tl.arange(0, KP)
    out_ids = tl.zeros((KP,), tl.int32)
    out = tl.zeros((KP,), tl.float32)
    for i in tl.static_range(K):
        best = tl.max(tl.where(valid, choice, float("-inf")), 0)
        # The clamp: NaN logits equal nothing, and even then an id must be one of an expert.
        at = tl.minimum(tl.min(tl.where(valid & (choice == best), e, EP), 0), E - 1)
        out_ids = tl.where(k == i, at, out_ids)
        out = tl.where(k == i, tl.sum(tl.where(e == at, score, 0.0), 0), out)
        valid = valid & (e != at)
    if SCORING == "softmax_of_topk":
        out = tl.where(k < K, out, float("-inf"))
        out = tl.exp(out - tl.max(out, 0))
        out = out / tl.sum(out, 0)
    elif SCORING == "sigmoid_of_topk":
        out = tl.sigmoid(out)
    if RENORMALIZE:
        out = out / (tl.sum(tl.where(k < K, out, 0.0), 0) + epsilon)
    tl.store(ids + token * K + k, out_ids.to(ids.dtype.element_ty), mask=k < K)
    tl.store(weights + token * K + k, out, mask=k < K)
