"""Rows routed by the scores of an earlier visit: exact while members stand still, else a fixed E-step."""

import itertools

import pytest
import torch
from tiny import padded_batch, scatter_members, tiny_ensemble
from torch import Tensor

from renyi import LoraEnsemble
from renyi.objectives import renyi_loss, responsibilities
from renyi.routing import ROUTED_ROW, KeptScores, Router, RoutingPlan

ALPHA = 0.6
ROWS = torch.tensor([4, 0, 2])  # of a dataset of five


def router_of(ensemble: LoraEnsemble, refresh: int = 2) -> Router:
    router = Router(ensemble.train(), RoutingPlan("sampled"))
    router.kept = KeptScores(3, 5, refresh)
    return router


def gradient_of(ensemble: LoraEnsemble, loss: Tensor) -> Tensor:
    ensemble.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])


@pytest.mark.parametrize("moved", [False, True])
def test_the_mean_over_draws_is_the_gradient_with_kept_responsibilities(monkeypatch, moved):
    """Exactly, over all draws: of the loss itself if members stand still, else of Σ r ℓ with r of the kept scores."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    batch = {"input_ids": ids, "attention_mask": mask, ROUTED_ROW: ROWS}
    router = router_of(ensemble, refresh=100)
    assert router.forward(batch, ALPHA).statistics.scored == 1
    kept_ME = ensemble(ids, mask).log_probs.sum(-1).detach()
    torch.testing.assert_close(router.kept.ell_MN[:, ROWS], kept_ME.double())
    if moved:
        scatter_members(ensemble, seed=7)
    r_ME, ell_ME = responsibilities(kept_ME, ALPHA), ensemble(ids, mask).log_probs.sum(-1)
    expected = gradient_of(ensemble, -(r_ME * ell_ME).sum())
    mean = torch.zeros_like(expected)
    for drawn in itertools.product(range(3), repeat=3):
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn: torch.tensor(drawn)[:, None])
        routed = router.forward(batch, ALPHA)
        assert routed.statistics.scored == 0
        found_ME = routed.output.log_probs.sum(-1)
        # Only the drawn member was run. The others keep their distance from it.
        torch.testing.assert_close(found_ME[list(drawn), range(3)], ell_ME[list(drawn), range(3)])
        torch.testing.assert_close(found_ME - found_ME[:1], kept_ME - kept_ME[:1])
        loss = renyi_loss(found_ME, ALPHA).sum()
        if not moved:
            assert loss.item() == pytest.approx(renyi_loss(ell_ME, ALPHA).sum().item(), rel=1e-6)
        mean += r_ME[list(drawn), range(3)].prod() * gradient_of(ensemble, loss)
    assert (mean - expected).norm() <= 2e-6 * expected.norm()


def test_a_row_is_scored_again_after_as_many_visits_as_were_asked_for():
    kept, rows = KeptScores(2, 5, refresh=3), torch.tensor([1, 3])
    assert kept.visit(rows) is None  # nothing is known
    assert kept.are_due(rows).all()
    kept.record(rows, torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]))
    assert kept.visit(rows).tolist() == [[-1, -2], [-3, -4]]
    assert kept.visit(rows[:1]).tolist() == [[-1], [-3]]
    assert kept.visit(rows) is None  # row 1 is due, and with it the batch
    assert kept.are_due(rows).tolist() == [True, False]
    assert kept.visit(rows[1:]).tolist() == [[-2], [-4]]
    assert kept.visit(torch.tensor([3])) is None
    assert kept.visit(torch.tensor([0])) is None


def test_batches_without_row_numbers_are_scored():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    router = router_of(ensemble)
    for _ in range(2):
        assert router.forward({"input_ids": ids, "attention_mask": mask}, ALPHA).statistics.scored == 1


def test_alpha_zero_needs_no_scores_and_counts_no_visit():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    router = router_of(ensemble)
    batch = {"input_ids": ids, "attention_mask": mask, ROUTED_ROW: ROWS}
    assert router.forward(batch, 0.0).statistics.scored == 0
    assert not router.kept.visits_N.any()
    assert router.kept.ell_MN.isnan().all()
    assert router.forward(batch, ALPHA).statistics.scored == 1


def test_scores_of_other_rows_are_refused(tmp_path):
    kept, file = KeptScores(2, 5, refresh=2), tmp_path / "scores.safetensors"
    kept.record(torch.tensor([1]), torch.tensor([[-1.0], [-2.0]]))
    kept.save(file)
    again = KeptScores(2, 5, refresh=2)
    again.restore(file)
    assert again.ell_MN[:, 1].tolist() == [-1, -2]
    assert again.ell_MN[:, 0].isnan().all()
    assert again.visits_N.tolist() == [0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"log_likelihood of shape \[2, 5\], not \[2, 4\]"):
        KeptScores(2, 4, refresh=2).restore(file)
