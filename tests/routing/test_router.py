"""Routed steps against the plain joint forward: the same values, and its gradient exactly, but for what is left out."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from float64 import SAME
from tiny import VOCABULARY, lora, padded_batch, scatter_members, tiny_ensemble, tiny_model
from torch import Tensor

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.objectives import renyi_loss, responsibilities
from renyi.routing import Router, RoutingPlan
from renyi.routing.plan import take_examples
from renyi.routing.race import race

ALPHA = 0.6


def step(ensemble: LoraEnsemble, plan: RoutingPlan | None, ids: Tensor, mask: Tensor, alpha: float = ALPHA):
    """The loss and its gradients [P] by all parameters; without a plan, those of the plain forward."""
    ensemble.train().zero_grad()
    batch = {"input_ids": ids, "attention_mask": mask}
    output = ensemble(**batch) if plan is None else Router(ensemble, plan).forward(batch, alpha).output
    loss = renyi_loss(output.log_probs.sum(-1), alpha).sum()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])


def shares(ensemble: LoraEnsemble, ids: Tensor, mask: Tensor, alpha: float = ALPHA) -> Tensor:
    with torch.no_grad():
        return responsibilities(ensemble(ids, mask).log_probs.sum(-1), alpha)


@pytest.mark.parametrize("budget", [1, 9, 20, 40])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_in_parts_is_the_whole_step(kind, budget):
    ensemble, (ids, mask) = tiny_ensemble(kind=kind).double(), padded_batch()
    loss, gradient = step(ensemble, None, ids, mask)
    found_loss, found = step(ensemble, RoutingPlan(token_budget=budget), ids, mask)
    assert found_loss == pytest.approx(loss, rel=SAME)
    assert (found - gradient).norm() <= SAME * gradient.norm()
    router = Router(ensemble, RoutingPlan(token_budget=budget))
    output, plain = router.forward({"input_ids": ids, "attention_mask": mask}, ALPHA).output, ensemble(ids, mask)
    for name in ("log_probs", "label_mask", "is_top1"):
        torch.testing.assert_close(getattr(output, name), getattr(plain, name))
    torch.testing.assert_close(output.entropy * output.label_mask, plain.entropy * plain.label_mask)


@pytest.mark.parametrize("budget", [5, 9, 20])
def test_no_pass_is_larger_than_the_budget(monkeypatch, budget):
    """None that keeps a graph, but for one row; to score, an example is run under all members at once."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    seen, forward = [], ensemble.base.base_model.forward

    def watched(**given):
        seen.append((torch.is_grad_enabled(), given["input_ids"].numel()))
        return forward(**given)

    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    step(ensemble, RoutingPlan(token_budget=budget), ids, mask)
    assert max(tokens for has_graph, tokens in seen if has_graph) <= max(budget, 9)
    assert max(tokens for _, tokens in seen) == 27


@pytest.mark.parametrize("alpha", [0.0, ALPHA])
@pytest.mark.parametrize("kind", ["dense", "sparse", "sampled", "raced"])
def test_checkpointed_steps_are_those_without_checkpoints(kind, alpha):
    """Blocks that run again in the backward see the members that they saw first, also those that were drawn."""
    ensemble, (ids, mask) = tiny_ensemble().double(), padded_batch()
    plan = RoutingPlan(kind, 0.0, 27 if kind in ("sampled", "raced") else 20)
    torch.manual_seed(0)
    _, gradient = step(ensemble, plan, ids, mask, alpha)
    ensemble.activation_checkpointing_enable()
    torch.manual_seed(0)
    _, found = step(ensemble, plan, ids, mask, alpha)
    assert (found - gradient).norm() <= SAME * gradient.norm()


