"""The trust region's weights, against their definition."""

import itertools
import math

import pytest
import torch
from support import dppo
from support.harness import make_args

from proma_trl import TrustRegion
from proma_trl.trust_region import TopLogProbs, divergences
from proma_trl.trust_region.trust_region import DIVERGENCES, MASKS

PROBABILITIES = [1e-30, 1e-12, 1e-6, 0.01, 0.3, 0.5, 0.9, 0.999, 1 - 1e-5, 1 - 1e-7]
ADVANTAGES = [-1.3, 0.0, 0.7]


def definition_settings(region):
    low, high = region.thresholds
    cap = math.inf if region.ratio_cap is None else region.ratio_cap
    return {"divergence": region.divergence, "low": low, "high": high, "mask": region.mask, "cap": cap}


def others(generator, k, left):
    """Log-probabilities of k other tokens, which leave some of what is left, and of which some are missing."""
    shares = torch.rand(k + 1, generator=generator, dtype=torch.float64) + 1e-3
    return (left * shares / shares.sum())[:k].log()


def cases(top_k, dtype):
    """Every pair of probabilities with every advantage, and at each pair K other tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = list(itertools.product(PROBABILITIES, PROBABILITIES, ADVANTAGES))
    mu, pi, advantages = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    sampler = torch.stack([others(generator, top_k, 1 - p) for p in mu.tolist()])
    current = torch.stack([others(generator, top_k, 1 - p) for p in pi.tolist()])
    if top_k > 2:
        sampler[::3, -1] = -math.inf  # no such token
        sampler[::5, -2] = -math.inf
    return advantages, mu.log().to(dtype), pi.log().to(dtype), TopLogProbs(sampler.to(dtype), current.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [1, 5, 20])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_weights_are_the_definitions(kind, mask, cap, top_k, dtype):
    region = TrustRegion(kind, 0.11, 0.25, top_k=top_k, mask=mask, ratio_cap=cap)
    advantages, mu, pi, top = cases(top_k, dtype)
    found = region.token_weights(advantages, pi, mu, top if region.needs_top else None)
    settings, near = definition_settings(region), 0
    for i in range(len(mu)):
        pairs = zip(top.sampler[i].tolist(), top.current[i].tolist(), strict=True)
        pairs = [(m, p) for m, p in pairs if m > -math.inf]
        distance = dppo.divergence(kind, mu[i].item(), pi[i].item(), pairs)
        tolerance = 2e-5 if dtype == torch.float32 else 1e-6
        assert found.divergence[i].item() == pytest.approx(distance, rel=tolerance, abs=1e-6)
        if min(abs(distance - settings["low"]), abs(distance - settings["high"])) < 1e-5:
            near += 1  # within rounding of a threshold
            continue
        want = dppo.token_weight(settings, advantages[i].item(), mu[i].item(), pi[i].item(), pairs)
        assert found.weights[i].item() == pytest.approx(want, rel=1e-5)
        assert found.masked[i] == (want == 0)
    assert near == 0
    assert torch.isfinite(found.weights).all() and torch.isfinite(found.divergence).all()
    for sign in (-1, 1):
        part = found.masked[advantages.sign() == sign]
        assert 0 < part.sum() < len(part)
    assert not found.masked[advantages == 0].any()
    assert cap is None or (found.capped.any() and found.weights.max() == cap)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_policy_that_sampled_is_within_the_region(kind):
    region = TrustRegion(kind, 1e-6)
    _, mu, _, top = cases(5, torch.float32)
    for advantage in (-1.0, 0.0, 1.0):
        found = region.token_weights(torch.tensor(advantage), mu, mu, TopLogProbs(top.sampler, top.sampler))
        assert torch.equal(found.weights, torch.ones_like(mu)) and not found.masked.any()
        assert found.divergence.max() < 1e-6


@pytest.mark.parametrize("kind", ["topk_tv", "topk_kl"])
def test_with_the_whole_vocabulary_the_divergence_is_exact(kind):
    generator = torch.Generator().manual_seed(0)
    mu, pi = ((4 * torch.randn(64, 12, generator=generator).double()).log_softmax(-1) for _ in range(2))
    exact = (mu.exp() - pi.exp()).abs().sum(-1) / 2 if kind == "topk_tv" else (mu.exp() * (mu - pi)).sum(-1)
    for sampled in (0, 7):
        rest = [i for i in range(12) if i != sampled]
        # Of more tokens than the vocabulary has, some are none
        top = [torch.cat([x[:, rest], torch.full((64, 4), -math.inf)], -1).float() for x in (mu, pi)]
        function = divergences.top_tv if kind == "topk_tv" else divergences.top_kl
        found = function(mu[:, sampled].float(), pi[:, sampled].float(), *top)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6)


def test_a_divergence_over_more_events_is_no_smaller():
    """Merging events loses information: binary below top-K below exact."""
    generator = torch.Generator().manual_seed(1)
    mu, pi = ((2 * torch.randn(200, 12, generator=generator)).log_softmax(-1) for _ in range(2))
    for coarse, fine in ((divergences.binary_tv, divergences.top_tv), (divergences.binary_kl, divergences.top_kl)):
        chain = [coarse(mu[:, 0], pi[:, 0])]
        chain += [fine(mu[:, 0], pi[:, 0], mu[:, 1:k], pi[:, 1:k]) for k in (2, 5, 12)]
        for smaller, larger in itertools.pairwise(chain):
            assert (smaller <= larger + 1e-6).all() and (smaller < larger - 1e-3).any()


def test_what_is_not_known_counts_as_on_policy():
    region = TrustRegion("topk_kl", 1e-3)
    mu = torch.tensor([math.nan, -0.1])
    top = TopLogProbs(torch.tensor([[-2.0], [-4.0]]), torch.tensor([[-9.0], [-4.0]]))
    found = region.token_weights(torch.ones(2), torch.tensor([-3.0, -1e-3]), mu, top)
    assert found.missing.tolist() == [True, False] and found.masked.tolist() == [False, True]
    assert found.weights[0] == 1 and found.ratio[0] == 1 and found.divergence[0] == 0


def test_log_ratios_are_clamped():
    found = TrustRegion().token_weights(torch.tensor(0.0), torch.tensor([0.0, -200.0]), torch.tensor([-200.0, 0.0]))
    assert found.ratio.tolist() == pytest.approx([math.exp(20), math.exp(-20)])


def test_half_precision_is_weighed_in_single():
    found = TrustRegion().token_weights(torch.ones(3), torch.full((3,), -1.0).bfloat16(), torch.full((3,), -1.1))
    assert found.weights.dtype == torch.float32 and found.weights[0] == pytest.approx(math.exp(0.1), rel=1e-5)


def test_thresholds_by_default_are_the_papers():
    assert TrustRegion("binary_tv").thresholds == TrustRegion("topk_tv").thresholds == (0.15, 0.15)
    assert TrustRegion("binary_kl").thresholds == TrustRegion("topk_kl").thresholds == (0.05, 0.05)
    assert TrustRegion("binary_tv", 0.2).thresholds == (0.2, 0.2)
    assert TrustRegion("binary_kl", threshold_high=0.2).thresholds == (0.05, 0.2)


@pytest.mark.parametrize(
    "settings,name",
    [
        ({"divergence": "tv"}, "divergence"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.5}, "threshold"),
        ({"threshold": "0.1"}, "threshold"),
        ({"threshold": True}, "threshold"),
        ({"threshold_high": -1}, "threshold_high"),
        ({"divergence": "binary_kl", "threshold": -0.1}, "threshold"),
        ({"divergence": "topk_kl", "threshold_high": math.inf}, "threshold_high"),
        ({"divergence": "topk_kl", "threshold": math.nan}, "threshold"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"mask": "both"}, "mask"),
        ({"ratio_cap": 0}, "ratio_cap"),
        ({"ratio_cap": math.inf}, "ratio_cap"),
    ],
)
def test_bad_values_are_refused_by_name(settings, name, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        TrustRegion(**settings)
    # A configuration has names of its own
    own = {n: n if n in ("divergence", "ratio_cap") else f"divergence_{n}" for n in (*settings, name)}
    with pytest.raises(ValueError, match=f"`{own[name]}` must be"):
        make_args(tmp_path, **{"divergence": "binary_tv", **{own[n]: value for n, value in settings.items()}})


def test_thresholds_at_the_ends_are_allowed():
    assert TrustRegion("topk_tv", 1).thresholds == (1.0, 1.0)
    assert TrustRegion("binary_kl", 0).thresholds == (0.0, 0.0)
