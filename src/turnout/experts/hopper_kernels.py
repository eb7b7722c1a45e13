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

from turnout.experts.hopper_epilogues import BOX, add_bias, finish

BYTES = gl.constexpr(2)  # of an element: float16 or bfloat16
PRODUCER_THREADS = gl.constexpr(128)


@gluon.jit
def wait_empty(empty, position, STAGES: gl.constexpr):
    """Waits until the consumers have left the stage of this position; returns the stage."""
    stage = position % STAGES
    mbarrier.wait(empty.index(stage), ((position // STAGES) & 1) ^ 1)
    return stage


@gluon.jit
def _start(
    acc,
    position,
    ring,
    FROM: gl.constexpr,
    ROWS: gl.constexpr,
    COLS: gl.constexpr,
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
    if b.shape[1] > COLS:
        b = b.slice(0, COLS, dim=1)
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
    COLS: gl.constexpr,
    LAST: gl.constexpr,
    A_BY_COLUMN: gl.constexpr,
    B_BY_COLUMN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """acc + the products of `steps` stages from `position`, and of LAST columns of one more.

    Also returns the position behind them.

    A is ROWS from FROM of its tile, which lies as (M, K), or as (K, M) with A_BY_COLUMN; B is the
    first COLS of its tile, which lies as (K, N), or as (N, K) with B_BY_COLUMN. Stages are handed
    back as they are read.
    """
    a_smem, _, _, empty = ring
    depth: gl.constexpr = a_smem.shape[1] if A_BY_COLUMN else a_smem.shape[2]
    begin = position
    for _ in range(steps):
        acc = _start(acc, position, ring, FROM, ROWS, COLS, depth, A_BY_COLUMN, B_BY_COLUMN, STAGES)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((position + STAGES - 1) % STAGES), pred=position > begin)
        position += 1
    if LAST > 0:
        acc = _start(acc, position, ring, FROM, ROWS, COLS, LAST, A_BY_COLUMN, B_BY_COLUMN, STAGES)
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
def _copy_weights(
    w_map, expert, n0, k0, width_k, HALF, bar, smem, COLS: gl.constexpr, RULE: gl.constexpr
):
    """Starts the copy of COLS columns of an expert's weight, or of its adapter."""
    smem = smem.slice(0, COLS, dim=1 if RULE.n_major else 0)
    if RULE.paired:
        half: gl.constexpr = COLS // 2
        tma.async_copy_global_to_shared(w_map, [n0, k0], bar, smem.slice(0, half))
        tma.async_copy_global_to_shared(w_map, [n0 + HALF, k0], bar, smem.slice(half, half))
    elif RULE.n_major:
        tma.async_copy_global_to_shared(w_map, [expert * width_k + k0, n0], bar, smem)
    else:
        tma.async_copy_global_to_shared(w_map, [n0, k0], bar, smem)


@gluon.jit
def _fill_tile(
    position,
    place,
    sources,
    weights,
    pointers,
    ring,
    sizes,
    COLS: gl.constexpr,
    RULE: gl.constexpr,
):
    """Fills the stages of a tile of COLS columns, from `position`; returns the one behind them.

    `place` is its first row, its expert and its column tile; `weights` are maps with boxes as wide.
    """
    first, expert, pid_n = place
    a, xa_map, z_map = sources
    w_map, b_map = weights
    _, _, _, slot_ptr, _, offsets_ptr = pointers
    a_smem, b_smem, full, empty = ring
    N, K, R, HALF, stride_am, _, _ = sizes
    block_k: gl.constexpr = RULE.block_k
    stages: gl.constexpr = RULE.stages
    b_bytes: gl.constexpr = COLS * block_k * BYTES
    a_bytes: gl.constexpr = RULE.block_m * block_k * BYTES
    bytes: gl.constexpr = a_bytes + b_bytes
    if RULE.paired:
        n0 = expert * N + pid_n * (RULE.block_n // 2)
    elif RULE.n_major:
        n0 = pid_n * RULE.block_n
    else:
        n0 = expert * N + pid_n * RULE.block_n
    if RULE.gather:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        block_m: gl.constexpr = RULE.block_m
        m = gl.arange(0, block_m, layout=gl.SliceLayout(1, layout))
        k = gl.arange(0, block_k, layout=gl.SliceLayout(0, layout))
        row = first + m
        last = gl.load(offsets_ptr + expert + 1)
        token = gl.load(slot_ptr + row, mask=row < last, other=0) // RULE.top_k
        a_rows = a + (token * stride_am)[:, None] + k[None, :]
    for step in range(gl.cdiv(K, block_k)):
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
        _copy_weights(w_map, expert, n0, k0, K, HALF, bar, b_smem.index(stage), COLS, RULE)
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
            _copy_weights(b_map, expert, n0, k0, R, HALF, bar, b_smem.index(stage), COLS, RULE)
            position += 1
    if RULE.epilogue == "activate_backward":
        f0 = pid_n * RULE.block_n
        for box in range(RULE.z_boxes * COLS // RULE.block_n):
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
    return position


@gluon.jit
def _produce(sources, weights, rest, pointers, ring, sizes, RULE: gl.constexpr):
    _, _, _, _, tiles_ptr, _ = pointers
    _, _, _, _, _, num_n, num_tiles = sizes
    position = 0
    for index in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile, pid_n = _place(index, num_tiles, num_n, RULE)
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            place = (gl.load(tiles_ptr + num_tiles + tile), expert, pid_n)
            if RULE.rest > 0 and pid_n == num_n - 1:
                position = _fill_tile(
                    position, place, sources, rest, pointers, ring, sizes, RULE.rest, RULE
                )
            else:
                position = _fill_tile(
                    position, place, sources, weights, pointers, ring, sizes, RULE.block_n, RULE
                )


@gluon.jit
def _compute_tile(
    begin,
    place,
    pointers,
    outs,
    buffers,
    ring,
    sizes,
    FROM: gl.constexpr,
    COLS: gl.constexpr,
    RULE: gl.constexpr,
):
    """Multiplies and stores the consumer's rows, those from FROM, of a tile of COLS columns.

    Its stages begin at `begin`; returns the position behind them. `place` is its first row, its
    expert and its column tile.
    """
    first, expert, pid_n = place
    bias_ptr, _, _, _, _, offsets_ptr = pointers
    N, K, R, HALF, _, _, _ = sizes
    rows: gl.constexpr = RULE.block_m // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    by_column: gl.constexpr = not RULE.n_major
    stages: gl.constexpr = RULE.stages
    last_k: gl.constexpr = RULE.tail % RULE.block_k  # of the contraction, in the last stage
    steps = gl.cdiv(K, RULE.block_k)
    if RULE.tail == RULE.block_k:
        steps += gl.cdiv(R, RULE.block_k)
    last = gl.load(offsets_ptr + expert + 1)
    acc = gl.zeros([rows, COLS], gl.float32, layout=mma)
    acc, position = multiply(
        acc, begin, steps, ring, FROM, rows, COLS, last_k, False, by_column, stages
    )
    if RULE.rest > 0:
        tma.store_wait(0)  # the tile before may have ended with either box
    if RULE.bias:
        acc = add_bias(acc, bias_ptr, expert, pid_n, N, HALF, RULE, mma)
    finish(
        acc,
        (first + FROM, last),
        pid_n,
        pointers,
        outs,
        buffers,
        ring,
        position,
        sizes,
        FROM,
        RULE,
    )
    return begin + steps + (1 if last_k > 0 else 0) + RULE.z_boxes * COLS // RULE.block_n


@gluon.jit
def _consume(WHO: gl.constexpr, pointers, outs, buffers, ring, sizes, RULE: gl.constexpr):
    _, _, _, _, tiles_ptr, _ = pointers
    _, _, _, _, _, num_n, num_tiles = sizes
    from_row: gl.constexpr = WHO * (RULE.block_m // 2)
    begin = 0
    for index in range(gl.program_id(0), num_tiles * num_n, gl.num_programs(0)):
        tile, pid_n = _place(index, num_tiles, num_n, RULE)
        expert = gl.load(tiles_ptr + tile)
        if expert >= 0:
            place = (gl.load(tiles_ptr + num_tiles + tile), expert, pid_n)
            if RULE.rest > 0 and pid_n == num_n - 1:
                begin = _compute_tile(
                    begin, place, pointers, outs, buffers, ring, sizes, from_row, RULE.rest, RULE
                )
            else:
                begin = _compute_tile(
                    begin, place, pointers, outs, buffers, ring, sizes, from_row, RULE.block_n, RULE
                )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    a,
    w_map,
    out,
    bias_ptr,
    xa_map,
    b_map,
    z_map,
    h_map,
    dot_ptr,
    weight_ptr,
    slot_ptr,
    tiles_ptr,
    offsets_ptr,
    w_rest,
    b_rest,
    N,
    K,
    R,
    HALF,
    stride_am,
    num_n,
    num_tiles,
    RULE: gl.constexpr,
):
    """Computes epilogue(a[row] @ w[e]^T + bias[e] + xa[row] @ b[e]^T), tile after tile.

    Grid: one program per multiprocessor, which take the tiles in turn. Assumes: rows of one tile
    belong to one expert; `a` is a map of (S, K), or a pointer to (T, K) when rows are gathered,
    with K a multiple of block_k; weights are maps of (E * N, K), or of (E * K, N) when N is the
    contiguous dim, with K a multiple of block_k; `w_rest` and `b_rest` are the same weights with
    boxes of RULE.rest columns, where the last column tile is narrow; xa carries the scaling; what
    is written are maps as `hopper_epilogues` describes them, z a map of (S, its width) where it is
    read.
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
    boxes: gl.constexpr = [2, 1, 1, RULE.block_m // 2, 1, BOX]  # of a consumer
    first_boxes = gl.allocate_shared_memory(out.dtype, boxes, out.layout)
    second_boxes = gl.allocate_shared_memory(out.dtype, boxes, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1 + (PRODUCER_THREADS if RULE.gather else 0))
        mbarrier.init(empty.index(stage), count=2)
    ring = (a_smem, b_smem, full, empty)
    sizes = (N, K, R, HALF, stride_am, num_n, num_tiles)
    pointers = (bias_ptr, dot_ptr, weight_ptr, slot_ptr, tiles_ptr, offsets_ptr)
    sources = (a, xa_map, z_map)
    outs = (out, z_map, h_map)
    gl.warp_specialize(
        [
            (_consume, (0, pointers, outs, first_boxes, ring, sizes, RULE)),
            (_consume, (1, pointers, outs, second_boxes, ring, sizes, RULE)),
            (_produce, (sources, (w_map, b_map), (w_rest, b_rest), pointers, ring, sizes, RULE)),
        ],
        [4, 4],
        [232, 40],
    )