def test_as_many_rows_as_members_are_still_told_apart_when_blocks_run_again(monkeypatch):
    """Three rows and three members: shapes alone would not show that all rows went to other members."""
    ensemble, (ids, mask) = tiny_ensemble().double(), padded_batch()
    ensemble.activation_checkpointing_enable()
    monkeypatch.setattr(torch, "multinomial", lambda *_: torch.tensor([2, 2, 0])[:, None])
    _, found = step(ensemble, RoutingPlan("sampled"), ids, mask, 0.0)
    ensemble.zero_grad()
    (-ensemble(ids, mask).log_probs.sum(-1)[[2, 2, 0], [0, 1, 2]].sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (found - expected).norm() <= 1e-6 * expected.norm()  # mixture weights are float32


@pytest.mark.parametrize("plan", [RoutingPlan("sampled"), RoutingPlan("sparse"), RoutingPlan(token_budget=20)])
def test_reentrant_checkpoints_are_refused_where_members_would_be_mixed_up(plan):
    ensemble, (ids, mask) = tiny_ensemble().train(), padded_batch()
    ensemble.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant") as refused:
        Router(ensemble, plan).forward({"input_ids": ids, "attention_mask": mask}, 0.0)
    assert refused.value.where == "gradient_checkpointing_kwargs"
    Router(ensemble, RoutingPlan()).forward({"input_ids": ids, "attention_mask": mask}, 0.0)


def test_autocast_reaches_the_second_pass(monkeypatch):
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    seen, forward = [], ensemble.base.base_model.forward

    def watched(**given):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return forward(**given)

    with torch.autocast("cpu", torch.bfloat16):
        _, gradient = step(ensemble, None, ids, mask)
        ensemble.train().zero_grad()
        router = Router(ensemble, RoutingPlan(token_budget=20))
        output, _ = router.forward({"input_ids": ids, "attention_mask": mask}, ALPHA)
        loss = renyi_loss(output.log_probs.sum(-1), ALPHA).sum()
    loss.backward()  # outside, as trainers do
    found = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (found - gradient).norm() <= 0.02 * gradient.norm()
    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    with torch.autocast("cpu", torch.float16):  # not what a CPU's autocast would take by itself
        output, _ = router.forward({"input_ids": ids, "attention_mask": mask}, ALPHA)
    scored = len(seen)
    output.log_probs.sum().backward()
    assert len(seen) > scored
    assert set(seen) == {torch.float16}


def test_a_packed_row_is_run_under_one_member_at_a_time(monkeypatch):
    """The boundaries of its examples belong to one row, so a pass has no second one, although the budget allows it."""
    ensemble, length = tiny_ensemble().double().train(), 10
    ids = torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    begins = torch.tensor([0, 4, length], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    batch = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": begins, "cu_seq_lens_k": begins}
    batch |= {"labels": ids.masked_fill(positions == 0, -100), "max_length_q": 6, "max_length_k": 6}
    renyi_loss(ensemble(**batch).log_probs.sum(-1), ALPHA).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    ensemble.zero_grad()
    seen, forward = [], ensemble.base.base_model.forward

    def watched(**given):
        seen.extend([len(given["input_ids"])] * torch.is_grad_enabled())
        return forward(**given)

    monkeypatch.setattr(ensemble.base.base_model, "forward", watched)
    output = Router(ensemble, RoutingPlan(token_budget=2 * length)).forward(batch, ALPHA).output
    renyi_loss(output.log_probs.sum(-1), ALPHA).sum().backward()
    found = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert seen == [1, 1, 1]
    assert (found - expected).norm() <= SAME * expected.norm()


@pytest.mark.parametrize("budget", [9, 20])
def test_an_example_has_its_own_noise_in_every_part(budget):
    """Members draw noise for each example by its place in the step, in whatever pass it is run."""
    made = LoraEnsemble.from_base(tiny_model(), 3, lora(), seed=7, member_kind="gaussian")
    ensemble, (ids, mask) = scatter_members(made), padded_batch()
    ensemble.stack.set_std(0.3)
    ensemble.redraw(5)
    loss, gradient = step(ensemble, None, ids, mask)
    found_loss, found = step(ensemble, RoutingPlan(token_budget=budget), ids, mask)
    assert found_loss == pytest.approx(loss, rel=SAME)
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()


def test_sparse_leaves_out_pairs_below_the_threshold_and_nothing_else():
    ensemble, (ids, mask) = tiny_ensemble().double(), padded_batch()
    r_MB = shares(ensemble, ids, mask)
    threshold = r_MB.flatten().sort().values[4].item() + 1e-6
    kept_MB = (r_MB >= threshold).float()
    assert 0 < kept_MB.sum() < kept_MB.numel()
    _, found = step(ensemble, RoutingPlan("sparse", threshold), ids, mask)
    ensemble.zero_grad()
    (-(ensemble(ids, mask).log_probs.sum(-1) * r_MB * kept_MB).sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (found - expected).norm() <= SAME * expected.norm()
    _, all_of_it = step(ensemble, None, ids, mask)
    _, none_dropped = step(ensemble, RoutingPlan("sparse", 1e-9), ids, mask)
    assert (none_dropped - all_of_it).norm() <= SAME * all_of_it.norm()


def test_a_pair_exactly_at_the_threshold_is_trained():
    ensemble, (ids, mask) = tiny_ensemble(4, scattered=False).double(), padded_batch()
    _, gradient = step(ensemble, None, ids, mask)
    _, found = step(ensemble, RoutingPlan("sparse", 0.25), ids, mask)
    assert gradient.norm() > 0
    assert (found - gradient).norm() <= SAME * gradient.norm()


def test_what_sparse_drops_moves_a_members_gradient_by_no_more_than_the_bound():
    """Σ r‖∇ℓ‖ over the pairs of a member that were dropped."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    r_MB, threshold = shares(ensemble, ids, mask), 0.3
    found, exact = (step(ensemble, routing, ids, mask)[1] for routing in (RoutingPlan("sparse", threshold), None))

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
        _, found = step(ensemble, RoutingPlan("sampled"), ids, mask, alpha)
        mean += share_MB[list(drawn), range(3)].prod() * found
    assert (mean - gradient).norm() <= 2e-6 * gradient.norm()


@pytest.mark.parametrize("kind", ["sampled", "raced"])
def test_at_alpha_zero_nothing_is_scored_before_a_member_is_drawn(kind):
    ensemble, (ids, mask) = tiny_ensemble().train(), padded_batch()
    batch = {"input_ids": ids, "attention_mask": mask}
    assert Router(ensemble, RoutingPlan(kind)).forward(batch, 0.0).statistics == (0.0, 0.0)
    assert Router(ensemble, RoutingPlan(kind)).forward(batch, ALPHA).statistics.scored == 1.0
    assert Router(ensemble, RoutingPlan(kind, token_budget=27)).forward(batch, 0.0).statistics.scored == 0.0
    assert Router(ensemble, RoutingPlan(kind, token_budget=26)).forward(batch, 0.0).statistics.scored == 1.0


def test_at_alpha_zero_all_members_get_the_values_of_the_drawn_one(monkeypatch):
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    plain, drawn = ensemble(ids, mask), [2, 2, 0]
    monkeypatch.setattr(torch, "multinomial", lambda *_: torch.tensor(drawn)[:, None])
    router = Router(ensemble.train(), RoutingPlan("sampled"))
    found = router.forward({"input_ids": ids, "attention_mask": mask}, 0.0).output
    assert torch.equal(found.label_mask, plain.label_mask)
    for name in ("log_probs", "entropy", "is_top1"):
        expected = getattr(plain, name)[drawn, range(3)].expand(3, -1, -1)
        torch.testing.assert_close(getattr(found, name), expected)


def test_drawn_members_are_the_only_ones_that_learn():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    step(ensemble, RoutingPlan("sampled"), ids[:1], mask[:1])
    learned = [p.grad.flatten(1).any(dim=1) for p in ensemble.parameters() if p.requires_grad]
    assert torch.stack(learned).any(dim=0).sum() == 1


def test_pairs_of_rows_go_to_one_member_together(monkeypatch):
    """A batch of preference pairs: chosen rows first."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    ids, mask, seen = ids.repeat(2, 1), mask.repeat(2, 1), []
    pairing = ensemble.pairing
    monkeypatch.setattr(ensemble, "pairing", lambda members, *of: seen.append(members) or pairing(members, *of))
    step(ensemble, RoutingPlan("sampled", rows_per_example=2), ids, mask)
    assert len(seen[0]) == 6
    # Pairs are run member by member; each member has both rows of an example or neither.
    assert all(seen[0].count(m) % 2 == 0 for m in range(3))


# The race


def long_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, VOCABULARY, (4, 50), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(50) < torch.tensor([[50], [40], [20], [16]])).long()
    return ids.masked_fill(mask == 0, 0), mask


def raced(ensemble: LoraEnsemble, threshold: float, alpha: float = ALPHA):
    """The race's scores and statistics on the long batch."""
    ids, mask = long_batch()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    with torch.no_grad():
        return race(ensemble, RoutingPlan("raced", threshold), batch, alpha)


def race_on_paper(
    log_probs_MBT: Tensor,
    threshold: float,
    alpha: float,
    lengths: Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0),
) -> tuple[Tensor, float, float]:
    """The race by hand, from the scores of all tokens: log-likelihoods [M, B], share scored, responsibility dropped.

    With `lengths`, responsibilities are those of the mean per token that was scored so far.
    """
    many, rows, _ = log_probs_MBT.shape
    ell, alive = torch.zeros(many, rows), torch.ones(many, rows, dtype=torch.bool)
    scored, dropped, leader = 0, 0.0, [0] * rows
    for begin, end in ((0, 16), (16, 32), (32, 50)):
        scored += int(alive.sum()) * (end - begin)
        for b in range(rows):
            found = log_probs_MBT[:, b, begin:end].sum(dim=1)  # token t is predicted at t - 1: the last has no next
            for m in range(many):
                ell[m, b] += found[m] if alive[m, b] else found[leader[b]]
        if end == 50:
            break
        units = 1 if lengths is None else (lengths - 1).clamp(max=end)
        r = (torch.tensor(weights).log()[:, None] + alpha * ell / units).softmax(dim=0)
        for b in range(rows):
            leader[b] = max((m for m in range(many) if alive[m, b]), key=lambda m: float(r[m, b]))
            for m in range(many):
                if alive[m, b] and r[m, b] < threshold:
                    alive[m, b] = False
                    dropped += float(r[m, b])
    return ell, scored / (many * rows * 50), dropped / rows


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_race_that_drops_nobody_scores_as_the_joint_forward_does(kind):
    ensemble, (ids, mask) = tiny_ensemble(kind=kind), long_batch()
    found, statistics = raced(ensemble, 0.0)
    with torch.no_grad():
        plain = ensemble(ids, mask)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=2e-5, rtol=1e-5)
    assert torch.equal(found.is_top1, plain.is_top1)
    assert torch.equal(found.label_mask, plain.label_mask)
    assert statistics == (1.0, 0.0)


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("threshold", [0.05, 0.25])
def test_a_race_is_the_race_on_paper(alpha, threshold):
    """Who falls, what the others score, and what is left out: from the scores of all tokens, by hand."""
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    with torch.no_grad():
        plain = ensemble(ids, mask).log_probs
    ell, scored, dropped = race_on_paper(plain, threshold, alpha)
    found, statistics = raced(ensemble, threshold, alpha)
    torch.testing.assert_close(found.log_probs.sum(-1), ell, atol=1e-3, rtol=1e-5)
    assert statistics.scored == pytest.approx(scored)
    assert statistics.dropped == pytest.approx(dropped, rel=1e-3)
    assert scored < 1 or (alpha, threshold) == (0.1, 0.05)


