"""turnout as a kernel layer of the `kernels` package, for `use_kernels=True` on gpt-oss.

    from turnout.integrations.kernels import TurnoutKernelConfig
    model = AutoModelForCausalLM.from_pretrained(path, kernel_config=TurnoutKernelConfig())

gpt-oss is the one model of transformers whose MoE block names a kernel layer. With `use_kernels`
transformers gives that block the forward of a layer from the Hub, and then its experts module is
never called. Here the layer is turnout's: the block's own forward, its experts in turnout. So hooks
on router, experts and block fire, and adapters of PEFT run as with `turnout.patch`. Nothing is
downloaded for it and it needs no build folder: `kernels` asks a repository for `load()`, no more.

The layers of the Hub that transformers names for other modules (norms, rotary embeddings) stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.kernel_config import KernelConfig, infer_device

from turnout.integrations import peft
from turnout.integrations.architectures import Layout, Stock, layout_of, live
from turnout.integrations.patching import patch_module
from turnout.integrations.state import LayerState, state_of
from turnout.specs import Unsupported

LAYER = "MegaBlocksMoeMLP"  # what transformers' GptOssMLP names
DEVICES = ("cpu", "cuda")


class TurnoutMoeMLP(nn.Module):
    """The layer. `kernels` binds its forward to the block, so `self` is a `GptOssMLP`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """The block's own forward, its experts in turnout.

        Args:
            hidden_states: (batch, sequence, hidden).

        Returns:
            What the block returns: the output in the same shape, and the router's weights.

        Raises:
            Unsupported: the experts have no layout that turnout runs, such as MXFP4 blocks; or the
                first forward is a compiled one.
        """
        _adopt(self)
        out: tuple[Tensor, Tensor] = type(self).forward(self, hidden_states)
        return out


@dataclass(frozen=True)
class Repository:
    """What `kernels` calls a repository; equal ones are one entry of its cache."""

    layer_name: str = TurnoutMoeMLP.__name__

    def load(self) -> type[nn.Module]:
        """The layer class, from this process."""
        return TurnoutMoeMLP

    def __str__(self) -> str:
        return f"turnout (layer `{self.layer_name}`)"


def mapping() -> dict[str, dict[str, Repository]]:
    """layer name -> device -> repository, for every mode: training, inference, with compile or not.

    For `kernels.use_kernel_mapping` and `kernels.register_kernel_mapping`. `model.set_use_kernels`
    registers the mapping of transformers again and so replaces this one: give it a
    `TurnoutKernelConfig`.
    """
    return {LAYER: {device: Repository() for device in DEVICES}}


class TurnoutKernelConfig(KernelConfig):
    """`transformers.KernelConfig` with turnout as the layer of the MoE block.

    For `from_pretrained(path, kernel_config=...)` and `model.set_use_kernels(True, ...)`. It may be
    given to several models.

    Args:
        kernel_mapping: further layers, as `KernelConfig` takes them.
        options: the other arguments of `KernelConfig`.

    Raises:
        ValueError: `kernel_mapping` names the layer of the MoE block.
    """

    def __init__(self, kernel_mapping: dict[Any, Any] | None = None, **options: Any) -> None:
        if LAYER in (kernel_mapping or {}):
            raise ValueError(
                f"kernel_mapping names {LAYER}; expected other layers only, because turnout takes "
                "that one. Use transformers.KernelConfig for a layer of the Hub"
            )
        super().__init__(kernel_mapping, **options)

    def sanitize_kernel_mapping(self, model: nn.Module) -> None:
        """`KernelConfig`'s check, and that turnout can run every block that names the layer.

        Raises:
            ValueError: no block names it.
            Unsupported: the device has no turnout layer, or a block's experts have no known layout.
        """
        super().sanitize_kernel_mapping(model)
        blocks = list(_blocks(model))
        if not blocks:
            raise ValueError(
                f"no block of {type(model).__name__} names the kernel layer {LAYER}; expected "
                "gpt-oss, with USE_HUB_KERNELS on. Use turnout.patch(model)"
            )
        device = infer_device(model)
        if device not in DEVICES:
            raise Unsupported(
                f"the model is on {device}; turnout's kernel layer is for {' and '.join(DEVICES)}. "
                "Use turnout.patch(model) without use_kernels"
            )
        for block in blocks:
            _layout(block)

    def create_compatible_mapping(self, model: Any, compile: bool = False) -> None:
        """What `kernels` is given goes onto the model alone, so this object can be used again."""
        for block in _blocks(model):
            _adopt(block)
        given = copy.copy(self)
        super(TurnoutKernelConfig, given).create_compatible_mapping(model, compile)
        given.kernel_mapping = {**given.kernel_mapping, **mapping()}
        model.kernel_config = given


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose class names the layer; `kernels` tags the class."""
    for module in model.modules():
        if getattr(type(module), "kernel_layer_name", None) == LAYER:  # set by kernels since 0.16
            yield module


def _layout(block: Any) -> Layout:
    """How turnout runs the experts of a block."""
    experts = live(block.experts) if hasattr(block, "experts") else None
    layout = None if experts is None else layout_of(experts)
    if isinstance(layout, Layout):
        return layout
    reason = f"{layout.reason}, {layout.detail}" if isinstance(layout, Stock) else "not known"
    raise Unsupported(
        f"the experts of {type(block).__name__} can not run in turnout's kernel layer: {reason}. "
        "Load the model in bfloat16, or leave use_kernels and kernel_config out"
    )


def _adopt(block: Any) -> None:
    """What `turnout.patch` does to one layer, where it was not called or PEFT came later."""
    module = live(block.experts) if hasattr(block, "experts") else block
    state = state_of(module)
    if state is None or not state.patched:
        if torch.compiler.is_compiling():
            raise Unsupported(
                f"the experts of {type(block).__name__} are not patched and the forward is being "
                "compiled. Call turnout.patch(model) before the first compiled forward"
            )
        patch_module(module, LayerState(_layout(block), patched=True))
    wrapper = block.experts
    if "lora_A" in wrapper._modules and "_activate_lora" not in vars(wrapper):
        peft.attach_chain(wrapper)
