"""The largest numbers of a row, in the registers of the one thread that has the row: device code.

A list is a tuple of (BLOCK_T,) tensors, so a step of a sorting network is one maximum and one
minimum of whole tensors, and no thread asks another. Lists are in descending order.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def sorting(n):
    """The pairs that Batcher's odd-even merge sort of n numbers compares, n a power of two."""
    pairs, run = [], 1
    while run < n:
        step = run
        while step:
            for first in range(step % run, n - step, 2 * step):
                for i in range(first, first + min(step, n - first - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        pairs.append((i, i + step))
            step //= 2
        run *= 2
    return tuple(pairs)


@triton.constexpr_function
def merging(n):
    """The pairs that sort n numbers which first fall, then rise (or the other way round)."""
    pairs, step = [], n // 2
    while step:
        pairs += [(i, i + step) for i in range(n) if not i & step]
        step //= 2
    return tuple(pairs)


@triton.jit
def _ranked(a, b):
    larger = tl.maximum(a, b)
    if a.dtype.primitive_bitwidth == 64:
        # what is not the larger: a second comparison of 64 bits would take twice the instructions
        smaller = a ^ b ^ larger
    else:
        smaller = tl.minimum(a, b)
    return larger, smaller


@triton.jit
def _exchange(keys, i: tl.constexpr, j: tl.constexpr):
    larger, smaller = _ranked(keys[i], keys[j])
    return keys[:i] + (larger,) + keys[i + 1 : j] + (smaller,) + keys[j + 1 :]


@triton.jit
def exchanged(keys, PAIRS: tl.constexpr):
    """The keys with the larger of each pair first. Cost: a maximum and a minimum per pair."""
    for n in tl.static_range(len(PAIRS)):
        keys = _exchange(keys, PAIRS[n][0], PAIRS[n][1])
    return keys


@triton.jit
def merged(best, keys, N: tl.constexpr):
    """The N largest of two lists of N."""
    larger = ()
    for i in tl.static_range(N):
        larger = larger + (tl.maximum(best[i], keys[N - 1 - i]),)
    return exchanged(larger, merging(N))


@triton.jit
def inserted(best, key, N: tl.constexpr):
    """The N largest of a list of N and one key more."""
    found = ()
    for i in tl.static_range(N):
        larger, key = _ranked(best[i], key)
        found = found + (larger,)
    return found


@triton.jit
def columns(tile):
    """The columns of a tile of 2^n columns, in no useful order."""
    n: tl.constexpr = tile.shape[1]
    if n == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], n // 2, 2]))
        return columns(even) + columns(odd)


@triton.jit
def tile_of(keys, N: tl.constexpr):
    """The tile with these N columns, in this order."""
    if N == 1:
        return keys[0][:, None]
    else:
        even, odd = tile_of(keys[0::2], N // 2), tile_of(keys[1::2], N // 2)
        return tl.reshape(tl.join(even, odd), [even.shape[0], N])