def test_a_race_goes_by_the_weights_of_the_members():
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    with torch.no_grad():
        plain = ensemble(ids, mask).log_probs
    scored = []
    for weights in ((0.1, 0.2, 0.7), (0.7, 0.2, 0.1)):
        ensemble.weights.copy_(torch.tensor(weights))
        ell, expected, dropped = race_on_paper(plain, 0.05, 0.6, weights=weights)
        found, statistics = raced(ensemble, 0.05, 0.6)
        torch.testing.assert_close(found.log_probs.sum(-1), ell, atol=1e-3, rtol=1e-5)
        assert statistics.scored == pytest.approx(expected)
        assert statistics.dropped == pytest.approx(dropped, rel=1e-3)
        scored.append(expected)
    assert scored[0] != scored[1]


@pytest.mark.parametrize("threshold", [0.25, 0.32])
def test_a_race_by_means_per_token_counts_the_tokens_scored_so_far(threshold):
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    ensemble.routing_quantity = "length_normalised"
    with torch.no_grad():
        plain = ensemble(ids, mask).log_probs
    ell, scored, dropped = race_on_paper(plain, threshold, 1.0, mask.sum(dim=1))
    found, statistics = raced(ensemble, threshold, 1.0)
    torch.testing.assert_close(found.log_probs.sum(-1), ell, atol=1e-3, rtol=1e-5)
    assert statistics.scored == pytest.approx(scored)
    assert scored < 1
    assert statistics.dropped == pytest.approx(dropped, rel=1e-4)


