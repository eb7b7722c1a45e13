"""The forward and the backward pass of an expert MLP, as straight lines of grouped GEMMs.

Forward, for the rows of expert e (row r is slot s, token t):

    xa_up = x A_up^T            z = x W_up^T + b_up + s_up * xa_up B_up^T       h = act(z)
    xa_dn = h A_dn^T            y = h W_dn^T + b_dn + s_dn * xa_dn B_dn^T
    out[t] = sum over k of w[t, k] * y

Backward, from dout (T, H), in one pass over the rows of d = dout[t] W_dn + s_dn * (dout[t] B_dn)
A_dn:

    dz = w * d * act'(z)        dw = <d, act(z)> + <dout[t], b_dn>        hw = w * act(z)

so y is neither kept nor rebuilt. Then dx = sum over k of (dz W_up + s_up * (dz B_up) A_up), and the
weight gradients are grouped Gram products: dA_up = s_up (dz B_up)^T x, dB_up = s_up dz^T xa_up,
dA_dn = s_dn (dout B_dn)^T hw, dB_dn = s_dn dout^T (w xa_dn). Saved: x (shared with the caller), z
(or nothing), xa_up, xa_dn, the routing. With `weight_on_input` the weight moves from y to x.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up (F without gate), R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.experts.combine import bias_dots, combine, row_dots
from turnout.experts.dropout import Dropout
from turnout.experts.gemm import adapter_intermediate, grouped_gemm, grouped_gram
from turnout.experts.operands import Activate, ActivateBackward, Operand, Tail
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights, down_EHF, gate_up_EGH
from turnout.ragged import Ragged, sort_by_expert
from turnout.specs import ExpertSpec


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a pass needs besides x, the routing and what the forward pass saved."""

    weights: ExpertWeights
    spec: ExpertSpec
    lora: LoraWeights
    dtype: torch.dtype
    backend: str
    recompute: bool
    dropout: float
    seed: Tensor | None

    def drop(self, tag: int) -> Dropout | None:
        return None if self.seed is None else Dropout(self.dropout, self.seed, tag)

    def lora_dtype(self, lora: Lora) -> torch.dtype:
        """What the adapter's products are computed in."""
        device = lora.a_ERI.device
        return adapter_intermediate(lora.rank, lora.a_ERI.dtype, self.dtype, device, self.backend)[
            1
        ]


@dataclass(frozen=True, slots=True)
class Saved:
    """What the backward pass reads; every shape depends on T, K and the sizes alone."""

    ragged: Ragged
    z_SG: Tensor | None
    xa_up_SR: Tensor | None
    xa_down_SR: Tensor | None


@dataclass(frozen=True, slots=True)
class Needs:
    """Which gradients were asked for."""

    x: bool
    weights_TK: bool
    gate_up: bool
    down: bool
    gate_up_bias: bool
    down_bias: bool
    a_up: bool
    b_up: bool
    a_down: bool
    b_down: bool

    @property
    def dz(self) -> bool:
        return self.x or self.gate_up or self.gate_up_bias or self.a_up or self.b_up

    @property
    def hw(self) -> bool:
        return self.down or self.a_down

    @property
    def d(self) -> bool:
        """The gradient of h: for dz, for the weights' dot products, or with hw and A."""
        return self.dz or self.hw or self.weights_TK


def _b_ENR(lora: Lora) -> Tensor:
    return lora.b_ORE.permute(2, 0, 1)


def _narrow(a: Operand, lora: Lora, job: Job, ragged: Ragged) -> Tensor:
    """(S, R): the rows times A^T."""
    dtype = job.lora_dtype(lora)
    return grouped_gemm(a, lora.a_ERI, ragged, dtype=dtype, narrow=True, backend=job.backend).out


def _narrow_back(a: Operand, lora: Lora, job: Job, ragged: Ragged) -> Tensor:
    """(S, R): gradient rows times B."""
    dtype, w_ERO = job.lora_dtype(lora), lora.b_ORE.permute(2, 1, 0)
    return grouped_gemm(a, w_ERO, ragged, dtype=dtype, narrow=True, backend=job.backend).out


def _input(job: Job, x: Tensor, weights_TK: Tensor, ragged: Ragged, tag: int | None) -> Operand:
    """The up projection's rows; `tag` asks for the adapter's masked ones."""
    weight_S = ragged.by_row(weights_TK) if job.spec.weight_on_input else None
    return Operand(x, ragged.token_S, weight_S, None if tag is None else job.drop(tag))


