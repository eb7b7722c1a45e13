"""Load, dropped share and entropy against loops over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from turnout.routing import losses
from turnout.routing.statistics import routing_statistics

EXPERTS = 6


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def indices(tokens: int = 40, top_k: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-1, EXPERTS + 2, (tokens, top_k), generator=generator)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_count_is_not_a_loops(masked: bool, dtype: torch.dtype) -> None:
    experts, logits = indices(), 3 * randn(40, EXPERTS)
    mask = torch.arange(40).view(4, 10) % 3 > 0 if masked else None
    kept = [t for t in range(40) if mask is None or mask.reshape(-1)[t]]
    load, dropped, entropy = [0] * EXPERTS, 0, 0.0
    for t in kept:
        for e in experts[t].tolist():
            if 0 <= e < EXPERTS:
                load[e] += 1
            else:
                dropped += 1
        entropy -= sum(p * math.log(p) for p in logits[t].double().softmax(-1).tolist())
    got = routing_statistics(experts.to(dtype), EXPERTS, logits_TE=logits, mask=mask)
    assert got.load_E.tolist() == load
    assert got.load_E.dtype == torch.int64
    assert got.dropped.item() == pytest.approx(dropped / (3 * len(kept)))
    assert got.entropy is not None
    assert got.entropy.item() == pytest.approx(entropy / len(kept), rel=1e-5)


def test_padding_counts_whatever_type_the_mask_has() -> None:
    experts = indices()
    mask = torch.arange(40) % 2
    expected = routing_statistics(experts, EXPERTS, mask=mask.bool())
    for same in (mask, mask.float(), mask.to(torch.uint8)):
        got = routing_statistics(experts, EXPERTS, mask=same)
        assert torch.equal(got.load_E, expected.load_E)
        assert torch.equal(got.dropped, expected.dropped)
        assert got.entropy is None


def test_no_tokens_or_none_that_counts_give_nan() -> None:
    for experts, mask in ((indices(0), None), (indices(), torch.zeros(40))):
        logits = randn(experts.shape[0], EXPERTS)
        got = routing_statistics(experts, EXPERTS, logits_TE=logits, mask=mask)
        assert not got.load_E.any()
        assert got.dropped == 0
        assert got.entropy == 0


def test_a_logit_of_minus_infinity_makes_the_entropy_nan() -> None:
    logits = randn(8, EXPERTS)
    logits[:, 0] = -math.inf
    got = routing_statistics(indices(8), EXPERTS, logits_TE=logits)
    assert got.entropy is not None
    assert got.entropy.isfinite()


def test_pieces_change_the_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = randn(50, EXPERTS)
    whole = routing_statistics(indices(50), EXPERTS, logits_TE=logits).entropy
    monkeypatch.setattr(losses, "PIECE", 7)
    torch.testing.assert_close(
        routing_statistics(indices(50), EXPERTS, logits_TE=logits).entropy, whole
    )


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_statistic_reads_a_value_on_the_host(masked: bool) -> None:
    """Tensors without values have none to wait for."""
    mask = torch.ones(4, 10, device="meta") if masked else None
    logits = torch.empty(40, EXPERTS, device="meta")
    got = routing_statistics(indices().to("meta"), EXPERTS, logits_TE=logits, mask=mask)
    assert got.load_E.shape == (EXPERTS,)


def test_sizes_that_do_not_fit_are_taken() -> None:
    with pytest.raises(ValueError, match="mask has 39 tokens; expected 40"):
        routing_statistics(indices(), EXPERTS, mask=torch.ones(39))
    with pytest.raises(ValueError, match=r"expected \(40, E\)"):
        routing_statistics(indices(), EXPERTS, logits_TE=randn(3, EXPERTS))