def test_a_race_of_double_precision_scores_in_double_precision():
    ensemble, (ids, mask) = tiny_ensemble().double(), long_batch()
    found, _ = raced(ensemble, 0.0)
    with torch.no_grad():
        plain = ensemble(ids, mask)
    torch.testing.assert_close(found.log_probs, plain.log_probs, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found.entropy, plain.entropy, atol=1e-10, rtol=1e-10)


def test_a_member_exactly_at_the_threshold_stays_in_the_race():
    _, statistics = raced(tiny_ensemble(4, scattered=False), 0.25)
    assert statistics == (1.0, 0.0)


def test_a_race_in_parts_counts_as_its_parts_do():
    ensemble, (ids, mask) = tiny_ensemble().train(), long_batch()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    plan = RoutingPlan("raced", 0.25, token_budget=2 * 3 * 50)
    with torch.no_grad():
        parts = [race(ensemble, plan, take_examples(batch, torch.tensor(at)), ALPHA)[1] for at in ([0, 1], [2, 3])]
    found = Router(ensemble, plan).forward(batch, ALPHA).statistics
    assert found.scored == pytest.approx(sum(part.scored for part in parts) / 2)
    assert found.dropped == pytest.approx(sum(part.dropped for part in parts) / 2)
    assert found.dropped > 0
    assert found.scored < 1


