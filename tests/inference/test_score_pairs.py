"""`score_pairs` against plain PEFT: member after member, row after row, log-probabilities from full logits."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tiny import WORDS, lora, scatter_members, tiny_ensemble, tiny_model, tiny_tokenizer
from torch import Tensor

from renyi import LoraEnsemble
from renyi.data import PairPreparation
from renyi.ensemble import Reference
from renyi.errors import EnsembleFormatError
from renyi.inference import PairScore, score_pairs
from renyi.objectives import PreferenceLoss, responsibilities

BETA = 0.3
PREPARATION = PairPreparation()


def prepared(number: int = 8) -> Dataset:
    """Pairs whose sides have different lengths, the longest first, so that batches are not in their order."""

    def words(start: int, length: int) -> str:
        return " ".join(WORDS[(start * 7 + 5 * i * i) % len(WORDS)] for i in range(length))

    rows = [
        {
            "prompt": words(i, 1 + (3 * i) % 5),
            "chosen": " " + words(i + 20, 9 - i),
            "rejected": " " + words(i + 40, 2 + (2 * i) % 7),
        }
        for i in range(number)
    ]
    return PREPARATION.prepare(Dataset.from_list(rows), tiny_tokenizer())


def scored(ensemble: LoraEnsemble, pairs: Dataset, **given: Any) -> list[PairScore]:
    arguments = {"loss": PreferenceLoss(beta=BETA), "reference": Reference(ensemble), "preparation": PREPARATION}
    return score_pairs(ensemble, pairs, **{**arguments, **given})


@pytest.fixture
def ensemble() -> LoraEnsemble:
    return tiny_ensemble(3)


def log_prob(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    """Of a completion, in nats, from the logits of one row of text without padding."""
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return float(log_p[range(len(log_p)), ids[0, 1:]][len(prompt) - 1 :].sum())


def log_ratios(policy: torch.nn.Module, reference: torch.nn.Module, pair: dict[str, list[int]]) -> list[float]:
    """Of the chosen and of the rejected completion."""
    return [
        log_prob(policy, pair["prompt_ids"], pair[side]) - log_prob(reference, pair["prompt_ids"], pair[side])
        for side in ("chosen_ids", "rejected_ids")
    ]


def with_peft(folder: Path, ensemble: LoraEnsemble) -> list[PeftModel]:
    """Every member as a model of its own."""
    ensemble.save(folder)
    return [PeftModel.from_pretrained(tiny_model(), str(folder / f"member_{m}")) for m in range(ensemble.num_members)]


# ---- Margins ---------------------------------------------------------------------------------------------------------


def test_margins_are_those_of_plain_peft(ensemble: LoraEnsemble, tmp_path: Path) -> None:
    pairs, base = prepared(), tiny_model()
    members = with_peft(tmp_path, ensemble)
    found = scored(ensemble, pairs)
    assert [score.index for score in found] == list(range(len(pairs)))
    for score, pair in zip(found, pairs, strict=True):
        chosen, rejected = zip(*(log_ratios(member, base, pair) for member in members), strict=True)
        margin = [BETA * (c - r) for c, r in zip(chosen, rejected, strict=True)]
        assert score.margin == pytest.approx(margin, abs=1e-5)
        assert score.log_likelihood == pytest.approx([-math.log1p(math.exp(-x)) for x in margin], abs=1e-5)
        assert score.tokens == len(pair["chosen_ids"]) + len(pair["rejected_ids"])
    spread = torch.tensor([score.margin for score in found])
    assert spread.std(dim=1).min() > 0.01  # members do differ, and so do pairs
    assert spread.std(dim=0).min() > 0.01


def test_margins_against_the_start(ensemble: LoraEnsemble, tmp_path: Path) -> None:
    """Each member is compared with itself as training began, not with the base."""
    pairs = prepared()
    before = with_peft(tmp_path / "before", ensemble)
    reference = Reference(ensemble, ensemble.snapshot())
    scatter_members(ensemble, seed=2)
    after = with_peft(tmp_path / "after", ensemble)
    for score, pair in zip(scored(ensemble, pairs, reference=reference), pairs, strict=True):
        ratios = [log_ratios(member, start, pair) for member, start in zip(after, before, strict=True)]
        assert score.margin == pytest.approx([BETA * (c - r) for c, r in ratios], abs=1e-5)
    against_base = scored(ensemble, pairs)
    assert against_base[0].margin != pytest.approx(scored(ensemble, pairs, reference=reference)[0].margin, abs=1e-2)


def test_members_that_never_left_the_reference_prefer_nothing(ensemble: LoraEnsemble) -> None:
    for fresh, start in ((tiny_ensemble(3, scattered=False), None), (ensemble, ensemble.snapshot())):
        for score in scored(fresh, prepared(), reference=Reference(fresh, start)):
            assert score.margin == pytest.approx([0.0] * 3, abs=1e-5)
            assert score.preference == pytest.approx(0.5, abs=1e-5)
            assert (score.epistemic, score.epistemic_share) == pytest.approx((0, 0), abs=1e-9)


def test_pairs_are_cut_as_in_training(ensemble: LoraEnsemble) -> None:
    """What lies beyond `max_length` of a prompt with its completion counts for nothing."""
    pairs = prepared()
    cut = PairPreparation(max_length=7)

    def shortened(pair: dict[str, list[int]]) -> dict[str, list[int]]:
        left = 7 - len(pair["prompt_ids"])
        return {side: pair[side][:left] for side in ("chosen_ids", "rejected_ids")}

    beforehand = scored(ensemble, pairs.map(shortened))
    for score, whole, other in zip(
        scored(ensemble, pairs, preparation=cut), scored(ensemble, pairs), beforehand, strict=True
    ):
        assert score.margin == pytest.approx(other.margin, abs=1e-5)
        assert score.tokens == other.tokens <= whole.tokens
    assert beforehand[0].tokens < scored(ensemble, pairs)[0].tokens


def test_pairs_are_cut_at_the_positions_of_the_base(caplog: pytest.LogCaptureFixture) -> None:
    """As with a `max_length` of as many tokens, which is how training cuts them; and the cut pairs are counted."""
    pairs = prepared()
    short = scatter_members(LoraEnsemble.from_base(tiny_model(max_position_embeddings=9), 3, lora(), seed=7))
    lengths = [len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs]
    cut = sum(length > 9 for length in lengths)
    assert 0 < cut < len(pairs)
    with caplog.at_level("WARNING", logger="renyi"):
        of_positions = scored(short, pairs)
    assert f"{cut} rows cut at the 9 positions of the base" in caplog.text
    assert of_positions == scored(short, pairs, preparation=PairPreparation(max_length=9))


@pytest.mark.parametrize("loss_type", ["ipo", "hinge"])
def test_another_loss_enters_by_its_negative(loss_type: str, ensemble: LoraEnsemble, tmp_path: Path) -> None:
    """Margins stay what they are; ℓ is −loss, which for ipo is of the mean log-ratio per token."""
    pairs, base = prepared(), tiny_model()
    members = with_peft(tmp_path, ensemble)
    loss = PreferenceLoss(beta=BETA, loss_type=(loss_type,))
    bradley_terry = scored(ensemble, pairs)
    for score, beside, pair in zip(scored(ensemble, pairs, loss=loss), bradley_terry, pairs, strict=True):
        assert score.margin == pytest.approx(beside.margin, abs=1e-6)
        for ell, (chosen, rejected) in zip(
            score.log_likelihood, (log_ratios(member, base, pair) for member in members), strict=True
        ):
            per_token = chosen / len(pair["chosen_ids"]) - rejected / len(pair["rejected_ids"])
            by_hand = {
                "ipo": -((per_token - 1 / (2 * BETA)) ** 2),
                "hinge": -max(0.0, 1 - BETA * (chosen - rejected)),
            }
            assert ell == pytest.approx(by_hand[loss_type], abs=1e-4)


# ---- What is made of them --------------------------------------------------------------------------------------------


def binary_entropy(p: Tensor) -> Tensor:
    return -(p * p.log() + (1 - p) * (1 - p).log())


def test_the_mixture_respects_weights(ensemble: LoraEnsemble) -> None:
    ensemble.weights.copy_(torch.tensor([0.7, 0.2, 0.1]))
    ensemble.alpha = 0.8
    weights = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    for score in scored(ensemble, prepared()):
        p = torch.tensor(score.margin, dtype=torch.float64).sigmoid()
        mixed = (weights * p).sum()
        doubt = (weights * binary_entropy(p)).sum()
        assert score.preference == pytest.approx(float(mixed), rel=1e-6)
        assert score.mixture_nll == pytest.approx(-math.log(mixed), rel=1e-6)
        assert score.total == pytest.approx(float(binary_entropy(mixed)), rel=1e-6)
        assert score.epistemic == pytest.approx(float(binary_entropy(mixed) - doubt), abs=1e-7)
        assert 0 <= score.epistemic_share == pytest.approx(score.epistemic / score.total)
        shares = responsibilities(torch.tensor(score.log_likelihood), 0.8, weights.log())
        assert score.responsibilities == pytest.approx(shares.tolist(), rel=1e-5)


def test_length_normalised_routing_is_by_the_mean_per_token(ensemble: LoraEnsemble) -> None:
    ensemble.alpha, ensemble.routing_quantity = 0.6, "length_normalised"
    score = scored(ensemble, prepared())[0]
    expected = responsibilities(torch.tensor(score.log_likelihood) / score.tokens, 0.6)
    assert score.responsibilities == pytest.approx(expected.tolist(), rel=1e-5)


def test_where_nothing_is_uncertain_nothing_is_shared() -> None:
    sure = PairScore(0, 1, [800.0, 800.0], 1.0, [0.0, 0.0], [0.5, 0.5], 0.0, 0.0, 0.0, 0.0)
    assert sure.epistemic_share == 0
    assert sure._replace(total=0.5, epistemic=0.2).epistemic_share == pytest.approx(0.4)


@pytest.mark.parametrize("draws", [1, 3])
def test_the_parts_of_uncertainty_sum_to_the_total(draws: int) -> None:
    """Within a member's draws and between members, from their definitions: entropies of mixtures of draws."""
    gaussian = LoraEnsemble.from_base(tiny_model(), 2, lora(), seed=7, member_kind="gaussian")
    gaussian.stack.set_std(0.5)
    gaussian = scatter_members(gaussian, std=0.5)
    drawn = gaussian.draw(draws) if draws > 1 else gaussian.mean()

    def entropy(p: Tensor) -> Tensor:
        return -(p * p.log() + (1 - p) * (1 - p).log())

    for score in scored(drawn, prepared(), loss=PreferenceLoss(beta=3.0)):
        p_MS = torch.tensor(score.margin, dtype=torch.float64).sigmoid().view(2, draws)
        own = entropy(p_MS.mean(dim=1)).mean()
        assert score.total == pytest.approx(entropy(p_MS.mean()).item(), abs=1e-6)
        assert score.aleatoric == pytest.approx(entropy(p_MS).mean().item(), abs=1e-6)
        if draws == 1:
            assert score.within_members is score.between_members is None
            assert score.aleatoric + score.epistemic == pytest.approx(score.total, abs=1e-12)
            continue
        assert score.within_members == pytest.approx((own - entropy(p_MS).mean()).item(), abs=1e-6)
        assert score.between_members == pytest.approx(score.total - own.item(), abs=1e-6)
        assert score.within_members > 1e-5
        parts = score.aleatoric + score.within_members + score.between_members
        assert parts == pytest.approx(score.total, abs=1e-12)


