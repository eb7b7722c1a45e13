"""`expert_mlp`: one autograd Function over the two passes of `passes.py`.

The Function's forward and backward are one op each under `torch.compile`, and plain calls
otherwise; where no gradient is asked for, the forward pass is called without it.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up (F without gate), R LoRA rank.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.compile_ahead import compile_ahead
from turnout.experts import passes, sonic
from turnout.experts.call import called, check_call, check_indices, decode
from turnout.experts.dropout import draw_seed
from turnout.experts.early import CPU, check_possible, places_of
from turnout.experts.gemm import adapter_intermediate
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights
from turnout.kernel_facts import INSTALLED
from turnout.library import kernel_op, reads_values, transformed
from turnout.ragged import Ragged, counts_of, memory_size, num_tiles, tile_rows_of
from turnout.replay import replayed
from turnout.specs import BackendName, ExpertSpec, Recompute
from turnout.tuning import first_use

_TENSORS = (
    "Tensor x, Tensor experts, Tensor weights_tk, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, "
    "Tensor? a_up, Tensor? b_up, Tensor? a_down, Tensor? b_down, Tensor? seed, "
)
_OPTIONS = "str call, float scale_up, float scale_down, float dropout"
_DIFFERENTIABLE = tuple(f.name for f in fields(passes.Needs))
RELEASED_BYTES = 64 * 2**20  # of z; smaller ones gain more from replay than from being released
_NO_LORA = LoraWeights()


def _job(tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> passes.Job:
    gate_up, down, up_bias, down_bias, a_up, b_up, a_down, b_down, seed = tensors
    call, scale_up, scale_down, dropout = options
    spec, recompute, backend, dtype = decode(call)
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


def _forward_fake(*args: Any) -> list[Tensor]:
    x, experts, _, gate_up = args[:4]
    spec, recompute, backend, dtype = decode(args[13])
    out = x.new_empty(x.shape)
    if not args[17]:
        return [out]
    rows, num_experts = experts.numel(), gate_up.shape[0]
    tiles = 0
    if experts.is_cuda and rows:
        tiles = num_tiles(rows, num_experts, tile_rows_of(rows, num_experts))
    size = memory_size(rows, num_experts, tiles)
    made = [out, experts.new_empty(size, dtype=torch.int32)]
    if recompute != "gate_up":
        width = gate_up.shape[2] if spec.transposed else gate_up.shape[1]
        made.append(x.new_empty(rows, width, dtype=dtype))
    for a in (args[7], args[9]):
        if a is not None:
            width, kept = adapter_intermediate(a.shape[1], a.dtype, dtype, x.device, backend)
            made.append(x.new_empty(rows, width, dtype=kept))
    return made


@kernel_op(
    "expert_mlp_forward",
    f"({_TENSORS}Tensor? counted, {_OPTIONS}, bool keep) -> Tensor[]",
    _forward_fake,
)
def _forward(*args: Any) -> list[Tensor]:
    """The output and, with `keep`, what `_saved` names. A `Call` may follow the op's arguments."""
    args, call = args[:18], args[18:]

    def function() -> list[Tensor]:
        if args[0].is_cuda and INSTALLED:
            _compile_ahead(args)
        return _run_forward(*args)

    if not (args[0].is_cuda and INSTALLED):
        return function()
    if call:
        counted = None if args[12] is None else args[12].dtype
        key = ("forward", *call, *args[14:], counted)
        return list(replayed(key, args[:13], function, known=True))
    return list(replayed(("forward", *args[13:]), args[:13], function))


def _run_forward(*args: Any) -> list[Tensor]:
    x, experts, weights_TK = args[:3]
    job, keep = _job(args[3:12], args[13:17]), args[17]
    with _without_autocast(x.device.type):
        out, saved = passes.forward(job, x, experts, weights_TK, args[12], keep=keep)
    if not keep:
        return [out]
    kept = (saved.ragged.memory, saved.z_SG, saved.xa_up_SR, saved.xa_down_SR)
    return [out, *[t for t in kept if t is not None]]


