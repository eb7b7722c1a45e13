"""Which configs a kernel may run with: every constraint, stated once in `fits`, and the candidates.

Shared memory of the pipelined loop, in bytes, as the compiler lays it out (Triton 3.6, checked
against it in `tests/compile/test_tuning_space.py`):

    loop     = buffers * (bytes of the operand tiles of one step)
    buffers  = num_stages where the tensor cores read shared memory (Hopper, datacenter Blackwell),
               else num_stages - 1; an operand that changes in registers on its way to the tensor
               cores (converted, masked, weighted) has one less there, and a copy
    needed   = max(loop, the scratch in which the epilogue changes its layout)

The loop of `rows` runs over K, that of `gram` over the rows; loads of gathered rows wait for loads
of their indices, so `gram` has half of the buffers then. Registers of one thread, of 255:

    needed = 64 + sums + mask
    sums   = tile / (32 * num_warps), twice that where a second sum lives beside the first: float32
             products, and adapters outside of the loop
    mask   = elements of a masked operand's tile / (32 * num_warps)

Legend: N output width, K contraction, R LoRA rank (padded).
"""

from __future__ import annotations

from turnout.kernel_facts import power_of_2
from turnout.specs import GemmProblem
from turnout.tuning.key import OPTIONS, TILES, Ask, Config

REGISTERS = 255  # one thread can have
OTHER_REGISTERS = 64  # addresses, masks and operands of one step, about
SMALLEST = 16  # of a tile's side, for the tensor cores
_WARPS = (1, 2, 4, 8, 16)
_MOST_STAGES = 8


def fits(ask: Ask, config: Config) -> str | None:
    """Why the kernel can not (or should not) run this problem with this config, or None."""
    wrong = _unknown(ask, config)
    if wrong is not None:
        return wrong
    for reject in (_tiles, _registers, _shared):
        reason = reject(ask, config)
        if reason is not None:
            return reason
    return None


def _unknown(ask: Ask, config: Config) -> str | None:
    expected = {*TILES[ask.kernel], *OPTIONS}
    got = {name for name, _ in config.values}
    if got != expected:
        return f"has {', '.join(sorted(got))}; {ask.kernel} takes {', '.join(sorted(expected))}"
    for name, value in config.values:
        if name.startswith("BLOCK") and (value < SMALLEST or value & (value - 1)):
            return f"{name} is {value}; expected a power of two, {SMALLEST} or more"
    if config["num_warps"] not in _WARPS:
        return f"num_warps is {config['num_warps']}; expected one of {_WARPS}"
    if not 1 <= config["num_stages"] <= _MOST_STAGES:
        return f"num_stages is {config['num_stages']}; expected 1 to {_MOST_STAGES}"
    if ask.kernel == "rows" and config["GROUP"] < 1:
        return f"GROUP is {config['GROUP']}; expected 1 or more"
    if ask.kernel == "gram" and config["EXPERT_FIRST"] not in (0, 1):
        return f"EXPERT_FIRST is {config['EXPERT_FIRST']}; expected 0 or 1"
    return None


def _tiles(ask: Ask, config: Config) -> str | None:
    """A tile wider than what it covers computes zeros. A step of `rows` may be up to 64 wide."""
    p = ask.problem
    limits = {
        "BLOCK_N": (p.n, SMALLEST),
        "BLOCK_K": (p.k, 64 if ask.kernel == "rows" else SMALLEST),
    }
    for name, (size, least) in limits.items():
        if config[name] > max(least, power_of_2(size)):
            what = "the padded rank, which is" if p.narrow and name == "BLOCK_N" else "there are"
            return f"{name} is {config[name]}; {what} {size}"
    return None


def tile(ask: Ask, config: Config) -> tuple[int, int, int]:
    """Rows, columns and depth of the product of one step."""
    if ask.kernel == "rows":
        return ask.tile_rows, config["BLOCK_N"], config["BLOCK_K"]
    return config["BLOCK_N"], config["BLOCK_K"], config["BLOCK_M"]


def registers(ask: Ask, config: Config) -> int:
    """Of one thread, about; see the module's docstring."""
    rows, columns, depth = tile(ask, config)
    threads = 32 * config["num_warps"]
    p = ask.problem
    sums = rows * columns // threads * (2 if _has_second_sum(p) else 1)
    masked = p.dropout and not p.rank
    side = rows if ask.kernel == "rows" else columns
    return OTHER_REGISTERS + sums + (side * depth // threads if masked else 0)


def _has_second_sum(p: GemmProblem) -> bool:
    tail_apart = p.rank > 0 and (p.dropout or p.weight_dtype not in (p.dtype, "float32"))
    return p.dtype == "float32" or tail_apart


def _registers(ask: Ask, config: Config) -> str | None:
    needed = registers(ask, config)
    if needed <= REGISTERS:
        return None
    rows, columns, _ = tile(ask, config)
    return (
        f"a tile of {rows} x {columns} on {config['num_warps']} warps needs about {needed} "
        f"registers per thread; there are {REGISTERS}"
    )


def shared_memory(ask: Ask, config: Config) -> int:
    """Bytes that one block asks for, at most; see the module's docstring."""
    p = ask.problem
    rows, columns, depth = tile(ask, config)
    item = _bytes(p.dtype)
    stages = config["num_stages"]
    asynchronous = _reads_shared(ask, config)
    waiting = max(1, stages - 1)
    if ask.kernel == "gram":
        return _gram_shared(p, rows, columns, depth, waiting, asynchronous)
    direct = stages if asynchronous else waiting
    a, w = rows * depth * item, columns * depth * _bytes(p.weight_dtype)
    changed_a, changed_w = p.dropout and not p.rank, p.weight_dtype != p.dtype
    loop = waiting * a + a if changed_a else direct * a
    loop += waiting * w + columns * depth * item if changed_w else direct * w
    return max(loop, rows * columns * 2) + _barriers(ask)


def _gram_shared(
    p: GemmProblem, rows: int, columns: int, depth: int, waiting: int, asynchronous: bool
) -> int:
    """The row loop: both operands may be masked or weighted, which this problem does not tell."""
    item = _bytes(p.dtype)
    step = (rows + columns) * depth * item
    if p.gathered or p.dropout:
        buffers = max(1, waiting // 2) if p.gathered else waiting
        copy = step if asynchronous else max(rows, columns) * depth * item
        indices = 12 * depth * waiting
        loop = buffers * step + copy + indices
    else:
        loop = (waiting + asynchronous) * step
    return max(loop, rows * columns * _bytes(p.weight_dtype)) + 16


def _reads_shared(ask: Ask, config: Config) -> bool:
    """The tensor cores read their operands from shared memory: wgmma and tcgen05, 16 bits."""
    arch = ask.device.arch
    rows, _, _ = tile(ask, config)
    is_wide = rows >= 64 and config["num_warps"] >= 4
    return arch is not None and 90 <= arch < 120 and is_wide and _bytes(ask.problem.dtype) == 2


def _barriers(ask: Ask) -> int:
    return 16 if (ask.device.arch or 0) >= 100 else 0


def _bytes(dtype: str) -> int:
    return {"float32": 4, "float64": 8}.get(dtype, 2)


def _shared(ask: Ask, config: Config) -> str | None:
    room = ask.device.shared_memory
    needed = shared_memory(ask, config)
    if not room or needed <= room:  # 0: not a GPU
        return None
    return f"needs {needed} bytes of shared memory; {ask.device.name} has {room}"
