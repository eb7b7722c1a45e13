"""Activations and their derivatives, against plain formulas and autograd in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from turnout.experts.epilogues import act, act_derivative, activate, activate_backward
from turnout.specs import Activation
from turnout.testing import poison_empty

PLAIN = {
    "silu": lambda x, alpha: x / (1 + torch.exp(-alpha * x)),
    "gelu": lambda x, alpha: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x, alpha: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
    ),
    "relu": lambda x, alpha: torch.relu(x),
    "relu2": lambda x, alpha: torch.relu(x) ** 2,
    "identity": lambda x, alpha: x,
}
GPT_OSS = Activation(alpha=1.702, limit=7.0, up_offset=1.0, interleaved=True)
GATED = [
    *(Activation(act=name) for name in PLAIN),
    *(Activation(act=name, interleaved=True, limit=0.8) for name in PLAIN),
    *(Activation(act=name, limit=0.6, limit_after=True) for name in PLAIN),
    GPT_OSS,
    Activation(alpha=0.5, up_offset=-0.25),
    Activation(limit=0.0),
    Activation(limit=1.5, limit_after=True, interleaved=True, up_offset=1.0, alpha=1.702),
]
NOT_GATED = [*(Activation(act=name, gated=False) for name in PLAIN)]
EVERY = [*GATED, *NOT_GATED, Activation(gated=False, alpha=1.702)]


def name(activation):
    parts = [activation.act if activation.gated else f"plain-{activation.act}"]
    if activation.interleaved:
        parts.append("interleaved")
    if activation.limit is not None:
        where = "after" if activation.limit_after else "before"
        parts.append(f"limit{activation.limit:g}{where}")
    parts += [f"a{activation.alpha:g}"] * (activation.alpha != 1)
    parts += [f"o{activation.up_offset:g}"] * (activation.up_offset != 0)
    return "-".join(parts)


def plain(z, activation):
    """h by the formula of the model that uses it, out of functions that torch differentiates."""
    a = PLAIN[activation.act]
    if not activation.gated:
        return a(z, activation.alpha)
    half = z.shape[-1] // 2
    if activation.interleaved:
        gate, up = z.unflatten(-1, (half, 2)).unbind(-1)
    else:
        gate, up = z[..., :half], z[..., half:]
    limit = activation.limit
    if limit is not None:
        up = torch.clamp(up, min=-limit, max=limit)
        if not activation.limit_after:
            gate = torch.clamp(gate, max=limit)
    gated = a(gate, activation.alpha)
    if limit is not None and activation.limit_after:
        gated = torch.clamp(gated, max=limit)
    return gated * (up + activation.up_offset)


def random_z(rows=7, half=6, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2 * half, generator=generator, dtype=torch.float64) * scale


def agree(z, activation, seed=1):
    """Value and gradient against the plain formula; `activate` itself must differentiate too."""
    z = z.detach().requires_grad_()
    expected = plain(z, activation)
    generator = torch.Generator().manual_seed(seed)
    dh = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (dz,) = torch.autograd.grad(expected, z, dh)
    h = activate(z, activation)
    (dz_definition,) = torch.autograd.grad(h, z, dh)
    h_again, dz_ours = activate_backward(z.detach(), dh, activation)
    torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-13)
    assert torch.equal(h_again, h), "the backward pass rebuilds another h"
    torch.testing.assert_close(dz_definition, dz, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(dz_ours, dz, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("activation", EVERY, ids=name)
def test_value_and_gradient_are_those_of_the_formula(activation):
    agree(random_z(), activation)


@pytest.mark.parametrize("activation", EVERY, ids=name)
def test_gradient_at_the_edges_is_that_of_torch(activation):
    """Exactly on a clamp's edge, at zero, and one step to each side."""
    limit = 1.0 if activation.limit is None else activation.limit
    edges = [0.0, limit, -limit]
    steps = [math.nextafter(e, way) for e in edges for way in (-math.inf, math.inf)]
    values = torch.tensor(edges + steps, dtype=torch.float64)
    pairs = torch.tensor(list(itertools.product(values.tolist(), repeat=2)), dtype=torch.float64)
    agree(pairs, activation)


def test_gradient_where_the_clamped_activation_meets_its_limit():
    """limit_after with an activation whose value is exactly the limit."""
    activation = Activation(act="identity", limit=0.5, limit_after=True)
    agree(torch.tensor([[0.5, 0.25], [0.5, 0.5], [0.75, -0.5]], dtype=torch.float64), activation)


