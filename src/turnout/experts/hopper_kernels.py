"""Device code of the grouped GEMM for Hopper (sm_90), in Gluon. `gemm_hopper.py` launches it.

One block per multiprocessor, of three parts that run side by side: a producer fills a ring of tiles
in shared memory (TMA; rows that are gathered by cp.async), two consumers of one warpgroup each
multiply them (wgmma), 64 of the 128 rows of a tile each, and run the epilogue while the ring
refills. A stage of the ring is handed over by two barriers: `full` counts the bytes of TMA and the
threads whose cp.async have landed, `empty` the consumers that are done with it. What the backward
epilogue reads of z comes through the same ring, behind the stages of the products, so that it has
arrived when they are done.

What differs between problems is one constexpr, a `hopper_config.RowsRule`.

Legend: S rows, T tokens, E experts, M rows of a tile, N output width, K contraction, R LoRA rank
(padded), F intermediate.
"""

# mypy: ignore-errors

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from turnout.experts.triton_math import act, act_and_slope, glu, glu_backward

BYTES = gl.constexpr(2)  # of an element: float16 or bfloat16
PRODUCER_THREADS = gl.constexpr(128)


@gluon.jit
def wait_empty(empty, position, STAGES: gl.constexpr):
    """Waits until the consumers have left the stage of this position; returns the stage."""
    stage = position % STAGES
    mbarrier.wait(empty.index(stage), ((position // STAGES) & 1) ^ 1)
    return stage


@gluon.jit
def halves(x):
    """The left and right half of the columns; nothing moves between threads."""
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, [rows, 2, width]), [0, 2, 1]))


@gluon.jit
def _half(x, WHICH: gl.constexpr):
    left, right = halves(x)
    if WHICH == 0:
        return left
    else:
        return right


@gluon.jit
def _start(
    acc,
    position,
    ring,
    FROM: gl.constexpr,
    ROWS: gl.constexpr,
    DEPTH: gl.constexpr,
    A_BY_COLUMN: gl.constexpr,
    B_BY_COLUMN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Waits for a stage and starts its product, of the first DEPTH of the contraction."""
    a_smem, b_smem, full, _ = ring
    stage = position % STAGES
    mbarrier.wait(full.index(stage), (position // STAGES) & 1)
    a, b = a_smem.index(stage), b_smem.index(stage)
    if A_BY_COLUMN:
        a = a.slice(FROM, ROWS, dim=1).permute((1, 0))
    else:
        a = a.slice(FROM, ROWS)
    if B_BY_COLUMN:
        b = b.permute((1, 0))
    if b.shape[0] > DEPTH:
        a, b = a.slice(0, DEPTH, dim=1), b.slice(0, DEPTH)
    return warpgroup_mma(a, b, acc, is_async=True)


@gluon.jit
def multiply(
    acc,
    position,
    steps,
    ring,
    FROM: gl.constexpr,
    ROWS: gl.constexpr,
    LAST: gl.constexpr,
    A_BY_COLUMN: gl.constexpr,
    B_BY_COLUMN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc + the products of `steps` stages from `position`, and of LAST columns of one more.

    Also returns the position behind them.

    A is ROWS from FROM of its tile, which lies as (M, K), or as (K, M) with A_BY_COLUMN; B lies as
    (K, N), or as (N, K) with B_BY_COLUMN. Stages are handed back as they are read.
    """
    a_smem, _, _, empty = ring
    depth: gl.constexpr = a_smem.shape[1] if A_BY_COLUMN else a_smem.shape[2]
    begin = position
    for _ in range(steps):
        acc = _start(acc, position, ring, FROM, ROWS, depth, A_BY_COLUMN, B_BY_COLUMN, STAGES)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), pred=position > begin)
        position += 1
    if LAST > 0:
        acc = _start(acc, position, ring, FROM, ROWS, LAST, A_BY_COLUMN, B_BY_COLUMN, STAGES)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), pred=position > begin)
        position += 1
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), pred=position > begin)
    return acc, position


@gluon.jit
def _place(index, num_tiles, num_n, RULE: gl.constexpr):
    """Row tile and column tile, in the order of the portable kernel."""
    group = index // (RULE.group * num_n)
    in_group = index % (RULE.group * num_n)
    rows_in_group = gl.minimum(RULE.group, num_tiles - group * RULE.group)
    return group * RULE.group + in_group % rows_in_group, in_group // rows_in_group


