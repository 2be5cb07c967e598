"""Routed steps against the plain joint forward: the same values, and its gradient exactly, but for what is left out."""

import itertools

import pytest
import torch
from tiny import VOCABULARY, padded_batch, tiny_ensemble
from torch import Tensor

from renyi import LoraEnsemble
from renyi.ensemble import routing as module
from renyi.ensemble.routing import Routing
from renyi.objectives import renyi_loss, responsibilities

ALPHA = 0.6


def loss_of(ensemble: LoraEnsemble, ids: Tensor, mask: Tensor, alpha: float = ALPHA) -> Tensor:
    return renyi_loss(ensemble(ids, mask).log_probs.sum(-1), alpha).sum()


def step(ensemble: LoraEnsemble, routing: Routing | None, ids: Tensor, mask: Tensor, alpha: float = ALPHA):
    """The loss and its gradients [P] by all parameters."""
    ensemble.train().zero_grad()
    ensemble.routing = routing
    loss = loss_of(ensemble, ids, mask, alpha)
    loss.backward()
    ensemble.routing = None
    return loss.item(), torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])


def shares(ensemble: LoraEnsemble, ids: Tensor, mask: Tensor, alpha: float = ALPHA) -> Tensor:
    with torch.no_grad():
        return responsibilities(ensemble(ids, mask).log_probs.sum(-1), alpha)


def route(alpha: float = ALPHA):
    return lambda ell_MB, tokens_B: responsibilities(ell_MB, alpha)


@pytest.mark.parametrize("budget", [1, 9, 20, 40])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_in_parts_is_the_whole_step(kind, budget):
    ensemble, (ids, mask) = tiny_ensemble(kind=kind), padded_batch()
    loss, gradient = step(ensemble, None, ids, mask)
    found_loss, found = step(ensemble, Routing(token_budget=budget), ids, mask)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert (found - gradient).norm() <= 1e-6 * gradient.norm()


def test_no_pass_is_larger_than_the_budget(monkeypatch):
    """None that keeps a graph; to score, an example is run under all members at once."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    seen, forward = [], ensemble.base.base_model.forward

    def watched(**given):
        seen.append((torch.is_grad_enabled(), given["input_ids"].numel()))
        return forward(**given)

    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    step(ensemble, Routing(token_budget=20), ids, mask)
    assert max(tokens for has_graph, tokens in seen if has_graph) <= 20
    assert max(tokens for _, tokens in seen) == 27


def test_checkpointed_steps_are_those_without_checkpoints():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    _, gradient = step(ensemble, None, ids, mask)
    ensemble.activation_checkpointing_enable()
    for kind in ("dense", "sparse", "raced"):
        routing = Routing(kind, 0.0, 20, responsibilities=route())
        _, found = step(ensemble, routing, ids, mask)
        if kind != "raced":  # which draws
            assert (found - gradient).norm() <= 1e-6 * gradient.norm()


def test_autocast_reaches_the_second_pass():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, gradient = step(ensemble, None, ids, mask)
        ensemble.train().zero_grad()
        ensemble.routing = Routing(token_budget=20)
        loss = loss_of(ensemble, ids, mask)
    loss.backward()  # outside, as trainers do
    found = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (found - gradient).norm() <= 0.02 * gradient.norm()
    assert (found - gradient).norm() > 0 or torch.equal(found, gradient)


def test_sparse_leaves_out_pairs_below_the_threshold_and_nothing_else():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    r_MB = shares(ensemble, ids, mask)
    threshold = r_MB.flatten().sort().values[4].item() + 1e-6
    kept_MB = (r_MB >= threshold).float()
    assert 0 < kept_MB.sum() < kept_MB.numel()
    _, found = step(ensemble, Routing("sparse", threshold), ids, mask)
    ensemble.zero_grad()
    (-(ensemble(ids, mask).log_probs.sum(-1) * r_MB * kept_MB).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    _, all_of_it = step(ensemble, None, ids, mask)
    _, none_dropped = step(ensemble, Routing("sparse", 1e-9), ids, mask)
    assert (none_dropped - all_of_it).norm() <= 1e-6 * all_of_it.norm()


def test_what_sparse_drops_moves_a_members_gradient_by_no_more_than_the_bound():
    """Σ r‖∇ℓ‖ over the pairs of a member that were dropped."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    r_MB, threshold = shares(ensemble, ids, mask), 0.3
    found, exact = (step(ensemble, routing, ids, mask)[1] for routing in (Routing("sparse", threshold), None))

    def by_member(flat: Tensor) -> Tensor:
        parameters = [p for p in ensemble.parameters() if p.requires_grad]
        parts = flat.split([p.numel() for p in parameters])
        return torch.cat([part.view(len(p), -1) for part, p in zip(parts, parameters, strict=True)], dim=1)

    bound_M = torch.zeros(3)
    for row in range(3):
        ensemble.zero_grad()
        ensemble(ids[[row]], mask[[row]]).log_probs.sum().backward()
        flat = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
        bound_M += (r_MB[:, row] * (r_MB[:, row] < threshold)) * by_member(flat).norm(dim=1)
    difference_M = (by_member(found) - by_member(exact)).norm(dim=1)
    assert bound_M.max() > 0
    assert (difference_M <= bound_M + 1e-5).all()


