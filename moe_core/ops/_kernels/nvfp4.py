"""What the NVFP4 kernels for few rows share: a lane's 16-byte load of packed weights is its share of four products.

Weights are the products' left side, 16 rows of them, and up to 8 activation rows are the right side: the codes become
bfloat16 in the lane that loaded them, and neither shared memory nor a shuffle is needed until warps that share a row's
K are summed. Layout and bits: `_nvfp4_layout.py`, where a tile is 16 rows by 64 columns. Not for the interpreter; the
twin is `nvfp4_experts_torch`.

T tokens · H hidden · I intermediate · E_l local experts · K top-k · C row capacity; slot s = t * K + k. LEN is the
length of the dot products, R the rows of a weight matrix, NT eights of activation rows a program multiplies at once.
WR warps stand along the rows, WK along LEN. A block is four tiles along LEN. Right sides without a row of their own are
read from some legal row: a column of a product depends on its own row alone, and theirs are not stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_core.ops._kernels.activation import activate
from moe_core.ops._nvfp4_layout import SCALE_FACTOR

UNDO = gl.constexpr(SCALE_FACTOR)


def _expansion() -> str:
    """Words $16 + j and the scales of rows g and g + 8 -> pairs of bfloat16: p 0 (g, g + 8), then p 1, each j 0 .. 3.

    The products are multiply-adds of -0, which sm_80 has too; `WORD_BITS` says where the bits of a code are.
    """
    text = "{ .reg .b32 t, u, z;\nmov.b32 z, 0x80008000;\n"
    for j in range(4):
        word, low, high = f"${16 + j}", f"${20 + j}", f"${24 + j}"
        text += f"and.b32 t, {word}, 0x81C081C0; fma.rn.bf16x2 ${j}, t, {low}, z;\n"
        text += f"shl.b32 t, {word}, 3; and.b32 t, t, 0x81C081C0; fma.rn.bf16x2 ${4 + j}, t, {high}, z;\n"
        text += f"shl.b32 t, {word}, 6; and.b32 t, t, 0x81C081C0; fma.rn.bf16x2 ${8 + j}, t, {low}, z;\n"
        text += f"shl.b32 t, {word}, 1; and.b32 t, t, 0x80008000;\n"
        text += f"shr.b32 u, {word}, 3; and.b32 u, u, 0x01800180; or.b32 t, t, u;\n"
        text += f"shr.b32 u, {word}, 7; and.b32 u, u, 0x00400040; or.b32 t, t, u;\n"
        text += f"fma.rn.bf16x2 ${12 + j}, t, {high}, z;\n"
    return text + "}"


def _products() -> str:
    """Four m16n8k16 products into one accumulator: weights $4 .. $19 as `_expansion` gives them, activations after."""
    text, acc = "{\n", "{$28, $29, $30, $31}"
    for j in range(4):
        weights = ", ".join(f"${4 + 4 * part + j}" for part in range(4))
        rows = f"${20 + 2 * j}, ${21 + 2 * j}"
        text += "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        text += f"{{$0, $1, $2, $3}}, {{{weights}}}, {{{rows}}}, {acc};\n"
        acc = "{$0, $1, $2, $3}"
    return text + "}"


_EXPAND = gl.constexpr(_expansion())
_EXPAND_OPERANDS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 12))
_MULTIPLY = gl.constexpr(_products())
_MULTIPLY_OPERANDS = gl.constexpr(",".join(["=&f"] * 4 + ["r"] * 24 + ["f"] * 4))


@gluon.jit
def loads_stay_above():
    """ptxas moves loads down to where their values are needed, one latency after another, but not past this.

    For a warp that asks for several blocks ahead; with one block ahead, more warps hide more than the order of loads.
    """
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _words(pointer):
    """A pointer to anything as a pointer to 32-bit words."""
    return pointer.to(gl.pointer_type(gl.int32), bitcast=True)


@gluon.jit
def expand(words, scales, SHIFT: gl.constexpr):
    """Codes `[threads, 4]` of one tile and their scales (16 bits from SHIFT on, `[threads]`) as bfloat16 pairs."""
    low = ((scales >> SHIFT) & 0xFF) * 0x00100010 + 0x75007500
    high = ((scales >> (SHIFT + 8)) & 0xFF) * 0x00100010 + 0x75007500
    low, _ = gl.broadcast(low[:, None], words)
    high, _ = gl.broadcast(high[:, None], words)
    return gl.inline_asm_elementwise(
        _EXPAND, _EXPAND_OPERANDS, [words, low, high], dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True,
        pack=4,
    )  # fmt: skip


@gluon.jit
def load_tiles(w_ptr, s_ptr, lane, i, ok, COUNT: gl.constexpr):
    """COUNT tiles along LEN from tile 4 * i on: their codes, `[threads, 4]` each, then a word of scales for every two.

    COUNT is 4, or at the end of LEN what is left; the scales of a last single tile are two bytes a lane.
    """
    loaded = ()
    for b in gl.static_range(COUNT):
        loaded = loaded + (gl.load(w_ptr + (512 * i + 128 * b)[:, None], mask=ok[:, None], other=0),)  # type: ignore[assignment]
    for pair in gl.static_range((COUNT + 1) // 2):
        if 2 * pair + 1 < COUNT:
            loaded = loaded + (gl.load(s_ptr + 32 * (2 * i + pair) + lane, mask=ok, other=0),)  # type: ignore[assignment]
        else:
            word = gl.load(s_ptr + 32 * (2 * i + pair) + lane // 2, mask=ok, other=0)
            loaded = loaded + (word >> 16 * (lane % 2),)  # type: ignore[assignment]
    return loaded


@gluon.jit
def load_columns(x_ptrs, i, FIRST: gl.constexpr, COUNT: gl.constexpr, ok, MASKED: gl.constexpr, NT: gl.constexpr):
    """A lane's 16 columns of COUNT tiles from tile 4 * i + FIRST on, of each of NT activation rows: 4 + 4 words a row.

    MASKED: zeros where not `ok`.
    """
    loaded = ()
    for b in gl.static_range(COUNT):
        at = 128 * i + 32 * (FIRST + b)
        for n in gl.static_range(NT):
            for half in gl.static_range(2):
                ptr = x_ptrs[n] + (at + 4 * half)[:, None]
                if MASKED:
                    loaded = loaded + (gl.load(ptr, mask=ok[:, None], other=0),)  # type: ignore[assignment]
                else:
                    loaded = loaded + (gl.load(ptr),)  # type: ignore[assignment]
    return loaded


@gluon.jit
def multiply_columns(tiles, x, accs, FIRST: gl.constexpr, COUNT: gl.constexpr, OF: gl.constexpr, NT: gl.constexpr):
    """accs[n] += COUNT tiles' weights, from the FIRST on of the OF of `load_tiles`, @ their `load_columns`."""
    for b in gl.static_range(COUNT):
        a0, a1, a2, a3 = expand(tiles[FIRST + b], tiles[OF + (FIRST + b) // 2], 16 * ((FIRST + b) % 2))
        new = ()
        for n in gl.static_range(NT):
            low, high = x[2 * NT * b + 2 * n], x[2 * NT * b + 2 * n + 1]
            acc = gl.inline_asm_elementwise(
                _MULTIPLY, _MULTIPLY_OPERANDS, [a0, a1, a2, a3, low, high, accs[n]], dtype=gl.float32, is_pure=True,
                pack=4,
            )  # fmt: skip
            new = new + (acc,)  # type: ignore[assignment]
        accs = new
    return accs


@gluon.jit
def multiply_tiles(
    tiles, x_ptrs, i, accs, ok, MASKED: gl.constexpr, COUNT: gl.constexpr, NT: gl.constexpr, TOGETHER: gl.constexpr
):
    """accs[n] += the weights of `load_tiles` @ activation rows x_ptrs[n].

    MASKED: the tiles are zeros where not `ok`, and so must the activations be, which may hold Inf or NaN. TOGETHER: all
    of these are asked for before the first product; for one row there are registers enough.
    """
    if TOGETHER:
        x = load_columns(x_ptrs, i, 0, COUNT, ok, MASKED, NT)
        accs = multiply_columns(tiles, x, accs, 0, COUNT, COUNT, NT)
    else:
        for b in gl.static_range(COUNT):
            x = load_columns(x_ptrs, i, b, 1, ok, MASKED, NT)
            accs = multiply_columns(tiles, x, accs, b, 1, COUNT, NT)
    return accs


@gluon.jit
def result_pairs(acc, WR: gl.constexpr, WK: gl.constexpr, LAYOUT: gl.constexpr):
    """A tile's results, summed over the warps along LEN: rows g and rows g + 8, `[32 WR, 2]` over two columns each."""
    if WK > 1:
        acc = gl.reshape(gl.sum(gl.reshape(acc, (WR, WK, 32, 4)), axis=1), (32 * WR, 4))
    low, high = gl.split(gl.permute(gl.reshape(acc, (32 * WR, 2, 2)), (0, 2, 1)))
    return gl.convert_layout(low, LAYOUT), gl.convert_layout(high, LAYOUT)


@gluon.jit
def scales_of(w_global, expert, UP: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr):
    """What the accumulators of rows g and of rows g + 8 are multiplied by."""
    if UP and GATED:
        low = gl.load(w_global + 2 * expert + UP_FIRST)
        high = gl.load(w_global + 2 * expert + (1 - UP_FIRST))
    else:
        low = gl.load(w_global + expert)
        high = low
    return low.to(gl.float32) * UNDO, high.to(gl.float32) * UNDO


@gluon.jit
def activated(
    low, high, expert, bias, column, ok,
    I: gl.constexpr, ACT: gl.constexpr, GATED: gl.constexpr, UP_FIRST: gl.constexpr, INTERLEAVED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """Biases and activation. `column` is where rows g belong: with a gate, rows g are the gate and rows g + 8 the up
    projection of one column; without one, they are columns `column` and `column` + 8."""
    if GATED:
        if bias is not None:
            if INTERLEAVED:
                gate_at = bias + expert * (2 * I) + 2 * column
                up_at = gate_at + 1
            else:
                gate_at = bias + expert * (2 * I) + UP_FIRST * I + column
                up_at = bias + expert * (2 * I) + (1 - UP_FIRST) * I + column
            low += gl.load(gate_at, mask=ok, other=0).to(gl.float32)
            high += gl.load(up_at, mask=ok, other=0).to(gl.float32)
        low = activate(low, high, ACT, True, ALPHA, LIMIT)
    else:
        if bias is not None:
            low += gl.load(bias + expert * I + column, mask=ok, other=0).to(gl.float32)
            high += gl.load(bias + expert * I + column + 8, mask=ok, other=0).to(gl.float32)
        low = activate(low, low, ACT, False, ALPHA, LIMIT)
        high = activate(high, high, ACT, False, ALPHA, LIMIT)
    return low, high


@gluon.jit
def row_tile(w, s, matrix, tile, lane, TILES: gl.constexpr, R: gl.constexpr):
    """Where a lane's codes `[threads, 4]` and this tile's scales `[threads]` begin, of one row of tiles; past the last
    row, the last one's."""
    row = (matrix * (R // 16) + gl.minimum(tile, R // 16 - 1)).to(gl.int64)
    return four_words(w, row * (TILES * 128) + lane * 4), _words(s) + row * (TILES * 16)


@gluon.jit
def four_words(pointer, offset):
    """The four words from `offset` on, in each thread: `[threads, 4]`."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [gl.num_warps(), 1], [1, 0])
    offset = gl.convert_layout(offset, gl.SliceLayout(1, L))
    return (_words(pointer) + offset)[:, None] + gl.arange(0, 4, gl.SliceLayout(0, L))[None, :]


@gluon.jit
def row_words(x, row, group, STRIDE: gl.constexpr):
    """Where this lane's group of columns starts in activation rows `row`, `[threads, 4]` words."""
    return four_words(x, row.to(gl.int64) * (STRIDE // 2) + group * 8)


# A kernel's key in Triton's cache holds a constant of this module only if the functions between the two had keys before
# it (triton 3.6, 3.7). So they get them here: else what is found there hangs on which kernel a process compiles first.
for _function in (expand, multiply_columns, multiply_tiles, scales_of):
    _function.cache_key  # noqa: B018 - computed when it is asked for
