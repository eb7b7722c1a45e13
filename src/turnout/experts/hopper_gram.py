"""Device code of the grouped Gram product for Hopper (sm_90), in Gluon: weight gradients.

Built like `hopper_kernels.py`: a producer and two consumers. The rows of an expert are
the contraction, so both operands lie in shared memory as (rows, columns) and the first is read
transposed. Where an expert's rows end, the rest of a stage is filled with zeros by cp.async: what
lies behind them is another expert's, or nobody's.

Legend: S rows, T tokens, E experts, N and K width of the result, M rows of a stage.
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
)

from turnout.experts.hopper_epilogues import halves, put, row_halves
from turnout.experts.hopper_kernels import BYTES, PRODUCER_THREADS, multiply, wait_empty


@gluon.jit
def _copy_rows(base, index, stride, inside, column, limit, smem, EVEN: gl.constexpr):
    """Starts the copy of rows `index` where `inside`, else of zeros."""
    mask = inside[:, None]
    if not EVEN:
        mask = mask & (column < limit)[None, :]
    at = index.to(gl.int64)[:, None] * stride + column[None, :]
    async_copy.async_copy_global_to_shared(smem, base + at, mask=mask)


@gluon.jit
def _produce(pointers, a_map, b_map, ring, sizes, RULE: gl.constexpr):
    a_ptr, b_ptr, slot_ptr, offsets_ptr = pointers
    a_smem, b_smem, full, empty = ring
    N, K, stride_am, stride_bm, num_n, num_k, E = sizes
    block_m: gl.constexpr = RULE.block_m
    block_n: gl.constexpr = RULE.block_n
    block_k: gl.constexpr = RULE.block_k
    stages: gl.constexpr = RULE.stages
    even_n: gl.constexpr = RULE.even_n
    even_k: gl.constexpr = RULE.even_k
    # the operand that TMA copies while the rows are an expert's
    bytes: gl.constexpr = block_m * (block_k if RULE.gather_a else block_n) * BYTES
    a_across: gl.constexpr = block_n // 8
    b_across: gl.constexpr = block_k // 8
    a_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // a_across, a_across], [4, 1], [1, 0])
    b_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // b_across, b_across], [4, 1], [1, 0])
    m_a = gl.arange(0, block_m, layout=gl.SliceLayout(1, a_layout))
    m_b = gl.arange(0, block_m, layout=gl.SliceLayout(1, b_layout))
    m = m_a if RULE.gather_a else m_b
    position = 0
    for tile in range(gl.program_id(0), E * num_n * num_k, gl.num_programs(0)):
        expert = tile // (num_n * num_k)
        n0 = (tile // num_k) % num_n * block_n
        k0 = tile % num_k * block_k
        n = n0 + gl.arange(0, block_n, layout=gl.SliceLayout(0, a_layout))
        k = k0 + gl.arange(0, block_k, layout=gl.SliceLayout(0, b_layout))
        first = gl.load(offsets_ptr + expert)
        last = gl.load(offsets_ptr + expert + 1)
        slot = gl.load(slot_ptr + first + m, mask=first + m < last, other=0)
        for row in range(first, last, block_m):
            token = slot // RULE.top_k
            # the next rows' slots travel while these rows are copied
            slot = gl.load(slot_ptr + row + block_m + m, mask=row + block_m + m < last, other=0)
            stage = wait_empty(empty, position, stages)
            bar = full.index(stage)
            a, b = a_smem.index(stage), b_smem.index(stage)
            if RULE.gather_a:
                _copy_rows(a_ptr, token, stride_am, row + m_a < last, n, N, a, even_n)
            else:
                _copy_rows(b_ptr, token, stride_bm, row + m_b < last, k, K, b, even_k)
            if row + block_m <= last:
                mbarrier.expect(bar, bytes)
                if RULE.gather_a:
                    tma.async_copy_global_to_shared(b_map, [row, k0], bar, b)
                else:
                    tma.async_copy_global_to_shared(a_map, [row, n0], bar, a)
            else:
                mbarrier.expect(bar, 0)
                if RULE.gather_a:
                    _copy_rows(b_ptr, row + m_b, stride_bm, row + m_b < last, k, K, b, even_k)
                else:
                    _copy_rows(a_ptr, row + m_a, stride_am, row + m_a < last, n, N, a, even_n)
            async_copy.mbarrier_arrive(bar, increment_count=False)
            position += 1
        fence_async_shared()  # TMA will write the stage that cp.async wrote last


@gluon.jit
def _put_two(out, buffers, value, expert, n0, k0):
    left, right = halves(value)
    width: gl.constexpr = left.shape[1]
    put(out, buffers.index(0), left, (expert, n0, k0))
    put(out, buffers.index(1), right, (expert, n0, k0 + width))


@gluon.jit
def _put_128(out, buffers, value, expert, n0, k0, RULE: gl.constexpr):
    """Stores 64 rows and 128 columns of a tile."""
    if RULE.box == 64:
        _put_two(out, buffers, value, expert, n0, k0)
    else:
        left, right = halves(value)
        _put_two(out, buffers, left, expert, n0, k0)
        _put_two(out, buffers, right, expert, n0, k0 + 64)


@gluon.jit
def _consume(WHO: gl.constexpr, out, offsets_ptr, buffers, ring, sizes, RULE: gl.constexpr):
    _, _, _, _, num_n, num_k, E = sizes
    rows: gl.constexpr = RULE.block_n // 2
    from_row: gl.constexpr = WHO * rows
    block_k: gl.constexpr = RULE.block_k
    stages: gl.constexpr = RULE.stages
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block_k, 16])
    position = 0
    for tile in range(gl.program_id(0), E * num_n * num_k, gl.num_programs(0)):
        expert = tile // (num_n * num_k)
        first = gl.load(offsets_ptr + expert)
        last = gl.load(offsets_ptr + expert + 1)
        steps = gl.cdiv(last - first, RULE.block_m)
        acc = gl.zeros([rows, block_k], gl.float32, layout=mma)
        acc, position = multiply(
            acc, position, steps, ring, from_row, rows, block_k, 0, True, False, stages
        )
        n0 = (tile // num_k) % num_n * RULE.block_n + from_row
        k0 = tile % num_k * block_k
        if rows == 64:
            left, right = halves(acc)
            _put_128(out, buffers, left, expert, n0, k0, RULE)
            _put_128(out, buffers, right, expert, n0, k0 + 128, RULE)
        else:
            upper, lower = row_halves(acc)
            _put_128(out, buffers, upper, expert, n0, k0, RULE)
            _put_128(out, buffers, lower, expert, n0 + 64, k0, RULE)
    tma.store_wait(0)


@gluon.jit
def gram_kernel(
    a_ptr,
    b_ptr,
    a_map,
    b_map,
    out,
    slot_ptr,
    offsets_ptr,
    N,
    K,
    stride_am,
    stride_bm,
    num_n,
    num_k,
    E,
    RULE: gl.constexpr,
):
    """Computes out[e, n, k] = sum over the rows of e of a[row, n] * b[row, k].

    Grid: one program per multiprocessor, which take the tiles in turn, those of one expert
    together. Assumes: one operand is gathered; the other is also a map of (S, its width). The row
    loop is sequential, so the sum has a fixed order.
    Cost: 2 S N K FLOPs; S (N * k tiles + K * n tiles) + E N K elements.
    """
    if RULE.gather_a:
        dtype: gl.constexpr = b_map.dtype
    else:
        dtype: gl.constexpr = a_map.dtype
    stages: gl.constexpr = RULE.stages
    a_shape: gl.constexpr = [RULE.block_m, RULE.block_n]
    b_shape: gl.constexpr = [RULE.block_m, RULE.block_k]
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(a_shape, dtype)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(b_shape, dtype)
    a_smem = gl.allocate_shared_memory(dtype, [stages, a_shape[0], a_shape[1]], a_layout)
    b_smem = gl.allocate_shared_memory(dtype, [stages, b_shape[0], b_shape[1]], b_layout)
    boxes: gl.constexpr = [2, 1, 64, RULE.box]  # of a consumer
    first_boxes = gl.allocate_shared_memory(out.dtype, boxes, out.layout)
    second_boxes = gl.allocate_shared_memory(out.dtype, boxes, out.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1 + PRODUCER_THREADS)
        mbarrier.init(empty.index(stage), count=2)
    ring = (a_smem, b_smem, full, empty)
    sizes = (N, K, stride_am, stride_bm, num_n, num_k, E)
    pointers = (a_ptr, b_ptr, slot_ptr, offsets_ptr)
    gl.warp_specialize(
        [
            (_consume, (0, out, offsets_ptr, first_boxes, ring, sizes, RULE)),
            (_consume, (1, out, offsets_ptr, second_boxes, ring, sizes, RULE)),
            (_produce, (pointers, a_map, b_map, ring, sizes, RULE)),
        ],
        [4, 4],
        [208, 88],
    )
