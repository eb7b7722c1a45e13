"""Device code of the Hopper kernels' epilogues, in Gluon: from a tile's sums to what is stored.

Results leave by TMA: a box of 64 columns is put into shared memory and copied from there while the
consumer goes on. A tile's rows end where its expert's do, in the middle of a matrix. So matrices
are described in five dims, (2^31, 2^31, 2^30, sides, width), whose first three all step by rows,
modulo 2^64 bytes: at (2^30, last, 2^30 - last + row, ...) lies `row`, and rows from `last` on are
out of bounds, where TMA writes nothing (Triton's `tools/ragged_tma.py` has the same idea). Sides
are the gate and the up columns.

Legend: S rows, N output width, F intermediate.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from turnout.experts.hopper_config import BOUND
from turnout.experts.triton_math import act, act_and_slope, glu, glu_backward

BOX = gl.constexpr(64)  # columns: 128 bytes, the widest swizzle
ROW_BOUND = gl.constexpr(BOUND)


@gluon.jit
def halves(x):
    """The left and right half of the columns; nothing moves between threads."""
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, [rows, 2, width]), [0, 2, 1]))


@gluon.jit
def row_halves(x):
    """The upper and the lower half of the rows; nothing moves between warps."""
    rows: gl.constexpr = x.shape[0] // 2
    width: gl.constexpr = x.shape[1]
    return gl.split(gl.permute(gl.reshape(x, [2, rows, width]), [1, 2, 0]))


@gluon.jit
def _half(x, WHICH: gl.constexpr):
    left, right = halves(x)
    if WHICH == 0:
        return left
    else:
        return right


@gluon.jit
def _piece(x, WHICH: gl.constexpr):
    """64 of a tile's 64, 128 or 256 columns."""
    if x.shape[1] == BOX:
        return x
    elif x.shape[1] == 2 * BOX:
        return _half(x, WHICH)
    else:
        return _half(_half(x, WHICH // 2), WHICH % 2)


@gluon.jit
def _pairs(x):
    """The even and the odd columns."""
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.reshape(x, [rows, width, 2]))


@gluon.jit
def put(out, buffer, value, at):
    """Starts the copy of a box to its place in a result.

    Two buffers alternate, so the copy before the last one must have been read.
    """
    tma.store_wait(1)
    buffer.reshape([value.shape[0], value.shape[1]]).store(value.to(out.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, at, buffer)


@gluon.jit
def _put(out, buffer, value, place, side, column):
    """`put` from the first row of `place` on, up to its end."""
    row, last = place
    put(out, buffer, value, (ROW_BOUND, last, ROW_BOUND - last + row, side, column))


@gluon.jit
def _put_two(out, buffers, value, place, side, column):
    """`_put` of two boxes side by side."""
    left, right = halves(value)
    _put(out, buffers.index(0), left, place, side, column)
    _put(out, buffers.index(1), right, place, side, column + BOX)


@gluon.jit
def _put_four(out, buffers, value, place, column):
    """`_put` of four."""
    left, right = halves(value)
    _put_two(out, buffers, left, place, 0, column)
    _put_two(out, buffers, right, place, 0, column + 2 * BOX)


@gluon.jit
def _put_all(out, buffers, value, place, column):
    """`_put` of a tile's one, two or four."""
    if value.shape[1] == BOX:
        _put(out, buffers.index(0), value, place, 0, column)
    elif value.shape[1] == 2 * BOX:
        _put_two(out, buffers, value, place, 0, column)
    else:
        _put_four(out, buffers, value, place, column)


@gluon.jit
def add_bias(acc, bias_ptr, expert, pid_n, N, HALF, RULE: gl.constexpr, LAYOUT: gl.constexpr):
    """acc + the expert's bias."""
    cols: gl.constexpr = acc.shape[1]
    j = gl.arange(0, cols, layout=gl.SliceLayout(0, LAYOUT))
    if RULE.paired:
        half: gl.constexpr = RULE.block_n // 2
        n = pid_n * half + j % half
        mask = n < HALF
        n += (j // half) * HALF
    else:
        n = pid_n * RULE.block_n + j
        mask = n < N
    bias = gl.load(bias_ptr + expert.to(gl.int64) * N + n, mask=mask, other=0.0)
    return acc + bias.to(gl.float32)[None, :]


@gluon.jit
def _activate(acc, place, pid_n, out, z_out, buffers, RULE: gl.constexpr):
    """Stores h, and z where it is kept."""
    ACT: gl.constexpr = RULE.act
    ALPHA: gl.constexpr = RULE.alpha
    half: gl.constexpr = RULE.block_n // 2
    n0 = pid_n * RULE.block_n
    if RULE.gated:
        LIMIT: gl.constexpr = RULE.limit
        AFTER: gl.constexpr = RULE.after
        UP_OFFSET: gl.constexpr = RULE.up_offset
        if RULE.interleaved:
            gate, up = _pairs(acc)
        else:
            gate, up = halves(acc)
        h = glu(gate, up, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, False).to(out.dtype)
        if RULE.interleaved:
            # a thread holds every other column; a matrix store wants them in pairs
            h = gl.convert_layout(h, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half, 16]))
        _put_two(out, buffers, h, place, 0, pid_n * half)
        if RULE.keep_z:
            if RULE.interleaved:
                _put_four(z_out, buffers, acc, place, n0)
            else:
                _put_two(z_out, buffers, gate, place, 0, pid_n * half)
                _put_two(z_out, buffers, up, place, 1, pid_n * half)
    else:
        _put_four(out, buffers, act(acc, ACT, ALPHA, False), place, n0)
        if RULE.keep_z:
            _put_four(z_out, buffers, acc, place, n0)


@gluon.jit
def _take(ring, position, FROM: gl.constexpr, RULE: gl.constexpr, LAYOUT: gl.constexpr):
    """The consumer's rows, those from FROM, of what a stage holds where A lies; hands it back.

    The fence waits until the loads have arrived. Without it they may still stand in a queue behind
    the epilogue's stores when the next copy lands: TMA does not queue.
    """
    a_smem, _, full, empty = ring
    stages: gl.constexpr = RULE.stages
    rows: gl.constexpr = RULE.block_m // 2
    stage = position % stages
    mbarrier.wait(full.index(stage), (position // stages) & 1)
    value = a_smem.index(stage).slice(FROM, rows).load(LAYOUT)
    fence_async_shared()
    mbarrier.arrive(empty.index(stage))
    return value


@gluon.jit
def _slopes(d, z, up, weight, RULE: gl.constexpr):
    """(h, gradient of the gate, of the up part) from d, the gradient of h before its weight.

    z is the gate, or all of it without one; then the last is of no use.
    """
    ACT: gl.constexpr = RULE.act
    ALPHA: gl.constexpr = RULE.alpha
    z, up = z.to(gl.float32), up.to(gl.float32)
    if RULE.gated:
        LIMIT: gl.constexpr = RULE.limit
        AFTER: gl.constexpr = RULE.after
        UP_OFFSET: gl.constexpr = RULE.up_offset
        return glu_backward(z, up, d * weight, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, False)
    else:
        h, slope = act_and_slope(z, ACT, ALPHA, False)
        return h, d * weight * slope, h


@gluon.jit
def _dots(d, h, column0, N, RULE: gl.constexpr):
    """The sums of d * h over the columns from `column0`, as far as there are N."""
    dots = d * h
    if not RULE.even_n:
        cols: gl.constexpr = d.shape[1]
        column = column0 + gl.arange(0, cols, layout=gl.SliceLayout(0, d.type.layout))
        dots = gl.where((column < N)[None, :], dots, 0.0)
    return gl.sum(dots, 1)


@gluon.jit
def _side_by_side(
    d, z, up, weight, f0, N, place, outs, buffers, TURN: gl.constexpr, RULE: gl.constexpr
):
    """Stores dz and h of 64 columns; returns the sums of d * h."""
    out, _, h_out = outs
    h, dgate, dup = _slopes(d, z, up, weight, RULE)
    _put(out, buffers.index(TURN % 2), dgate, place, 0, f0)
    if RULE.gated:
        _put(out, buffers.index((TURN + 1) % 2), dup, place, 1, f0)
    if RULE.keep_h:
        at: gl.constexpr = TURN + 1 + RULE.gated
        _put(h_out, buffers.index(at % 2), h * weight, place, 0, f0)
    return _dots(d, h, f0, N, RULE)


@gluon.jit
def _alternating(
    d, z, z_right, weight, f0, N, place, outs, buffers, TURN: gl.constexpr, RULE: gl.constexpr
):
    """`_side_by_side` where gates and ups alternate in z: those of 32 columns in each box."""
    out, _, h_out = outs
    rows: gl.constexpr = d.shape[0]
    half: gl.constexpr = BOX // 2
    d_left, d_right = halves(d)
    gate, up = _pairs(z)
    gate = gl.convert_layout(gate, d_left.type.layout, assert_trivial=True)
    up = gl.convert_layout(up, d_left.type.layout, assert_trivial=True)
    h_left, dgate, dup = _slopes(d_left, gate, up, weight, RULE)
    dz = gl.reshape(gl.join(dgate.to(out.dtype), dup.to(out.dtype)), [rows, BOX])
    _put(out, buffers.index(TURN % 2), dz, place, 0, 2 * f0)
    gate, up = _pairs(z_right)
    gate = gl.convert_layout(gate, d_right.type.layout, assert_trivial=True)
    up = gl.convert_layout(up, d_right.type.layout, assert_trivial=True)
    h_right, dgate, dup = _slopes(d_right, gate, up, weight, RULE)
    dz = gl.reshape(gl.join(dgate.to(out.dtype), dup.to(out.dtype)), [rows, BOX])
    _put(out, buffers.index((TURN + 1) % 2), dz, place, 0, 2 * f0 + BOX)
    if RULE.keep_h:
        h = gl.join((h_left * weight).to(h_out.dtype), (h_right * weight).to(h_out.dtype))
        h = gl.reshape(gl.permute(h, [0, 2, 1]), [rows, BOX])
        _put(h_out, buffers.index(TURN % 2), h, place, 0, f0)
    return _dots(d_left, h_left, f0, N, RULE) + _dots(d_right, h_right, f0 + half, N, RULE)


@gluon.jit
def _backward(
    acc,
    place,
    pid_n,
    pointers,
    outs,
    buffers,
    ring,
    position,
    sizes,
    FROM: gl.constexpr,
    RULE: gl.constexpr,
):
    """Stores dz and h, and the sums of d * h over this tile's columns, d the gradient of h.

    z comes through the ring, 64 columns at a time.
    """
    row, last = place
    _, dot_ptr, weight_ptr, slot_ptr, _, _ = pointers
    N, _, _, _, _, num_n, _ = sizes
    rows: gl.constexpr = acc.shape[0]
    mixed: gl.constexpr = RULE.gated and RULE.interleaved
    by_box: gl.constexpr = _piece(acc, 0).type.layout
    by_half: gl.constexpr = _half(_piece(acc, 0), 0).type.layout
    layout: gl.constexpr = by_half if mixed else by_box
    # four columns of z for two of the sums: gates and ups of columns that a thread holds
    fours: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [rows, BOX],
    )
    taken: gl.constexpr = fours if mixed else by_box
    by_row: gl.constexpr = gl.SliceLayout(1, layout)
    row64 = (row + gl.arange(0, rows, layout=by_row)).to(gl.int64)
    mask_m = row64 < last
    weight = gl.full([rows], 1.0, gl.float32, layout=by_row)
    if RULE.weighted:
        slot = gl.load(slot_ptr + row64, mask=mask_m, other=0)
        weight = gl.load(weight_ptr + slot, mask=mask_m, other=0.0).to(gl.float32)
    weight = weight[:, None]
    dot = gl.zeros([rows], gl.float32, layout=by_row)
    puts: gl.constexpr = 1 + RULE.gated + RULE.keep_h
    for piece in gl.static_range(acc.shape[1] // BOX):
        f0 = pid_n * RULE.block_n + piece * BOX
        d = _piece(acc, piece)
        z = _take(ring, position, FROM, RULE, taken)
        position += 1
        if RULE.gated:
            up = _take(ring, position, FROM, RULE, taken)
            position += 1
        else:
            up = z
        if mixed:
            dot += _alternating(d, z, up, weight, f0, N, place, outs, buffers, piece * puts, RULE)
        else:
            dot += _side_by_side(d, z, up, weight, f0, N, place, outs, buffers, piece * puts, RULE)
    gl.store(dot_ptr + row64 * num_n + pid_n, dot, mask=mask_m)


@gluon.jit
def finish(
    acc,
    place,
    pid_n,
    pointers,
    outs,
    buffers,
    ring,
    position,
    sizes,
    FROM: gl.constexpr,
    RULE: gl.constexpr,
):
    """What a tile's sums become, and where it is stored.

    `place` is their first row and the end of the expert's, `outs` are the maps that are written,
    `buffers` two boxes of this consumer; `position` is behind the tile's products.
    """
    out, z_out, _ = outs
    if RULE.epilogue == "none":
        _put_all(out, buffers, acc, place, pid_n * RULE.block_n)
    elif RULE.epilogue == "activate":
        _activate(acc, place, pid_n, out, z_out, buffers, RULE)
    else:
        _backward(acc, place, pid_n, pointers, outs, buffers, ring, position, sizes, FROM, RULE)
