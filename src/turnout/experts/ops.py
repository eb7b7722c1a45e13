"""`expert_mlp`: validate once, then one autograd Function over the two passes of `passes.py`.

The Function's forward and backward are one op each under `torch.compile`, and plain calls
otherwise.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up (F without gate), R LoRA rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import lru_cache, partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.compile_ahead import compile_ahead
from turnout.experts import passes, sonic
from turnout.experts.dropout import draw_seed
from turnout.experts.early import CPU, check_possible, places_of
from turnout.experts.gemm import adapter_intermediate
from turnout.experts.weights import (
    Dims,
    ExpertWeights,
    Lora,
    LoraWeights,
    check_lora,
    check_weights,
)
from turnout.kernel_facts import INSTALLED
from turnout.library import kernel_op, reads_values
from turnout.ragged import Ragged, counts_of, num_tiles, tile_rows_of
from turnout.replay import replayed
from turnout.specs import (
    Activation,
    BackendName,
    ExpertSpec,
    Recompute,
    Unsupported,
    check_choice,
)
from turnout.tuning import first_use

_TENSORS = (
    "Tensor x, Tensor experts, Tensor weights_tk, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? a_up, Tensor? b_up, Tensor? a_down, Tensor? b_down, Tensor? seed, "
)
_OPTIONS = "str call, float scale_up, float scale_down, float dropout"
_DIFFERENTIABLE = tuple(f.name for f in fields(passes.Needs))
RELEASED_BYTES = 64 * 2**20  # of z; smaller ones gain more from replay than from being released


def _encode(spec: ExpertSpec, recompute: Recompute, backend: str, dtype: torch.dtype) -> str:
    """What an op can not take as an argument, as a string of plain constants."""
    a = spec.activation
    return (
        f"{a.act},{a.gated},{a.interleaved},{a.limit},{a.limit_after},{a.alpha},{a.up_offset},"
        f"{spec.transposed},{spec.weight_on_input},{recompute},{backend},{dtype}"
    )


@lru_cache(maxsize=256)
def _decode(call: str) -> tuple[ExpertSpec, str, str, torch.dtype]:
    act, *rest, recompute, backend, dtype = call.split(",")
    gated, interleaved, limit, limit_after, alpha, up_offset, transposed, on_input = rest
    activation = Activation(
        act=act,  # type: ignore[arg-type]
        gated=gated == "True",
        interleaved=interleaved == "True",
        limit=None if limit == "None" else float(limit),
        limit_after=limit_after == "True",
        alpha=float(alpha),
        up_offset=float(up_offset),
    )
    spec = ExpertSpec(
        activation=activation, transposed=transposed == "True", weight_on_input=on_input == "True"
    )
    return spec, recompute, backend, getattr(torch, dtype.removeprefix("torch."))


def _job(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> passes.Job:
    gate_up, down, up_bias, down_bias, a_up, b_up, a_down, b_down, seed = tensors
    call, scale_up, scale_down, dropout = options
    spec, recompute, backend, dtype = _decode(call)
    assert gate_up is not None
    assert down is not None
    up = None if a_up is None or b_up is None else Lora(a_up, b_up, scale_up)
    dn = None if a_down is None or b_down is None else Lora(a_down, b_down, scale_down)
    return passes.Job(
        weights=ExpertWeights(gate_up, down, up_bias, down_bias),
        spec=spec,
        lora=LoraWeights(up, dn),
        dtype=dtype,
        backend=backend,
        recompute=recompute == "gate_up",
        dropout=dropout,
        seed=seed,
    )


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Ops return tensors, not None."""
    return like.new_empty(0) if tensor is None else tensor


