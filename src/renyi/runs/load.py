"""`renyi.load`: an ensemble's folder as a whole, with scores, answers, choices and evaluations as methods.

A folder holds more than members: the tokenizer, how training prepared its rows, what preferences were measured against,
the threshold above which to abstain. The commands call the object made here, so they have the same defaults. Read next:
`renyi.inference.score` and `renyi.inference.generate`, the functions that it calls.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from renyi import data
from renyi.data import PairPreparation, Preparation, Question, ThumbPreparation
from renyi.ensemble import (
    KeptReward,
    KeptThumbs,
    LoraEnsemble,
    needed_thumbs,
    read_preference,
    read_reward,
    read_thumbs,
)
from renyi.ensemble.reference import KeptPreference
from renyi.errors import ConfigError
from renyi.evaluation import Evaluated, Opinion, evaluate
from renyi.inference import (
    RewardFunction,
    RewardScore,
    Score,
    ThumbScore,
    choice_log_probs,
    generate,
    rated_rows,
    score,
    score_choices,
    score_rewards,
    score_thumbs,
)
from renyi.inference.abstention import FIND_ONE, Abstention, read_abstention
from renyi.inference.choices import ChoiceBy
from renyi.inference.generate import MAX_NEW_TOKENS, OnPiece, PromptRow, as_chat
from renyi.inference.model import load_model
from renyi.inference.score import prepared_for
from renyi.layout import ABSTENTION_FILE

Progress = Callable[[int], object]


def _ignore(done: int) -> None:
    pass


class Choice(NamedTuple):
    """The answer of an ensemble of M members to a question with C options.

    Attributes:
        index: the number of the question, counted from 0.
        tokens: of each option, [C].
        log_likelihood: of each option under each member, nats, [M][C].
        probabilities: of the options under the mixture, [C].
        choice: the likeliest option, counted from 0.
        uncertainty: `total`, `aleatoric`, `epistemic` and more, by name; see `renyi.evaluation.Opinion`.
    """

    index: int  # type: ignore[assignment]
    tokens: list[int]
    log_likelihood: list[list[float]]
    probabilities: list[float]
    choice: int
    uncertainty: dict[str, float]


class Loaded:
    """An ensemble with everything that its folder says about it. `renyi.load` makes one.

    Attributes:
        folder: what it was loaded from.
        ensemble: the members on their base, in evaluation mode, on its device.
        tokenizer: the one that training used.
    """

    def __init__(self, folder: Path, ensemble: LoraEnsemble, tokenizer: PreTrainedTokenizerBase):
        self.folder, self.ensemble, self.tokenizer = folder, ensemble, tokenizer

    @cached_property
    def preparation(self) -> Preparation:
        """How rows become tokens and labels, as in training."""
        return Preparation.read(self.folder)

    @cached_property
    def pair_preparation(self) -> PairPreparation:
        """How preference pairs become tokens, as in training."""
        return PairPreparation.read(self.folder)

    @cached_property
    def preference(self) -> KeptPreference:
        """The loss of training on preferences, and the reference that margins are measured against."""
        return read_preference(self.folder, self.ensemble)

    @cached_property
    def thumbs(self) -> KeptThumbs | None:
        """The loss, reference and reference points of training on thumbs; None if it was not trained on thumbs."""
        return read_thumbs(self.folder, self.ensemble)

    @cached_property
    def reward(self) -> KeptReward:
        """What each member's rewards are centred by, for an ensemble of reward models.

        Raises:
            EnsembleFormatError: its members are no reward models.
        """
        return read_reward(self.folder, self.ensemble)

    @property
    def abstention(self) -> Abstention | None:
        """The threshold above which to abstain; None if none was found yet."""
        return read_abstention(self.folder)

    def draw(self, num_draws: int, seed: int = 0) -> "Loaded":
        """The same with draws of every member in place of the members; see `LoraEnsemble.draw`."""
        return Loaded(self.folder, self.ensemble.draw(num_draws, seed), self.tokenizer)

    def rows(self, rows: Any, *, split: str | None = None, dataset_config: str | None = None) -> Dataset:
        """Rows as a dataset, as `renyi.data.read_rows` reads them."""
        return data.read_rows(rows, split, dataset_config)

    def prepare(self, rows: Any, *, name: str = "dataset", **departures: Any) -> Dataset:
        """Rows as columns `input_ids` and `labels`, prepared as in training.

        Args:
            rows: a path, a hub id, a list of dictionaries, or a dataset.
            name: what to call them in errors, if they have no name.
            departures: settings of `Preparation` to take instead of training's, such as `max_length`.

        Raises:
            DataError: a row is malformed, or nothing of it is trained.
        """
        name = str(rows) if isinstance(rows, str | Path) else name
        preparation = replace(self.preparation, **departures)
        return prepared_for(self.ensemble, self.rows(rows), self.tokenizer, preparation, name)

    def score(self, rows: Any, *, progress: Progress = _ignore, **departures: Any) -> list[Score]:
        """Log-likelihoods, responsibilities and mixture NLL of every row, as `renyi score` does.

        Args:
            rows: a path, a hub id, a list of dictionaries, or a dataset; prepared ones (`input_ids` and `labels`) are
                taken as they are.
            progress: called after each batch with the number of rows done.
            departures: settings of `Preparation` to take instead of training's, such as `max_length`.

        Raises:
            DataError: a row is malformed, or nothing of it is trained.
            EnsembleFormatError: a member gives no finite likelihood.
        """
        is_prepared = isinstance(rows, Dataset) and {"input_ids", "labels"}.issubset(rows.column_names)
        prepared = rows if is_prepared else self.prepare(rows, **departures)
        return score(self.ensemble, prepared, progress=progress)

    def score_thumbs(
        self, rows: Any, *, name: str = "dataset", progress: Progress = _ignore, **departures: Any
    ) -> list[ThumbScore]:
        """Rewards, probabilities of thumbs up and log-likelihoods of thumbs, for an ensemble trained on thumbs.

        Args:
            rows: of `prompt`, `completion` and `label`: a path, a hub id, a list of dictionaries, or a dataset.
            name: what to call them in errors, if they have no name.
            progress: called after each batch with the number of rows done.
            departures: `max_length`, to take instead of training's.

        Raises:
            DataError: a row is malformed, or no token of its completion is left after the cut.
            EnsembleFormatError: the ensemble was not trained on thumbs, or a member gives no finite reward.
        """
        kept = self.thumbs or needed_thumbs(self.folder, self.ensemble)
        unknown = sorted(set(departures) - {"max_length"})
        if unknown:
            raise ConfigError("is no setting of thumbs", where=unknown[0], hint="Leave it out.")
        name = str(rows) if isinstance(rows, str | Path) else name
        preparation = replace(ThumbPreparation.read(self.folder), **departures)
        limits = data.Limits.of(self.ensemble.base)
        prepared = preparation.prepare(self.rows(rows), self.tokenizer, name, limits)
        return score_thumbs(self.ensemble, prepared, kept, preparation, progress=progress)

    def score_rewards(
        self,
        rows: Any,
        kind: str = "mean",
        *,
        lcb_width: float = 1.0,
        name: str = "dataset",
        progress: Progress = _ignore,
    ) -> list[RewardScore]:
        """Every answer's reward under each member, their mean, spread and lower confidence bound.

        Args:
            rows: of `prompt` and `completion`: a path, a hub id, a list of dictionaries, or a dataset.
            kind: what `reward` is: "mean" or "lcb".
            lcb_width: standard deviations by which the lower confidence bound is below the mean.
            name: what to call the rows in errors, if they have no name.
            progress: called after each batch with the number of rows done.

        Raises:
            ConfigError: a setting is out of range.
            DataError: a row is malformed, or longer than the base can read.
            EnsembleFormatError: the members are no reward models, or one gives no finite reward.
        """
        name = str(rows) if isinstance(rows, str | Path) else name
        kept = self.reward
        ids = rated_rows(self.rows(rows), self.tokenizer, self.ensemble, name)
        return score_rewards(self.ensemble, ids, self.tokenizer, kept, kind, lcb_width, progress=progress)

    def reward_function(self, kind: str = "lcb", lcb_width: float = 1.0) -> RewardFunction:
        """A reward function for TRL's GRPOTrainer: `GRPOTrainer(reward_funcs=loaded.reward_function())`.

        Args:
            kind: "mean", or "lcb": the lower confidence bound, which pays a policy only for what members agree on.
            lcb_width: as for `score_rewards`.

        Raises:
            ConfigError: a setting is out of range.
            EnsembleFormatError: the members are no reward models.
        """
        return RewardFunction(self.ensemble, self.tokenizer, self.reward, kind, lcb_width)

    def generate(
        self,
        prompts: PromptRow | Sequence[PromptRow],
        *,
        system: str | None = None,
        plain: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
        batch_size: int = 8,
        seed: int | None = None,
        on_piece: OnPiece | None = None,
        progress: Progress = _ignore,
        **settings: Any,
    ) -> list[Any]:
        """Answers to prompts, as `renyi generate` does.

        Args:
            prompts: text, which opens a chat where the tokenizer has a chat template; a chat's messages; or a list of
                either.
            system: the system message of every chat.
            plain: continue text as it is, without the chat template.
            max_new_tokens, batch_size, seed, on_piece, progress, settings: as for `renyi.inference.generate`.

        Returns:
            An `Answer` for each prompt; with mixture="member" and no `member` a list of M answers, one a member.

        Raises:
            DataError: a prompt is empty, ends with an answer, or does not fit the chat template.
            ConfigError: a setting is unknown, out of range, or contradicts another one.
        """
        asked = [as_chat(p, self.tokenizer, system=system, plain=plain) for p in _several(prompts)]
        return generate(
            self.ensemble,
            asked,
            self.tokenizer,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            on_piece=on_piece,
            progress=progress,
            **settings,
        )

    def choices(
        self, questions: Any, by: ChoiceBy = "letter", *, name: str = "questions", progress: Progress = _ignore
    ) -> list[Choice]:
        """The ensemble's answers to multiple-choice questions, as `renyi score --choice_by` gives them.

        Args:
            questions: a path, a hub id, a list of dictionaries or of `Question`s, or a dataset; which option is right
                is not looked at.
            by: what is scored: "letter", "text", or "text_normalised".
            name: what to call the questions in errors, if they have no name.
            progress: called after each batch with the number of questions done.

        Raises:
            DataError: a question is malformed.
            EnsembleFormatError: a member gives no finite likelihood.
        """
        if not (isinstance(questions, Sequence) and questions and isinstance(questions[0], Question)):
            name = str(questions) if isinstance(questions, str | Path) else name
            questions = data.read_questions(self.rows(questions), name)
        scores = score_choices(self.ensemble, questions, self.tokenizer, by, progress=progress)
        weights = self.ensemble.weights.cpu()
        log_probs, draws = choice_log_probs(scores, by), self.ensemble.num_draws
        opinion = Opinion(log_probs, weights, scores.log_likelihood, scores.tokens, draws)
        mixture, uncertainty = opinion.mixture(), opinion.uncertainty()
        return [
            Choice(
                index=i,
                tokens=scores.tokens[i, : len(question.choices)].tolist(),
                log_likelihood=scores.log_likelihood[:, i, : len(question.choices)].tolist(),
                probabilities=mixture[i, : len(question.choices)].tolist(),
                choice=int(mixture[i].argmax()),
                uncertainty={name: float(values[i]) for name, values in uncertainty.items()},
            )
            for i, question in enumerate(questions)
        ]

    def evaluate(self, task: Any, rows: Any, **settings: Any) -> Evaluated:
        """How good the ensemble is at a task, as `renyi evaluate --task` does.

        Args:
            task: "choice", "perplexity", "preference", "refusal", "reward", "sampling", "thumbs", or one of your own.
            rows: a path, a hub id, a list of dictionaries, a dataset, or several paths where the task reads several.
            settings: of the task, named as the command's flags.

        Returns:
            The figures (`result`), what is said of each row (`lines`), and the report.

        Raises:
            ConfigError: there is no such task or setting, or a value does not fit.
            DataError: a row does not fit the task.
        """
        return evaluate(task, rows, self, **settings)

    def needed_abstention(self, where: str = "withhold") -> Abstention:
        """The threshold above which to abstain; an error if there is none.

        Args:
            where: the setting that needs it, for errors.

        Raises:
            ConfigError: there is none, or answers have no such score.
        """
        found = self.abstention
        if found is None:
            raise ConfigError(f"there is no {ABSTENTION_FILE} in {self.folder}", where=where, hint=FIND_ONE)
        try:
            found.check()
        except ConfigError as error:
            raise ConfigError(error.what, where=where, hint=error.hint) from error
        return found


def load(folder: str | Path, *, base: str | Path | None = None, device: str | None = None) -> Loaded:
    """Open the folder of a training run: members, tokenizer, preparation, reference, abstention.

    Args:
        folder: the folder of an ensemble, or of a single PEFT adapter (it becomes an ensemble of one); or a hub id.
        base: the base model, if it is no longer where the ensemble says.
        device: "cpu", "cuda", …; by default cuda if there is one.

    Raises:
        EnsembleFormatError: the folder is not an ensemble, or a file of it is missing or damaged.
        TokenizerError: there is no tokenizer.
        ConfigError: there is no such device.
    """
    return Loaded(*load_model(folder, base, device))


def _several(prompts: PromptRow | Sequence[PromptRow]) -> list[PromptRow]:
    """Prompts as a list; one prompt gives a list of one. A list of messages is one chat."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [prompts]
    several: list[Any] = list(prompts)
    is_chat = bool(several) and isinstance(several[0], Mapping) and "prompt" not in several[0]
    return [several] if is_chat else several
