"""What a config is asked for, and the config itself.

A stored config belongs to a `Key`: everything that the best tile sizes depend on but the number of
rows. Rows come in buckets, powers of two, because a training run meets many counts of tokens and
all of one bucket share a config:

    bucket(rows) = 2^round(log2(rows))

Legend: S rows, E experts, N output width, K contraction, R LoRA rank (padded).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

from turnout.device import Device
from turnout.specs import GemmProblem

Kernel = Literal["rows", "gram", "hopper_rows", "hopper_gram"]

# Tile sizes of each kernel; the row tile of `rows` belongs to the sort and is part of the key.
TILES: dict[str, tuple[str, ...]] = {
    "rows": ("BLOCK_N", "BLOCK_K", "GROUP"),
    "gram": ("EXPERT_FIRST", "BLOCK_N", "BLOCK_K", "BLOCK_M"),
}
OPTIONS = ("num_warps", "num_stages")
FIXED = ("hopper_rows", "hopper_gram")  # a rule decides their config, so there is none to search


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes and options of one launch, in the order of their names; hashable."""

    values: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, values: Mapping[str, int]) -> Config:
        """From a plain dict; a bool becomes 0 or 1."""
        return cls(tuple(sorted((name, int(value)) for name, value in values.items())))

    def __getitem__(self, name: str) -> int:
        return dict(self.values)[name]

    def to_dict(self) -> dict[str, int]:
        """Plain values, for JSON."""
        return dict(self.values)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What a stored config is for, but the number of rows.

    Attributes:
        layout: what is on, in the order of the names: `activation_gated`, `activation_interleaved`,
            `bias`, `dropout`, `gathered`, `k_major`, `narrow`.
        epilogue: `none`, `activate` or `activate_backward`.
        tile_rows: rows of a tile, decided by the sort; 0 for `gram`.
        arch: compute capability as one number; None in Triton's interpreter.
        triton: its version, major and minor.
    """

    kernel: Kernel
    experts: int
    n: int
    k: int
    rank: int
    dtype: str
    weight_dtype: str
    layout: tuple[str, ...]
    epilogue: str
    tile_rows: int
    arch: int | None
    triton: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"layout": list(self.layout)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Key:
        """The inverse of `to_dict`; further entries are not read.

        Raises:
            ValueError: a field is missing or of the wrong type, or the kernel is not known.
        """
        kernel = checked(values, "kernel", str)
        if kernel not in get_args(Kernel):
            raise ValueError(f"kernel is {kernel!r}; this version has {', '.join(TILES)}")
        found: dict[str, Any] = {}
        for field in fields(cls):
            if field.name == "arch" and values.get("arch") is None:
                found["arch"] = None
            elif field.name == "layout":
                found["layout"] = tuple(map(str, checked(values, "layout", list)))
            else:
                is_text = field.name in ("kernel", "dtype", "weight_dtype", "epilogue", "triton")
                found[field.name] = checked(values, field.name, str if is_text else int)
        return cls(**found)

    def __str__(self) -> str:
        words = [self.kernel, f"E={self.experts} N={self.n} K={self.k}"]
        words += [f"R={self.rank}"] if self.rank else []
        words += [
            self.dtype if self.dtype == self.weight_dtype else f"{self.dtype}/{self.weight_dtype}"
        ]
        words += [self.epilogue] if self.epilogue != "none" else []
        words += ["+".join(self.layout)] if self.layout else []
        words += [f"tile_rows={self.tile_rows}"] if self.tile_rows else []
        return " ".join(words)


def checked(values: Mapping[str, Any], name: str, kind: type) -> Any:
    """`values[name]`, which has to be there and of that type (a bool is no int)."""
    if name not in values:
        raise ValueError(f"{name} is missing")
    value = values[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{name} is {value!r}; expected {kind.__name__}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question for a config: the problem, its row tile (0 for `gram`) and the device.

    `top_k`, experts per token, is for the record: no config depends on it.
    """

    kernel: Kernel
    problem: GemmProblem
    device: Device
    tile_rows: int = 0
    top_k: int = 1

    @property
    def key(self) -> Key:
        p = self.problem
        return Key(
            kernel=self.kernel,
            experts=p.experts,
            n=p.n,
            k=p.k,
            rank=p.rank,
            dtype=p.dtype,
            weight_dtype=p.weight_dtype,
            layout=tuple(sorted(_layout(p))),
            epilogue=p.epilogue or "none",
            tile_rows=self.tile_rows,
            arch=self.device.arch,
            triton=triton_version(),
        )

    @property
    def rows(self) -> int:
        return self.problem.rows


def _layout(problem: GemmProblem) -> Iterator[str]:
    activation = problem.activation
    flags = {
        "activation_gated": activation is not None and activation.gated,
        "activation_interleaved": activation is not None and activation.interleaved,
        "bias": problem.bias,
        "dropout": problem.dropout,
        "gathered": problem.gathered,
        "k_major": problem.ragged == "m" and problem.weight_k_major,
        "narrow": problem.narrow,
    }
    return (name for name, on in flags.items() if on)


def bucket_of(rows: int) -> int:
    """The power of two nearest to `rows` in log space; 1 for none."""
    return 1 << round(math.log2(max(1, rows)))


def octaves(rows: int, bucket: int) -> float:
    """How far apart two counts of rows are, in powers of two."""
    return abs(math.log2(max(1, rows)) - math.log2(max(1, bucket)))


def installed(name: str) -> str | None:
    """The version of a package as its metadata says, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def triton_version() -> str:
    """Major and minor of the installed Triton: patch releases share configs."""
    return ".".join((installed("triton") or "none").split(".")[:2])
