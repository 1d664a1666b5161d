"""How the NVFP4 kernels want their weights: rows, codes and scales in another order, in the same number of bytes.

R rows of a matrix · K its columns (not top-k, in this file) · I intermediate.

A tile is 16 rows by 64 columns: what one warp multiplies with four m16n8k16 products. Lane 4 * g + q of the warp holds
rows g and g + 8 and the columns of group q, the 16 that share a scale, so it needs two scales a tile. In each product j
it brings four columns, 16 q + 4 j + 0 .. 3; the activations are read in that order too, so no product has to be undone.

Codes of a tile: 32 lanes of 16 bytes, word j for product j. A word holds eight codes, so that four masks and shifts
make four pairs of bfloat16 of them (see `WORD_BITS`). Tiles of the same 16 rows follow one another along K.
Scales of a tile: two bytes a lane, row g and then g + 8; those of two tiles along K stand together, as one word a lane.
A scale's byte is a 5-bit exponent and 3 bits of mantissa, which one multiply-add makes a bfloat16 (see `scale_codes`).

With a gate, the first 8 rows of a tile are gate rows and the others the up rows that belong to them.
Everything here is invertible: the checkpoint's bytes come back.
"""

from __future__ import annotations

import functools

import torch

TILE_ROWS = 16
TILE_COLUMNS = 64
SCALE_FACTOR = 2.0**10
"""A product of an expanded code (2^-126) and an expanded scale (2^116) is this much too small."""

_ZERO, _MINUS_ZERO, _NAN = 0xB0, 0xB1, 0xA9  # expand to -0, to what vanishes in any product, and to NaN
_CHUNK = 1 << 22
"""Codes that are permuted at once: about 20 bytes of intermediates each, beside one expert's tensor."""

WORD_BITS = (((15, 8, 7, 6), (12, 5, 4, 3)), ((9, 2, 1, 0), (14, 11, 10, 13)))
"""`[p][half]` -> bits of a code, from its sign down, in each 16-bit half of a word. The first three are shifts of the
first by 3, which is where bfloat16 has its sign and its lowest exponent bits."""


def row_order(rows: int, gate_up_layout: str | None) -> torch.Tensor:
    """int64 `[R]`: which row of the checkpoint's order each packed row is. None: no gate, the order stays."""
    packed = torch.arange(rows)
    if gate_up_layout is None:
        return packed
    inner, is_up = rows // 2, packed % TILE_ROWS // 8
    column = packed // TILE_ROWS * 8 + packed % 8
    if gate_up_layout == "interleaved":
        return 2 * column + is_up
    return column + inner * (is_up if gate_up_layout == "gate_up" else 1 - is_up)


def lane_order(columns: int) -> torch.Tensor:
    """int64 `[columns]`: which column of its own order each is, where lanes hold theirs side by side.

    A product of a tile takes 16 columns at a time, and lane q of a quad the ones at 2 q, 2 q + 1, 2 q + 8 and 2 q + 9:
    these must be columns 16 q + 4 j and the next three, for product j.
    """
    place = torch.arange(columns)
    product, pair, q, odd = place % 64 // 16, place % 16 // 8, place % 8 // 2, place % 2
    return place // 64 * 64 + 16 * q + 4 * product + 2 * pair + odd


@functools.cache
def scale_codes() -> torch.Tensor:
    """uint8 `[256]`, a permutation: an e4m3 byte as the byte whose expansion is the scale.

    Byte c expands to the bfloat16 with bits 16 c + 0x7500, which is 2^116 times the scale: subnormals get an exponent
    of their own, and zero and NaN bytes that overflow into a zero and a NaN. Negative scales expand to nonsense.
    """
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    codes = torch.full((256,), -1, dtype=torch.int64)
    mantissa, exponent = torch.frexp(values[1:127])
    codes[1:127] = (exponent - 1 + 9) * 8 + ((2 * mantissa - 1) * 8).to(torch.int64)
    codes[0], codes[127], codes[128] = _ZERO, _NAN, _MINUS_ZERO
    free = sorted(set(range(256)) - set(codes.tolist()))
    codes[codes < 0] = torch.tensor(free)
    return codes.to(torch.uint8)


def pack_nvfp4_matrix(q: torch.Tensor, scale: torch.Tensor, gate_up_layout: str | None) -> None:
    """One expert's matrix from the checkpoint's order into the kernels', in place.

    Args:
        q: uint8 `[R, K / 2]`, two codes a byte, contiguous; R a multiple of 16, K of 64.
        scale: float8_e4m3fn `[R, K / 16]`, contiguous.
        gate_up_layout: of w13; None for w2, or without a gate.

    Raises:
        ValueError: a scale is negative, which the kernels' form of a scale can't hold.
    """
    if bool((scale.view(torch.uint8) > 0x80).any()):
        raise ValueError("a group scale is negative; experts that read the checkpoint's own order take it")
    order = row_order(q.shape[0], gate_up_layout).to(q.device)
    source = q.clone()
    for rows in _row_chunks(q):
        q[rows] = _pack_codes(source[order[rows]])
    codes = scale_codes().to(q.device)[scale.view(torch.uint8)[order].to(torch.int64)]
    scale.view(torch.uint8).copy_(_interleave_scales(codes))


