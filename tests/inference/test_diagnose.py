"""Diagnoses of adapters that were fitted to contradictory answers, and of ones whose data are their own predictions."""

import copy
import importlib
import random
from typing import Any

import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score
from tiny import lora, pair_rows, scatter_members, tiny_ensemble, tiny_model, tiny_tokenizer
from torch.nn.utils.rnn import pad_sequence

from renyi import LoraEnsemble
from renyi.data import PairPreparation
from renyi.ensemble import Reference
from renyi.ensemble.curvature import AdapterSpace
from renyi.errors import ConfigError, DataError
from renyi.inference import diagnose, score, score_pairs
from renyi.inference.diagnose import Diagnosis, Pairs, loadings_along, memory_needed, recommended_alpha, spread
from renyi.objectives import PreferenceLoss

MODULE = importlib.import_module("renyi.inference.diagnose")
CONTESTED, AGREED = (5, 6), (7, 8)
YES, NO = 40, 41


def answered(number: int, seed: int) -> Dataset:
    """Records of one to four yes-no items, all answered by one of two sources that contradict each other on two items.

    Answers are labels and never inputs, so nothing within a record tells who answers.
    """
    draw, rows = random.Random(seed), []
    for _ in range(number):
        source, items = draw.randrange(2), draw.choices(CONTESTED + AGREED, k=draw.randint(1, 4))
        answers = [(YES, NO)[(item + source * (item in CONTESTED)) % 2] for item in items]
        labels = [-100, *answers]
        count = sum(item in CONTESTED for item in items)
        rows.append({"input_ids": [*items, 3], "labels": labels, "source": source, "contested": count})
    return Dataset.from_list(rows)


