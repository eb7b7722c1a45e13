"""What `patch` did, layer by layer, and what the adapters really do: a live, printable report.

Nothing is stored that could go stale: adapters and paths are read off the model when asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from turnout.integrations import peft
from turnout.integrations.architectures import (
    Layout,
    Stock,
    expert_modules,
    forward_in_front,
    live,
    stack_at,
    stack_holder,
)
from turnout.integrations.aux_loss import AuxLossRow, aux_loss_rows
from turnout.integrations.router_forward import STATE, lost_forward
from turnout.integrations.router_places import Place, places, why_definition
from turnout.integrations.sonic import describe
from turnout.integrations.state import state_of
from turnout.specs import Unsupported


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
        """The row of one experts module as it is now."""
        kind = type(module).__name__
        if isinstance(layout, Stock):
            return cls(
                name=name,
                experts_class=kind,
                status="stock",
                reason=layout.reason,
                detail=layout.detail,
            )
        holder = stack_holder(module, layout)
        down = stack_at(holder, layout.down)
        outer, inner = (2, 1) if layout.spec.transposed else (1, 2)
        known = down.dim() == 3
        state = state_of(holder)
        patched = state is not None
        return cls(
            name=name,
            experts_class=kind,
            status="fused" if patched else "unpatched",
            detail="turnout.unpatch was called" if state is None else describe(state),
            num_experts=down.shape[0] if known else None,
            hidden=down.shape[outer] if known else None,
            intermediate=down.shape[inner] if known else None,
            dtype=str(down.dtype).removeprefix("torch."),
            activation=_describe(layout),
            frozen=not down.requires_grad,
        )


def _describe(layout: Layout) -> str:
    a = layout.spec.activation
    words = [a.act, "glu" if a.gated else "mlp"]
    if a.limit is not None:
        words.append(f"limit {a.limit:g}")
    if a.interleaved:
        words.append("interleaved")
    return " ".join(words)


def _taken(model: nn.Module, path: str) -> str:
    """The forward of another library in front of turnout's, in words, or an empty string.

    It stands on the experts, on PEFT's wrapper around them, or (`kernels`) on their block.
    """
    found = forward_in_front(model, path)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    block = model.get_submodule(path.rpartition(".")[0])
    function = getattr(vars(block).get("forward"), "__func__", None)  # kernels 0.16 binds a method
    if found or not hasattr(type(block), "kernel_layer_name"):
        return found
    if function in (None, type(block).forward) or function.__module__.startswith("turnout."):
        return ""
    return f"use_kernels gave the block {function.__qualname__}; docs/kernels_hub.md"


def _unless_taken(model: nn.Module, row: LayerRow) -> LayerRow:
    """The row, or stock where another library's forward runs in place of turnout."""
    taken = "" if row.status == "stock" else _taken(model, row.name)
    return replace(row, status="stock", reason="other_kernel", detail=taken) if taken else row


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRow:
    """One router: `model` runs its own forward, `fused` and `definition` are swapped; and why."""

    name: str
    router_class: str
    status: Literal["model", "fused", "definition"]
    detail: str

    @classmethod
    def of(cls, place: Place, router: str) -> RouterRow:
        """The row of one router as it is now; `router` is what `patch` was given."""
        state = vars(place.modules[0]).get(STATE)
        status: Literal["model", "fused", "definition"] = "model"
        if state is None:
            detail = f"router={router!r}" if router == "model" else "turnout.unpatch was called"
        elif state.own:
            detail = state.own
        elif lost := lost_forward(place.modules[0]):
            detail = lost
        elif state.kernel:
            reason, status = why_definition(place), "fused"
            detail = f"definition in PyTorch: {reason}" if reason else "kernel"
        else:
            status, detail = "definition", "in PyTorch, for routing_cache=True"
        return cls(
            name=place.name, router_class=type(place.router).__name__, status=status, detail=detail
        )