def _up(
    job: Job, x: Operand, xa: Tensor | None, ragged: Ragged, epilogue: Activate | None
) -> tuple[Tensor, Tensor | None]:
    lora = job.lora.gate_up
    tail = None
    if lora is not None and xa is not None:
        tail = Tail(xa, _b_ENR(lora), lora.scaling)
    out = grouped_gemm(
        x,
        gate_up_EGH(job.weights, job.spec),
        ragged,
        dtype=job.dtype,
        bias_EN=job.weights.gate_up_bias,
        tail=tail,
        epilogue=epilogue,
        backend=job.backend,
    )
    return out.out, out.z_SG


def forward(
    job: Job, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, keep: bool
) -> tuple[Tensor, Saved]:
    """out (T, H) in x's dtype, and what the backward pass needs."""
    x = x_TH.to(job.dtype)
    ragged = sort_by_expert(experts_TK, job.weights.gate_up.shape[0])
    up, down = job.lora.gate_up, job.lora.down
    xa_up = xa_down = None
    if up is not None:
        xa_up = _narrow(_input(job, x, weights_TK, ragged, 0), up, job, ragged)
    keep_z = keep and not job.recompute
    epilogue = Activate(job.spec.activation, keep_z)
    h, z = _up(job, _input(job, x, weights_TK, ragged, None), xa_up, ragged, epilogue)
    tail = None
    if down is not None:
        xa_down = _narrow(Operand(h, dropout=job.drop(1)), down, job, ragged)
        tail = Tail(xa_down, _b_ENR(down), down.scaling)
    y = grouped_gemm(
        Operand(h),
        down_EHF(job.weights, job.spec),
        ragged,
        dtype=job.dtype,
        bias_EN=job.weights.down_bias,
        tail=tail,
        backend=job.backend,
    ).out
    out = combine(y, ragged, None if job.spec.weight_on_input else weights_TK, x_TH.dtype)
    return out, Saved(ragged, z, xa_up, xa_down)


def backward(
    job: Job,
    saved: Saved,
    needs: Needs,
    x_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    dout_TH: Tensor,
) -> dict[str, Tensor]:
    """The gradients that `needs` names, by name."""
    grads: dict[str, Tensor] = {}
    ragged, x, dout = saved.ragged, x_TH.to(job.dtype), dout_TH.to(job.dtype)
    on_input = job.spec.weight_on_input
    weight_S = ragged.by_row(weights_TK)
    dy = Operand(dout, ragged.token_S)
    dy_weighted = dy if on_input else Operand(dout, ragged.token_S, weight_S)
    down = job.lora.down
    dyb = dz = hw = None
    if needs.d:
        dyb = None if down is None else _narrow_back(dy, down, job, ragged)
        z = saved.z_SG
        if z is None:
            rows = _input(job, x, weights_TK, ragged, None)
            z, _ = _up(job, rows, saved.xa_up_SR, ragged, None)
        tail = None
        if down is not None and dyb is not None:
            tail = Tail(dyb, down.a_ERI.transpose(1, 2), down.scaling, job.drop(1))
        first = grouped_gemm(
            dy,
            down_EHF(job.weights, job.spec).transpose(1, 2),
            ragged,
            dtype=job.dtype,
            tail=tail,
            epilogue=ActivateBackward(
                job.spec.activation, z, None if on_input else weight_S, keep_h=needs.hw
            ),
            backend=job.backend,
        )
        dz, hw = first.out, first.h_SF
        if needs.weights_TK and not on_input:
            assert first.dot_S is not None
            dweights = ragged.by_slot(first.dot_S)
            if job.weights.down_bias is not None:
                dweights = dweights + bias_dots(dout, job.weights.down_bias, experts_TK, ragged)
            grads["weights_TK"] = dweights
    _down_grads(job, saved, needs, dy_weighted, dyb, hw, grads)
    if needs.dz or (on_input and needs.weights_TK):
        assert dz is not None
        _up_grads(job, saved, needs, x, weights_TK, dz, grads)
    return grads


