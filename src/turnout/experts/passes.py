"""The forward and the backward pass of an expert MLP, as straight lines of grouped GEMMs.

Forward, for the rows of expert e (row r is slot s, token t):

    xa_up = s_up * x A_up^T     z = x W_up^T + b_up + xa_up B_up^T       h = act(z)
    xa_dn = s_dn * h A_dn^T     y = h W_dn^T + b_dn + xa_dn B_dn^T
    out[t] = sum over k of w[t, k] * y

Backward, from dout (T, H), in one pass over the rows of d = dout[t] W_dn + db_dn A_dn with
db_dn = s_dn * dout[t] B_dn:

    dz = w * d * act'(z)        dw = <d, act(z)> + <dout[t], b_dn>        hw = w * act(z)

so y is neither kept nor rebuilt. Then, with db_up = s_up * dz B_up,
dx = sum over k of (dz W_up + db_up A_up), and the weight gradients are grouped Gram products:
dA_up = db_up^T x, dB_up = dz^T xa_up, dA_dn = db_dn^T hw, dB_dn = w dout^T xa_dn. Saved: x (shared
with the caller), z (or nothing), xa_up, xa_dn, the routing. With `weight_on_input` the weight moves
from y to x.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate,
G = 2F gate and up (F without gate), R LoRA rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.experts.combine import SlotDots, combine, combine_and_dots, row_dots, slot_dots
from turnout.experts.dropout import Dropout
from turnout.experts.gemm import factors, grouped_gemm, grouped_gram
from turnout.experts.operands import Activate, ActivateBackward, Factors, Operand, RowsOut, Tail
from turnout.experts.weights import ExpertWeights, LoraWeights, down_EHF, gate_up_EGH
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


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t.to(dtype)`; nothing is called where nothing is to be done."""
    return t if t.dtype == dtype else t.to(dtype)


def _factors(
    job: Job, *, backward: bool, up: bool = True, down: bool = True
) -> tuple[Factors | None, Factors | None]:
    """The adapters of the two projections, where there are any and they are asked for."""
    w_up, w_down = gate_up_EGH(job.weights, job.spec), down_EHF(job.weights, job.spec)
    if backward:
        w_up, w_down = w_up.transpose(1, 2), w_down.transpose(1, 2)
    asked = [
        (job.lora.gate_up if up else None, w_up),
        (job.lora.down if down else None, w_down),
    ]
    adapters = [(lora, w) for lora, w in asked if lora is not None]
    made = iter(factors(adapters, job.dtype, backward=backward, backend=job.backend))
    first, second = [None if lora is None else next(made) for lora, _ in asked]
    return first, second


def _narrow(a: Operand, parts: Factors, job: Job, ragged: Ragged) -> Tensor:
    """(S, R): the rows through the adapter's first factor, scaled."""
    return grouped_gemm(
        a,
        parts.narrow_ERK,
        ragged,
        dtype=parts.dtype,
        narrow=True,
        scale=parts.scaling,
        backend=job.backend,
    ).out


def _input(job: Job, x: Tensor, weights_TK: Tensor, tag: int | None) -> Operand:
    """The up projection's rows; `tag` asks for the adapter's masked ones."""
    weight_TK = weights_TK if job.spec.weight_on_input else None
    return Operand(x, True, weight_TK, None if tag is None else job.drop(tag))