@pytest.mark.parametrize("kind", ["relu", "relu2"])
def test_relu_passes_nothing_at_zero(kind):
    """`torch.clamp(min=0)` passes the gradient at 0 and `torch.relu` does not; models use relu.

    A row of zeros (padding, no bias) gives exactly z = 0.
    """
    zero = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    activation = Activation(act=kind, gated=False)
    act(zero, activation).sum().backward()
    assert zero.grad.item() == 0
    assert act_derivative(zero.detach(), activation).item() == 0


def test_gpt_oss_formula_is_the_models():
    """transformers' GptOssExperts._apply_gate, written out."""
    z = random_z(scale=6.0)
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    expected = (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    torch.testing.assert_close(activate(z, GPT_OSS), expected, rtol=1e-13, atol=0)


def test_interleaving_is_not_ignored():
    z = random_z()
    pairs, halves = Activation(interleaved=True), Activation()
    reordered = torch.cat([z[:, 0::2], z[:, 1::2]], dim=1)
    assert torch.equal(activate(z, pairs), activate(reordered, halves))
    assert not torch.allclose(activate(z, pairs), activate(z, halves))


@pytest.mark.parametrize("activation", EVERY, ids=name)
def test_gradient_passes_gradcheck(activation):
    z = random_z(rows=3, half=3, seed=5).requires_grad_()

    class Ours(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return activate(z, activation)

        @staticmethod
        def backward(ctx, dh):
            return activate_backward(*ctx.saved_tensors, dh, activation)[1]

    assert torch.autograd.gradcheck(Ours.apply, (z,))


@pytest.mark.parametrize("activation", EVERY, ids=name)
def test_large_values_stay_finite(activation):
    z = torch.tensor([[1e4, 1e4], [-1e4, -1e4], [1e4, -1e4], [-1e4, 1e4]], dtype=torch.float32)
    h, dz = activate_backward(z, torch.ones_like(activate(z, activation)), activation)
    assert h.isfinite().all()
    assert dz.isfinite().all()


@pytest.mark.parametrize("activation", EVERY, ids=name)
def test_every_column_of_the_gradient_is_written(activation):
    z = random_z().float()
    with poison_empty():
        h, dz = activate_backward(z, torch.ones_like(activate(z, activation)), activation)
    assert h.isfinite().all()
    assert dz.isfinite().all()


@given(data=st.data())
def test_any_activation_agrees_with_the_formula(data):
    kind = data.draw(st.sampled_from(sorted(PLAIN)))
    gated = data.draw(st.booleans())
    limit = data.draw(st.none() | st.floats(0.0, 8.0)) if gated else None
    activation = Activation(
        act=kind,
        gated=gated,
        interleaved=gated and data.draw(st.booleans()),
        limit=limit,
        limit_after=limit is not None and data.draw(st.booleans()),
        alpha=data.draw(st.floats(0.25, 3.0)) if kind == "silu" else 1.0,
        up_offset=data.draw(st.sampled_from([0.0, 1.0, -0.5])) if gated else 0.0,
    )
    rows, half = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    agree(random_z(rows, half, seed=data.draw(st.integers(0, 99)), scale=3.0), activation)


def test_a_view_of_z_is_read_as_its_values():
    z = random_z().t().contiguous().t()
    dh = torch.ones(7, 6, dtype=torch.float64)
    for activation in (Activation(), GPT_OSS):
        for ours, expected in zip(
            activate_backward(z, dh, activation),
            activate_backward(z.contiguous(), dh, activation),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act": "swish"}, "Activation.act is 'swish'"),
        ({"limit": -1.0}, "at least 0"),
        ({"limit": math.inf}, "finite"),
        ({"gated": False, "interleaved": True}, "no up half"),
        ({"gated": False, "limit": 7.0}, "no up half"),
        ({"gated": False, "up_offset": 1.0}, "no up half"),
        ({"act": "gelu", "alpha": 1.7}, "for silu only"),
        ({"limit_after": True}, "limit is None"),
    ],
    ids=str,
)
def test_an_activation_that_means_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Activation(**fields)


def test_specs_are_keys():
    assert len({Activation(), Activation(act="silu"), GPT_OSS}) == 2
    assert F.silu(torch.tensor(1.0)).item() == pytest.approx(
        activate(torch.ones(1, 2), Activation()).item()
    )
