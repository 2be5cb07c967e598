"""What a task of evaluation is, and `evaluate`, which runs one: read rows, ask the model, evaluate, report.

A task is one file in `renyi.evaluation.tasks`: a subclass of `Task`, and a dataclass of its settings, from which the
flags of `renyi evaluate --task …` are made. Read `tasks/perplexity.py` first; it is the shortest.
"""

import dataclasses
import difflib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

from renyi.errors import ConfigError
from renyi.evaluation.files import File, as_files
from renyi.evaluation.sections import Report

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from renyi import LoraEnsemble


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

    baseline: list[str] = setting([], "another ensemble or single adapter to compare with; repeat", "DIR")


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


class LoadedModel(NamedTuple):
    """A `Model` from a folder."""

    folder: Path | None
    ensemble: "LoraEnsemble"
    tokenizer: "PreTrainedTokenizerBase"


def load_model(name: str, base: str | None = None, device: str | None = None) -> LoadedModel:
    """Load an ensemble and its tokenizer from a folder or the hub; by default on a GPU if there is one."""
    import torch

    from renyi import LoraEnsemble, data
    from renyi.ensemble.storage import resolve_folder

    folder = resolve_folder(name)
    ensemble = LoraEnsemble.load(folder, base=base).eval()
    tokenizer = data.load_tokenizer_of(folder, ensemble.base_model_name)
    ensemble.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return LoadedModel(folder, ensemble, tokenizer)


Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]


def no_progress(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """Says nothing. A `Progress` is given what is done and how much there is, and then how much is done."""
    return nullcontext(lambda done: None)


class Models:
    """The ensemble that is evaluated, and those it is compared with, each loaded when it is first asked for.

    Args:
        model: an ensemble with its tokenizer, or a folder or hub id to load one from.
        load: loads what `baseline` (and `model`, if it is a name) names.
        progress: told how far the asking is.
    """

    def __init__(
        self, model: Model | str | Path, load: Callable[[str], Model] = load_model, progress: Progress = no_progress
    ):
        self._given, self.load, self.progress = model, load, progress

    @cached_property
    def model(self) -> Model:
        """The ensemble that is evaluated."""
        return self.load(str(self._given)) if isinstance(self._given, str | Path) else self._given

    @cached_property
    def folder(self) -> Path | None:
        """Its folder, without loading it; None of an ensemble that has none."""
        if not isinstance(self._given, str | Path):
            return self._given.folder
        from renyi.ensemble.storage import resolve_folder

        return resolve_folder(str(self._given))

    @cached_property
    def weights(self) -> list[float]:
        """Its mixture weights [M], without loading it where it has a folder."""
        if self.folder is None or not isinstance(self._given, str | Path):
            return [float(weight) for weight in self.model.ensemble.weights]
        from renyi.ensemble.storage import read_manifest

        return list(read_manifest(self.folder).weights)

    def baselines(self, names: Iterable[str], taken: Iterable[str] = ()) -> "Iterator[tuple[str, Model]]":
        """Each of the named ensembles, with what tables call it: its folder's name, or all of it where that is taken.

        Each is loaded in its turn, so that no two need be held.
        """
        known = {"mixture", *taken}
        for name in names:
            short = Path(name).resolve().name if Path(name).is_dir() else name
            short = name if short in known else short
            known.add(short)
            yield short, self.load(name)


# ---- Tasks -----------------------------------------------------------------------------------------------------------


class Task(ABC):
    """One kind of evaluation. Its steps are called in the order in which they stand here.

    Attributes:
        name: as `--task` and `evaluate` know it.
        Settings: its settings with their defaults, a subclass of `Settings`.
        reads_several: whether DATA may be several files.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[Settings]] = Settings
    reads_several: ClassVar[bool] = False

    @abstractmethod
    def read(self, files: Sequence[File], settings: Any) -> Any:
        """What rows say; every bad row is refused here, before a model is loaded."""

    @abstractmethod
    def ask(self, models: Models, data: Any, settings: Any) -> Any:
        """What the ensemble and its baselines say to that."""

    @abstractmethod
    def evaluate(self, data: Any, answers: Any, settings: Any) -> Any:
        """The figures, as a named tuple."""

    @abstractmethod
    def report(self, data: Any, answers: Any, found: Any, settings: Any) -> Report:
        """What a person sees of it."""

    def result(self, data: Any, answers: Any, found: Any, settings: Any) -> dict[str, Any]:
        """What a machine reads: JSON-able, with the task's name."""
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


def evaluate(task: "str | Task", rows: Any, model: Model | str | Path | Models, /, **settings: Any) -> Evaluated:
    """Evaluate an ensemble on rows, with the same defaults as `renyi evaluate`.

    Args:
        task: choice, perplexity, preference, refusal, sampling, or a task of your own.
        rows: a `Dataset`, a list of dicts, a path, a hub id, or several paths where the task reads several.
        model: an ensemble's folder or hub id, or a loaded one with `ensemble`, `tokenizer` and `folder`.
        settings: of the task; `find_task(name).Settings` lists them.

    Raises:
        ConfigError: there is no such task or setting, or a value does not fit.
        DataError: a row does not fit the task.
    """
    found_task = find_task(task) if isinstance(task, str) else task
    filled = fill(found_task, settings)
    files = as_files(rows)
    if len(files) > 1 and not found_task.reads_several:
        raise ConfigError(
            f"{files[1].name!r} is a second file, and --task {found_task.name} reads one",
            where="DATA",
            hint="Join the files, and tell them apart by a column with --group.",
        )
    data = found_task.read(files, filled)
    answers = found_task.ask(model if isinstance(model, Models) else Models(model), data, filled)
    found = found_task.evaluate(data, answers, filled)
    parts = (data, answers, found, filled)
    return Evaluated(found_task.result(*parts), list(found_task.lines(*parts)), found_task.report(*parts))


def fill(task: Task, settings: dict[str, Any]) -> Settings:
    """The task's settings with their defaults.

    Raises:
        ConfigError: the task has no such setting, or a value does not fit.
    """
    known = [field.name for field in dataclasses.fields(task.Settings)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            hint = f"The nearest known one is {near[0]}." if near else None
            raise ConfigError(f"task {task.name} has no such setting", where=name, hint=hint)
    return task.Settings(**settings)


# ---- The registry ----------------------------------------------------------------------------------------------------

_REGISTERED: dict[str, Task] = {}


def register(task: Task) -> Task:
    """Make a task known by its name. Tasks in `renyi.evaluation.tasks` are known without it."""
    _REGISTERED[task.name] = task
    return task


def task_names() -> list[str]:
    """The names of all tasks: the modules of `renyi.evaluation.tasks`, and what was registered."""
    from renyi.evaluation import tasks

    return sorted({*(module.name for module in pkgutil.iter_modules(tasks.__path__)), *_REGISTERED})


def find_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigError: there is none.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    names = task_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ConfigError(
            f"{name!r} is none of {', '.join(names)}",
            where="task",
            hint=f"Did you mean {near[0]}?" if near else None,
        )
    task: Task = import_module(f"renyi.evaluation.tasks.{name}").TASK
    return task


# ---- JSON ------------------------------------------------------------------------------------------------------------


def as_json(value: Any) -> Any:
    """Named tuples, however deep, as JSON objects, and what is no number as null."""
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [as_json(item) for item in value] if isinstance(value, list) else value