def _up(
    job: Job, x: Operand, tail: Tail | None, ragged: Ragged, epilogue: Activate | None
) -> tuple[Tensor, Tensor | None]:
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
    job: Job,
    x_TH: Tensor,
    experts_TK: Tensor,
    weights_TK: Tensor,
    counted: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Saved]:
    """out (T, H) in x's dtype, and what the backward pass needs."""
    x = as_dtype(x_TH, job.dtype)
    num_experts = job.weights.gate_up.shape[0]
    ragged = sort_by_expert(experts_TK, num_experts, counted, together=keep)
    up, down = _factors(job, backward=False)
    xa_up = xa_down = tail = None
    if up is not None:
        xa_up = _narrow(_input(job, x, weights_TK, 0), up, job, ragged)
        tail = Tail(xa_up, up.tail_ENR)
    keep_z = keep and not job.recompute
    epilogue = Activate(job.spec.activation, keep_z)
    h, z = _up(job, _input(job, x, weights_TK, None), tail, ragged, epilogue)
    up = tail = None
    if down is not None:
        xa_down = _narrow(Operand(h, dropout=job.drop(1)), down, job, ragged)
        tail = Tail(xa_down, down.tail_ENR)
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
    release: bool = False,
) -> dict[str, Tensor]:
    """The gradients that `needs` names, by name.

    With `release`, the memory of z is given back once dz exists: nobody will read it again.
    """
    grads: dict[str, Tensor] = {}
    x, dout = as_dtype(x_TH, job.dtype), as_dtype(dout_TH, job.dtype)
    weights_TK = weights_TK.contiguous()
    on_input = job.spec.weight_on_input
    with_up = needs.x or needs.a_up or (on_input and needs.weights_TK)
    up, down = _factors(job, backward=True, up=with_up, down=needs.d)
    # adapters, prepared, are as large as half of their gradients: they go once they were read
    db = dz = hw = dots = None
    if needs.d:
        db, first = _hidden_grads(job, saved, needs, x, weights_TK, dout, down)
        down = None
        if release and saved.z_SG is not None:
            saved.z_SG.untyped_storage().resize_(0)
        dz, hw = first.out, first.h_SF
        if needs.weights_TK and not on_input:
            assert first.dot_SP is not None
            bias = job.weights.down_bias
            dots = SlotDots(first.dot_SP, dout, bias, experts_TK, weights_TK.dtype)
        del first
    dy = Operand(dout, True, None if on_input else weights_TK)
    # the gradient of a stack is larger than hw: it comes when dz, which is larger too, is gone
    if not needs.down:
        _down_grads(job, saved, needs, dy, db, hw, grads)
        db = hw = None
    if needs.dz or (on_input and needs.weights_TK):
        assert dz is not None
        db_up = _input_grads(job, saved, needs, x, weights_TK, dz, up, dots, grads)
        up = None
        _up_grads(job, saved, needs, x, weights_TK, dz, db_up, grads)
        del db_up
    if needs.down:
        del dz
        _down_grads(job, saved, needs, dy, db, hw, grads)
    if dots is not None and "weights_TK" not in grads:
        grads["weights_TK"] = slot_dots(dots, saved.ragged)
    return grads


def _hidden_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    x: Tensor,
    weights_TK: Tensor,
    dout: Tensor,
    down: Factors | None,
) -> tuple[Tensor | None, RowsOut]:
    """db_dn, and dz, the dot products and (when asked) hw."""
    ragged, on_input = saved.ragged, job.spec.weight_on_input
    dy = Operand(dout, True)
    db = tail = None
    if down is not None:
        db = _narrow(dy, down, job, ragged)
        tail = Tail(db, down.tail_ENR, job.drop(1))
    z = saved.z_SG
    if z is None:
        z = _pre_activation(job, saved, x, weights_TK)
    out = grouped_gemm(
        dy,
        down_EHF(job.weights, job.spec).transpose(1, 2),
        ragged,
        dtype=job.dtype,
        tail=tail,
        epilogue=ActivateBackward(
            job.spec.activation, z, None if on_input else weights_TK, keep_h=needs.hw
        ),
        backend=job.backend,
    )
    return db, out


def _pre_activation(job: Job, saved: Saved, x: Tensor, weights_TK: Tensor) -> Tensor:
    """z again, by the products of the forward pass."""
    up, _ = _factors(job, backward=False, down=False)
    tail = None
    if up is not None:
        assert saved.xa_up_SR is not None
        tail = Tail(saved.xa_up_SR, up.tail_ENR)
    z, _ = _up(job, _input(job, x, weights_TK, None), tail, saved.ragged, None)
    return z


def _gram(
    job: Job, a: Operand, b: Operand, ragged: Ragged, out_ENK: Tensor, dtype: torch.dtype
) -> None:
    grouped_gram(a, b, ragged, out_ENK, dtype=dtype, backend=job.backend)


