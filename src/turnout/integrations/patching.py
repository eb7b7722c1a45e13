"""`patch`, `unpatch`, `lora_targets`: from a Hugging Face model to turnout and back.

Every change is on an instance and is undone by `unpatch`: a config copy and a state object per
experts module, an instance `forward` where transformers' interface does not reach, on routers that
are swapped and with `aux_loss="fused"` on the model that computes the loss, an `_activate_lora` per
PEFT wrapper, forward pre-hooks that attach what is added later, and with `routing_cache` a
`context_fn` on the checkpoint functions. No class of another library is modified, and
`model.config` stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from turnout.experts.early import check_possible, dtypes_of, places_of
from turnout.experts.ops import check_backend
from turnout.experts.sonic import NAMES as SONIC
from turnout.integrations import checkpoints, peft, sonic
from turnout.integrations.architectures import (
    Layout,
    Stock,
    expert_modules,
    live,
    stack_at,
    stack_holder,
)
from turnout.integrations.aux_loss import restore_loss, swap_losses
from turnout.integrations.report import Report
from turnout.integrations.router_forward import restore
from turnout.integrations.router_swap import swap_all
from turnout.integrations.state import ATTRIBUTE, LayerState, state_of
from turnout.integrations.transformers import FORWARDS, NAME, bind, experts_forward
from turnout.integrations.versions import check_versions
from turnout.specs import (
    AuxLossChoice,
    BackendName,
    Recompute,
    RouterChoice,
    Unsupported,
    check_choice,
)
from turnout.tuning import first_use

_ROOT = "_turnout_root"


def patch(
    model: nn.Module,
    *,
    backend: BackendName = "auto",
    router: RouterChoice = "model",
    recompute: Recompute = "none",
    expert_dropout: float = 0.0,
    routing_cache: bool = False,
    tune: str | None = None,
    aux_loss: AuxLossChoice = "model",
) -> Report:
    """Run the experts of a transformers model through turnout. One line; `unpatch` undoes it.

    Works before and after `get_peft_model`. Patching twice is unpatching, then patching.

    Args:
        model: a transformers model, or a PEFT model around one.
        backend: `auto`, or the one back end to use. `sonic` is SonicMoE, whose package has to be
            there: it reorders the rows of gate_up in place until `unpatch`, and runs every layer
            or none; `sonic-merged` also merges adapters, in every forward (docs/sonic.md).
        router: `model` keeps the forward of the model's own routers. `fused` swaps it, on each
            instance, for one that computes the same logits, calls `turnout.route`, and returns the
            same tuple with the same dtypes; hooks and adapters on routers go on working. Routers
            that turnout can not reproduce stay as they are; the report names each, and says where
            `route` has a kernel and where it runs its definition in PyTorch.
        recompute: `gate_up` saves no pre-activation for backward and computes it again.
        expert_dropout: LoRA dropout on the experts' inputs, in training mode; PEFT refuses its own.
        routing_cache: with non-reentrant activation checkpointing, the recompute takes the experts
            that the forward chose and does not select again. Forward and recompute have to keep the
            same tensors, so the routers are swapped for this too: with `router="model"` they run
            the definition of their rule in PyTorch. Not in compiled code.
        tune: `first-use` searches the config of every kernel where a problem is first met, within
            ten minutes for the process, and keeps it in the cache (docs/tuning.md). None times
            nothing.
        aux_loss: `model` keeps the load-balancing loss of `output_router_logits=True` as the model
            computes it. `fused` gives the model, on its instance, a forward of the same code that
            calls `turnout.routing.losses.load_balancing_loss` for it: the same value and gradient,
            no wait for the GPU, and no softmax is kept. A model whose function gives something else
            stays as it is, and the report says why (docs/step.md).

    Returns:
        A live `Report`: what runs fused, what stays stock and why.

    Raises:
        ValueError: no MoE layer, a bad option, too old transformers or PEFT, or expert adapters
            that were asked for and are not there.
        Unsupported: an option or back end that this version does not have, or a back end that can
            not run these weights: on a GPU where they are, else on any device of this machine.
    """
    check_versions()
    _check_options(model, backend, router, recompute, expert_dropout, tune)
    check_choice("aux_loss", aux_loss, AuxLossChoice)
    unpatch(model)
    layers = list(expert_modules(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer that turnout knows; expected a transformers "
            "model with routed experts. docs/support.md lists the architectures"
        )
    if backend in SONIC:
        sonic.check(layers, backend, recompute, expert_dropout)
    elif backend != "auto":
        _check_places(layers, backend)
    for _, module, layout in layers:
        if isinstance(layout, Layout):
            state = LayerState(layout, backend, recompute, expert_dropout, patched=True)
            patch_module(module, state)
    root = _install_root(model)
    try:
        if router == "fused" or routing_cache:
            swap_all(model, kernel=router == "fused", cache=routing_cache)
        if aux_loss == "fused":
            swap_losses(model)
        if routing_cache:
            root.handles += checkpoints.follow(model, strict=False)
        peft.attach(model)
        sonic.start(model)
    except (ValueError, Unsupported):
        unpatch(model)
        raise
    if tune is not None:
        first_use.start(model)
    return Report(
        model,
        backend=backend,
        router=router,
        recompute=recompute,
        routing_cache=routing_cache,
        aux_loss=aux_loss,
    )


def _check_options(
    model: nn.Module,
    backend: str,
    router: str,
    recompute: str,
    expert_dropout: float,
    tune: str | None,
) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    for what, got, choices in (
        ("backend", backend, BackendName),
        ("router", router, RouterChoice),
        ("recompute", recompute, Recompute),
    ):
        check_choice(what, got, choices)
    if not 0.0 <= expert_dropout < 1.0:
        raise ValueError(f"expert_dropout is {expert_dropout!r}; expected 0 <= p < 1")
    check_backend(backend)
    if tune not in (None, "first-use"):
        raise ValueError(f"tune is {tune!r}; expected None or 'first-use'")


def _check_places(layers: Iterable[tuple[str, nn.Module, Layout | Stock]], backend: str) -> None:
    """Raise `Unsupported` for the first layer that the named back end can never run."""
    for name, module, layout in layers:
        if isinstance(layout, Stock):
            continue
        stack = stack_at(stack_holder(module, layout), layout.gate_up)
        dtype = str(stack.dtype).removeprefix("torch.")
        what = f"{name} ({type(module).__name__}), {dtype} on {stack.device}"
        check_possible(backend, what, places_of(stack.device), dtypes_of(stack))


def patch_module(module: Any, state: LayerState) -> None:
    """Give one experts module the state, and make transformers call turnout for it."""
    call = state.layout.call
    if call == "interface":
        state.original_config = module.config
        module.config = copy.copy(module.config)
        module.config._experts_implementation = NAME
    elif call == "llama4_block":
        bind(module, FORWARDS[call])
        module = stack_holder(module, state.layout)
        bind(module, experts_forward)
    else:
        bind(module, FORWARDS[call])
    vars(module)[ATTRIBUTE] = state


@dataclass
class _Root:
    """What `patch` leaves on the model it was called on.

    Attributes:
        layers: the patched modules.
        seen: names of the PEFT configs at the last attach.
        handles: of the forward pre-hooks.
    """

    layers: list[nn.Module]
    seen: tuple[str, ...] = ()
    handles: list[RemovableHandle] = field(default_factory=list)

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


def _install_root(model: nn.Module) -> _Root:
    """Hooks for adapters that PEFT adds later: one on the root, one on each experts' parent.

    The root's looks at configs. The parents' attach: PEFT replaces the child of that parent, and a
    decoder may be called without its root (as losses fused with the head do).
    """
    layers = [module for module in model.modules() if state_of(module) is not None]
    root = _Root(layers)
    root.handles.append(model.register_forward_pre_hook(partial(_look_at_configs, root)))
    for module in model.modules():
        for child, inner in module.named_children():
            if state_of(live(inner)) is not None and child != "base_layer":
                hook = partial(_attach_child, child)
                root.handles.append(module.register_forward_pre_hook(hook))
    vars(model)[_ROOT] = root
    return root


def _look_at_configs(root: _Root, model: nn.Module, args: Any) -> None:
    """Root forward pre-hook: new PEFT configs are attached and checked; else two look-ups."""
    names = tuple(vars(model).get("peft_config", ()))
    if names == root.seen:
        return
    if any(state_of(module) is not None for module in root.layers):
        peft.attach(model)
    root.seen = names


def _attach_child(child: str, parent: nn.Module, args: Any) -> None:
    """Forward pre-hook of the experts' parent: one look-up unless PEFT has wrapped the child."""
    wrapper: Any = parent._modules[child]
    if "lora_A" in wrapper._modules and "_activate_lora" not in vars(wrapper):
        peft.attach_chain(wrapper)