@gluon.jit
def _copy_weights(w_map, expert, n0, k0, width_k, HALF, bar, smem, RULE: gl.constexpr):
    """Starts the copy of one tile of an expert's weight, or of its adapter."""
    if RULE.paired:
        half: gl.constexpr = RULE.block_n // 2
        tma.async_copy_global_to_shared(w_map, [n0, k0], bar, smem.slice(0, half))
        tma.async_copy_global_to_shared(w_map, [n0 + HALF, k0], bar, smem.slice(half, half))
    elif RULE.n_major:
        tma.async_copy_global_to_shared(w_map, [expert * width_k + k0, n0], bar, smem)
    else:
        tma.async_copy_global_to_shared(w_map, [n0, k0], bar, smem)


@gluon.jit
def _produce(a, w_map, xa_map, b_map, z_map, pointers, ring, sizes, RULE: gl.constexpr):
    _, _, _, _, _, _, slot_ptr, tiles_ptr, offsets_ptr = pointers
    a_smem, b_smem, full, empty = ring
    N, K, R, HALF, stride_am, _, num_n, num_tiles = sizes
    block_k: gl.constexpr = RULE.block_k
    stages: gl.constexpr = RULE.stages
    b_bytes: gl.constexpr = RULE.block_n * block_k * BYTES
    a_bytes: gl.constexpr = RULE.block_m * block_k * BYTES
    bytes: gl.constexpr = a_bytes + b_bytes
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    block_m: gl.constexpr = RULE.block_m
    m = gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
    k = gl.arange(0, block_k, layout=gl.SliceLayout(0, layout))
    steps = gl.cdiv(K, block_k)
    position = 0
    for index in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile, pid_n = _place(index, num_tiles, num_n, RULE)
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            first = gl.load(tiles_ptr + num_tiles + tile)
            if RULE.paired:
                n0 = expert * N + pid_n * (RULE.block_n // 2)
            elif RULE.n_major:
                n0 = pid_n * RULE.block_n
            else:
                n0 = expert * N + pid_n * RULE.block_n
            if RULE.gather:
                row = first + m
                last = gl.load(offsets_ptr + expert + 1)
                token = gl.load(slot_ptr + row, mask=row < last, other=0) // RULE.top_k
                a_rows = a + (token * stride_am)[:, None] + k[None, :]
            for step in range(steps):
                stage = wait_empty(empty, position, stages)
                bar = full.index(stage)
                k0 = step * block_k
                if RULE.gather:
                    mbarrier.expect(bar, b_bytes)
                    async_copy.async_copy_global_to_shared(a_smem.index(stage), a_rows + k0)
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                else:
                    mbarrier.expect(bar, bytes)
                    tma.async_copy_global_to_shared(a, [first, k0], bar, a_smem.index(stage))
                _copy_weights(w_map, expert, n0, k0, K, HALF, bar, b_smem.index(stage), RULE)
                position += 1
            if RULE.tail > 0:
                for step in range(gl.cdiv(R, block_k)):
                    stage = wait_empty(empty, position, stages)
                    bar = full.index(stage)
                    k0 = step * block_k
                    mbarrier.expect(bar, bytes)
                    if RULE.gather:
                        fence_async_shared()  # TMA writes what cp.async wrote
                        async_copy.mbarrier_arrive(bar, increment_count=False)
                    tma.async_copy_global_to_shared(xa_map, [first, k0], bar, a_smem.index(stage))
                    _copy_weights(b_map, expert, n0, k0, R, HALF, bar, b_smem.index(stage), RULE)
                    position += 1
            if RULE.epilogue == "activate_backward":
                f0 = pid_n * RULE.block_n
                for box in range(RULE.z_boxes):
                    stage = wait_empty(empty, position, stages)
                    bar = full.index(stage)
                    mbarrier.expect(bar, a_bytes)
                    if RULE.gather:
                        fence_async_shared()
                        async_copy.mbarrier_arrive(bar, increment_count=False)
                    if not RULE.gated:
                        g0 = f0 + box * block_k
                    elif RULE.interleaved:
                        g0 = 2 * f0 + box * block_k
                    else:
                        g0 = f0 + box // 2 * block_k + box % 2 * N
                    tma.async_copy_global_to_shared(z_map, [first, g0], bar, a_smem.index(stage))
                    position += 1


@gluon.jit
def _pairs(x):
    """The even and the odd columns."""
    rows: gl.constexpr = x.shape[0]
    width: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.reshape(x, [rows, width, 2]))


@gluon.constexpr_function
def _doubled(layout):
    """The layout of gate and up columns side by side."""
    return gl.BlockedLayout(
        [layout.size_per_thread[0], 2 * layout.size_per_thread[1]],
        layout.threads_per_warp,
        layout.warps_per_cta,
        layout.order,
    )