def _or_none(tensor: Tensor, present: bool) -> Tensor | None:
    return tensor if present else None


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, experts, _, gate_up = args[:4]
    spec, recompute, backend, dtype = _decode(args[13])
    keep = args[17]
    rows, num_experts = experts.numel(), gate_up.shape[0]
    tiles = 0
    if experts.is_cuda:
        tiles = num_tiles(rows, num_experts, tile_rows_of(rows, num_experts))
    width = gate_up.shape[2] if spec.transposed else gate_up.shape[1]

    def narrow(a: Tensor | None) -> Tensor:
        if a is None:
            return x.new_empty(0)
        width, kept = adapter_intermediate(a.shape[1], a.dtype, dtype, x.device, backend)
        return x.new_empty(rows, width, dtype=kept)

    has_z = keep and recompute != "gate_up"
    return (
        x.new_empty(x.shape),
        experts.new_empty(rows, dtype=torch.int64),
        experts.new_empty(experts.shape, dtype=torch.int64),
        experts.new_empty(num_experts + 1, dtype=torch.int32),
        experts.new_empty(2 if tiles else 0, tiles, dtype=torch.int32),
        x.new_empty(rows, width, dtype=dtype) if has_z else x.new_empty(0),
        narrow(args[7]),
        narrow(args[9]),
    )


@kernel_op(
    "expert_mlp_forward",
    f"({_TENSORS}Tensor? counted, {_OPTIONS}, bool keep) -> ({', '.join(['Tensor'] * 8)})",
    _forward_fake,
)
def _forward(*args: Any) -> tuple[Tensor, ...]:
    def function() -> tuple[Tensor, ...]:
        if args[0].is_cuda and INSTALLED:
            _compile_ahead(args)
        return _run_forward(*args)

    if args[0].is_cuda and INSTALLED:
        return tuple(replayed(("forward", *args[13:]), args[:13], function))
    return function()


def _run_forward(*args: Any) -> tuple[Tensor, ...]:
    x, experts, weights_TK = args[:3]
    job = _job(args[3:12], args[13:17])
    with _without_autocast(x.device.type):
        out, saved = passes.forward(job, x, experts, weights_TK, args[12], keep=args[17])
    ragged = saved.ragged
    return (
        out,
        ragged.slot_S,
        ragged.row_TK,
        ragged.offsets,
        x.new_empty(0, 0, dtype=torch.int32) if ragged.tiles is None else ragged.tiles,
        _or_empty(saved.z_SG, x),
        _or_empty(saved.xa_up_SR, x),
        _or_empty(saved.xa_down_SR, x),
    )


def _compile_ahead(args: tuple[Any, ...]) -> None:
    """Compile the kernels of the forward pass and of the backward pass that will follow."""
    x, experts = args[:2]
    flags = [t is not None and t.requires_grad for t in _differentiable(args)]
    rows, num_experts = experts.numel(), args[3].shape[0]
    tensors = [t if t is None else (t.dtype, t.shape[1:], t.stride()) for t in args[:13]]
    key = (
        x.device,
        *tensors,
        *args[13:],
        *flags,
        tile_rows_of(rows, num_experts),
        rows % 16,
    )

    def dry() -> None:
        with first_use.paused():  # nothing runs, so nothing can be timed
            out, *saved = _run_forward(*args)
            if args[17]:
                _run_backward(out, *saved, *args[:12], *args[13:17], flags)

    compile_ahead(key, x.device, dry)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _backward_fake(dout: Tensor, slot: Tensor, row: Tensor, *args: Any) -> list[Tensor]:
    needs, inputs = args[-1], args[5:]
    named = zip(_DIFFERENTIABLE, _differentiable(inputs), needs, strict=True)
    return [
        tensor.new_empty(tensor.shape) if name in ("x", "weights_TK") else torch.empty_like(tensor)
        for name, tensor, need in named
        if need and tensor is not None
    ]


