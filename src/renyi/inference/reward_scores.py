"""The reward of an answer: each member's, their mean and spread, and the lower bound that policies are trained on.

Tokens and the joint forward are those of training. Each member's rewards are centred by its mean over training pairs.
Read next: `renyi.objectives.reward` (the formulas).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from renyi.batches import batches_by_length, padded
from renyi.data import Limits, Preparation, prepare, rated_tokens
from renyi.ensemble import KeptReward, LoraEnsemble, evaluating
from renyi.errors import ConfigError, DataError
from renyi.inference.pair_scores import PairScore, scores_of_margins, votes_of
from renyi.inference.scoring import check_finite
from renyi.objectives import Votes, reward_bounds, reward_log_likelihood

REWARDS = ("mean", "lcb")


class RewardScore(NamedTuple):
    """What an ensemble of M reward models says about one answer.

    Attributes:
        index: row of the dataset, counted from 0.
        tokens: of the prompt with the answer.
        rewards: each member's centred reward, [M].
        mean: their weighted mean.
        std: their weighted standard deviation.
        lcb: the lower confidence bound, mean − width · std.
        reward: the mean or the lower bound, as asked.
    """

    index: int  # type: ignore[assignment]
    tokens: int
    rewards: list[float]
    mean: float
    std: float
    lcb: float
    reward: float


def rated_rows(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, ensemble: LoraEnsemble, name: str = "dataset"
) -> list[list[int]]:
    """The tokens of each row, whole, as a reward model reads them.

    Raises:
        DataError: a row is malformed.
    """
    whole = Preparation(max_length=None, completion_only_loss=False)
    limits = Limits(None, Limits.of(ensemble.base).vocabulary)
    return list(prepare(rows, tokenizer, whole, name, limits)["input_ids"])


def score_rewards(
    ensemble: LoraEnsemble,
    rows: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    kept: KeptReward,
    kind: str = "mean",
    lcb_width: float = 1.0,
    *,
    tokens_per_batch: int = 16_384,
    progress: Callable[[int], object] = lambda done: None,
) -> list[RewardScore]:
    """Rate answers under every member.

    Args:
        ensemble: M reward models.
        rows: the tokens of each answer with its prompt.
        tokenizer: of training: its padding token is what a reward is not read at.
        kept: what each member's rewards are centred by.
        kind: what `reward` is: "mean" or "lcb".
        lcb_width: standard deviations by which the lower confidence bound is below the mean.
        tokens_per_batch: limit on members × rows × length in one forward. A longer single row is rated alone.
        progress: called after each batch with the number of rows done.

    Returns:
        One score a row, in their order.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a row is longer than the base can read.
        EnsembleFormatError: a member gives no finite reward.
    """
    check_reward(kind, lcb_width)
    positions = Limits.of(ensemble.base).positions
    for row, ids in enumerate(rows, start=1):
        if positions is not None and len(ids) > positions:
            what = f"has {len(ids):,} tokens, and the base reads {positions:,}"
            raise DataError(what, where=f"row {row}", hint="Shorten it: a reward is read at the end of a text.")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ensemble.config.get_text_config().pad_token_id = padding
    weights_M, center_M1 = ensemble.weights.double().cpu(), kept.center.double()[:, None]
    scores: list[RewardScore] = []
    with evaluating(ensemble), torch.inference_mode():
        for at in batches_by_length([len(ids) for ids in rows], tokens_per_batch // ensemble.num_members):
            input_ids = padded([rows[i] for i in at], padding or 0)
            mask = padded([[1] * len(rows[i]) for i in at], 0)
            given_MB = ensemble.rewards(input_ids.to(ensemble.device), mask.to(ensemble.device)).double().cpu()
            check_finite(given_MB, at, "reward")
            rewards_MB = given_MB - center_M1
            bounds = dict(zip(("mean", "std", "lcb"), reward_bounds(rewards_MB, weights_M, lcb_width), strict=True))
            columns = [bounds[name].tolist() for name in ("mean", "std", "lcb", kind)]
            scores += [
                RewardScore(i, len(rows[i]), rewards, *values)
                for i, rewards, *values in zip(at, rewards_MB.T.tolist(), *columns, strict=True)
            ]
            progress(len(scores))
    return sorted(scores)


def score_rated_pairs(
    ensemble: LoraEnsemble,
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    kept: KeptReward,
    lcb_width: float = 1.0,
    *,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[list[PairScore], list[tuple[RewardScore, RewardScore]]]:
    """Score pairs by the members' rewards: a member's margin is its reward of the chosen minus that of the rejected.

    Args:
        ensemble: M reward models.
        pairs: with columns `prompt_ids`, `chosen_ids`, `rejected_ids`, and votes if there are some, as `prepare_pairs`
            makes them without a `max_length`.
        tokenizer, kept, lcb_width: as for `score_rewards`.
        progress: called with the number of pairs done.

    Returns:
        One score a pair, and the rewards of both of its answers, in the dataset's order.

    Raises:
        As `score_rewards`.
    """
    of_sides = []
    for number, column in enumerate(("chosen_ids", "rejected_ids")):
        rows, before = [[*pair["prompt_ids"], *pair[column]] for pair in pairs], number * len(pairs)

        def told(done: int, before: int = before) -> None:
            progress((before + done) // 2)

        of_sides.append(score_rewards(ensemble, rows, tokenizer, kept, lcb_width=lcb_width, progress=told))
    sides = list(zip(*of_sides, strict=True))
    margin_MB = torch.tensor(
        [[a - b for a, b in zip(chosen.rewards, rejected.rewards, strict=True)] for chosen, rejected in sides],
        dtype=torch.float64,
    ).T
    votes_N3 = votes_of(pairs)
    votes = None if votes_N3 is None else Votes(*votes_N3.T)
    ell_MB = reward_log_likelihood(margin_MB, torch.zeros(()), votes=votes, tie_strength=kept.tie_strength)
    tokens_B = torch.tensor([chosen.tokens + rejected.tokens for chosen, rejected in sides])
    numbers = list(range(len(sides)))
    return scores_of_margins(ensemble, numbers, tokens_B, margin_MB, ell_MB, votes, kept.tie_strength), sides


class RewardFunction:
    """A reward function of TRL's GRPOTrainer: from prompts and completions, both text or both messages, to rewards."""

    def __init__(
        self, ensemble: LoraEnsemble, tokenizer: PreTrainedTokenizerBase, kept: KeptReward, kind: str, lcb_width: float
    ):
        check_reward(kind, lcb_width)
        self.ensemble, self.tokenizer, self.kept = ensemble, tokenizer, kept
        self.kind, self.lcb_width = kind, lcb_width
        self.__name__ = f"renyi_{kind}"  # TRL logs a function's rewards under its name

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """The reward of each completion. TRL passes columns of the dataset by name; they are not used."""
        asked = enumerate(zip(prompts, completions, strict=True), start=1)
        rows = [rated_tokens(self.tokenizer, prompt, answer, f"completion {i}") for i, (prompt, answer) in asked]
        scores = score_rewards(self.ensemble, rows, self.tokenizer, self.kept, self.kind, self.lcb_width)
        return [score.reward for score in scores]


def check_reward(kind: str, lcb_width: float) -> None:
    """Raise `ConfigError` unless both settings are allowed."""
    if kind not in REWARDS:
        raise ConfigError(f"{kind!r} is not allowed", where="reward", hint=f"Write {' or '.join(REWARDS)}.")
    if not 0 <= lcb_width < math.inf:
        hint = "Give how many standard deviations the bound is below the mean: a number of at least 0."
        raise ConfigError(f"{lcb_width} is not allowed", where="lcb_width", hint=hint)
