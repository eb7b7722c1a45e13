"""Who is timed: an adapter of a few lines for turnout, for the definition, and for each peer.

A provider gets a work, whose routing is given, and returns `run(leaves) -> out (T, H)`, a
differentiable function. Adapters arrive in PEFT's storage in float32; what a provider converts, it
converts inside `run`, on the clock. Only a weight layout that a model would be loaded in (SonicMoE:
gate and up rows alternate) is made before. A peer's package is imported when it is asked for.

`lora16` by name: turnout's and axolotl's adapters are fused; split-lora adds them as grouped
products; grouped_mm, sonicmoe and liger run on weights merged in every step, W + s * B A, as PEFT
does. turnout-sonic is SonicMoE through `expert_mlp`: `backend="sonic"`, in `lora16`
`"sonic-merged"`, which merges in the backward pass again and keeps no copy. turnout-portable is
turnout with `backend="triton"`, for the choice of `auto` to be compared with.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up, R LoRA rank, I/O in and out of one projection.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from turnout.bench.truth import bundles
from turnout.bench.work import DTYPE, RANK, SCALING, SPEC, Leaves, Mode, Work
from turnout.device import device_of
from turnout.experts import sonic
from turnout.experts.ops import expert_mlp
from turnout.experts.reference import expert_mlp as definition
from turnout.specs import BackendName, ExpertSpec, Recompute

SONIC_SPEC = ExpertSpec(activation=sonic.ACTIVATION)
Run = Callable[[Leaves], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What only turnout listens to."""

    backend: BackendName = "auto"
    recompute: Recompute = "none"


@dataclass(frozen=True, slots=True)
class Provider:
    """A name, the modes it has, why it is not there, and how it prepares a work.

    Attributes:
        missing: None if it can run on this device, else the reason in words.
        prepare: imports the package and returns `run`.
        interleaved: rows of gate_up, and of its B, alternate between gate and up.
        backend: of turnout, where the name of the provider stands for one.
        waits: the host waits for the device in a step, so no CUDA graph can capture it.
    """

    name: str
    modes: tuple[Mode, ...]
    missing: Callable[[torch.device], str | None]
    prepare: Callable[[Work, Mode, Options], Run]
    interleaved: bool = False
    waits: bool = False
    backend: str = ""

    @property
    def is_ours(self) -> bool:
        return self.name in ("turnout", "turnout-portable")


PROVIDERS: dict[str, Provider] = {}


def _here(device: torch.device) -> str | None:
    return None


def load(module: str, ops: str | None = None) -> Any:
    """The module; what it registers as `scattermoe::` operators goes to the namespace `ops`.

    scattermoe and axolotl's copy of it register the same names, and the last to come would answer
    for both.
    """
    if ops is None or module in sys.modules:
        return import_module(module)
    register = torch.library.custom_op

    def renamed(name: str, *args: Any, **options: Any) -> Any:
        return register(name.replace("scattermoe::", f"{ops}::"), *args, **options)

    with mock.patch.object(torch.library, "custom_op", renamed):
        return import_module(module)


def needs(
    module: str, *, gpu: bool = True, ops: str | None = None
) -> Callable[[torch.device], str | None]:
    """`missing` of a provider that imports `module`."""

    def missing(device: torch.device) -> str | None:
        package = module.split(".")[0]
        if find_spec(package) is None:
            return f"{package} is not installed"
        if gpu and device.type != "cuda":
            return "needs a GPU"
        try:
            load(module, ops)
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            # a package built for other versions of torch or Triton fails in any of these ways
            return f"{module} does not import: {error}"
        return None

    return missing


def provider(
    name: str,
    modes: tuple[Mode, ...],
    missing: Callable[[torch.device], str | None] = _here,
    *,
    interleaved: bool = False,
    waits: bool = False,
    backend: str = "",
) -> Callable[[Callable[[Work, Mode, Options], Run]], Callable[[Work, Mode, Options], Run]]:
    """Registers `prepare` as a provider."""

    def register(prepare: Callable[[Work, Mode, Options], Run]) -> Any:
        PROVIDERS[name] = Provider(name, modes, missing, prepare, interleaved, waits, backend)
        return prepare

    return register