def fit(ensemble: LoraEnsemble, rows: Dataset, steps: int) -> None:
    ids = pad_sequence([torch.tensor(r) for r in rows["input_ids"]], batch_first=True)
    labels = pad_sequence([torch.tensor(r) for r in rows["labels"]], batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam([p for p in ensemble.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(ids), (64,), generator=generator)
        optimizer.zero_grad()
        (-ensemble.log_likelihood(ids[chosen], labels=labels[chosen]).mean()).backward()
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def fitted() -> LoraEnsemble:
    """One adapter fitted to both sources, on a base whose logits reach far enough to be sure of what is agreed."""
    model = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(5)
    ensemble = LoraEnsemble.from_base(model, 1, lora())
    fit(ensemble, answered(4096, seed=0), 200)
    return ensemble


@pytest.fixture(scope="module")
def held_out() -> Dataset:
    return answered(1024, seed=1)


@pytest.fixture(scope="module")
def found(fitted: LoraEnsemble, held_out: Dataset) -> Diagnosis:
    return diagnose(fitted, held_out, max_examples=1024)


# ---- Two sources -----------------------------------------------------------------------------------------------------


def test_critical_alpha_is_that_of_the_closed_form(found: Diagnosis, held_out: Dataset) -> None:
    """E[k_c] / E[k_c²] of records with k_c contested items (docs/mathematics.md)."""
    contested = torch.tensor(held_out["contested"], dtype=torch.float64)
    formula = (contested.sum() / contested.square().sum()).item()
    assert found.critical_alpha == pytest.approx(formula, rel=0.2)
    assert found.low < found.critical_alpha < found.high < 1
    assert found.contradicted
    assert found.alpha == recommended_alpha(found.critical_alpha)
    assert found.members >= 2
    assert found.mean_share < 0.1
    assert found.calibration == pytest.approx(1, abs=0.15)
    assert found.eigenvalues == sorted(found.eigenvalues, reverse=True)


def test_length_normalised_routing_has_its_own_closed_form(fitted: LoraEnsemble, held_out: Dataset) -> None:
    """E[k_c] / E[k_c² / T] of records with k_c contested of T answers. The default is what the ensemble routes."""
    contested = torch.tensor(held_out["contested"], dtype=torch.float64)
    length = torch.tensor([len(ids) - 1 for ids in held_out["input_ids"]])
    formula = (contested.sum() / (contested.square() / length).sum()).item()
    settings: dict[str, Any] = {"num_directions": 8, "max_examples": 700}
    found = diagnose(fitted, held_out, routing_quantity="length_normalised", **settings)
    assert found.critical_alpha == pytest.approx(formula, rel=0.2)
    assert found.critical_alpha > 1.5 * diagnose(fitted, held_out, **settings).critical_alpha
    normalised = copy.deepcopy(fitted)
    normalised.routing_quantity = "length_normalised"
    assert diagnose(normalised, held_out, **settings)[:4] == found[:4]


def test_contested_examples_load_most_and_sources_on_two_sides(found: Diagnosis, held_out: Dataset) -> None:
    rows = held_out.select(found.examples)
    contested = torch.tensor(rows["contested"]) > 0
    source, loadings = torch.tensor(rows["source"]), torch.tensor(found.loadings)
    assert roc_auc_score(contested, loadings.abs()) >= 0.95
    of_source = roc_auc_score(source[contested], loadings[contested])
    assert max(of_source, 1 - of_source) >= 0.95
    assert loadings.square().mean().item() == pytest.approx(1)


def test_examples_are_named_with_their_likelihoods(found: Diagnosis, fitted: LoraEnsemble, held_out: Dataset) -> None:
    assert len(set(found.examples)) == len(found.examples) == 512
    for row, ell in list(zip(found.examples, found.log_likelihood, strict=True))[::100]:
        example = {name: torch.tensor([held_out[row][name]]) for name in ("input_ids", "labels")}
        assert fitted.log_likelihood(**example).item() == pytest.approx(ell, rel=1e-4)


def test_rows_are_laid_along_directions_as_finite_differences_are(found: Diagnosis, fitted: LoraEnsemble) -> None:
    rows, v, step = answered(40, seed=2), found.directions[:, :2], 0.02
    ell, loadings = loadings_along(fitted, rows, v)
    offsets = torch.cat([step * v.T, -step * v.T])
    with fitted.acting_as(AdapterSpace(fitted).displaced(offsets)):
        moved = torch.tensor([s.log_likelihood for s in score(fitted, rows)])
    torch.testing.assert_close(loadings, (moved[:, :2] - moved[:, 2:]) / (2 * step), rtol=0.02, atol=0.02)
    assert ell.tolist() == pytest.approx([s.log_likelihood[0] for s in score(fitted, rows)], rel=1e-4, abs=1e-4)


def test_pairs_are_laid_along_directions_as_finite_differences_are(
    annotated: tuple[LoraEnsemble, Dataset, Pairs],
) -> None:
    ensemble, rows, pairs = annotated
    rows, space, step = rows.select(range(30)), AdapterSpace(ensemble, 1), 0.02
    v = torch.randn(space.size, 2, generator=torch.Generator().manual_seed(0)) / space.size**0.5
    ell, loadings = loadings_along(ensemble, rows, v, pairs, member=1)

    def moved(offset: torch.Tensor) -> torch.Tensor:
        """Of each label under member 1, moved; its reference is the one of its place."""
        with ensemble.acting_as(space.displaced(offset.expand(2, -1))):
            return torch.tensor([s.log_likelihood[1] for s in score_pairs(ensemble, rows, *pairs)])

    slopes = torch.stack([moved(step * u) - moved(-step * u) for u in v.T], dim=1) / (2 * step)
    torch.testing.assert_close(loadings, slopes, rtol=0.05, atol=2e-3)
    assert ell.tolist() == pytest.approx(
        [s.log_likelihood[1] for s in score_pairs(ensemble, rows, *pairs)], rel=1e-4, abs=1e-4
    )


def test_the_hessian_and_half_precision_agree(found: Diagnosis, fitted: LoraEnsemble, held_out: Dataset) -> None:
    settings: dict[str, Any] = {"num_directions": 16, "max_examples": 512}
    fisher = diagnose(fitted, held_out, **settings)
    hessian = diagnose(fitted, held_out, curvature="hessian", **settings)
    assert hessian.critical_alpha == pytest.approx(fisher.critical_alpha, rel=0.2)
    assert hessian.calibration is None
    halved = copy.deepcopy(fitted)
    for parameter in halved.base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert diagnose(halved, held_out, **settings).critical_alpha == pytest.approx(fisher.critical_alpha, rel=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = diagnose(fitted, held_out, **settings)
    assert rounded.critical_alpha == pytest.approx(fisher.critical_alpha, rel=0.05)


def test_a_seed_decides_everything(fitted: LoraEnsemble, held_out: Dataset) -> None:
    settings: dict[str, Any] = {"num_directions": 4, "max_examples": 100}
    first, again, other = (diagnose(fitted, held_out, seed=seed, **settings) for seed in (3, 3, 4))
    assert first._replace(directions=None) == again._replace(directions=None)  # type: ignore[arg-type]
    assert torch.equal(first.directions, again.directions)
    assert first.examples != other.examples


def test_directions_come_from_other_examples_in_small_batches(
    fitted: LoraEnsemble, held_out: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured had no part in finding directions; no batch holds more gradients than there are directions."""
    numbered = held_out.select(range(200)).map(
        lambda row, i: {"input_ids": [*row["input_ids"][:-1], 9 + i % 30]}, with_indices=True
    )
    seen: list[list[int]] = []
    original = MODULE.diagnose_curvature

    def spy(space: Any, batches: Any, spanning: Any, *rest: Any, **settings: Any) -> Any:
        def watched(given: Any, sizes: list[int]) -> Any:
            for batch in given:
                sizes.append(len(batch["input_ids"]))
                yield batch

        seen.extend(([], []))
        return original(space, watched(batches, seen[0]), watched(spanning, seen[1]), *rest, **settings)

    monkeypatch.setattr(MODULE, "diagnose_curvature", spy)
    drawn: list[list[int]] = []
    batches = MODULE._sequence_batches
    monkeypatch.setattr(
        MODULE,
        "_sequence_batches",
        lambda ensemble, rows, numbers, *limits: drawn.append(numbers) or batches(ensemble, rows, numbers, *limits),
    )
    done: list[int] = []
    result = diagnose(fitted, numbered, num_directions=6, progress=done.append)
    measured, spanning = drawn
    assert sorted(measured + spanning) == list(range(200))
    assert sorted(result.examples) == sorted(measured)
    assert sum(seen[0]) == sum(seen[1]) == 100
    assert max(seen[0] + seen[1]) == 6
    assert done == sorted(done)
    assert done[-1] == 200
    assert len(result.eigenvalues) == 6


def test_an_adapter_that_heard_one_source_only_is_not_fitted(fitted: LoraEnsemble, held_out: Dataset) -> None:
    """It is surer than right of both sources' answers, and could still learn."""
    one_sided, rows = copy.deepcopy(fitted), answered(1024, seed=3)
    fit(one_sided, rows.filter(lambda row: row["source"] == 0), 40)
    found = diagnose(one_sided, held_out, num_directions=8, max_examples=400)
    assert found.calibration is not None
    assert found.calibration > MODULE.OVERCONFIDENT
    assert found.mean_share > MODULE.UNFINISHED


# ---- A model that is right -------------------------------------------------------------------------------------------


def test_what_a_model_says_itself_does_not_contradict_it(fitted: LoraEnsemble) -> None:
    rows = answered(1024, seed=2)
    ids = pad_sequence([torch.tensor(r) for r in rows["input_ids"]], batch_first=True)
    with torch.no_grad():
        p = fitted.logits(ids)[0].softmax(dim=-1)
    drawn = torch.multinomial(p.flatten(0, 1), 1, generator=torch.Generator().manual_seed(0)).view_as(ids).tolist()
    labels = [[-100, *tokens[: len(r) - 1]] for r, tokens in zip(rows["input_ids"], drawn, strict=True)]
    own = Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})
    found = diagnose(fitted, own, max_examples=1024, num_directions=8)
    assert found.critical_alpha == pytest.approx(1, abs=0.2)
    assert found.high > 1
    assert not found.contradicted
    assert found.members == 1


@pytest.fixture(scope="module")
def annotated() -> tuple[LoraEnsemble, Dataset, Pairs]:
    """Pairs whose labels member 1 of two drew itself, each with its own odds σ(Δ); the reference is another start."""
    ensemble = tiny_ensemble(2)
    start = ensemble.snapshot()
    scatter_members(ensemble, std=0.3, seed=5)
    preparation, loss = PairPreparation(), PreferenceLoss(beta=1.0)
    pairs = Pairs(loss, Reference(ensemble, start), preparation)
    rows = preparation.prepare(pair_rows(1000), tiny_tokenizer())
    scores = score_pairs(ensemble, rows, *pairs)
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = [], []
    for row, scored in zip(rows, scores, strict=True):
        odds = torch.tensor(scored.margin[1]).sigmoid()
        sides = [row["chosen_ids"], row["rejected_ids"]]
        if torch.rand((), generator=generator) > odds:
            sides.reverse()
        chosen.append(sides[0])
        rejected.append(sides[1])
    columns = {"prompt_ids": rows["prompt_ids"], "chosen_ids": chosen, "rejected_ids": rejected}
    return ensemble, Dataset.from_dict(columns), pairs


def test_annotators_with_the_odds_of_the_model_do_not_contradict_it(
    annotated: tuple[LoraEnsemble, Dataset, Pairs],
) -> None:
    ensemble, rows, pairs = annotated
    found = diagnose(ensemble, rows, pairs, member=1, max_examples=1000, num_directions=8)
    assert found.critical_alpha == pytest.approx(1, abs=0.2)
    assert not found.contradicted
    assert found.calibration is None
    scores = score_pairs(ensemble, rows, *pairs)
    expected = [scores[row].log_likelihood[1] for row in found.examples]
    assert found.log_likelihood == pytest.approx(expected, rel=1e-3, abs=1e-4)


# ---- Members that stand apart ----------------------------------------------------------------------------------------


def diagnosis(eigenvalues: list[float], directions: torch.Tensor) -> Diagnosis:
    return Diagnosis(0.4, 0.3, 0.5, 0.4, eigenvalues, 0.0, 1.0, 0.7, 2, [], [], [], directions)


@pytest.mark.parametrize("num_members", range(1, 7))
def test_members_are_spread_evenly_round_where_they_were(num_members: int) -> None:
    directions = torch.linalg.qr(torch.randn(20, 5, dtype=torch.float64))[0]
    offsets = spread(diagnosis([3.0, 2.0, 1.5, 0.9, 0.5], directions), num_members, size=0.3)
    assert offsets.shape == (num_members, 20)
    torch.testing.assert_close(offsets.mean(dim=0), torch.zeros(20, dtype=torch.float64))
    if num_members > 1:
        assert torch.pdist(offsets).min() > 0.01  # no two alike
    along = offsets @ directions
    used = min(num_members - 1, 3)  # no more than there are eigenvalues above 1
    second_moment = torch.diag(torch.tensor([0.09] * used + [0.0] * (5 - used), dtype=torch.float64))
    torch.testing.assert_close(along.T @ along / num_members, second_moment)
    torch.testing.assert_close(along @ directions.T, offsets)  # and nowhere else


def test_members_part_even_where_no_direction_is_worth_it() -> None:
    offsets = spread(diagnosis([0.5, 0.4], torch.eye(2)), 2)
    assert offsets[0, 0] == pytest.approx(0.5)
    torch.testing.assert_close(offsets[0], -offsets[1])


def test_recommended_alpha_is_half_way_to_one() -> None:
    assert [recommended_alpha(x) for x in (0.4, 0.0, 1.0, 3.0, float("inf"))] == [0.7, 0.5, 1, 1, 1]


# ---- What cannot be diagnosed ----------------------------------------------------------------------------------------


def test_bad_settings_say_which(fitted: LoraEnsemble, held_out: Dataset) -> None:
    with pytest.raises(DataError, match="39 rows are too few"):
        diagnose(fitted, held_out.select(range(39)))
    with pytest.raises(ConfigError, match="num_directions"):
        diagnose(fitted, held_out, num_directions=0)
    with pytest.raises(ConfigError, match=r"routing_quantity.*'tokens'"):
        diagnose(fitted, held_out, routing_quantity="tokens")
    with pytest.raises(ConfigError, match="no member 1 of 1"):
        diagnose(fitted, held_out, member=1)
    with pytest.raises(ConfigError, match="unknown curvature"):
        diagnose(fitted, held_out, curvature="gauss")  # type: ignore[arg-type]


def test_a_loss_that_is_no_likelihood(annotated: tuple[LoraEnsemble, Dataset, Pairs]) -> None:
    ensemble, rows, pairs = annotated
    with pytest.raises(ConfigError, match="hinge is no likelihood"):
        diagnose(ensemble, rows, pairs._replace(loss=PreferenceLoss(loss_type=("hinge",))))


def test_a_quantised_base(held_out: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = tiny_ensemble(1)
    monkeypatch.setattr(ensemble.base, "is_quantized", True, raising=False)
    with pytest.raises(ConfigError, match="quantised"):
        diagnose(ensemble, held_out)


def test_the_hessian_of_an_adapter_that_is_not_fitted(held_out: Dataset) -> None:
    with pytest.raises(ConfigError, match="not at a fitted point"):
        diagnose(tiny_ensemble(1), held_out, curvature="hessian", num_directions=8, max_examples=100)


def test_an_adapter_whose_training_diverged(held_out: Dataset) -> None:
    ensemble = tiny_ensemble(1)
    with torch.no_grad():
        next(p for p in ensemble.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(DataError, match="diverged"):
        diagnose(ensemble, held_out, num_directions=4, max_examples=60)


def test_memory_grows_with_directions_and_with_what_runs_at_once(fitted: LoraEnsemble) -> None:
    parameters = sum(A.numel() + B.numel() for A, B in fitted.adapter(0).values())
    assert memory_needed(fitted, 1, tokens_per_batch=1) == 4 * 11 * parameters
    assert memory_needed(fitted, 32) == 32 * memory_needed(fitted, 1)
    assert memory_needed(fitted, 8, 1 << 20) > memory_needed(fitted, 8, 1 << 10)
