"""What routing counts, by hand: shares of the gradient, what was left out, and the choice of "auto"."""

import math

import pytest
import torch

from renyi.objectives import renyi_loss
from renyi.routing import AutoRouting, PassStatistics, RoutingPlan, member_shares, member_sums, pair_sums, routing_sums

SHARES = torch.tensor([[0.7, 0.5, 0.95, 0.2], [0.3, 0.5, 0.05, 0.8]])


def means(sums: dict) -> dict[str, float]:
    """What is logged: each sum divided by its number."""
    return {name: (total / number).item() for name, (total, number) in sums.items()}


def test_shares_are_sizes_of_gradients_and_pairs_add_both_rows():
    upstream = torch.tensor(
        [[[1.0, -2.0], [0.0, 0.0], [0.5, 0.5], [1.0, 0.0]], [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0, 3]]]
    )
    torch.testing.assert_close(
        member_shares(upstream, 1), torch.tensor([[0.75, 0.0, 0.5, 0.25], [0.25, 0.0, 0.5, 0.75]])
    )
    torch.testing.assert_close(member_shares(upstream, 2), torch.tensor([[4 / 6, 0.25], [2 / 6, 0.75]]))


def test_dense_leaves_nothing_out():
    found = pair_sums(SHARES, SHARES, RoutingPlan("dense", threshold=0.4), PassStatistics())
    assert means(found) == {"routing/active": 1.0, "routing/dropped": 0.0, "routing/scored": 1.0}
    assert all(number == 4 for _, number in found.values())


def test_sparse_counts_the_pairs_below_the_threshold_by_share_and_drops_their_responsibility():
    r = torch.tensor([[0.6, 0.5, 0.9, 0.3], [0.4, 0.5, 0.1, 0.7]])
    found = means(pair_sums(SHARES, r, RoutingPlan("sparse", threshold=0.3), PassStatistics(scored=0.5)))
    assert found["routing/active"] == pytest.approx(6 / 8)  # 0.3 is not below 0.3
    assert found["routing/dropped"] == pytest.approx((0.3 + 0.1) / 4)
    assert found["routing/scored"] == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["sampled", "raced"])
def test_a_drawn_member_is_one_of_all_and_the_race_says_what_it_dropped(kind):
    found = pair_sums(SHARES, SHARES, RoutingPlan(kind), PassStatistics(scored=0.4, dropped=0.02))
    assert means(found) == pytest.approx({"routing/active": 0.5, "routing/dropped": 0.02, "routing/scored": 0.4})
    assert all(number == 4 for _, number in found.values())


def test_losses_are_logged_by_unit_and_loads_by_example():
    ell, log_weights = torch.tensor([[-1.0, -8.0], [-3.0, -2.0]]), torch.tensor([0.25, 0.75]).log()
    found = means(routing_sums(ell, SHARES[:, :2], log_weights, torch.tensor(10)))
    members = (0.25 * 9.0 + 0.75 * 5.0) / 10
    mixture = renyi_loss(ell, 1.0, log_weights).sum().item() / 10
    assert found["nll_members"] == pytest.approx(members)
    assert found["nll_mixture"] == pytest.approx(mixture)
    assert found["jensen_gap"] == pytest.approx(members - mixture)
    assert found["member_load/0"] == pytest.approx(0.6)
    assert found["member_load/1"] == pytest.approx(0.4)
    doubt = math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.3))
    assert found["effective_members"] == pytest.approx((doubt + 2.0) / 2)
    assert means(member_sums(SHARES[:, :2])).items() <= found.items()


def test_auto_follows_the_share_of_active_pairs_and_compares_costs():
    auto = AutoRouting()
    assert (auto.choice("auto"), auto.state()) == ("dense", {"scoring_cost": None, "active": None})
    auto.observe(SHARES, 0.3)
    assert auto.active == pytest.approx(6 / 8)
    auto.observe(SHARES, 0.9)
    assert auto.active == pytest.approx(0.75 + 0.1 * (1 / 8 - 0.75))
    for cost, active, kind in (
        (0.25, 0.5, "sparse"),
        (0.5, 0.5, "dense"),
        (0.25, 0.71, "dense"),
        (0.25, 0.69, "sparse"),
        (0.25, None, "dense"),
        (None, 0.0, "dense"),
    ):
        auto.scoring_cost, auto.active = cost, active
        assert auto.choice("auto") == kind
    assert AutoRouting(0.25, 0.69).state() == {"scoring_cost": 0.25, "active": 0.69}


@pytest.mark.parametrize(("active", "kind"), [(None, "sparse"), (0.4, "sparse"), (0.41, "dense"), (1.0, "dense")])
def test_sparse_leaves_pairs_out_where_that_saves_time(active, kind):
    assert AutoRouting(active=active).choice("sparse") == kind
    assert [AutoRouting(active=active).choice(other) for other in ("dense", "raced")] == ["dense", "raced"]
