"""What is known of a mixture from each member's likeliest tokens: exact likelihoods, and bounds of entropies."""

import pytest
import torch

from renyi.measures import token_uncertainty
from renyi.objectives import running_log_weights
from renyi.serve.rescored import rescored

M, N, V = 3, 6, 40


@pytest.fixture(scope="module")
def log_p() -> torch.Tensor:
    torch.manual_seed(0)
    return (2 * torch.randn(M, N, V, dtype=torch.float64)).log_softmax(-1)


WEIGHTS = [0.5, 0.2, 0.3]
TOKENS = [3, 39, 0, 17, 17, 8]


def named(log_p: torch.Tensor, several: int) -> list[list[dict[int, float]]]:
    return [
        [
            {t: float(row[t]) for t in [*row.topk(several).indices.tolist(), token]}
            for row, token in zip(own, TOKENS, strict=True)
        ]
        for own in log_p
    ]


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("several", [5, 20, V])
def test_likelihoods_are_exact_and_entropies_bounded(log_p: torch.Tensor, several: int, by_token: bool) -> None:
    found = rescored(named(log_p, several), TOKENS, WEIGHTS, by_token, alternatives=4, members=True)
    log_w = torch.tensor(WEIGHTS, dtype=torch.float64).log()
    for position, (token, told) in enumerate(zip(TOKENS, found, strict=True)):
        mixture = (log_w[:, None] + log_p[:, position]).logsumexp(0)
        exact = token_uncertainty(log_p[:, position], log_w)
        assert told.token == token
        assert told.log_prob == pytest.approx(float(mixture[token]), abs=1e-12)
        assert told.weights == pytest.approx(log_w.exp().tolist(), abs=1e-12)
        assert told.member_log_probs == log_p[:, position, token].tolist()
        assert told.variation_ratio == pytest.approx(float(exact.variation_ratio), abs=1e-12)
        for name in ("total", "aleatoric", "epistemic"):
            bound, value = getattr(told, name), float(getattr(exact, name))
            assert 0 <= bound <= value + 1e-12
            if several == V:
                assert bound == pytest.approx(value, abs=1e-9)
        for other, log_prob in told.alternatives:
            assert log_prob == pytest.approx(float(mixture[other]), abs=1e-12)
        assert [len(own) for own in told.member_alternatives] == [4] * M
        for own, row in zip(told.member_alternatives, log_p[:, position], strict=True):
            assert [other for other, _ in own] == row.topk(4).indices.tolist()
        if not by_token:
            log_w = running_log_weights(log_w, log_p[:, position, token])
    if several == V:
        first = (torch.tensor(WEIGHTS, dtype=torch.float64).log()[:, None] + log_p[:, 0]).logsumexp(0)
        assert [other for other, _ in found[0].alternatives] == first.topk(4).indices.tolist()
    total = sum(told.log_prob for told in found)
    own = log_p.gather(-1, torch.tensor(TOKENS).expand(M, N)[..., None])[..., 0]
    whole = (torch.tensor(WEIGHTS, dtype=torch.float64).log() + own.sum(1)).logsumexp(0)
    assert by_token or total == pytest.approx(float(whole), abs=1e-9)


def test_bounds_tighten(log_p: torch.Tensor) -> None:
    few, many = (rescored(named(log_p, several), TOKENS, WEIGHTS) for several in (5, 20))
    assert sum(told.epistemic for told in few) < sum(told.epistemic for told in many)
