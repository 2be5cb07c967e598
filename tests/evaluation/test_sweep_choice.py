"""A sweep's figures against their definitions, and its choice against numbers made up for it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from renyi.evaluation.bootstrap import Estimate
from renyi.evaluation.sweep_choice import (
    Cell,
    CellQuality,
    HeldOut,
    SweepEvaluation,
    choose,
    evaluate_sweep,
    ratio_standard_error,
    why,
)
from renyi.evaluation.sweep_figure import draw_sweep

ONE, LOW, HIGH, MANY = Cell(1, 0.0), Cell(2, 0.3), Cell(2, 0.8), Cell(4, 0.5)


def held_out(members: int, seed: int, shift: float = 0.0, examples: int = 200) -> HeldOut:
    """Likelihoods of examples of 1 to 9 tokens, about 1 nat a token, the same tokens for every seed."""
    units_N = torch.randint(1, 10, (examples,), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ell_MN = -units_N * (1 + shift + 0.3 * torch.randn(members, examples, generator=generator, dtype=torch.float64))
    confidence_K = torch.rand(500, generator=generator, dtype=torch.float64)
    is_right_K = torch.rand(500, generator=generator, dtype=torch.float64) < confidence_K
    return HeldOut(ell_MN, units_N, torch.full((members,), 1 / members), confidence_K, is_right_K)


def quality(nll: float, behind: float, error: float = 0.01) -> CellQuality:
    return CellQuality(Estimate(nll, nll - 0.1, nll + 0.1), Estimate(behind, behind - 0.02, behind + 0.02), error,
                       nll, 0.0, 1.0, 0.1, [1.0])  # fmt: skip


# ---- The choice ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behind", "chosen"),
    [
        ({ONE: (0.3, 0.1), LOW: (0.2, 0.1), HIGH: (0.11, 0.1), MANY: (0.0, 0.0)}, MANY),  # all others are farther
        ({ONE: (0.3, 0.1), LOW: (0.1, 0.1), HIGH: (0.01, 0.1), MANY: (0.0, 0.0)}, LOW),  # fewer members, smaller alpha
        ({ONE: (0.3, 0.1), LOW: (0.2, 0.1), HIGH: (0.01, 0.1), MANY: (0.0, 0.0)}, HIGH),  # members before alpha
        ({ONE: (0.05, 0.1), LOW: (0.0, 0.0), HIGH: (0.01, 0.1), MANY: (0.02, 0.1)}, ONE),
        ({ONE: (0.0, 0.0), LOW: (0.0, 0.0)}, ONE),
        ({LOW: (0.1, math.nan), MANY: (0.0, math.nan)}, MANY),  # one example has no standard error
    ],
)
def test_the_cheapest_within_one_standard_error(behind: dict[Cell, tuple[float, float]], chosen: Cell) -> None:
    assert choose(behind) == chosen


@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)), min_size=1, max_size=6))
def test_nothing_cheaper_is_as_good_as_the_choice(others: list[tuple[float, float]]) -> None:
    cells = {Cell(1 + i, 0.0): pair for i, pair in enumerate([*others, (0.0, 0.0)])}
    chosen = choose(cells)
    assert cells[chosen][0] <= cells[chosen][1]
    assert all(difference > error for cell, (difference, error) in cells.items() if cell < chosen)


def test_the_reason_names_who_comes_next_and_by_how_much() -> None:
    cells = {ONE: quality(0.9, 0.4), HIGH: quality(0.505, 0.005), MANY: quality(0.5, 0.0)}
    cheaper = why(SweepEvaluation(cells, MANY, HIGH, MANY), "token")
    for part in ("2 members at alpha 0.8: the fewest", "4 members at alpha 0.5 have", "0.5000 nats a token",
                 "0.0050 behind", "standard error of 0.0100"):  # fmt: skip
        assert part in cheaper
    best = why(SweepEvaluation(cells, MANY, MANY, HIGH), "token")
    for part in ("4 members at alpha 0.5: the smallest", "no cheaper cell", "next best are 2 members at alpha 0.8",
                 "0.0050 [-0.0150, 0.0250] behind"):  # fmt: skip
        assert part in best
    assert "no cheaper cell" not in why(SweepEvaluation(cells, ONE, ONE, HIGH), "token")
    assert "the only cell" in why(SweepEvaluation({ONE: cells[ONE]}, ONE, ONE, None), "token")


# ---- The figures -----------------------------------------------------------------------------------------------------


def test_figures_are_their_definitions() -> None:
    single, pair = held_out(1, seed=1), held_out(2, seed=2, shift=0.3)
    pair = pair._replace(weights=torch.tensor([0.25, 0.75], dtype=torch.float64))
    found = evaluate_sweep({LOW: pair, ONE: single})
    assert list(found.cells) == [ONE, LOW]
    assert (found.best, found.runner_up) == (ONE, LOW)
    tokens = pair.units.sum().item()
    p_MN = pair.log_likelihood.exp()
    joint_MN = torch.tensor([[0.25], [0.75]]) * p_MN
    mixture_N = -joint_MN.sum(dim=0).log()
    r_MN = joint_MN / joint_MN.sum(dim=0)
    q = found.cells[LOW]
    assert q.mixture_nll.value == pytest.approx(mixture_N.sum().item() / tokens)
    assert q.member_nll == pytest.approx((-pair.log_likelihood.T @ pair.weights).sum().item() / tokens)
    assert q.jensen_gap == pytest.approx(q.member_nll - q.mixture_nll.value)
    assert q.effective_members == pytest.approx(torch.exp(-(r_MN * r_MN.log()).sum(dim=0)).mean().item())
    assert q.member_load == pytest.approx(r_MN.mean(dim=1).tolist())
    assert q.behind.value == pytest.approx(q.mixture_nll.value - found.cells[ONE].mixture_nll.value)
    assert q.mixture_nll.low < q.mixture_nll.value < q.mixture_nll.high
    assert q.behind.low < q.behind.value < q.behind.high
    assert found.cells[ONE].behind == (0, 0, 0)


def test_calibration_is_that_of_bins() -> None:
    """Nine in ten right at a confidence of 0.7, and one in ten at 0.1: off by 0.2 and by nothing."""
    right = torch.tensor([True] * 9 + [False] + [True] + [False] * 9)
    cell = held_out(1, 1)._replace(confidence=torch.tensor([0.7] * 10 + [0.1] * 10).double(), is_right=right)
    assert evaluate_sweep({ONE: cell}).cells[ONE].ece == pytest.approx(0.1)
    sure = cell._replace(confidence=torch.ones(20).double(), is_right=torch.ones(20).bool())
    assert evaluate_sweep({ONE: sure}).cells[ONE].ece == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_a_means_and_the_bootstraps() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=400)
    assert ratio_standard_error(values, np.ones(400)) == pytest.approx(values.std(ddof=1) / 20)
    tokens = generator.integers(1, 20, 400)
    rates = generator.normal(1, 0.5, 400) * tokens
    drawn = generator.integers(400, size=(4000, 400))
    assert ratio_standard_error(rates, tokens) == pytest.approx(
        (rates[drawn].sum(axis=1) / tokens[drawn].sum(axis=1)).std(), rel=0.05
    )
    assert math.isnan(ratio_standard_error([1.0], [2.0]))


def test_a_difference_of_two_like_cells_is_surer_than_either() -> None:
    """What examples differ in by themselves is in both cells, and not in their difference."""
    one = held_out(1, seed=1)
    other = one._replace(log_likelihood=one.log_likelihood - 0.01 * one.units)
    q = evaluate_sweep({ONE: one, LOW: other}).cells[LOW]
    assert q.behind == pytest.approx((0.01, 0.01, 0.01))
    assert q.mixture_nll.high - q.mixture_nll.low > 0.02
    assert q.standard_error == pytest.approx(0, abs=1e-9)
    assert choose({ONE: (0.0, 0.0), LOW: (q.behind.value, q.standard_error)}) == ONE


def test_cells_of_other_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="different examples"):
        evaluate_sweep({ONE: held_out(1, 1), LOW: held_out(2, 1, examples=100)})


def test_the_figure_is_drawn_of_any_grid() -> None:
    grids = [{ONE: held_out(1, 1)}, {LOW: held_out(2, 1, shift=5.0), MANY: held_out(4, 2)}]
    for cells in [*grids, {**grids[0], **grids[1]}]:
        for resamples in (0, 50):
            found = evaluate_sweep(cells, resamples)
            assert draw_sweep(found.cells, found.chosen, "pair").startswith(b"\x89PNG")