# ---- Batches ---------------------------------------------------------------------------------------------------------


def test_batches_change_nothing(ensemble: LoraEnsemble) -> None:
    pairs = prepared()
    done: list[int] = []
    one_by_one = scored(ensemble, pairs, tokens_per_batch=1, progress=done.append)
    assert done == list(range(1, len(pairs) + 1))
    for tokens in (100, 300, 16_384):
        done.clear()
        together = scored(ensemble, pairs, tokens_per_batch=tokens, progress=done.append)
        assert done[-1] == len(pairs)
        assert len(done) < len(pairs)
        for one, other in zip(one_by_one, together, strict=True):
            assert one.margin == pytest.approx(other.margin, abs=1e-5)
            assert one[:2] == other[:2]
            assert one.responsibilities == pytest.approx(other.responsibilities, abs=1e-5)


def test_batches_respect_the_budget(ensemble: LoraEnsemble, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    forward = LoraEnsemble.forward

    def counted(self: LoraEnsemble, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(input_ids.shape))  # type: ignore[arg-type]
        return forward(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(LoraEnsemble, "forward", counted)
    scored(ensemble, prepared(), tokens_per_batch=3 * 80)
    assert max(rows * length for rows, length in seen) <= 80
    assert max(rows for rows, _ in seen) > 2


def test_training_mode_is_left_as_it_was() -> None:
    ensemble = tiny_ensemble(2, lora_dropout=0.5).train()
    first, second = (scored(ensemble, prepared(2)) for _ in range(2))
    assert first == second  # no dropout
    assert ensemble.training


def test_a_member_that_is_no_number(ensemble: LoraEnsemble) -> None:
    with torch.no_grad():
        next(p for name, p in ensemble.named_parameters() if name.endswith("lora_B"))[1] = math.nan
    with pytest.raises(EnsembleFormatError, match=r"row \d+: a member's preference is no finite number"):
        scored(ensemble, prepared())