def _down_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    dy: Operand,
    dyb: Tensor | None,
    hw: Tensor | None,
    grads: dict[str, Tensor],
) -> None:
    """Gradients of the down projection, its bias and its adapter.

    `dy` carries the row weight, and so does `hw`; each product takes it once.
    """
    ragged, lora = saved.ragged, job.lora.down
    if needs.down:
        assert hw is not None
        grads["down"] = torch.zeros_like(job.weights.down)
        out = down_EHF(ExpertWeights(job.weights.gate_up, grads["down"]), job.spec)
        plain = Operand(dy.rows, dy.gather_S)
        grouped_gram(plain, Operand(hw), ragged, out, dtype=job.dtype, backend=job.backend)
    if needs.down_bias:
        assert job.weights.down_bias is not None
        grads["down_bias"] = _row_sums(dy, ragged, job.weights.down_bias, job)
    if lora is None:
        return
    dtype = job.lora_dtype(lora)
    if needs.a_down:
        assert dyb is not None
        assert hw is not None
        grads["a_down"] = torch.zeros_like(lora.a_ERI)
        grouped_gram(
            Operand(dyb),
            Operand(hw, dropout=job.drop(1)),
            ragged,
            grads["a_down"],
            dtype=dtype,
            scale=lora.scaling,
            backend=job.backend,
        )
    if needs.b_down:
        assert saved.xa_down_SR is not None
        grads["b_down"] = torch.zeros_like(lora.b_ORE)
        grouped_gram(
            dy,
            Operand(saved.xa_down_SR),
            ragged,
            grads["b_down"].permute(2, 0, 1),
            dtype=dtype,
            scale=lora.scaling,
            backend=job.backend,
        )


def _up_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    x: Tensor,
    weights_TK: Tensor,
    dz: Tensor,
    grads: dict[str, Tensor],
) -> None:
    """Gradients of x, of the up projection, its bias and its adapter."""
    ragged, lora = saved.ragged, job.lora.gate_up
    rows = _input(job, x, weights_TK, ragged, None)
    dzb = None
    dx = needs.x or (needs.weights_TK and job.spec.weight_on_input)
    if lora is not None and (dx or needs.a_up):
        dzb = _narrow_back(Operand(dz), lora, job, ragged)
    if dx:
        tail = None
        if lora is not None and dzb is not None:
            tail = Tail(dzb, lora.a_ERI.transpose(1, 2), lora.scaling, job.drop(0))
        w_EHG = gate_up_EGH(job.weights, job.spec).transpose(1, 2)
        dx_SH = grouped_gemm(
            Operand(dz), w_EHG, ragged, dtype=job.dtype, tail=tail, backend=job.backend
        ).out
        if needs.x:
            factor = weights_TK if job.spec.weight_on_input else None
            grads["x"] = combine(dx_SH, ragged, factor, dx_SH.dtype)
        if needs.weights_TK and job.spec.weight_on_input:
            grads["weights_TK"] = row_dots(dx_SH, x, ragged)
    if needs.gate_up:
        grads["gate_up"] = torch.zeros_like(job.weights.gate_up)
        out = gate_up_EGH(ExpertWeights(grads["gate_up"], job.weights.down), job.spec)
        grouped_gram(Operand(dz), rows, ragged, out, dtype=job.dtype, backend=job.backend)
    if needs.gate_up_bias:
        assert job.weights.gate_up_bias is not None
        grads["gate_up_bias"] = _row_sums(Operand(dz), ragged, job.weights.gate_up_bias, job)
    if lora is None:
        return
    dtype = job.lora_dtype(lora)
    if needs.a_up:
        assert dzb is not None
        grads["a_up"] = torch.zeros_like(lora.a_ERI)
        masked = _input(job, x, weights_TK, ragged, 0)
        grouped_gram(
            Operand(dzb),
            masked,
            ragged,
            grads["a_up"],
            dtype=dtype,
            scale=lora.scaling,
            backend=job.backend,
        )
    if needs.b_up:
        assert saved.xa_up_SR is not None
        grads["b_up"] = torch.zeros_like(lora.b_ORE)
        grouped_gram(
            Operand(dz),
            Operand(saved.xa_up_SR),
            ragged,
            grads["b_up"].permute(2, 0, 1),
            dtype=dtype,
            scale=lora.scaling,
            backend=job.backend,
        )


def _row_sums(a: Operand, ragged: Ragged, bias_EN: Tensor, job: Job) -> Tensor:
    """(E, N) sums of the rows of each expert: a Gram product with a column of ones."""
    out = torch.zeros_like(bias_EN)
    ones = Operand(out.new_ones(ragged.num_rows, 1, dtype=job.dtype))
    wide = torch.promote_types(job.dtype, torch.float32)
    grouped_gram(a, ones, ragged, out.unsqueeze(-1), dtype=wide, backend=job.backend)
    return out
