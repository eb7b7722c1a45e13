"""The load-balancing loss of a whole model, value and gradient: transformers' function and ours.

    PYTHONPATH=src python3 benchmarks/aux_loss.py --commit $(git rev-parse --short HEAD)

Times `load_balancing_loss_func` of transformers' Mixtral, which the other models copy, and what
`turnout.patch(model, aux_loss="fused")` puts in its place, on the router logits of all layers of
Qwen3-30B-A3B. See benchmarks/README.md. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from compare import HERE, git_commit
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from turnout.bench.musts import Must, show
from turnout.bench.records import slug
from turnout.bench.run import MIB
from turnout.bench.sweep import version_of
from turnout.bench.table import File, Table
from turnout.device import device_of
from turnout.integrations.aux_loss import balancing
from turnout.measure import host_seconds, seconds
from turnout.routing.losses import load_balancing_loss

LAYERS, EXPERTS, TOP_K, SEQUENCE = 48, 128, 8, 4096
PROVIDERS: dict[str, Callable[..., Tensor]] = {"hf": load_balancing_loss_func, "turnout": balancing}
FACTOR, ROUNDING = 2.0, 2.4e-7  # ours may be as wrong as FACTOR times transformers', and ROUNDING


@dataclass(frozen=True, slots=True)
class Row:
    """One provider on one batch: milliseconds on the device's clock, what the host spends until it
    is free again, the most memory above the logits, and `error`: of value and gradient in float32,
    the largest difference from float64, relative to the largest value."""

    commit: str
    device: str
    torch: str
    transformers: str
    layers: int
    experts: int
    top_k: int
    tokens: int
    mask: str
    provider: str
    ms: float
    host_ms: float
    peak_mb: float | None
    error: float


TABLE = Table(Row, {"ms": ".4f", "host_ms": ".4f", "peak_mb": ".1f", "error": ".2e"})


def make_logits(tokens: int, layers: int, device: torch.device) -> tuple[Tensor, ...]:
    """(tokens, E) of each layer, bfloat16 as a router gives them."""
    generator = torch.Generator(device).manual_seed(0)
    options = {"device": device, "generator": generator}
    made = (torch.randn(tokens, EXPERTS, **options) for _ in range(layers))
    return tuple(z.bfloat16().requires_grad_() for z in made)


def make_mask(tokens: int, sequence: int, device: torch.device) -> Tensor:
    """(tokens / sequence, sequence): an eighth of every row is padding."""
    mask = torch.ones(tokens // sequence, sequence, dtype=torch.int64, device=device)
    mask[:, -(sequence // 8) :] = 0
    return mask


def step_of(
    provider: str, logits: tuple[Tensor, ...], mask: Tensor | None
) -> Callable[[], tuple[Tensor, ...]]:
    """The loss and the gradient of every layer's logits."""

    def step() -> tuple[Tensor, ...]:
        loss = PROVIDERS[provider](logits, EXPERTS, TOP_K, mask)
        return (loss.detach(), *torch.autograd.grad(loss, logits))

    return step


def difference(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest, relative to the largest value of each tensor."""
    found = 0.0
    for one, other in zip(got, expected, strict=True):
        apart = (one.double() - other.double()).abs().max() / other.double().abs().max()
        found = max(found, float(apart))
    return found


def spaced(tokens: int, layers: int, device: torch.device) -> tuple[Tensor, ...]:
    """Float32 logits of every token far apart, so that every precision chooses the same experts."""
    made = make_logits(tokens, layers, device)
    ranks = (z.detach().argsort(-1).argsort(-1) for z in made)
    return tuple((rank / 16).float().requires_grad_() for rank in ranks)


def truth_of(logits: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, ...]:
    """The definition in float64."""
    wide = tuple(z.detach().double().requires_grad_() for z in logits)
    loss = load_balancing_loss(wide, TOP_K, mask=mask)
    return (loss.detach(), *torch.autograd.grad(loss, wide))


def demands(rows: Iterable[Row]) -> list[Must]:
    """As right as transformers' in float32, and not slower."""
    found = []
    by_case = {(row.tokens, row.mask, row.provider): row for row in rows}
    for (tokens, mask, provider), ours in by_case.items():
        stock = by_case.get((tokens, mask, "hf"))
        if provider == "turnout" and stock is not None:
            case = f"T={tokens}, mask {mask}"
            limit = FACTOR * stock.error + ROUNDING
            note = f"{ours.error:.1e}, hf {stock.error:.1e}"
            found.append(Must(f"{case}: error / limit", ours.error / limit, 1.0, False, note))
            note = f"{stock.ms:.2f} ms to {ours.ms:.2f}"
            found.append(Must(f"{case}: hf / turnout", stock.ms / ours.ms, 1.0, True, note))
    return found


def peak_mb(step: Callable[[], object], device: torch.device) -> float | None:
    """MiB of a step above what was there; None without an allocator that counts."""
    if device.type != "cuda":
        return None
    step()
    gc.collect()  # what goes while the step runs would be counted against it
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def main() -> int:
    """Run, save, judge; 1 if a demand is missed."""
    args = arguments()
    device = torch.device(args.device)
    name = device_of(device).name
    out = Path(args.out) if args.out else HERE / "results" / f"aux_{slug(name)}.csv"
    file = File(TABLE, out)
    facts = args.commit or git_commit(), name, torch.__version__, version_of("transformers")
    sizes = args.layers, EXPERTS, TOP_K
    for tokens in map(int, args.tokens.split(",")):
        logits = make_logits(tokens, args.layers, device)
        for word in ("no", "yes"):
            mask = make_mask(tokens, min(SEQUENCE, tokens), device) if word == "yes" else None
            far = spaced(tokens, args.layers, device)
            truth = truth_of(far, mask)
            errors = {one: difference(step_of(one, far, mask)(), truth) for one in PROVIDERS}
            del far, truth
            for provider, error in errors.items():
                step = step_of(provider, logits, mask)
                options = {"device": device, "warmup": 2, "repeats": args.repeats}
                ms = seconds(step, **options).median * 1e3
                host = host_seconds(step, **options).median * 1e3
                case = tokens, word, provider
                file.add(Row(*facts, *sizes, *case, ms, host, peak_mb(step, device), error))
                print(f"T={tokens} mask {word:3s} {provider:8s} {ms:8.3f} ms, host {host:8.3f} ms")
    found = demands(file.rows)
    print(f"\n{len(file.rows)} rows in {out}\n\n{show(found)}")
    return 0 if all(must.passed for must in found) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--tokens", default="4096,8192,32768", help="joined by commas")
    add("--layers", type=int, default=LAYERS)
    add("--repeats", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", help="the CSV; benchmarks/results/aux_<gpu>.csv by default")
    add("--commit", help="for the first column; asked of git by default")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
