"""Reward models: which answer of a pair their rewards prefer, whether the lower bound is better than the mean, and
whether the members' spread finds the pairs that are ordered wrongly.

Rows are pairs, as for `renyi reward`; votes are read, and margins are not. Read next: `renyi.evaluation.pair_task`,
which evaluates the members' margins, and `renyi.evaluation.reward_quality`, the figures of rewards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from renyi.errors import ConfigError
from renyi.evaluation.pair_task import Asked, PairSettings, PairTask, Read
from renyi.evaluation.sections import Cell, Column, Note, Section, Table
from renyi.evaluation.task import Model, setting

if TYPE_CHECKING:
    from renyi.evaluation.preference_quality import PreferenceEvaluation

NAMES = {"mean": "mean", "lcb": "lower bound", "worst": "worst member"}
RANKED = {
    "margin_spread": "spread of the members' margins",
    "epistemic": "epistemic uncertainty",
    "total": "total uncertainty",
    "small_margin": "small mean margin",
}


@dataclass(frozen=True, kw_only=True)
class RewardSettings(PairSettings):
    """Settings of the reward task."""

    lcb_width: float = setting(1.0, "standard deviations that the lower bound is below the mean", "K")

    def validate(self) -> None:
        super().validate()
        self.require(0 <= self.lcb_width < float("inf"), "lcb_width", "Give a number of at least 0.")


class Reward(PairTask):
    """Rewards."""

    name = "reward"
    title = "Rewards"
    Settings = RewardSettings

    def scores(self, model: Model, data: Read, settings: RewardSettings, progress: Callable[[int], object]) -> Asked:
        from renyi.data import Limits, PairPreparation
        from renyi.ensemble import read_reward
        from renyi.inference import score_rated_pairs

        ensemble, tokenizer = model.ensemble, model.tokenizer
        if model.folder is None:
            hint = "Save it, and give its folder: rewards are centred by what training kept there."
            raise ConfigError("has no folder", where="model", hint=hint)
        kept = read_reward(model.folder, ensemble)
        whole, limits = PairPreparation(max_length=None), Limits.of(ensemble.base)
        pairs = whole.prepare(data.file.rows, tokenizer, data.file.name, limits._replace(positions=None))
        scores, rewards = score_rated_pairs(ensemble, pairs, tokenizer, kept, settings.lcb_width, progress=progress)
        told = f"lower bound: mean − {settings.lcb_width:g} std"
        ties = kept.tie_strength
        return Asked(scores, ensemble.weights, ties, {}, told, pairs, tokenizer, {}, ensemble.num_draws, rewards)

    def evaluate(self, data: Read, answers: Asked, settings: RewardSettings) -> "PreferenceEvaluation":
        from renyi.evaluation.preference_quality import is_turned
        from renyi.evaluation.reward_quality import evaluate_rewards

        scores, rewards = answers.scores, answers.rewards or []
        sides = [(b, a) if is_turned(s) else (a, b) for s, (a, b) in zip(scores, rewards, strict=True)]
        votes = [s.votes for s in scores if s.votes is not None]
        found = evaluate_rewards(
            [better.rewards for better, _ in sides],
            [worse.rewards for _, worse in sides],
            answers.weights.tolist(),
            [s.epistemic for s in scores],
            [s.total for s in scores],
            [sum(v > 0 for v in of_pair) > 1 for of_pair in votes] if votes else None,
            settings.lcb_width,
            settings.resamples,
        )
        return super().evaluate(data, answers, settings)._replace(rewards=found)

    def own_sections(self, found: "PreferenceEvaluation", settings: RewardSettings) -> list[Section]:
        rewards = found.rewards
        if rewards is None or len(found.members) == 1:
            return []
        orders: list[list[Cell]] = [[NAMES[name], accuracy] for name, accuracy in rewards.accuracy.items()]
        columns: list[Column | str] = ["", Column("accuracy", ".1%", "high")]
        gain = f"lower bound − mean: {rewards.lcb_gain.value:+.1%}"
        if settings.resamples > 0:
            gain += f" [{rewards.lcb_gain.low:+.1%}, {rewards.lcb_gain.high:+.1%}]"
        note = f"the preferred answer gets the greater reward · {gain} · intervals of 95 %"
        split = rewards.finds_split or {}
        ranks: list[list[Cell]] = [
            [RANKED[name], auroc, *([split[name]] if split else [])] for name, auroc in rewards.finds_wrong.items()
        ]
        figures: list[Column | str] = ["AUROC for pairs that are", Column("ordered wrongly", ".3f", "high")]
        figures += [Column("split", ".3f", "high")] if split else []
        spread = (
            f"members' rewards of an answer differ by {rewards.spread:.4f} (standard deviation), their margins of a "
            f"pair by {rewards.margin_spread:.4f}; its rank correlation with epistemic uncertainty is "
            f"{rewards.spread_and_epistemic:.3f}"
        )
        return [
            Table("Which reward orders pairs best?", columns, orders, note, has_intervals=settings.resamples > 0),
            Table("Does the spread find wrong orders?", figures, ranks, "by the mean reward"),
            Note("Spread and disagreement", spread),
        ]


TASK = Reward()