def unpatch(model: nn.Module) -> None:
    """Undo `patch` exactly; a model that was not patched stays as it is."""
    peft.detach(model)
    checkpoints.detach(model)
    for module in model.modules():
        first_use.stop(module)
        restore(module)
        restore_loss(module)
        state = state_of(module)
        if state is not None:
            sonic.stop(state)
            if state.original_config is not None:
                module.config = state.original_config
            del vars(module)[ATTRIBUTE]
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in FORWARDS.values():
            del module.forward
        root = vars(module).pop(_ROOT, None)
        if root is not None:
            root.remove()


def lora_targets(model: nn.Module) -> list[str]:
    """PEFT `target_parameters` that put an adapter on both projections of every routed expert.

    Raises:
        ValueError: no MoE layer.
        Unsupported: a layer whose experts PEFT can not adapt as stacks.
    """
    targets: list[str] = []
    stock: list[Stock] = []
    for name, _, layout in expert_modules(model):
        if isinstance(layout, Stock):
            stock.append(layout)
            continue
        place = _place(name)
        if layout.call == "llama4_block":
            place = f"{place}.experts"
        for path in (layout.gate_up, layout.down):
            target = f"{place}.{path}" if place else path
            if target not in targets:
                targets.append(target)
    if targets:
        return targets
    if stock:
        raise Unsupported(
            f"the experts of {type(model).__name__} have no stacks to adapt: {stock[0].detail}"
        )
    raise ValueError(f"{type(model).__name__} has no MoE layer that turnout knows")


def _place(name: str) -> str:
    """What follows the layer number: `model.layers.3.mlp.experts` to `mlp.experts`."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else ".".join(parts)
