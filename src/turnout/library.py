"""What PyTorch's modes ask of us: `torch.compile`, anomaly detection, `torch.func`.

`kernel_op` is a `torch.library` op for the compiler, a plain call for everyone else. Under
`torch.compile` a decorated function is one opaque op with a fake, so a graph is whole whatever
happens inside. In eager mode the function is called directly: an op boundary costs microseconds
that buy nothing there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from turnout.specs import Unsupported

P = ParamSpec("P")
R = TypeVar("R")


def reads_values(tensor: Tensor) -> bool:
    """The values of a tensor may be checked: on the CPU, where that waits for nothing, and on a GPU
    in `torch.autograd.detect_anomaly()` or after `torch.autograd.set_detect_anomaly(True)`."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or torch.is_anomaly_enabled()


def transformed() -> bool:
    """`torch.func` or forward-mode differentiation follows what runs: autograd functions refuse
    both, plain calls do not know of them."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """`make_fx` or `torch.jit.trace` writes down the operations that run; a plain call that
    launches a kernel is none."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # no stub says so
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def kernel_op(
    name: str, schema: str, fake: Callable[..., Any]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as `torch.ops.turnout.<name>`.

    Args:
        name: op name without namespace.
        schema: arguments and returns in torch's schema language. A plain call may give more
            arguments, which the op does without.
        fake: shapes and dtypes of the result from fake tensors; same signature.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        op = torch.library.custom_op(f"turnout::{name}", function, mutates_args=(), schema=schema)
        op.register_fake(fake)
        count = len(op._opoverload._schema.arguments)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                if forward_ad._current_level >= 0:  # an op loses tangents in silence
                    raise Unsupported(
                        f"forward-mode differentiation reached turnout::{name} under "
                        "torch.compile; expected reverse mode, as it has no forward derivative. "
                        "Use torch.autograd.grad, or turnout.reference, which is plain PyTorch"
                    )
                # the caller, where the compiler has left it to eager mode, may have given more
                return cast(R, op(*args[:count], **kwargs))
            return function(*args, **kwargs)

        call.__doc__ = function.__doc__
        return call

    return decorate
