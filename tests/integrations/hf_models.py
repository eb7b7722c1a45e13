"""What the integration tests share: tiny models with adapters, one step, and probes of what ran.

Stock means: transformers' eager experts, and PEFT's own fold for adapters.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import turnout
from turnout.integrations import transformers as glue
from turnout.verify.tiny import TINY, build, make_inputs, out_tensor

STOCK_ARCHS = ("dbrx", "switch_transformers", "nllb-moe")
FUSED_ARCHS = tuple(key for key in TINY if key not in STOCK_ARCHS)
# Each stack in a module of its own; aria up to transformers 5.17.
PEFT_PATH_ARCHS = tuple(
    key
    for key in ("aria_text", "jetmoe")
    if any(
        name.endswith(("experts.fc1.weight", "mlp.input_linear.weight"))
        for name in build(key).state_dict()
    )
)
LORA_ARCHS = tuple(key for key in FUSED_ARCHS if key not in PEFT_PATH_ARCHS)
UNDECORATED = tuple(key for key in FUSED_ARCHS if not TINY[key].decorated)


def tiny(key: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """The tiny model of an architecture, with other config values where given."""
    arch = TINY[key]
    with mock.patch.dict(TINY, {key: replace(arch, config={**arch.config, **config})}):
        return build(key, dtype=dtype, seed=seed)


def with_lora(model: nn.Module, *, name: str = "default", r: int = 4, **options: Any) -> Any:
    """A PEFT model with random, non-zero A and B; the same ones for the same arguments."""
    options.setdefault("lora_alpha", 2 * r)
    options.setdefault("init_lora_weights", False)
    options.setdefault("target_modules", [])
    if not options.get("target_parameters") and not options["target_modules"]:
        options["target_parameters"] = turnout.lora_targets(model)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not supported and thus will be.*")
        return get_peft_model(model, LoraConfig(r=r, **options), adapter_name=name).eval()


def pickled(model: nn.Module) -> Any:
    """A copy of the model through pickle."""
    for module in model.modules():
        # local classes of the `kernels` package, which no model of transformers can be pickled with
        vars(module).pop("_kernel_funcs", None)
    return pickle.loads(pickle.dumps(model))


def loss_of(out: Tensor) -> Tensor:
    """A scalar in which every output counts differently."""
    return (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() / out.shape[0]


def forward(model: Any, key: str, **options: Any) -> Tensor:
    """The output tensor of one forward."""
    if TINY[key].inputs != "encdec":
        options.setdefault("use_cache", False)
    torch.manual_seed(7)
    return out_tensor(model(**make_inputs(key), **options))


def forward_after(first: Callable[[Any], Any] | None, model: Any, key: str) -> Tensor:
    """One forward, after `first(model)` (such as `turnout.patch`) where there is one."""
    if first is not None:
        first(model)
    return forward(model, key)


def step(model: Any, key: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of one forward, and every gradient of `loss_of` by parameter name."""
    model.zero_grad(set_to_none=True)
    out = forward(model, key, **options)
    loss_of(out).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.detach(), grads


def relative(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_same_step(
    got: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    limit: float = 1e-5,
    floor: float = 0.0,
) -> None:
    """Outputs and every gradient agree, relative to their norms; no gradient is missing.

    `floor`: a gradient smaller than this part of the largest one is measured against that part.
    """
    error = relative(got[0], expected[0])
    assert error < limit, f"the output is off by {error:.1e}"
    assert got[1].keys() == expected[1].keys()
    assert expected[1]
    least = floor * max(float(grad.norm()) for grad in expected[1].values())
    wrong = {}
    for name, grad in expected[1].items():
        scale = max(float(grad.norm()), least, 1e-30)
        error = float((got[1][name].double() - grad.double()).norm()) / scale
        if not error < limit:
            wrong[name] = f"{error:.1e}"
    assert not wrong, f"gradients are off: {wrong}"


class Probe:
    """How often the experts ran in turnout, with which adapters, and how often PEFT folded."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.folds = 0

    @property
    def fused_projections(self) -> int:
        """Adapters that reached the kernels as factors."""
        return sum(
            (lora.gate_up is not None) + (lora.down is not None) for lora in self.calls if lora
        )


@contextmanager
def probe() -> Iterator[Probe]:
    """Count the calls of `expert_mlp` and of PEFT's folds."""
    found = Probe()
    run = glue.expert_mlp
    # PEFT 0.20 folds by get_delta_weight alone
    folds = [n for n in ("get_delta_factors", "get_delta_weight") if hasattr(ParamWrapper, n)]

    def expert_mlp(*args: Any, **kwargs: Any) -> Tensor:
        found.calls.append(kwargs["lora"])
        return run(*args, **kwargs)

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def fold(*args: Any, **kwargs: Any) -> Any:
            found.folds += 1
            return method(*args, **kwargs)

        return fold

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(glue, "expert_mlp", expert_mlp))
        for name in folds:
            fold = counted(getattr(ParamWrapper, name))
            stack.enter_context(mock.patch.object(ParamWrapper, name, fold))
        yield found


def pair(key: str = "qwen3_moe", **options: Any) -> tuple[Any, Any]:
    """The same adapted model twice: stock, and patched."""
    stock, model = with_lora(tiny(key), **options), with_lora(tiny(key), **options)
    turnout.patch(model)
    return stock, model


def assert_fused(model: Any, stock: Any, key: str = "qwen3_moe", projections: int = 4) -> None:
    """Outputs and gradients are stock PEFT's, and no stack was folded."""
    expected = step(stock, key)
    with probe() as ran:
        got = step(model, key)
    assert ran.folds == 0
    assert ran.fused_projections == projections
    assert_same_step(got, expected)


def experts_of(model: nn.Module) -> list[Any]:
    """Every module of transformers that holds routed experts, below PEFT's wrappers."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Experts")
        and type(module).__name__ != "InklingSharedExperts"
    ]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every object that a module of the model holds, with its class and the config's contents.

    Containers (hooks, parameters, children) are opened, and what they hold is kept by reference, so
    that two snapshots compare by identity with `changes`.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name}: class"] = type(module)
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = value
            if isinstance(value, dict):
                found |= {f"{name}.{key}[{inner}]": held for inner, held in value.items()}
        if "config" in vars(module):
            found[f"{name}: config values"] = config_values(module.config)
    return found


def config_values(config: Any) -> tuple[Any, ...]:
    """The contents of a config, the experts implementation included."""
    return config._experts_implementation, sorted((k, repr(v)) for k, v in vars(config).items())


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is new, gone, or no longer the same object (for config values: not equal)."""
    missing = object()
    return [
        key
        for key in before.keys() | after.keys()
        if (a := before.get(key, missing)) is not (b := after.get(key, missing))
        and (not key.endswith("values") or a != b)
    ]
