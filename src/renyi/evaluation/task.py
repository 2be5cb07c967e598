"""What a task of evaluation is: it reads rows, asks the model, evaluates, and reports. `running.py` runs a task.

A task is one file in `renyi.evaluation.tasks`: a subclass of `Task`, and a dataclass of its settings, from which the
flags of `renyi evaluate --task …` are made. Read next: `tasks/perplexity.py`, the shortest task.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from renyi.errors import ConfigError
from renyi.evaluation.files import File
from renyi.evaluation.sections import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from renyi import LoraEnsemble

Answered = TypeVar("Answered")


# ---- Settings --------------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, metavar: str | None = None) -> Any:
    """A setting of a task, with its default, its line of help, and what a flag's value is called there.

    A list is a flag that may be repeated; `false` is a flag without value.
    """
    metadata = {"help": help, "metavar": metavar}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a task. Subclasses declare theirs with `setting`, and refuse bad values in `validate`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if get_origin(hint) is Literal and value not in get_args(hint):
                raise ConfigError(f"{value!r} is none of {', '.join(get_args(hint))}", where=field.name)
        self.validate()

    def validate(self) -> None:
        """Raise `ConfigError`, with the setting's name as its place, for a value that is out of range."""

    def require(self, is_fine: bool, name: str, hint: str) -> None:
        """Raise `ConfigError` unless the value of a setting is fine."""
        if not is_fine:
            value = getattr(self, name)
            raise ConfigError(
                f"is {value:g}" if isinstance(value, int | float) else f"is {value!r}", where=name, hint=hint
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouped(Settings):
    """Settings of tasks that report groups of rows."""

    group: str | None = setting(None, "column to report groups of rows by", "COLUMN")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampled(Settings):
    """Settings of tasks whose figures have bootstrap intervals."""

    resamples: int = setting(1000, "draws for bootstrap intervals", "N")

    def validate(self) -> None:
        super().validate()
        self.require(self.resamples >= 0, "resamples", "Give a number of draws, or 0 for none.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared(Settings):
    """Settings of tasks that put other ensembles beside the one that is evaluated."""

    baseline: list[str] = setting(
        [], "another ensemble or single adapter to compare with; repeat the flag for more", "DIR"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropped(Compared):
    """Settings of tasks that can also ask a single member again and again with dropout (Monte Carlo dropout)."""

    mc_dropout: int = setting(
        0, "also the mean of this many passes of a single member with dropout, the first baseline or member 0", "N"
    )
    mc_dropout_rate: float | None = setting(None, "dropout of these passes; by default the one trained with", "RATE")

    def validate(self) -> None:
        super().validate()
        self.require(self.mc_dropout >= 0, "mc_dropout", "Give a number of passes, or 0 for none.")
        rate = self.mc_dropout_rate
        self.require(rate is None or 0 < rate < 1, "mc_dropout_rate", "Give a probability above 0 and below 1.")

    def rivals(self, models: "Models") -> "Iterator[tuple[str, Model, bool]]":
        """What to compare with: its name in tables, a model, and whether to ask its first member with dropout.

        These are the baselines, and with `mc_dropout` the first baseline of one member again, or the ensemble that is
        evaluated if there is no such baseline.
        """
        left = self.mc_dropout > 0
        for name, other in models.baselines(self.baseline):
            yield name, other, False
            if left and other.ensemble.num_members == 1:
                left = False
                yield f"{name}, MC dropout", other, True
        if left:
            yield "member 0, MC dropout", models.model, True

    def passes(self, ensemble: "LoraEnsemble", ask: Callable[[int], Answered]) -> list[Answered]:
        """What `ask(number)` answers in each pass, all members of the ensemble having dropout (arXiv 1506.02142).

        Raises:
            ConfigError: the members were trained without dropout, and no rate was given.
        """
        import torch

        rate = ensemble.peft_config.lora_dropout if self.mc_dropout_rate is None else self.mc_dropout_rate
        if rate == 0:
            hint = "Give --mc_dropout_rate, or train with lora_dropout."
            raise ConfigError("the member was trained without dropout", where="mc_dropout", hint=hint)
        answers = []
        with torch.random.fork_rng():
            for number in range(self.mc_dropout):
                torch.manual_seed(number)
                with ensemble.dropping(rate):
                    answers.append(ask(number))
        return answers


def is_positive(value: float) -> bool:
    return 0 < value < math.inf


# ---- Models ----------------------------------------------------------------------------------------------------------


class Model(Protocol):
    """An ensemble on its device, its tokenizer, and the folder that it was loaded from, if there is one."""

    @property
    def folder(self) -> Path | None: ...
    @property
    def ensemble(self) -> "LoraEnsemble": ...
    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase": ...


def load_model(name: str, base: str | None = None, device: str | None = None) -> Model:
    """Load an ensemble, or a single adapter, and its tokenizer; by default on a GPU if there is one."""
    from renyi.inference import model

    return model.load_model(name, base, device)


Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def no_progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Shows nothing. A `Progress` gets the name of the work and its total; what it returns gets how much is done."""
    return nullcontext(lambda done: None)


class Models:
    """The ensemble that is evaluated, and those it is compared with, each loaded when it is first asked for.

    Args:
        model: an ensemble with its tokenizer, or a folder or hub id to load one from.
        load: loads what `baseline` (and `model`, if it is a name) names.
        progress: told how many questions or rows are done.
        draws: draws of each member to take in place of the members of `model`, if it is a name; None for the means.
        seed: of the draws.
    """

    def __init__(
        self,
        model: Model | str | Path,
        load: Callable[[str], Model] = load_model,
        progress: Progress = no_progress,
        draws: int | None = None,
        seed: int = 0,
    ):
        self._given, self.load, self.progress, self._draws, self._seed = model, load, progress, draws, seed

    @cached_property
    def model(self) -> Model:
        """The ensemble that is evaluated."""
        if not isinstance(self._given, str | Path):
            return self._given
        found = self.load(str(self._given))
        if self._draws is None:
            return found
        from renyi.inference.model import LoadedModel

        return LoadedModel(Path(found.folder or "."), found.ensemble.draw(self._draws, self._seed), found.tokenizer)

    @cached_property
    def folder(self) -> Path | None:
        """The ensemble's folder, without loading the ensemble; None if it has no folder."""
        if not isinstance(self._given, str | Path):
            return self._given.folder
        from renyi.ensemble.storage import resolve_folder

        return resolve_folder(str(self._given))

    @cached_property
    def weights(self) -> list[float]:
        """The ensemble's mixture weights [M]. If it has a folder, it is not loaded for that."""
        if self.folder is None or not isinstance(self._given, str | Path) or self._draws is not None:
            return [float(weight) for weight in self.model.ensemble.weights]
        from renyi.ensemble.storage import read_ensemble

        return list(read_ensemble(self.folder).weights)

    def baselines(self, names: Iterable[str], taken: Iterable[str] = ()) -> "Iterator[tuple[str, Model]]":
        """Each named ensemble, with its name in tables: its folder's name, or the whole path if that name is taken.

        They are loaded one after another, so that only one must be in memory.
        """
        known = {"mixture", *taken}
        for name in names:
            short = Path(name).resolve().name if Path(name).is_dir() else name
            short = name if short in known else short
            known.add(short)
            yield short, self.load(name)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


class Task(ABC):
    """One kind of evaluation. Its methods are called in the order of this class.

    Attributes:
        name: the name for `--task` and `evaluate`.
        Settings: its settings with their defaults, a subclass of `Settings`.
        reads_several: whether DATA may be several files.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]] = Settings
    reads_several: ClassVar[bool] = False

    @abstractmethod
    def read(self, files: Sequence[File], settings: Any) -> Any:
        """Read the rows. Bad rows are refused here, before a model is loaded, unless a tokenizer is needed for that."""

    @abstractmethod
    def ask(self, models: Models, data: Any, settings: Any) -> Any:
        """The answers of the ensemble and its baselines to these rows."""

    @abstractmethod
    def evaluate(self, data: Any, answers: Any, settings: Any) -> Any:
        """The figures, as a named tuple."""

    @abstractmethod
    def report(self, data: Any, answers: Any, found: Any, settings: Any) -> Report:
        """The report for a person."""

    def result(self, data: Any, answers: Any, found: Any, settings: Any) -> dict[str, Any]:
        """The result for a machine: an object that JSON can hold, with the task's name."""
        return {"task": self.name, **as_json(found)}

    def lines(self, data: Any, answers: Any, found: Any, settings: Any) -> Iterable[dict[str, Any]]:
        """What is said of each row, in their order."""
        return []


class Evaluated(NamedTuple):
    """What `evaluate` finds.

    Attributes:
        result: the figures, as the command's `--json` prints them.
        lines: what is said of each row, as the command's `--output` writes them.
        report: tables, charts and examples.
    """

    result: dict[str, Any]
    lines: list[dict[str, Any]]
    report: Report

    def write(self, folder: str | Path) -> Path:
        """Write evaluation.json, figures and report.html to a folder, as `--report` does; returns the page's path."""
        from renyi.evaluation.page import write_report

        return write_report(Path(folder), self.report, self.result)


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    """The value with named tuples at any depth as JSON objects, and NaN or infinite numbers as null."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [as_json(item) for item in value] if isinstance(value, list) else value