def _differentiable(inputs: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """The inputs in the order of `passes.Needs`: all but the expert indices."""
    x, _, weights_TK, *rest = inputs[:11]
    return (x, weights_TK, *rest)


@kernel_op(
    "expert_mlp_backward",
    "(Tensor dout, Tensor slot, Tensor row, Tensor offsets, Tensor tiles, Tensor z, "
    f"Tensor xa_up, Tensor xa_down, {_TENSORS}{_OPTIONS}, bool[] needs) -> Tensor[]",
    _backward_fake,
)
def _backward(*args: Any) -> list[Tensor]:
    def function() -> list[Tensor]:
        return _run_backward(*args)

    if args[0].is_cuda and INSTALLED:
        key = ("backward", *args[20:24], tuple(args[24]))
        return list(replayed(key, args[:20], function))
    return function()


def _run_backward(
    dout: Tensor, slot: Tensor, row: Tensor, *args: Any, release: bool = False
) -> list[Tensor]:
    offsets, tiles, z, xa_up, xa_down, *inputs, flags = args
    x, experts, weights_TK = inputs[:3]
    job = _job(tuple(inputs[3:12]), tuple(inputs[12:16]))
    saved = passes.Saved(
        Ragged(
            slot_S=slot,
            row_TK=row,
            offsets=offsets,
            tiles=_or_none(tiles, tiles.numel() > 0),
            tile_rows=tile_rows_of(slot.numel(), offsets.numel() - 1),
        ),
        _or_none(z, not job.recompute),
        _or_none(xa_up, job.lora.gate_up is not None),
        _or_none(xa_down, job.lora.down is not None),
    )
    needs = passes.Needs(*flags)
    with _without_autocast(x.device.type):
        grads = passes.backward(job, saved, needs, x, experts, weights_TK, dout, release)
    named = zip(_DIFFERENTIABLE, _differentiable(tuple(inputs)), flags, strict=True)
    return [passes.as_dtype(grads[n], t.dtype) for n, t, need in named if need and t is not None]


def _may_release(z: Tensor) -> bool:
    """z is large, memory of its own, and this backward pass is the last to read it."""
    if torch.compiler.is_compiling() or z.numel() * z.element_size() < RELEASED_BYTES:
        return False
    own = z.untyped_storage().nbytes() == z.numel() * z.element_size()
    return own and not torch._C._autograd._get_current_graph_task_keep_graph()


class _ExpertMlp(torch.autograd.Function):
    """Tensors, counts, options; see `_TENSORS` and `_OPTIONS` for the order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out, *saved = _forward(*args)
        ctx.save_for_backward(*saved, *args[:12])
        ctx.options = args[13:17]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        flags = [needed[0], *needed[2:11]]
        tensors = ctx.saved_tensors
        # a weight stack's gradient is what makes memory tight; autograd itself lets go too late
        release = (needed[3] or needed[4]) and _may_release(tensors[4])
        run = partial(_run_backward, release=True) if release else _backward
        found = iter(run(dout.contiguous(), *tensors, *ctx.options, flags))
        grads: list[Tensor | None] = [next(found) if need else None for need in flags]
        return (grads[0], None, *grads[1:], *(None,) * 7)


def expert_mlp(
    x_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    weights: ExpertWeights,
    spec: ExpertSpec,
    *,
    lora: LoraWeights | None = None,
    recompute: Recompute = "none",
    backend: BackendName = "auto",
    expert_dropout: float = 0.0,
) -> Tensor:
    """y[t] = sum over k of weights[t, k] * mlp(x[t], experts[t, k]).

    mlp(x, e) = down_e(act(gate_up_e(x))), each projection with its bias and adapter:
    up_e(x) = x W_e^T + b_e + scaling * (dropout(x) A_e^T) B_e^T. The definition is
    `turnout.reference.expert_mlp`. Neither the gathered input nor the per-expert output is kept for
    the backward pass (the arrangement of SonicMoE, arXiv:2512.14080), and no merged weight exists.

    Args:
        x_TH: (T, H) float. Computed in the autocast dtype if autocast is on, else in the weights'.
        experts_TK: (T, K) int32 or int64 in 0..E; E (the expert-parallel sentinel) is dropped.
        weights_TK: (T, K) float, any float dtype.
        weights: the expert stacks, in the layout that `spec` says.
        spec: layout and activation.
        lora: adapters of the two projections, in their own dtype and PEFT's storage.
        recompute: `gate_up` keeps no (S, G) pre-activation and computes it again in backward.
        backend: `auto`, or the name of one back end. `sonic` and `sonic-merged` are SonicMoE, which
            runs the whole op (`turnout.experts.sonic`).
        expert_dropout: probability, on the adapters' inputs; applied whenever it is above 0.

    Returns:
        (T, H) in x's dtype.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit; or an index (checked on the
            CPU, and on a GPU with PyTorch's anomaly detection on).
        Unsupported: no back end of this version runs it.
    """
    lora = lora or LoraWeights()
    dims = check_weights(weights, spec)
    check_lora(lora, dims, weights)
    _check_inputs(x_TH, experts_TK, weights_TK, weights, dims)
    if recompute not in get_args(Recompute):
        check_choice("recompute", recompute, Recompute)
    if backend not in get_args(BackendName):
        check_choice("backend", backend, BackendName)
    if not 0.0 <= expert_dropout < 1.0:
        raise ValueError(f"expert_dropout is {expert_dropout!r}; expected 0 <= p < 1")
    if x_TH.is_meta:
        raise Unsupported("x_TH is on the meta device, which computes nothing; use a real device")
    device_type = x_TH.device.type
    dtype = weights.gate_up.dtype
    if dtype.itemsize < 2:
        raise Unsupported(
            f"the expert weights are {dtype}; quantised experts are not supported. Load them in "
            "bfloat16 or float16"
        )
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    if backend in sonic.NAMES:
        return sonic.expert_mlp(
            x_TH,
            experts_TK,
            weights_TK,
            weights,
            spec,
            lora=lora,
            backend=backend,
            dtype=dtype,
            recompute=recompute != "none",
            dropout=expert_dropout > 0,
        )
    up, down = lora.gate_up, lora.down
    seed = draw_seed(x_TH.device) if expert_dropout > 0 and (up or down) else None
    tensors = (
        x_TH,
        experts_TK,
        weights_TK,
        weights.gate_up,
        weights.down,
        weights.gate_up_bias,
        weights.down_bias,
        None if up is None else up.a_ERI,
        None if up is None else up.b_ORE,
        None if down is None else down.a_ERI,
        None if down is None else down.b_ORE,
        seed,
    )
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    out: Tensor = _ExpertMlp.apply(
        *tensors,
        counts_of(experts_TK, dims.experts),
        _encode(spec, recompute, backend, dtype),
        1.0 if up is None else float(up.scaling),
        1.0 if down is None else float(down.scaling),
        float(expert_dropout),
        keep,
    )
    return out


def check_backend(backend: str) -> None:
    """Raise `Unsupported` unless this version has the back end and this machine may run it.

    Of SonicMoE only the package is looked for: what it takes is known with the weights.
    """
    if backend in sonic.NAMES:
        sonic.require(backend)
    elif backend != "auto":
        check_possible(backend, "on this machine", places_of(CPU))


def _check_inputs(
    x: Tensor, experts: Tensor, weights_TK: Tensor, weights: ExpertWeights, dims: Dims
) -> None:
    if x.dim() != 2 or x.shape[1] != dims.hidden or not x.is_floating_point():
        raise ValueError(
            f"x_TH has shape {tuple(x.shape)} and dtype {x.dtype}; expected a float tensor (T, "
            f"{dims.hidden}), H from gate_up {tuple(weights.gate_up.shape)}. Is the weight layout "
            "transposed? See ExpertSpec.transposed"
        )
    if experts.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"experts_TK has dtype {experts.dtype}; expected int32 or int64")
    if experts.dim() != 2 or experts.shape[0] != x.shape[0] or experts.shape[1] < 1:
        raise ValueError(
            f"experts_TK has shape {tuple(experts.shape)}; expected (T, K) with T = {x.shape[0]} "
            "and K of at least 1"
        )
    if weights_TK.shape != experts.shape or not weights_TK.is_floating_point():
        raise ValueError(
            f"weights_TK has shape {tuple(weights_TK.shape)} and dtype {weights_TK.dtype}; "
            f"expected a float tensor of the shape of experts_TK, {tuple(experts.shape)}"
        )
    for name, tensor in (
        ("experts_TK", experts),
        ("weights_TK", weights_TK),
        ("gate_up", weights.gate_up),
    ):
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device} as x_TH")
    if reads_values(experts):
        check_indices(experts, dims.experts)


def check_indices(experts_TK: Tensor, num_experts: int) -> None:
    """Raise `ValueError` unless every index is in 0..E. Waits for the device on a GPU."""
    if not experts_TK.numel():
        return
    low, high = int(experts_TK.min()), int(experts_TK.max())
    if low < 0 or high > num_experts:
        raise ValueError(
            f"experts_TK holds {low}..{high}; expected 0..{num_experts - 1}, or {num_experts} for "
            "a dropped slot (the expert-parallel sentinel)"
        )