def test_a_race_scores_who_is_left_exactly_and_leaves_the_others_behind():
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    found, _ = raced(ensemble, 0.05)
    with torch.no_grad():
        plain_MB = ensemble(ids, mask).log_probs.sum(-1)
    found_MB = found.log_probs.sum(-1)
    left_MB = torch.isclose(found_MB, plain_MB, atol=1e-3)
    assert left_MB.any(dim=0).all()
    assert not left_MB.all()
    assert (responsibilities(found_MB, ALPHA)[~left_MB] < 0.06).all()


def test_a_raced_step_trains_the_drawn_members_and_nobody_else(monkeypatch):
    """A drawn member gets the inverse of its share, so each example's gradient is that of the drawn log-likelihood."""
    ensemble, (ids, mask) = tiny_ensemble(), long_batch()
    found, _ = raced(ensemble, 0.05)
    shares_ME = responsibilities(found.log_probs.sum(-1), ALPHA)
    asked: list[Tensor] = []

    def likeliest(weights: Tensor, *_: object) -> Tensor:
        asked.append(weights)
        return weights.argmax(dim=1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", likeliest)
    _, gradient = step(ensemble, RoutingPlan("raced", 0.05), ids, mask)
    torch.testing.assert_close(asked[0].T, shares_ME, atol=1e-5, rtol=1e-4)
    winners = shares_ME.argmax(dim=0)
    ensemble.zero_grad()
    (-ensemble(ids, mask).log_probs.sum(-1)[winners, torch.arange(len(ids))].sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad])
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_without_gradients_or_in_evaluation_a_router_is_the_plain_forward():
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    router, batch = Router(ensemble, RoutingPlan("sampled")), {"input_ids": ids, "attention_mask": mask}
    plain = ensemble(ids, mask)
    for found in (router.forward(batch, 0.0), router.forward(batch, ALPHA)):
        assert torch.equal(found.output.log_probs, plain.log_probs)
    ensemble.train()
    with torch.no_grad():
        assert torch.equal(router.forward(batch, 0.0).output.log_probs, plain.log_probs)


def test_a_router_leaves_the_plain_forward_as_it_is():
    """Nothing about routing is kept on the ensemble, nor on the module that wraps it."""
    ensemble, (ids, mask) = tiny_ensemble(), padded_batch()
    before = dict(vars(ensemble))

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.calls = ensemble, 0

        def forward(self, *args: object, **kwargs: object) -> object:
            self.calls += 1
            return self.module(*args, **kwargs)

    wrapper, router = Wrapper(), Router(ensemble.train(), RoutingPlan("sparse", 1e-9))
    batch = {"input_ids": ids, "attention_mask": mask}
    found = router.forward(batch, ALPHA, through=wrapper)
    assert wrapper.calls == 1
    torch.testing.assert_close(found.output.log_probs, router.forward(batch, ALPHA).output.log_probs)
    assert vars(ensemble.eval()) == before


def test_a_forward_that_others_had_replaced_is_still_theirs_afterwards():
    """Accelerate puts its own forward on a module, for example to convert outputs."""
    ensemble, (ids, mask), calls = tiny_ensemble().train(), padded_batch(), []
    own = ensemble.forward

    def replaced(*args: object, **kwargs: object) -> object:
        calls.append(kwargs.keys())
        return own(*args, **kwargs)

    ensemble.forward = replaced
    wrapper = torch.nn.Sequential(ensemble)
    wrapper.forward = lambda *args: ensemble(*args)
    found = Router(ensemble, RoutingPlan("sparse", 1e-9)).forward(
        {"input_ids": ids, "attention_mask": mask}, ALPHA, wrapper
    )
    assert vars(ensemble)["forward"] is replaced
    assert len(calls) == 1  # one pass scores all pairs
    torch.testing.assert_close(found.output.log_probs, ensemble.eval()(ids, mask).log_probs)


def test_without_a_mask_and_labels_every_token_is_trained():
    ensemble, (ids, _) = tiny_ensemble().train(), padded_batch()
    found = Router(ensemble, RoutingPlan("sparse", 1e-9)).forward({"input_ids": ids}, ALPHA).output
    torch.testing.assert_close(found.log_probs, ensemble.eval()(ids).log_probs)
    assert found.label_mask.all()
