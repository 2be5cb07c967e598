"""`renyi evaluate`: how good an ensemble and each of its members are, and where the members contradict each other.

--task choice: rows are multiple-choice questions. It reports accuracy, NLL, calibration, and whether uncertainty finds
the errors, for the mixture, every member and baselines. --target_risk finds the uncertainty above which to abstain.

--task perplexity: rows are texts. It reports how likely they are under the mixture, every member and baselines, by
group.

--task preference: rows are pairs, prepared, cut and compared with the reference as in the ensemble's training. It
reports accuracy, NLL, Brier score and calibration of the probability that the chosen completion is preferred, for the
mixture, every member and baselines, and the pairs on which members contradict each other.

--task refusal: rows are prompts, safe or unsafe to answer. Every member answers them, or the rows have the answers. It
reports how often each member refuses, how much members differ, and the prompts on which they differ.

--task reward: rows are pairs, for reward models. As for preferences; and which reward orders pairs best, the mean over
members or a lower bound, and whether the members' spread finds the pairs that are ordered wrongly.

--task sampling: rows are prompts, with answers or without. It draws several samples of each, and reports how many are
right, how much they vary, how long they are, and how likely they are under the base. --baseline base also samples the
base.

--task thumbs: rows are completions with thumbs up or down. How well the mixture, every member and baselines foretell
them, and whether uncertainty finds those that are foretold wrongly.
"""

import argparse
import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args, get_origin, get_type_hints

from rich.text import Text

from renyi.cli.console import emit_json, quiet_progress_bars, stream
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import add_draw_flags, add_reading_flags, check_output, draws_of, progress_bar, write_lines
from renyi.cli.tables import rendered, titled
from renyi.errors import ConfigError
from renyi.evaluation.files import load_files
from renyi.evaluation.running import evaluate, find_task, task_names
from renyi.evaluation.task import Models, Settings, Task, load_model
from renyi.text import plural


def run(argv: Sequence[str]) -> int:
    """Evaluate an ensemble on a dataset."""
    args, task, given = _parse(argv)
    out, err = stream(), stream(stderr=True)
    with _flags_named({*given, *_known(task), "split", "device", "draws"}):
        with err.status("loading"):
            quiet_progress_bars()
            files = load_files(args.data, args.split, args.dataset_config)
        models = Models(
            args.ensemble,
            lambda name: load_model(name, args.base, args.device),
            lambda what, total: progress_bar(err, what, total),
            *draws_of(args),
        )
        found = evaluate(task, files, models, **given)
    page = found.write(args.report) if args.report else None
    if args.output:
        write_lines(found.lines, args.output)
    if args.json:
        emit_json(found.result)
        return 0
    out.print(titled(found.report.title))
    out.print(Text(found.report.subtitle, "dim"))
    for section in found.report.sections:
        shown = rendered(section, args.show)
        if shown is not None:
            out.print(shown)
    if page:
        err.print(f"\nthe report is {page}", soft_wrap=True, markup=False)
    if args.output:
        err.print(f"\n{plural(len(found.lines), 'line')} in {args.output}", soft_wrap=True, markup=False)
    return 0


# ---- Flags -----------------------------------------------------------------------------------------------------------


def parser(tasks: Sequence[Task] | None = None) -> StrictParser:
    """What the command reads, with the flags of some tasks; of all if None."""
    tasks = tasks or [find_task(name) for name in task_names()]
    parser = StrictParser(
        prog="renyi evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_reading_flags(
        parser, "write one JSON line for each row here", "print one JSON object and no table", several=True
    )
    parser.add_argument("--task", required=True, metavar="TASK", help=f"one of: {', '.join(task_names())}")
    parser.add_argument("--show", default="5", metavar="N", help="how many examples to show (default: 5)")
    parser.add_argument("--report", metavar="DIR", help="write evaluation.json, figures and report.html here")
    for task in tasks:
        _add_flags(parser, task)
    add_draw_flags(parser)
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Task, dict[str, Any]]:
    """What the command line says: the general flags, the task, and those of its settings that were given."""
    name = _task_name(argv)
    tasks = [find_task(n) for n in task_names()] if name is None else [_found(name)]
    args = _checked(parser(tasks), argv, tasks[0])
    args.show = converted(args.show, int, None, "--show")
    if args.show < 0:
        raise ConfigError(f"is {args.show}", where="--show", hint="Give a number of rows, or 0 for none.")
    check_output(args.output)
    hints = get_type_hints(tasks[0].Settings)
    given = {
        name: converted(getattr(args, name), hints[name], None, f"--{name}")
        for name in _known(tasks[0])
        if getattr(args, name, None) is not None
    }
    return args, tasks[0], given


def _task_name(argv: Sequence[str]) -> str | None:
    first = StrictParser(prog="renyi evaluate", add_help=False)
    first.add_argument("--task")
    name: str | None = first.parse_known_args(list(argv))[0].task
    return name


def _found(name: str) -> Task:
    with _flags_named({"task"}):
        return find_task(name)


def _known(task: Task) -> list[str]:
    return [field.name for field in dataclasses.fields(task.Settings)]


def _add_flags(parser: StrictParser, task: Task) -> None:
    """Add the flags of a task, made from its settings. A flag that another task has already added is not changed."""
    hints = get_type_hints(task.Settings)
    group = parser.add_argument_group(task.name)
    for field in dataclasses.fields(task.Settings):
        if f"--{field.name}" in parser._option_string_actions:
            continue
        flag: dict[str, Any] = {"help": _help(task.Settings, field), "default": None}
        if hints[field.name] is bool:
            flag["action"] = "store_true"
        else:
            flag["metavar"] = field.metadata.get("metavar") or field.name.upper()
            flag["action"] = "append" if get_origin(hints[field.name]) is list else "store"
        group.add_argument(f"--{field.name}", **flag)


def _help(settings: type[Settings], field: "dataclasses.Field[Any]") -> str:
    hint, text = get_type_hints(settings)[field.name], str(field.metadata.get("help", ""))
    if get_origin(hint) is not None and all(isinstance(choice, str) for choice in get_args(hint)):
        text += f": {', '.join(choice for choice in get_args(hint) if choice not in text)}".rstrip(": ")
    default = None if field.default is dataclasses.MISSING else field.default
    return (text if default is None or default is False else f"{text} (default: {default})").replace("%", "%%")


def _checked(parser: StrictParser, argv: Sequence[str], task: Task) -> argparse.Namespace:
    """The parsed arguments. A flag that only another task has is an error that names that task."""
    try:
        args: argparse.Namespace = parse_strictly(parser, argv)
    except ConfigError as error:
        flag = (error.where or "").removeprefix("--").partition("=")[0]
        others = [name for name in task_names() if flag and flag in _known(find_task(name))]
        if others and flag not in _known(task):
            hint = f"It belongs to --task {', '.join(others)}. Leave it out."
            raise ConfigError(f"--task {task.name} has no such flag", where=error.where, hint=hint) from error
        raise
    return args


@contextmanager
def _flags_named(settings: set[str]) -> Iterator[None]:
    """Let an error about a setting name the flag that sets it."""
    try:
        yield
    except ConfigError as error:
        first = re.match(r"\w+", error.where or "")
        if first and first[0] in settings and not (error.where or "").startswith("--"):
            raise ConfigError(error.what, where=f"--{error.where}", hint=error.hint) from error
        raise