@gluon.jit
def _columns(first, N, mask_m, COUNT: gl.constexpr, EVEN: gl.constexpr, LAYOUT: gl.constexpr):
    """COUNT columns from `first`, and which elements of the rows lie within N columns."""
    column = first + gl.arange(0, COUNT, layout=gl.SliceLayout(0, LAYOUT))
    mask = mask_m[:, None]
    if not EVEN:
        mask = mask & (column < N)[None, :]
    return column[None, :], mask


@gluon.jit
def _store(ptr, value, row64, mask_m, first, width, N, EVEN: gl.constexpr, LAYOUT: gl.constexpr):
    """Stores columns `first`.. of rows of `width` elements, as far as there are N."""
    cols: gl.constexpr = value.shape[1]
    column, mask = _columns(first, N, mask_m, cols, EVEN, LAYOUT)
    value = gl.convert_layout(value.to(ptr.dtype.element_ty), LAYOUT)
    gl.store(ptr + row64[:, None] * width + column, value, mask=mask)


@gluon.jit
def _take(
    ring,
    position,
    FROM: gl.constexpr,
    ROWS: gl.constexpr,
    RULE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """ROWS from FROM of what a stage holds where A lies; hands the stage back.

    The fence waits until the loads have arrived. Without it they may still stand in a queue behind
    the epilogue's stores when the next copy lands: TMA does not queue.
    """
    a_smem, _, full, empty = ring
    stages: gl.constexpr = RULE.stages
    stage = position % stages
    mbarrier.wait(full.index(stage), (position // stages) & 1)
    value = a_smem.index(stage).slice(FROM, ROWS).load(LAYOUT)
    fence_async_shared()
    mbarrier.arrive(empty.index(stage))
    return value


@gluon.jit
def _store_backward(
    d, z, up, first, row64, mask_m, weight, pointers, N, RULE: gl.constexpr, LAYOUT: gl.constexpr
):
    """Stores dz and h of these columns from d, the gradient of h; returns the row sums of d * h.

    z is the gate and `up` the rest of the input, or z is all of it when they are interleaved or
    there is no gate.
    """
    out_ptr, _, _, h_ptr, _, _, _, _, _ = pointers
    cols: gl.constexpr = d.shape[1]
    even: gl.constexpr = RULE.even_n
    ACT: gl.constexpr = RULE.act
    ALPHA: gl.constexpr = RULE.alpha
    column, mask = _columns(first, N, mask_m, cols, even, LAYOUT)
    d = gl.convert_layout(d, LAYOUT)
    at = row64[:, None] * N + column
    if RULE.gated:
        if RULE.interleaved:
            # gate and up lie side by side: one wide store, split in registers
            wide: gl.constexpr = _doubled(LAYOUT)
            by_row: gl.constexpr = gl.SliceLayout(1, wide)
            inside = gl.convert_layout(mask_m, by_row)
            both_cols: gl.constexpr = 2 * cols
            both, mask_z = _columns(2 * first, 2 * N, inside, both_cols, even, wide)
            z_at = gl.convert_layout(row64, by_row)[:, None] * (2 * N) + both
            gate, up = _pairs(z)
        else:
            z_at = row64[:, None] * (2 * N) + column
            gate = z
        LIMIT: gl.constexpr = RULE.limit
        AFTER: gl.constexpr = RULE.after
        UP_OFFSET: gl.constexpr = RULE.up_offset
        gate = gl.convert_layout(gate, LAYOUT).to(gl.float32)
        up = gl.convert_layout(up, LAYOUT).to(gl.float32)
        dw = d * weight
        h, dgate, dup = glu_backward(gate, up, dw, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, False)
        dgate, dup = dgate.to(out_ptr.dtype.element_ty), dup.to(out_ptr.dtype.element_ty)
        if RULE.interleaved:
            dz = gl.reshape(gl.join(dgate, dup), [d.shape[0], 2 * cols])
            gl.store(out_ptr + z_at, gl.convert_layout(dz, wide), mask=mask_z)
        else:
            gl.store(out_ptr + z_at, dgate, mask=mask)
            gl.store(out_ptr + z_at + N, dup, mask=mask)
    else:
        z = gl.convert_layout(z, LAYOUT).to(gl.float32)
        h, slope = act_and_slope(z, ACT, ALPHA, False)
        dz = d * weight * slope
        gl.store(out_ptr + at, dz.to(out_ptr.dtype.element_ty), mask=mask)
    if RULE.keep_h:
        gl.store(h_ptr + at, (h * weight).to(h_ptr.dtype.element_ty), mask=mask)
    return gl.sum(gl.where(mask, d * h, 0.0), 1)


@gluon.jit
def _add_bias(acc, bias_ptr, expert, pid_n, N, HALF, RULE: gl.constexpr, LAYOUT: gl.constexpr):
    block_n: gl.constexpr = RULE.block_n
    j = gl.arange(0, block_n, layout=gl.SliceLayout(0, LAYOUT))
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
def _finish(
    acc,
    row64,
    mask_m,
    pid_n,
    pointers,
    ring,
    position,
    sizes,
    FROM: gl.constexpr,
    RULE: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """The epilogue: what the sums become, and where they are stored; `position` is behind them."""
    out_ptr, _, z_ptr, _, dot_ptr, weight_ptr, slot_ptr, _, _ = pointers
    N, _, _, HALF, _, stride_om, num_n, _ = sizes
    half: gl.constexpr = RULE.block_n // 2
    even: gl.constexpr = RULE.even_n
    ACT: gl.constexpr = RULE.act
    ALPHA: gl.constexpr = RULE.alpha
    n0 = pid_n * RULE.block_n
    if RULE.epilogue == "none":
        left, right = halves(acc)
        _store(out_ptr, left, row64, mask_m, n0, stride_om, N, even, LAYOUT)
        _store(out_ptr, right, row64, mask_m, n0 + half, stride_om, N, even, LAYOUT)
    elif RULE.epilogue == "activate":
        if RULE.gated:
            f0 = pid_n * half
            if RULE.interleaved:
                gate, up = _pairs(acc)
            else:
                gate, up = halves(acc)
            LIMIT: gl.constexpr = RULE.limit
            AFTER: gl.constexpr = RULE.after
            UP_OFFSET: gl.constexpr = RULE.up_offset
            h = glu(gate, up, ACT, ALPHA, LIMIT, AFTER, UP_OFFSET, False)
            _store(out_ptr, h, row64, mask_m, f0, stride_om, HALF, even, LAYOUT)
            if RULE.keep_z:
                if RULE.interleaved:
                    left, right = halves(acc)
                    _store(z_ptr, left, row64, mask_m, n0, N, N, even, LAYOUT)
                    _store(z_ptr, right, row64, mask_m, n0 + half, N, N, even, LAYOUT)
                else:
                    _store(z_ptr, gate, row64, mask_m, f0, N, HALF, even, LAYOUT)
                    _store(z_ptr, up, row64, mask_m, HALF + f0, N, N, even, LAYOUT)
        else:
            h = act(acc, ACT, ALPHA, False)
            _store(out_ptr, h, row64, mask_m, n0, stride_om, N, even, LAYOUT)
            if RULE.keep_z:
                _store(z_ptr, acc, row64, mask_m, n0, N, N, even, LAYOUT)
    else:
        by_row: gl.constexpr = gl.SliceLayout(1, LAYOUT)
        rows: gl.constexpr = acc.shape[0]
        weight = gl.full([rows], 1.0, gl.float32, layout=by_row)
        if RULE.weighted:
            slot = gl.load(slot_ptr + row64, mask=mask_m, other=0)
            weight = gl.load(weight_ptr + slot, mask=mask_m, other=0.0).to(gl.float32)
        weight = weight[:, None]
        dot = gl.zeros([rows], gl.float32, layout=by_row)
        taken: gl.constexpr = _doubled(LAYOUT) if RULE.gated and RULE.interleaved else LAYOUT
        # as many columns at a time as z comes in; 32 of them, so that not all is live at once
        for piece in gl.static_range(RULE.block_n // 64):
            d = _half(_half(acc, piece // 2), piece % 2)
            z = _take(ring, position, FROM, rows, RULE, taken)
            position += 1
            if RULE.gated:
                up = _take(ring, position, FROM, rows, RULE, taken)
                position += 1
            else:
                up = z
            for side in gl.static_range(2):
                if RULE.gated and RULE.interleaved:
                    z_cut = z if side == 0 else up  # the two boxes lie one behind the other
                    up_cut = z_cut
                else:
                    z_cut = _half(z, side)
                    up_cut = _half(up, side)
                dot += _store_backward(
                    _half(d, side),
                    z_cut,
                    up_cut,
                    n0 + piece * 64 + side * 32,
                    row64,
                    mask_m,
                    weight,
                    pointers,
                    N,
                    RULE,
                    LAYOUT,
                )
        gl.store(dot_ptr + row64 * num_n + pid_n, dot, mask=mask_m)


@gluon.jit
def _consume(WHO: gl.constexpr, pointers, ring, sizes, RULE: gl.constexpr):
    _, bias_ptr, _, _, _, _, _, tiles_ptr, offsets_ptr = pointers
    N, K, R, HALF, _, _, num_n, num_tiles = sizes
    rows: gl.constexpr = RULE.block_m // 2
    from_row: gl.constexpr = WHO * rows
    block_n: gl.constexpr = RULE.block_n
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_n, 16])
    by_column: gl.constexpr = not RULE.n_major
    stages: gl.constexpr = RULE.stages
    # warps keep their rows, so that what is stored moves between the threads of a warp
    backward: gl.constexpr = RULE.epilogue == "activate_backward"
    wide: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])
    slim: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])
    stored: gl.constexpr = slim if backward else wide
    last_k: gl.constexpr = RULE.tail % RULE.block_k  # of the contraction, in the last stage
    steps = gl.cdiv(K, RULE.block_k)
    if RULE.tail == RULE.block_k:
        steps += gl.cdiv(R, RULE.block_k)
    stages_of_tile = steps + (1 if last_k > 0 else 0) + RULE.z_boxes
    begin = 0
    for index in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile, pid_n = _place(index, num_tiles, num_n, RULE)
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            first = gl.load(tiles_ptr + num_tiles + tile)
            last = gl.load(offsets_ptr + expert + 1)
            acc = gl.zeros([rows, block_n], gl.float32, layout=mma)
            acc, position = multiply(
                acc, begin, steps, ring, from_row, rows, last_k, False, by_column, stages
            )
            if RULE.bias:
                acc = _add_bias(acc, bias_ptr, expert, pid_n, N, HALF, RULE, mma)
            row = first + from_row + gl.arange(0, rows, layout=gl.SliceLayout(1, stored))
            _finish(
                acc,
                row.to(gl.int64),
                row < last,
                pid_n,
                pointers,
                ring,
                position,
                sizes,
                from_row,
                RULE,
                stored,
            )
            begin += stages_of_tile


@gluon.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    a,
    w_map,
    out_ptr,
    bias_ptr,
    xa_map,
    b_map,
    z,
    h_ptr,
    dot_ptr,
    weight_ptr,
    slot_ptr,
    tiles_ptr,
    offsets_ptr,
    N,
    K,
    R,
    HALF,
    stride_am,
    stride_om,
    num_n,
    num_tiles,
    RULE: gl.constexpr,
):
    """Computes epilogue(a[row] @ w[e]^T + bias[e] + xa[row] @ b[e]^T), tile after tile.

    Grid: one program per multiprocessor, which take the tiles in turn. Assumes: rows of one tile
    belong to one expert; `a` is a map of (S, K), or a pointer to (T, K) when rows are gathered,
    with K a multiple of block_k; weights are maps of (E * N, K), or of (E * K, N) when N is the
    contiguous dim, with K a multiple of block_k; xa carries the scaling; z is a pointer where it is
    written and a map where it is read.
    Cost: 2 S N (K + R) FLOPs, R rounded up to block_k; S K + E N K + S N elements, each once if L2
    holds an expert.
    """
    dtype: gl.constexpr = w_map.dtype
    block_k: gl.constexpr = RULE.block_k
    a_shape: gl.constexpr = [RULE.block_m, block_k]
    b_shape: gl.constexpr = [block_k, RULE.block_n] if RULE.n_major else [RULE.block_n, block_k]
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(a_shape, dtype)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b_shape, dtype)
    stages: gl.constexpr = RULE.stages
    a_smem = gl.allocate_shared_memory(dtype, [stages, a_shape[0], a_shape[1]], a_layout)
    b_smem = gl.allocate_shared_memory(dtype, [stages, b_shape[0], b_shape[1]], b_layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1 + (PRODUCER_THREADS if RULE.gather else 0))
        mbarrier.init(empty.index(stage), count=2)
    ring = (a_smem, b_smem, full, empty)
    sizes = (N, K, R, HALF, stride_am, stride_om, num_n, num_tiles)
    pointers = (
        out_ptr,
        bias_ptr,
        z,
        h_ptr,
        dot_ptr,
        weight_ptr,
        slot_ptr,
        tiles_ptr,
        offsets_ptr,
    )
    gl.warp_specialize(
        [
            (_consume, (0, pointers, ring, sizes, RULE)),
            (_consume, (1, pointers, ring, sizes, RULE)),
            (_produce, (a, w_map, xa_map, b_map, z, pointers, ring, sizes, RULE)),
        ],
        [4, 4],
        [232, 40],
    )