def unpack_nvfp4_matrix(q: torch.Tensor, scale: torch.Tensor, gate_up_layout: str | None) -> None:
    """The way back, in place."""
    order = row_order(q.shape[0], gate_up_layout).to(q.device)
    source = q.clone()
    for rows in _row_chunks(q):
        q[order[rows]] = _unpack_codes(source[rows])
    values = torch.argsort(scale_codes().to(torch.int64)).to(q.device, torch.uint8)
    back = values[_separate_scales(scale.view(torch.uint8)).to(torch.int64)]
    scale.view(torch.uint8)[order] = back


def expand_nvfp4_matrix(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A packed matrix as bfloat16 `[R, K]`, step by step as the kernels make it: in packed row order, columns in their
    own, without the global scale and 1 / `SCALE_FACTOR` too small."""
    rows, columns = q.shape[0], 2 * q.shape[1]
    words = q.view(torch.int32).view(rows // TILE_ROWS, columns // TILE_COLUMNS, 8, 4, 4).to(torch.int64)
    words = words.permute(0, 2, 1, 3, 4) & 0xFFFFFFFF  # tile, g, tile along K, q, j
    codes = _separate_scales(scale.view(torch.uint8)).view(rows // TILE_ROWS, 2, 8, -1, 4).to(torch.int64)
    scales = _bfloat16(codes * 16 + 0x7500)
    halves = []
    for half in range(2):
        pairs = []
        for p in range(2):
            if (p, half) == (1, 1):
                bits = words << 1 & 0x80008000 | words >> 3 & 0x01800180 | words >> 7 & 0x00400040
            else:
                bits = words << 3 * (2 * p + half) & 0x81C081C0
            pair = torch.stack((_bfloat16(bits & 0xFFFF), _bfloat16(bits >> 16)), dim=-1)
            pairs.append(pair * scales[:, half, ..., None, None])
        halves.append(torch.stack(pairs, dim=-2))
    return torch.stack(halves, dim=1).reshape(rows, columns)


def _bfloat16(bits: torch.Tensor) -> torch.Tensor:
    """The lowest 16 bits of int64 values as bfloat16."""
    return bits.to(torch.int16).view(torch.bfloat16)


def _row_chunks(q: torch.Tensor) -> list[slice]:
    step = max(_CHUNK // (2 * q.shape[1]) // TILE_ROWS, 1) * TILE_ROWS
    return [slice(first, first + step) for first in range(0, q.shape[0], step)]


def _pack_codes(q: torch.Tensor) -> torch.Tensor:
    """uint8 `[R, K / 2]`, rows in tile order -> the same bytes as words of the tiles."""
    rows, half_columns = q.shape
    tiles = (rows // TILE_ROWS, 2, 8, half_columns // 32, 4, 4, 2)  # tile, half, g, tile along K, q, j, p
    pairs = q.view(tiles).to(torch.int64)
    word = torch.zeros(tiles[0], 8, *tiles[3:6], dtype=torch.int64, device=q.device)
    for p in range(2):
        for half in range(2):
            pair = pairs[:, half, ..., p]
            for b, code in enumerate((pair & 15, pair >> 4)):
                for place, bit in enumerate(WORD_BITS[p][half]):
                    word |= (code >> (3 - place) & 1) << (bit + 16 * b)
    word = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    return word.permute(0, 2, 1, 3, 4).contiguous().view(torch.uint8).view(rows, half_columns)


def _unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    rows, half_columns = packed.shape
    words = packed.contiguous().view(torch.int32).view(rows // TILE_ROWS, half_columns // 32, 8, 4, 4)
    words = words.permute(0, 2, 1, 3, 4)  # tile, g, tile along K, q, j
    pairs = torch.zeros(words.shape[0], 2, *words.shape[1:], 2, dtype=torch.uint8, device=packed.device)
    for p in range(2):
        for half in range(2):
            for b in range(2):
                for place, bit in enumerate(WORD_BITS[p][half]):
                    pairs[:, half, ..., p] |= ((words >> (bit + 16 * b) & 1) << (3 - place + 4 * b)).to(torch.uint8)
    return pairs.reshape(rows, half_columns)


def _interleave_scales(codes: torch.Tensor) -> torch.Tensor:
    """`[R, K / 16]` -> the same bytes, two tiles along K a word; a last single tile has half words."""
    rows, groups = codes.shape
    tiles = codes.view(rows // TILE_ROWS, 2, 8, groups // 4, 4)  # tile, half, g, tile along K, q
    even = groups // 4 // 2 * 2
    whole = tiles[:, :, :, :even].unflatten(3, (even // 2, 2)).permute(0, 3, 2, 5, 4, 1)
    last = tiles[:, :, :, even:].permute(0, 3, 2, 4, 1)
    return torch.cat([whole.flatten(1), last.flatten(1)], dim=1).view(rows, groups)


def _separate_scales(packed: torch.Tensor) -> torch.Tensor:
    rows, groups = packed.shape
    flat = packed.reshape(rows // TILE_ROWS, groups // 4, 64)
    even = groups // 4 // 2 * 2
    whole = flat[:, :even].reshape(len(flat), even // 2, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3).flatten(3, 4)
    last = flat[:, even:].reshape(len(flat), groups // 4 - even, 8, 4, 2).permute(0, 4, 2, 1, 3)
    return torch.cat([whole, last], dim=3).reshape(rows, groups)