def provider_named(name: str) -> Provider:
    """The provider called `name`.

    Raises:
        ValueError: there is none.
    """
    if name not in PROVIDERS:
        raise ValueError(f"provider is {name!r}; expected one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def _sonic_missing(device: torch.device) -> str | None:
    """Of a layer at the least sizes: what device or package do not allow."""
    layer = sonic.Problem(
        spec=SONIC_SPEC,
        experts=1,
        hidden=sonic.LEAST_HIDDEN,
        intermediate=sonic.MULTIPLE,
        dtype="bfloat16",
        compute="bfloat16",
    )
    return sonic.rejects(layer, device_of(device))


@provider(
    "turnout-sonic",
    ("fwd", "full", "lora16"),
    _sonic_missing,
    interleaved=True,
    backend=sonic.NAME,
)
def _turnout_sonic(work: Work, mode: Mode, options: Options) -> Run:
    backend: BackendName = "sonic-merged" if mode == "lora16" else "sonic"

    def run(leaves: Leaves) -> Tensor:
        weights, lora = bundles(leaves)
        return expert_mlp(
            leaves.x,
            work.experts_TK,
            leaves.weights_TK,
            weights,
            SONIC_SPEC,
            lora=lora,
            backend=backend,
        )

    return run


def _needs_a_gpu(device: torch.device) -> str | None:
    return "needs an NVIDIA GPU" if device_of(device).arch is None else None


@provider("turnout-portable", ("fwd", "full", "lora16"), _needs_a_gpu, backend="triton")
def _turnout_portable(work: Work, mode: Mode, options: Options) -> Run:
    return _turnout(work, mode, replace(options, backend="triton"))


@provider("turnout", ("fwd", "full", "lora16"))
def _turnout(work: Work, mode: Mode, options: Options) -> Run:
    def run(leaves: Leaves) -> Tensor:
        weights, lora = bundles(leaves)
        return expert_mlp(
            leaves.x,
            work.experts_TK,
            leaves.weights_TK,
            weights,
            SPEC,
            lora=lora,
            recompute=options.recompute,
            backend=options.backend,
        )

    return run


@provider("eager", ("fwd", "full", "lora16"), waits=True)
def _eager(work: Work, mode: Mode, options: Options) -> Run:
    """The definition: a loop over the experts, in bf16."""

    def run(leaves: Leaves) -> Tensor:
        weights, lora = bundles(leaves)
        return definition(leaves.x, work.experts_TK, leaves.weights_TK, weights, SPEC, lora=lora)

    return run


def _merged(leaves: Leaves) -> tuple[Tensor, Tensor]:
    """gate_up and down with W + s * B A folded in, the whole stacks, in bf16."""
    if leaves.adapters is None:
        return leaves.gate_up, leaves.down
    a_up, b_up, a_down, b_down = (tensor.to(DTYPE) for tensor in leaves.adapters)
    return (
        torch.baddbmm(leaves.gate_up, b_up.permute(2, 0, 1), a_up, alpha=SCALING),
        torch.baddbmm(leaves.down, b_down.permute(2, 0, 1), a_down, alpha=SCALING),
    )


def _hugging_face(function: str) -> Callable[[Work, Mode, Options], Run]:
    def prepare(work: Work, mode: Mode, options: Options) -> Run:
        from transformers.integrations import moe

        forward = getattr(moe, function)
        module = SimpleNamespace(
            num_experts=work.shape.experts,
            has_gate=True,
            has_bias=False,
            is_transposed=False,
            act_fn=F.silu,
        )
        module._apply_gate = lambda z: moe._default_apply_gate(module, z)

        def run(leaves: Leaves) -> Tensor:
            module.gate_up_proj, module.down_proj = _merged(leaves)
            out: Tensor = forward(module, leaves.x, work.experts_TK, leaves.weights_TK)
            del module.gate_up_proj, module.down_proj
            return out

        return run

    return prepare


_TRANSFORMERS = needs("transformers", gpu=False)
provider("grouped_mm", ("fwd", "full", "lora16"), _TRANSFORMERS)(
    _hugging_face("grouped_mm_experts_forward")
)
# Copies the weights of every row: for a few tokens only, and a row for decoding only.
provider("batched_mm", ("fwd",), _TRANSFORMERS)(_hugging_face("batched_mm_experts_forward"))


@provider("split-lora", ("lora16",))
def _split_lora(work: Work, mode: Mode, options: Options) -> Run:
    """Grouped products for the base and for each factor, added: the way of unsloth."""
    shape = work.shape

    def project(x: Tensor, w: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        a_EIR = a.to(DTYPE).transpose(1, 2).contiguous()
        b_ERO = b.permute(2, 1, 0).to(DTYPE).contiguous()
        base = torch._grouped_mm(x, w.transpose(1, 2), offs=offsets)
        xa = torch._grouped_mm(x, a_EIR, offs=offsets)
        return base + SCALING * torch._grouped_mm(xa, b_ERO, offs=offsets)

    def run(leaves: Leaves) -> Tensor:
        assert leaves.adapters is not None
        a_up, b_up, a_down, b_down = leaves.adapters
        expert_S, order = torch.sort(work.experts_TK.flatten())
        offsets = _counts(expert_S, shape.experts).cumsum(0, dtype=torch.int32)
        x_SH = leaves.x[order // shape.top_k]
        gate, up = project(x_SH, leaves.gate_up, a_up, b_up, offsets).chunk(2, -1)
        y_SH = project(F.silu(gate) * up, leaves.down, a_down, b_down, offsets)
        y_SH = y_SH * leaves.weights_TK.flatten()[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y_SH[back].view(shape.tokens, shape.top_k, shape.hidden).sum(1)

    return run


def _counts(experts: Tensor, num_experts: int) -> Tensor:
    """Rows per expert without waiting for the device; on the CPU `histc` takes floats only."""
    values = experts.int() if experts.is_cuda else experts.float()
    return torch.histc(values, bins=num_experts, min=0, max=num_experts - 1)


def _scatter(work: Work, base: Any, linear: Any, linear_lora: Any) -> Run:
    """The two products of scattermoe: scattered to grouped rows, then back with the weights."""
    shape = work.shape

    def run(leaves: Leaves) -> Tensor:
        expert_S, slot_S, offsets = base.flatten_sort_count(
            work.experts_TK, num_experts=shape.experts
        )
        routing = (expert_S, slot_S, offsets)
        up: tuple[Any, ...] = ()
        down: tuple[Any, ...] = ()
        call = linear
        if leaves.adapters is not None:
            a_up, b_up, a_down, b_down = (tensor.to(DTYPE) for tensor in leaves.adapters)
            rows = shape.experts * RANK
            up = (a_up.reshape(rows, -1), b_up.permute(0, 2, 1).reshape(-1, rows), SCALING)
            down = (a_down.reshape(rows, -1), b_down.permute(0, 2, 1).reshape(-1, rows), SCALING)
            call = linear_lora
        z_SG = call(
            leaves.x,
            leaves.gate_up.transpose(2, 1),
            shape.top_k,
            *routing,
            *up,
            grouped_in=False,
            grouped_out=True,
        )
        gate, wide = z_SG.chunk(2, -1)
        out: Tensor = call(
            F.silu(gate) * wide,
            leaves.down.transpose(2, 1),
            1,
            *routing,
            *down,
            grouped_in=True,
            grouped_out=False,
            gates=leaves.weights_TK,
        )
        return out

    return run


_SCATTERMOE = "scattermoe.parallel_experts"


@provider("scattermoe", ("fwd", "full"), needs(_SCATTERMOE, ops="peer_scattermoe"), waits=True)
def _scattermoe(work: Work, mode: Mode, options: Options) -> Run:
    base = load(_SCATTERMOE, "peer_scattermoe")
    return _scatter(work, base, base.parallel_linear, None)


_AXOLOTL = "axolotl.integrations.kernels.libs.scattermoe_lora"


@provider(
    "axolotl",
    ("fwd", "full", "lora16"),
    needs(f"{_AXOLOTL}.parallel_linear_lora", ops="peer_axolotl"),
    waits=True,
)
def _axolotl(work: Work, mode: Mode, options: Options) -> Run:
    base = load(f"{_AXOLOTL}.parallel_experts", "peer_axolotl")
    lora = load(f"{_AXOLOTL}.parallel_linear_lora", "peer_axolotl")
    return _scatter(work, base, base.parallel_linear, lora.parallel_linear_lora)


@provider("sonicmoe", ("fwd", "full", "lora16"), needs("sonicmoe.functional"), interleaved=True)
def _sonicmoe(work: Work, mode: Mode, options: Options) -> Run:
    """Release of December 2025; `histc` in the place of its count kernel, which needs nvcc."""
    sonic = import_module("sonicmoe.functional")
    swiglu = import_module("sonicmoe.enums").ActivationType.SWIGLU
    shape = work.shape

    def run(leaves: Leaves) -> Tensor:
        gate_up, down = _merged(leaves)
        experts = work.experts_TK.int()
        ends = _counts(experts.view(-1), shape.experts).int().cumsum(0).int()
        offsets, *routing = sonic.TC_topk_router_metadata(experts, ends, shape.top_k)
        stream = torch.cuda.current_stream().cuda_stream
        h, z = sonic._UpProjection.apply(
            leaves.x,
            gate_up.permute(1, 2, 0),
            None,
            offsets,
            shape.rows,
            shape.top_k,
            stream,
            *routing,
            False,
            swiglu,
            mode == "fwd",
        )
        out: Tensor = sonic._DownProjection.apply(
            h,
            z,
            down.permute(1, 2, 0),
            None,
            leaves.weights_TK.float(),
            offsets,
            shape.tokens,
            shape.top_k,
            stream,
            *routing,
            False,
            swiglu,
        )
        return out

    return run


@provider("liger", ("fwd", "full", "lora16"), needs("liger_kernel.ops.fused_moe"), waits=True)
def _liger(work: Work, mode: Mode, options: Options) -> Run:
    """Computes both weight gradients in every backward pass; `lora16` needs them anyway."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def run(leaves: Leaves) -> Tensor:
        gate_up, down = _merged(leaves)
        experts = work.experts_TK.int()
        out: Tensor = function.apply(leaves.x, gate_up, down, experts, leaves.weights_TK)
        return out

    return run
