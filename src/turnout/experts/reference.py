"""The definition of an expert MLP, in plain PyTorch and differentiated by autograd.

    y[t] = sum over k of weights[t, k] * mlp(x[t], experts[t, k])
    mlp(x, e) = down[e](act(gate_up[e](x))),  each projection plus its bias and adapter

A slot whose expert is E (the expert-parallel sentinel) adds nothing. Any float dtype. Slow, and
keeps everything: this is what the kernels are judged by.

Legend: T tokens, K experts per token, S = T*K rows, E experts, H hidden, F intermediate, R LoRA
    rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnout.experts.dropout import Dropout, draw_seed, mask
from turnout.experts.epilogues import activate
from turnout.experts.weights import ExpertWeights, Lora, LoraWeights, down_EHF, gate_up_EGH
from turnout.specs import BackendName, ExpertSpec, Recompute


def _project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: Lora | None,
    expert: int,
    drop: Tensor | None,
) -> Tensor:
    y = x @ weight.to(x.dtype).T
    if bias is not None:
        y = y + bias.to(y.dtype)
    if lora is not None:
        a, b = lora.a_ERI[expert], lora.b_ORE[:, :, expert]
        x = x.to(a.dtype) if drop is None else x.to(a.dtype) * drop.to(a.dtype)
        y = y + (lora.scaling * ((x @ a.T) @ b.T)).to(y.dtype)
    return y


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
    """y[t] = sum over k of weights[t, k] * mlp(x[t], experts[t, k]). See `turnout.expert_mlp`.

    `recompute` and `backend` have no effect here.
    """
    lora = lora or LoraWeights()
    gate_up, down = gate_up_EGH(weights, spec), down_EHF(weights, spec)
    x = x_TH.to(gate_up.dtype)
    tokens, top_k = experts_TK.shape
    flat_experts, flat_weights = experts_TK.reshape(-1), weights_TK.reshape(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    adapted = lora.gate_up is not None or lora.down is not None
    seed = draw_seed(x.device) if expert_dropout > 0 and adapted else None
    slots, rows = [], []
    for expert in range(gate_up.shape[0]):
        slot = torch.where(flat_experts == expert)[0]
        if not slot.numel():
            continue

        def drop(tag: int, width: int, slot: Tensor = slot) -> Tensor | None:
            if seed is None:
                return None
            return mask(Dropout(expert_dropout, seed, tag), slot, width, wide)

        weight = flat_weights[slot, None]
        x_e = x[slot // top_k]
        if spec.weight_on_input:
            x_e = (x_e * weight).to(x.dtype)
        bias_up = None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
        bias_down = None if weights.down_bias is None else weights.down_bias[expert]
        z = _project(x_e, gate_up[expert], bias_up, lora.gate_up, expert, drop(0, x.shape[1]))
        h = activate(z, spec.activation)
        y = _project(h, down[expert], bias_down, lora.down, expert, drop(1, h.shape[1]))
        slots.append(slot)
        rows.append(y if spec.weight_on_input else y * weight)
    if not rows:
        return torch.zeros_like(x_TH) + _nothing(x_TH, weights_TK, weights, lora).to(x_TH.dtype)
    y_SH = rows[0].new_zeros(tokens * top_k, x.shape[1], dtype=torch.cat(rows).dtype)
    y_SH = y_SH.index_copy(0, torch.cat(slots), torch.cat(rows))
    return y_SH.view(tokens, top_k, -1).sum(1).to(x_TH.dtype)


def _nothing(x_TH: Tensor, weights_TK: Tensor, weights: ExpertWeights, lora: LoraWeights) -> Tensor:
    """Zero, with zero gradients for every input."""
    tensors = [x_TH, weights_TK, weights.gate_up, weights.down]
    tensors += [b for b in (weights.gate_up_bias, weights.down_bias) if b is not None]
    for one in (lora.gate_up, lora.down):
        tensors += [] if one is None else [one.a_ERI, one.b_ORE]
    return torch.stack([t.flatten()[:0].sum().double() for t in tensors]).sum()
