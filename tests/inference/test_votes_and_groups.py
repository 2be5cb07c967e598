"""Scores and diagnoses of votes and of groups: closed forms, sums over rows, and rows that are groups of one."""

import pytest
import torch
from datasets import Dataset
from float64 import in_float64
from tiny import pair_rows, text_rows, tiny_ensemble, tiny_tokenizer

from renyi.data import PairPreparation, Preparation, prepare, prepare_pairs
from renyi.ensemble import Reference
from renyi.ensemble.curvature import AdapterSpace
from renyi.errors import DataError
from renyi.inference import diagnose, score, score_pairs
from renyi.inference.diagnose import Pairs, loadings_along
from renyi.objectives import PreferenceLoss, outcome_log_probs, responsibilities

LOSS = PreferenceLoss(beta=2.0)


def pairs_with(loss: PreferenceLoss = LOSS, number: int = 12, group: str | None = None, **columns):
    rows = pair_rows(number)
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    preparation = PairPreparation(routing_group=group)
    ensemble = tiny_ensemble(3)
    prepared = prepare_pairs(rows, tiny_tokenizer(), preparation)
    return ensemble, prepared, loss, Reference(ensemble), preparation


def test_votes_are_scored_as_their_product():
    loss = PreferenceLoss(beta=2.0, tie_strength=0.6)
    votes = {"votes_chosen": [2] * 12, "votes_rejected": [1] * 12, "votes_tie": [3] * 12}
    counts = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    for found in score_pairs(*pairs_with(loss, **votes)):
        assert found.votes == (2, 1, 3)
        ell = outcome_log_probs(torch.tensor(found.margin, dtype=torch.float64), 0.6) @ counts
        assert found.log_likelihood == pytest.approx(ell.tolist(), abs=1e-4)
        assert found.mixture_nll == pytest.approx(-(ell.logsumexp(0) - torch.tensor(3.0).log()).item(), abs=1e-4)


def test_one_vote_changes_no_score():
    plain = score_pairs(*pairs_with())
    voted = score_pairs(*pairs_with(votes_chosen=[1] * 12, votes_rejected=[0] * 12))
    for one, other in zip(plain, voted, strict=True):
        assert one.log_likelihood == other.log_likelihood
        assert one.mixture_nll == pytest.approx(other.mixture_nll, abs=1e-6)  # weights are float32
        assert (one.votes, other.votes) == (None, (1, 0, 0))


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_group_shares_one_responsibility(method):
    names = [f"g{i % 3}" for i in range(12)]
    if method == "dpo":
        ensemble, *rest = pairs_with(group="author", author=names)
        scores = score_pairs(ensemble, *rest)
    else:
        ensemble, rows = tiny_ensemble(3), text_rows(12).add_column("author", names)
        scores = score(ensemble, prepare(rows, tiny_tokenizer(), Preparation(routing_group="author")))
    ell_MN = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T
    for s in scores:
        of_group = ell_MN[:, [i for i, name in enumerate(names) if name == s.group]].sum(dim=1)
        assert s.group_responsibilities == pytest.approx(responsibilities(of_group, ensemble.alpha).tolist())
    assert [s.group for s in scores] == names


def diagnosed(number: int = 64, group: str | None = None, loss: PreferenceLoss = LOSS, **columns):
    ensemble, prepared, loss, reference, preparation = pairs_with(loss, number, group, **columns)
    return diagnose(ensemble, prepared, Pairs(loss, reference, preparation), num_directions=8, max_examples=number)


def test_k_equal_votes_divide_the_critical_alpha_by_k():
    """V of k labels is k times that of one, and J is k² times: 1/k in closed form."""
    one = diagnosed()
    four = diagnosed(votes_chosen=[4] * 64, votes_rejected=[0] * 64)
    assert four.critical_alpha == pytest.approx(one.critical_alpha / 4, rel=1e-4)
    assert diagnosed(votes_chosen=[1] * 64, votes_rejected=[0] * 64).critical_alpha == one.critical_alpha


@pytest.mark.parametrize("tie_strength", [0.0, 0.6])
def test_votes_are_laid_along_directions_as_finite_differences_are(tie_strength):
    loss, many = PreferenceLoss(beta=2.0, tie_strength=tie_strength), 8
    votes = {"votes_chosen": [2, 0] * 4, "votes_rejected": [1, 3] * 4, "votes_tie": [1 if tie_strength else 0] * many}
    with in_float64():
        ensemble, rows, *given = pairs_with(loss, many, **votes)
        pairs, space, step = Pairs(*given), AdapterSpace(ensemble), 1e-4
        v = torch.randn(space.size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v /= v.norm(dim=0)
        ell, loadings = loadings_along(ensemble, rows, v, pairs)

        def moved(offset):
            with ensemble.acting_as(space.displaced(offset.expand(3, -1))):
                return torch.tensor([s.log_likelihood[0] for s in score_pairs(ensemble, rows, *given)])

        slopes = torch.stack([moved(step * u) - moved(-step * u) for u in v.T], dim=1) / (2 * step)
        torch.testing.assert_close(loadings.to(slopes), slopes, rtol=1e-4, atol=1e-5)
        expected = [s.log_likelihood[0] for s in score_pairs(ensemble, rows, *given)]
    assert ell.tolist() == pytest.approx(expected, rel=1e-6)


def test_groups_of_one_row_are_rows():
    rows, groups = diagnosed(), diagnosed(group="author", author=list(range(64)))
    assert groups.critical_alpha > 0
    assert sorted(groups.groups, key=int) == [str(i) for i in sorted(groups.examples)]
    assert rows.groups is None


def test_a_group_of_k_copies_divides_the_critical_alpha_by_k():
    """Rows of a group that agree entirely: V is k times that of a row, and J is k² times."""
    ensemble = tiny_ensemble(3)
    once = pair_rows(48).add_column("author", list(range(48)))
    thrice = Dataset.from_list([row for row in once for _ in range(3)])
    found = []
    for rows in (once, thrice):
        preparation = PairPreparation(routing_group="author")
        prepared = prepare_pairs(rows, tiny_tokenizer(), preparation)
        pairs = Pairs(LOSS, Reference(ensemble), preparation)
        found.append(diagnose(ensemble, prepared, pairs, num_directions=8, max_examples=len(rows)))
    assert found[1].critical_alpha == pytest.approx(found[0].critical_alpha / 3, rel=1e-3)
    assert len(found[1].groups) == len(found[0].groups) == 24
    with pytest.raises(DataError, match="3 groups are too few"):
        diagnosed(group="author", author=[i % 3 for i in range(64)])