def _saved(args: tuple[Any, ...], made: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Routing, z, x A_up^T and h A_down^T of a forward pass that kept them."""
    has_up, has_down = args[7] is not None, args[9] is not None
    has_z = len(made) > 1 + has_up + has_down
    return (
        made[0],
        made[1] if has_z else None,
        made[1 + has_z] if has_up else None,
        made[-1] if has_down else None,
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
            out, *made = _run_forward(*args)
            if args[17]:
                _run_backward(out, *_saved(args, made), *args[:12], *args[13:17], flags)

    compile_ahead(key, x.device, dry)


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _backward_fake(dout: Tensor, *args: Any) -> list[Tensor]:
    needs, inputs = args[-1], args[4:]
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
    "(Tensor dout, Tensor routing, Tensor? z, Tensor? xa_up, Tensor? xa_down, "
    f"{_TENSORS}{_OPTIONS}, bool[] needs) -> Tensor[]",
    _backward_fake,
)
def _backward(*args: Any) -> list[Tensor]:
    def function() -> list[Tensor]:
        return _run_backward(*args)

    if args[0].is_cuda and INSTALLED:
        key = ("backward", *args[17:21], tuple(args[21]))
        return list(replayed(key, args[:17], function))
    return function()


def _run_backward(dout: Tensor, *args: Any, release: bool = False) -> list[Tensor]:
    routing, z, xa_up, xa_down, *inputs, flags = args
    x, experts, weights_TK = inputs[:3]
    job = _job(tuple(inputs[3:12]), tuple(inputs[12:16]))
    (tokens, top_k), num_experts = experts.shape, inputs[3].shape[0]
    tile_rows = tile_rows_of(tokens * top_k, num_experts)
    ragged = Ragged.over(routing, tokens, top_k, num_experts, tile_rows)
    saved = passes.Saved(ragged, z, xa_up, xa_down)
    needs = passes.Needs(*flags)
    with _without_autocast(x.device.type):
        grads = passes.backward(job, saved, needs, x, experts, weights_TK, dout, release)
    named = zip(_DIFFERENTIABLE, _differentiable(tuple(inputs)), flags, strict=True)
    return [passes.as_dtype(grads[n], t.dtype) for n, t, need in named if need and t is not None]


def _may_release(z: Tensor | None) -> bool:
    """z is large, memory of its own, and this backward pass is the last to read it."""
    if z is None or torch.compiler.is_compiling() or z.numel() * z.element_size() < RELEASED_BYTES:
        return False
    own = z.untyped_storage().nbytes() == z.numel() * z.element_size()
    return own and not torch._C._autograd._get_current_graph_task_keep_graph()


class _ExpertMlp(torch.autograd.Function):
    """The arguments of `_forward`, and once more those tensors among them that autograd has to see:
    it spends a microsecond on each."""

    @staticmethod
    def forward(ctx: Any, args: tuple[Any, ...], places: tuple[int, ...], *seen: Tensor) -> Tensor:
        out, *made = _forward(*args)
        if made:
            ctx.save_for_backward(*_saved(args, made), *args[:12])
            ctx.options, ctx.places = args[13:17], places
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        flags = [False] * 13  # of `_forward`'s tensors
        for place, need in zip(ctx.places, ctx.needs_input_grad[2:], strict=True):
            flags[place] = need
        tensors = ctx.saved_tensors
        # a weight stack's gradient is what makes memory tight; autograd itself lets go too late
        release = (flags[3] or flags[4]) and _may_release(tensors[1])
        run = partial(_run_backward, release=True) if release else _backward
        needs = [flags[0], *flags[2:11]]
        found = iter(run(dout.contiguous(), *tensors, *ctx.options, needs))
        return (None, None, *(next(found) if flags[place] else None for place in ctx.places))


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
    lora = lora or _NO_LORA
    up, down = lora.gate_up, lora.down
    tensors: tuple[Tensor | None, ...] = (
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
    )
    options = spec, recompute, backend, expert_dropout
    check = partial(check_call, x_TH, experts_TK, weights_TK, weights, lora, options)
    call = called(tensors, options, check)
    if reads_values(experts_TK):
        check_indices(experts_TK, call.experts)
    if backend in sonic.NAMES:
        return sonic.expert_mlp(
            x_TH,
            experts_TK,
            weights_TK,
            weights,
            spec,
            lora=lora,
            backend=backend,
            dtype=call.dtype,
            recompute=recompute != "none",
            dropout=expert_dropout > 0,
        )
    seed = draw_seed(x_TH.device) if expert_dropout > 0 and (up or down) else None
    keep = torch.is_grad_enabled() and True in [t.requires_grad for t in tensors if t is not None]
    inputs = (*tensors, seed, counts_of(experts_TK, call.experts))
    others: tuple[Any, ...] = (
        call.encoded,
        1.0 if up is None else float(up.scaling),
        1.0 if down is None else float(down.scaling),
        float(expert_dropout),
        keep,
    )
    if not torch.compiler.is_compiling():
        others = (*others, call)
    hidden = transformed()  # a tangent, or a batch, is no `requires_grad`
    if not (keep or hidden):
        return _forward(*inputs, *others)[0]
    seen = [(n, t) for n, t in enumerate(inputs) if t is not None and (hidden or t.requires_grad)]
    places, wanting = zip(*seen, strict=True)
    out: Tensor = _ExpertMlp.apply((*inputs, *others), places, *wanting)
    return out


def check_backend(backend: str) -> None:
    """Raise `Unsupported` unless this version has the back end and this machine may run it.

    Of SonicMoE only the package is looked for: what it takes is known with the weights.
    """
    if backend in sonic.NAMES:
        sonic.require(backend)
    elif backend != "auto":
        check_possible(backend, "on this machine", places_of(CPU))
