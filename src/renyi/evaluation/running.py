"""`evaluate` runs a task on rows and a model; the registry finds a task by its name.

Read next: `task.py`, what a task is. The tasks are the files in `tasks/`.
"""

import dataclasses
import difflib
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any

from renyi.errors import ConfigError
from renyi.evaluation import tasks
from renyi.evaluation.files import as_files
from renyi.evaluation.task import Evaluated, Model, Models, Settings, Task


def evaluate(task: "str | Task", rows: Any, model: Model | str | Path | Models, /, **settings: Any) -> Evaluated:
    """Evaluate an ensemble on rows, with the same defaults as `renyi evaluate`.

    Args:
        task: choice, perplexity, preference, refusal, reward, sampling, thumbs, or a task of your own.
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
