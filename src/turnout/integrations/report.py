"""What `patch` did, layer by layer, and what the adapters really do: a live, printable report.

Nothing is stored that could go stale: adapters and paths are read off the model when asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from turnout.integrations import peft
from turnout.integrations.architectures import (
    Layout,
    Stock,
    get_path,
    layout_of,
    live,
)
from turnout.specs import Unsupported


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout | Stock]]:
    """(name, module, layout) of every MoE layer, in model order."""
    for name, module in list(model.named_modules()):
        layout = layout_of(module)
        if layout is not None:
            yield name, module, layout


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRow:
    """One MoE layer. `reason` is empty when it is fused."""

    name: str
    experts_class: str
    status: str
    reason: str = ""
    detail: str = ""
    num_experts: int | None = None
    hidden: int | None = None
    intermediate: int | None = None
    dtype: str | None = None
    activation: str | None = None
    frozen: bool | None = None

    @classmethod
    def of(cls, name: str, module: nn.Module, layout: Layout | Stock) -> LayerRow:
        """The row of a module that `patch` looked at."""
        kind = type(module).__name__
        if isinstance(layout, Stock):
            return cls(
                name=name,
                experts_class=kind,
                status="stock",
                reason=layout.reason,
                detail=layout.detail,
            )
        if layout.call == "llama4_block":
            module = live(module.experts)
        down = _parameter(module, layout.down)
        outer, inner = (2, 1) if layout.spec.transposed else (1, 2)
        return cls(
            name=name,
            experts_class=kind,
            status="fused",
            num_experts=down.shape[0],
            hidden=down.shape[outer],
            intermediate=down.shape[inner],
            dtype=str(down.dtype).removeprefix("torch."),
            activation=_describe(layout),
            frozen=not down.requires_grad,
        )


def _parameter(module: nn.Module, path: str) -> Any:
    head, _, tail = path.partition(".")
    if tail:
        return get_path(live(getattr(module, head)), tail)
    return getattr(module, head)


def _describe(layout: Layout) -> str:
    a = layout.spec.activation
    words = [a.act, "glu" if a.gated else "mlp"]
    if a.limit is not None:
        words.append(f"limit {a.limit:g}")
    if a.interleaved:
        words.append("interleaved")
    return " ".join(words)


class Report:
    """What runs where. `print` it, `.to_dict()` it, or `.require("fused")`."""

    def __init__(
        self, model: nn.Module, layers: list[LayerRow], *, backend: str, router: str, recompute: str
    ) -> None:
        self._model = model
        self.layers = tuple(layers)
        self.backend = backend
        self.router = router
        self.recompute = recompute

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by status."""
        return dict(Counter(row.status for row in self.layers))

    @property
    def adapters(self) -> dict[str, str]:
        """What each adapted expert parameter's next forward does, by name."""
        return peft.adapter_paths(self._model)

    def require(self, status: str = "fused") -> Report:
        """This report, or an error unless every layer and every adapter has `status`.

        Raises:
            ValueError: `status` is not `fused`.
            Unsupported: with the layers and adapters that are not, and why.
        """
        if status != "fused":
            raise ValueError(f"require takes 'fused'; got {status!r}")
        problems = [f"{r.name}: {r.reason} ({r.detail})" for r in self.layers if r.status != status]
        problems += [
            f"{name}: {path}" for name, path in self.adapters.items() if not path.startswith(status)
        ]
        if problems:
            raise Unsupported(f"{len(problems)} parts are not fused: " + "; ".join(problems))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": type(self._model).__name__,
            "backend": self.backend,
            "router": self.router,
            "recompute": self.recompute,
            "counts": self.counts,
            "layers": [asdict(row) for row in self.layers],
            "adapters": self.adapters,
        }

    def __rich__(self) -> Table:
        title = f"turnout: {type(self._model).__name__}, back end {self.backend}"
        table = Table(
            "layers", "experts", "E", "H", "F", "dtype", "activation", "status", title=title
        )
        for (row, count), first in self._grouped():
            sizes = [str(v or "") for v in (row.num_experts, row.hidden, row.intermediate)]
            status = row.status if row.status == "fused" else f"stock: {row.reason} ({row.detail})"
            table.add_row(
                f"{count} x {first}", row.experts_class, *sizes, row.dtype, row.activation, status
            )
        for path, count in Counter(self.adapters.values()).items():
            table.add_row(f"{count} adapters", "", "", "", "", "", "", path)
        return table

    def _grouped(self) -> list[tuple[tuple[LayerRow, int], str]]:
        """Equal layers once, with their number and the first one's name."""
        groups: dict[tuple[object, ...], list[LayerRow]] = {}
        for row in self.layers:
            values = asdict(row)
            values.pop("name")
            groups.setdefault(tuple(values.values()), []).append(row)
        return [((rows[0], len(rows)), rows[0].name) for rows in groups.values()]

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__