def _down_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    dy: Operand,
    db: Tensor | None,
    hw: Tensor | None,
    grads: dict[str, Tensor],
) -> None:
    """Gradients of the down projection, its bias and its adapter.

    `dy` carries the row weight, and so does `hw`; each product takes it once.
    """
    ragged, lora = saved.ragged, job.lora.down
    if needs.down:
        assert hw is not None
        grads["down"] = torch.empty_like(job.weights.down)
        out = down_EHF(ExpertWeights(job.weights.gate_up, grads["down"]), job.spec)
        _gram(job, Operand(dy.rows, True), Operand(hw), ragged, out, job.dtype)
    if needs.down_bias:
        assert job.weights.down_bias is not None
        grads["down_bias"] = _row_sums(dy, ragged, job.weights.down_bias, job)
    if needs.a_down:
        assert lora is not None
        assert db is not None
        assert hw is not None
        grads["a_down"] = out = torch.empty_like(lora.a_ERI)
        masked = Operand(hw, dropout=job.drop(1))
        _gram(job, Operand(db), masked, ragged, out, db.dtype)
    if needs.b_down:
        assert lora is not None
        assert saved.xa_down_SR is not None
        grads["b_down"] = out = torch.empty_like(lora.b_ORE)
        xa = Operand(saved.xa_down_SR)
        _gram(job, dy, xa, ragged, out.permute(2, 0, 1), xa.rows.dtype)


def _input_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    x: Tensor,
    weights_TK: Tensor,
    dz: Tensor,
    up: Factors | None,
    dots: SlotDots | None,
    grads: dict[str, Tensor],
) -> Tensor | None:
    """Gradients of x and, in the launch that sums x's, of the routing weights (`dots`).

    Returns db_up, which the gradients of the adapter need as well.
    """
    ragged = saved.ragged
    db = tail = None
    if up is not None:
        db = _narrow(Operand(dz), up, job, ragged)
        tail = Tail(db, up.tail_ENR, job.drop(0))
    if not (needs.x or (needs.weights_TK and job.spec.weight_on_input)):
        return db
    w_EHG = gate_up_EGH(job.weights, job.spec).transpose(1, 2)
    dx_SH = grouped_gemm(
        Operand(dz), w_EHG, ragged, dtype=job.dtype, tail=tail, backend=job.backend
    ).out
    if needs.x and dots is not None:
        grads["x"], grads["weights_TK"] = combine_and_dots(dx_SH, ragged, dots)
    elif needs.x:
        factor = weights_TK if job.spec.weight_on_input else None
        grads["x"] = combine(dx_SH, ragged, factor, dx_SH.dtype)
    if needs.weights_TK and job.spec.weight_on_input:
        grads["weights_TK"] = row_dots(dx_SH, x, ragged)
    return db


def _up_grads(
    job: Job,
    saved: Saved,
    needs: Needs,
    x: Tensor,
    weights_TK: Tensor,
    dz: Tensor,
    db: Tensor | None,
    grads: dict[str, Tensor],
) -> None:
    """Gradients of the up projection, its bias and its adapter."""
    ragged, lora = saved.ragged, job.lora.gate_up
    if needs.gate_up:
        grads["gate_up"] = torch.empty_like(job.weights.gate_up)
        out = gate_up_EGH(ExpertWeights(grads["gate_up"], job.weights.down), job.spec)
        _gram(job, Operand(dz), _input(job, x, weights_TK, None), ragged, out, job.dtype)
    if needs.gate_up_bias:
        assert job.weights.gate_up_bias is not None
        grads["gate_up_bias"] = _row_sums(Operand(dz), ragged, job.weights.gate_up_bias, job)
    if needs.a_up:
        assert lora is not None
        assert db is not None
        grads["a_up"] = out = torch.empty_like(lora.a_ERI)
        masked = _input(job, x, weights_TK, 0)
        _gram(job, Operand(db), masked, ragged, out, db.dtype)
    if needs.b_up:
        assert lora is not None
        assert saved.xa_up_SR is not None
        grads["b_up"] = out = torch.empty_like(lora.b_ORE)
        xa = Operand(saved.xa_up_SR)
        _gram(job, Operand(dz), xa, ragged, out.permute(2, 0, 1), xa.rows.dtype)


def _row_sums(a: Operand, ragged: Ragged, bias_EN: Tensor, job: Job) -> Tensor:
    """(E, N) sums of the rows of each expert: a Gram product with a column of ones."""
    out = torch.empty_like(bias_EN)
    ones = Operand(out.new_ones(ragged.num_rows, 1, dtype=job.dtype))
    _gram(job, a, ones, ragged, out.unsqueeze(-1), job.dtype)
    return out
