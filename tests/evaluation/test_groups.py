"""Figures by group: equal to those of each group's rows alone, and linear in the number of rows."""

import time

import numpy as np
import pytest
import torch

from renyi.evaluation import Opinion, evaluate_choice, evaluate_refusal, specialisation
from renyi.evaluation.member_groups import rows_by_group
from renyi.evaluation.metrics import ece, ece_by_group

N, M, C = 60, 3, 4


@pytest.fixture(scope="module")
def opinion() -> Opinion:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(M, N, C, generator=generator, dtype=torch.float64)
    return Opinion(logits.log_softmax(-1), torch.tensor([0.5, 0.3, 0.2]))


def test_a_group_is_its_rows_alone(opinion: Opinion) -> None:
    draw = np.random.default_rng(0)
    labels, names = draw.integers(C, size=N).tolist(), draw.choice(["$x$", "b", "a_b", "é"], size=N).tolist()
    found = evaluate_choice(opinion, labels, groups=names, resamples=0)
    assert found.groups is not None
    assert [g.group for g in found.groups] == sorted(set(names))
    for group in found.groups:
        rows = np.flatnonzero([name == group.group for name in names])
        of_rows = [labels[i] for i in rows]
        alone = evaluate_choice(opinion.rows(rows), of_rows, resamples=0)
        mixture, *members = alone.systems
        assert group.questions == len(rows)
        assert group[2:5] == pytest.approx((mixture.accuracy.value, mixture.nll.value, mixture.ece.value))
        assert group.members == pytest.approx([m.accuracy.value for m in members])
        assert ece_by_group(opinion.mixture()[rows], of_rows, np.zeros(len(rows), int)) == pytest.approx(
            [ece(opinion.mixture()[rows], of_rows)]
        )


def test_members_against_groups_by_hand() -> None:
    ell = [[-1.0, -2.0, -3.0, -1.0], [-2.0, -1.0, -1.0, -3.0]]
    found = specialisation(ell, [0.5, 0.5], ["a", "b", "b", "b"])
    assert found.groups == ["a", "b"]
    assert found.log_likelihood == [[-1.0, -2.0], pytest.approx([-2.0, -5 / 3])]
    assert found.led == [pytest.approx([1, 1 / 3]), pytest.approx([0, 2 / 3])]


def test_a_group_for_every_row_takes_no_time(opinion: Opinion) -> None:
    """Of 8,000 groups: what looks at every row for every group takes a minute, or gigabytes."""
    many = 8_000
    names = [f"group {i}" for i in range(many)]
    repeated = Opinion(opinion.log_probs.repeat(1, many // N + 1, 1)[:, :many], opinion.weights)
    evaluate_choice(opinion, [0] * N, resamples=0)  # which imports what takes seconds
    started = time.process_time()
    assert len(rows_by_group(names)) == many
    found = evaluate_choice(repeated, [0] * many, groups=names, resamples=0)
    refused = evaluate_refusal(np.zeros((many, M)), None, [1, 1, 1], names)
    assert time.process_time() - started < 10
    assert found.groups is not None
    assert refused.groups is not None
    assert len(found.groups) == len(refused.groups) == many