class Report:
    """What runs where. `print` it, `.to_dict()` it, or `.require("fused")`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: str,
        router: str,
        recompute: str,
        routing_cache: bool = False,
        aux_loss: str = "model",
    ) -> None:
        self._model = model
        self.backend = backend
        self.router = router
        self.recompute = recompute
        self.routing_cache = routing_cache
        self.aux_loss = aux_loss

    @property
    def layers(self) -> tuple[LayerRow, ...]:
        """One row per MoE layer as it is now; of `modules_to_save` copies only the live one."""
        idle = set()
        for child in self._model.modules():
            module: Any = child
            if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
                copies = {id(module.original_module), *map(id, module.modules_to_save.values())}
                idle |= copies - {id(live(module))}
        return tuple(
            _unless_taken(self._model, LayerRow.of(name, module, layout))
            for name, module, layout in expert_modules(self._model)
            if id(module) not in idle
        )

    @property
    def counts(self) -> dict[str, int]:
        """Number of layers by status."""
        return dict(Counter(row.status for row in self.layers))

    @property
    def routers(self) -> tuple[RouterRow, ...]:
        """One row per router: what routes, and why."""
        return tuple(RouterRow.of(place, self.router) for place in places(self._model))

    @property
    def aux_losses(self) -> tuple[AuxLossRow, ...]:
        """One row per module that computes a load-balancing loss: whose code does, and why."""
        return aux_loss_rows(self._model, self.aux_loss)

    @property
    def adapters(self) -> dict[str, str]:
        """What each adapted expert parameter's next forward does, by name."""
        return peft.adapter_paths(self._model)

    def require(self, status: str = "fused") -> Report:
        """This report, or an error unless every layer and every adapter has `status`.

        With `router="fused"` every router too; on what it runs is in its row. With
        `aux_loss="fused"` every load-balancing loss that the model has.

        Raises:
            ValueError: `status` is not `fused`.
            Unsupported: with the layers and adapters that are not, and why.
        """
        if status != "fused":
            raise ValueError(f"require takes 'fused'; got {status!r}")
        problems = [
            f"{row.name}: {row.reason or row.status} ({row.detail})"
            for row in self.layers
            if row.status != status
        ]
        problems += [
            f"{name}: {path}" for name, path in self.adapters.items() if not path.startswith(status)
        ]
        if self.router == status:
            problems += [
                f"{row.name}: router {row.status} ({row.detail})"
                for row in self.routers
                if row.status != status
            ]
        if self.aux_loss == status:
            problems += [
                f"{row.name or row.model_class}: load-balancing loss {row.status} ({row.detail})"
                for row in self.aux_losses
                if row.status == "model"
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
            "routing_cache": self.routing_cache,
            "aux_loss": self.aux_loss,
            "counts": self.counts,
            "layers": [asdict(row) for row in self.layers],
            "routers": [asdict(row) for row in self.routers],
            "aux_losses": [asdict(row) for row in self.aux_losses],
            "adapters": self.adapters,
        }

    def __rich__(self) -> Table:
        title = f"turnout: {type(self._model).__name__}, back end {self.backend}"
        table = Table(
            "layers", "experts", "E", "H", "F", "dtype", "activation", "status", title=title
        )
        for (row, count), first in self._grouped():
            sizes = [str(v or "") for v in (row.num_experts, row.hidden, row.intermediate)]
            why = " ".join(filter(None, (row.reason, f"({row.detail})" if row.detail else "")))
            status = f"{row.status}: {why}" if why else row.status
            table.add_row(
                f"{count} x {first}", row.experts_class, *sizes, row.dtype, row.activation, status
            )
        for (first, kind, what), count in self._grouped_routers():
            table.add_row(f"{count} x {first}", kind, "", "", "", "", "", what)
        for loss in self.aux_losses if self.aux_loss == "fused" else ():
            what = f"load-balancing loss: {loss.status} ({loss.detail})"
            table.add_row(loss.name, loss.model_class, "", "", "", "", "", what)
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

    def _grouped_routers(self) -> list[tuple[tuple[str, str, str], int]]:
        """(the first one's name, class, what routes) of equal routers, with their number."""
        groups: dict[tuple[str, str], list[str]] = {}
        for row in self.routers:
            what = f"router: {row.status} ({row.detail})"
            groups.setdefault((row.router_class, what), []).append(row.name)
        return [((names[0], *key), len(names)) for key, names in groups.items()]

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__