@pytest.mark.parametrize("undivided", [False, True])
def test_sampled_gradients_have_the_dense_one_as_their_mean(monkeypatch, undivided):
    """Exactly: over all draws, each weighted with its probability."""
    alpha = 0.0 if undivided else ALPHA
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    _, gradient = step(ensemble, None, ids, mask, alpha)
    share_MB = shares(ensemble, ids, mask, alpha)
    mean = torch.zeros_like(gradient)
    for drawn in itertools.product(range(3), repeat=3):
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn: torch.tensor(drawn)[:, None])
        _, found = step(ensemble, Routing("sampled", undivided=undivided), ids, mask, alpha)
        mean += share_MB[list(drawn), range(3)].prod() * found
    assert (mean - gradient).norm() <= 2e-6 * gradient.norm()


def test_drawn_members_are_the_only_ones_that_learn():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    step(ensemble, Routing("sampled"), ids[:1], mask[:1])
    learned = [p.grad.flatten(1).any(dim=1) for p in ensemble.parameters() if p.requires_grad]
    assert torch.stack(learned).any(dim=0).sum() == 1


def test_pairs_of_rows_go_to_one_member_together(monkeypatch):
    """A batch of preference pairs: chosen rows first."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    ids, mask, seen = ids.repeat(2, 1), mask.repeat(2, 1), []
    pairing = ensemble.pairing
    monkeypatch.setattr(ensemble, "pairing", lambda members: seen.append(members) or pairing(members))
    step(ensemble, Routing("sampled", rows_per_example=2), ids, mask)
    assert len(seen[0]) == 6
    # Pairs are run member by member; each member has both rows of an example or neither.
    assert all(seen[0].count(m) % 2 == 0 for m in range(3))


# The race


def long_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, VOCABULARY, (4, 50), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(50) < torch.tensor([[50], [40], [20], [16]])).long()
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_race_that_drops_nobody_scores_as_the_joint_forward_does(kind):
    ensemble, (ids, mask) = tiny_ensemble(kind=kind), long_batch()
    labels = ids.masked_fill(mask == 0, -100)
    routing = Routing("raced", 0.0, responsibilities=route())
    with torch.no_grad():
        found = module.race(ensemble, routing, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        plain = ensemble(ids, mask)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=2e-5, rtol=1e-5)
    assert torch.equal(found.is_top1, plain.is_top1)
    assert torch.equal(found.label_mask, plain.label_mask)
    assert (routing.scored, routing.dropped) == (1.0, 0.0)


def test_a_race_scores_who_is_left_exactly_and_leaves_the_others_behind():
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    labels = ids.masked_fill(mask == 0, -100)
    routing = Routing("raced", 0.05, responsibilities=route())
    with torch.no_grad():
        found = module.race(ensemble, routing, {"input_ids": ids, "attention_mask": mask, "labels": labels})
        plain_MB = ensemble(ids, mask).log_probs.sum(-1)
    found_MB = found.log_probs.sum(-1)
    left_MB = torch.isclose(found_MB, plain_MB, atol=1e-3)
    assert left_MB.any(dim=0).all()
    assert not left_MB.all()
    assert (responsibilities(found_MB, ALPHA)[~left_MB] < 0.06).all()
    assert 0 < routing.scored < 1
    assert 0 < routing.dropped < 0.05 * 3


def test_a_raced_step_trains_who_won():
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    _, found = step(ensemble, Routing("raced", 0.05, responsibilities=route()), ids, mask)
    assert found.isfinite().all()
    assert found.any()
