"""`renyi diagnose`: do the data contradict a fitted adapter, above which alpha would members part, and over what?

    renyi diagnose ENSEMBLE DATA [--member 0]
    renyi diagnose --adapter PEFT_FOLDER --model BASE --dataset_name DATA

One member, or an ordinary PEFT adapter, is compared with rows like those of its training. Give held-out rows: on rows
that the adapter has memorised the figures are wrong. Half of the examples find the directions in which gradients differ
most. The other half is measured along them. Rows with `chosen` and `rejected` are diagnosed as preference pairs. Train
the adapter to the end first: what it has not learned yet looks like a contradiction.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rich.console import RenderableType
from rich.text import Text

from renyi.cli.console import bytes_text, emit_json, facts, quiet_progress_bars, say, stream
from renyi.cli.diagnosis import Doubt, LoadedExample, doubts_of, examples_table, findings, text_of
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import (
    add_reading_flags,
    check_output,
    load_ensemble,
    load_rows,
    progress_bar,
    write_lines,
)
from renyi.cli.tables import as_json
from renyi.errors import ConfigError, EnsembleFormatError, SaveError
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.inference.diagnose import Diagnosis, Pairs
    from renyi.runs.load import Loaded

PROG = "renyi diagnose"
# Flags that depart from how training prepared rows, and their types.
_PREPARATION = {
    "max_length": (int | None, "tokens after which a row is cut; null for no limit"),
    "dataset_text_field": (str, "the column that holds the text of a row of text"),
    "completion_only_loss": (bool | None, "whether only completions are trained"),
    "assistant_only_loss": (bool, "whether only the assistant's messages are trained"),
}
_NUMBERS = {"num_directions": 1, "max_examples": 4, "tokens_per_batch": 1}  # and the least of each
_OF_EXAMPLES = ("examples", "loadings", "log_likelihood", "directions", "group_loadings")  # most are in `--output`


class _Case(NamedTuple):
    """What is diagnosed.

    Attributes:
        args: the flags.
        loaded: the ensemble, or one adapter as an ensemble of one.
        rows: prepared, at most `--max_examples` of them.
        numbers: of those rows in the dataset, counted from 0.
        of: how many rows the dataset has.
        pairs: what is needed to score pairs; None if the rows are not pairs.
        is_fitted_to: whether the rows are known to be those of the adapter's training.
    """

    args: argparse.Namespace
    loaded: "Loaded"
    rows: "Dataset"
    numbers: list[int]
    of: int
    pairs: "Pairs | None"
    is_fitted_to: bool


def run(argv: Sequence[str]) -> int:
    """Diagnose an adapter on a dataset."""
    args = _parse(argv)
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.inference.diagnose import diagnose, memory_needed

        quiet_progress_bars()
        case = _read(args)
        ensemble = case.loaded.ensemble
        memory = memory_needed(ensemble, args.num_directions, args.tokens_per_batch)
    if not args.json:
        err.print(_plan(case, memory))
    _check_memory(case, memory)

    started = time.perf_counter()
    settings = {name: getattr(args, name) for name in ("member", "routing_quantity", "curvature", *_NUMBERS, "seed")}
    with progress_bar(err, "differentiating", len(case.rows)) as progress:
        found = diagnose(ensemble, case.rows, case.pairs, progress=progress, **settings)
    seconds = time.perf_counter() - started

    if args.output:
        lines = zip(found.examples, found.loadings, found.log_likelihood, strict=True)
        named = [{"index": case.numbers[i], "loading": x, "log_likelihood": ell} for i, x, ell in sorted(lines)]
        if found.groups is not None:
            from renyi.data import GROUP_COLUMN

            of_rows, loading = case.rows[GROUP_COLUMN], dict(zip(found.groups, found.group_loadings or (), strict=True))
            for line, i in zip(named, sorted(found.examples), strict=True):
                line |= {"group": of_rows[i], "group_loading": loading[of_rows[i]]}
        write_lines(named, args.output)
    if args.figure:
        _draw(found, args.figure)
    sides, doubts = _sides(found, case), doubts_of(found, _is_trained(case), case.is_fitted_to)
    if args.json:
        emit_json(_as_json(case, found, sides, doubts) | {"memory_bytes": memory, "seconds": seconds})
        return 0
    out.print(findings(found, "pair" if case.pairs else "sequence", seconds))
    if any(sides):
        out.print(examples_table(sides, found.contradicted))
    for what, hint in doubts:
        say("warning", "bold yellow", what, hint)
    for file, what in ((args.output, plural(len(found.examples), "line")), (args.figure, "the figure")):
        if file:
            err.print(f"\n{what} in {file}", soft_wrap=True)
    return 0


# ---- What is asked for -----------------------------------------------------------------------------------------------


def _apart() -> StrictParser:
    """Flags that stand for the two arguments."""
    names = StrictParser(prog=PROG, add_help=False)
    apart = names.add_argument_group("one adapter, instead of ENSEMBLE and DATA")
    apart.add_argument("--adapter", metavar="FOLDER", help="folder of an ordinary PEFT adapter, or its hub id")
    apart.add_argument("--model", metavar="BASE", help="its base model, if it is not the one that the adapter names")
    apart.add_argument("--dataset_name", metavar="DATA", help="the same as DATA")
    return names


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[_apart()]
    )
    add_reading_flags(
        parser, "write one JSON line for each measured example here", "print one JSON object and no table"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the spectrum and the loadings here")
    parser.add_argument(
        "--show", default="5", metavar="N", help="how many examples to show of either side (default: 5)"
    )
    parser.add_argument("--member", default="0", metavar="M", help="which member of the ensemble (default: 0)")
    how = parser.add_argument_group("the measurement")
    how.add_argument(
        "--curvature",
        default="fisher",
        help="fisher (the Gauss-Newton matrix), or hessian, which is slower and needs a well fitted adapter "
        "(default: fisher)",
    )
    how.add_argument(
        "--num_directions",
        default="16",
        metavar="K",
        help="directions to look at. Memory: about 11 x K floats for every parameter of the adapter. Time: K forwards "
        "over half of the examples, and a forward and a backward over the others (default: 16)",
    )
    how.add_argument(
        "--max_examples", default="512", metavar="N", help="rows drawn at random; time grows with it (default: 512)"
    )
    how.add_argument(
        "--tokens_per_batch",
        default="4096",
        metavar="T",
        help="tokens of one pass; bounds its activations (default: 4096)",
    )
    how.add_argument(
        "--routing_quantity",
        help="what responsibilities are taken of: sequence or length_normalised; by default what the ensemble routes",
    )
    how.add_argument("--seed", default="0", help="seed of the draw and of the bootstrap (default: 0)")
    kept = parser.add_argument_group("preparation, by default as in training")
    for name, (_, text) in _PREPARATION.items():
        kept.add_argument(f"--{name}", help=text, default=argparse.SUPPRESS)
    kept.add_argument("--beta", help="for pairs: temperature of their margins", default=argparse.SUPPRESS)

    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    named, rest = _apart().parse_known_args(list(argv))
    if named.model is not None:
        rest = [*rest, "--base", named.model]
    args = parse_strictly(parser(), [*_given(named.adapter), *rest, *_given(named.dataset_name)])
    args.adapter = named.adapter
    for name, least in {**_NUMBERS, "show": 0, "member": 0, "seed": 0}.items():
        value = converted(getattr(args, name), int, None, f"--{name}")
        if value < least:
            raise ConfigError(f"is {value}", where=f"--{name}", hint=f"Give a number from {least} on.")
        setattr(args, name, value)
    args.curvature = converted(args.curvature, Literal["fisher", "hessian"], None, "--curvature")
    if args.routing_quantity is not None:
        choices = Literal["sequence", "length_normalised"]
        args.routing_quantity = converted(args.routing_quantity, choices, None, "--routing_quantity")
    args.preparation = {
        name: converted(getattr(args, name), hint, None, f"--{name}")
        for name, (hint, _) in {**_PREPARATION, "beta": (float, "")}.items()
        if hasattr(args, name)
    }
    if not 0 < args.preparation.get("beta", 1.0) < float("inf"):
        raise ConfigError(f"is {args.preparation['beta']:g}", where="--beta", hint="Give a number above 0.")
    check_output(args.output)
    try:
        check_output(args.figure)
    except ConfigError as error:
        raise ConfigError(error.what, where="--figure", hint=error.hint) from None
    return args


def _given(value: str | None) -> list[str]:
    return [] if value is None else [value]


def _read(args: argparse.Namespace) -> _Case:
    """Load the adapter, and prepare the rows that are used."""
    import torch

    from renyi.data import number_rows

    rows = load_rows(args)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    numbers = order[: args.max_examples].sort().values.tolist()
    if 2 * args.num_directions > len(numbers):
        raise ConfigError(
            f"{args.num_directions} directions take as many examples to find, and there are {len(numbers) // 2}",
            where="--num_directions",
            hint=f"Half of {plural(len(numbers), 'row')} are for that, the others are measured. "
            f"Ask for fewer directions{', or raise --max_examples' if len(numbers) < len(rows) else ''}.",
        )
    if args.adapter is not None:
        _check_adapter(args.adapter)
    loaded = load_ensemble(args)
    numbers = _whole_groups(args, loaded.folder, rows) or numbers
    if args.member >= loaded.ensemble.num_members:
        what = f"there is no member {args.member} of {loaded.ensemble.num_members}"
        raise ConfigError(what, where="--member", hint="They are counted from 0.")
    # Rows are numbered before some are chosen, so that a message names a row by its number in the file.
    prepared, pairs = _prepared(args, loaded, number_rows(rows).select(numbers))
    return _Case(args, loaded, prepared, numbers, len(rows), pairs, _is_fitted_to(args, loaded.folder, rows))


def _whole_groups(args: argparse.Namespace, folder: Path, rows: "Dataset") -> list[int] | None:
    """Rows of whole groups, drawn at random up to `--max_examples`; None if training shared nothing over these rows.

    There are enough groups to measure, even if their rows are more than asked for.

    Raises:
        ConfigError: a row is labelled by several annotators, each of which is a group.
    """
    from renyi.data import PairPreparation
    from renyi.inference.diagnose import whole_groups

    group = PairPreparation.read(folder).routing_group
    if group is None:
        return None
    if group not in rows.column_names:
        if group == "annotator" and "annotations" in rows.column_names:
            raise ConfigError(
                "has rows of several annotators, and each annotator is a group",
                where=args.data,
                hint="Give a row for each annotation, with a column `annotator` and a vote.",
            )
        return None
    drawn = whole_groups(list(map(str, rows[group])), args.max_examples, args.seed)
    return sorted(row for rows_of_group in drawn for row in rows_of_group)


def _check_adapter(name: str) -> None:
    from renyi.ensemble.storage import resolve_folder
    from renyi.layout import ADAPTER_CONFIG_FILE, MANIFEST_FILE

    folder = resolve_folder(name)
    if not any((folder / file).is_file() for file in (ADAPTER_CONFIG_FILE, MANIFEST_FILE)):
        raise EnsembleFormatError(
            f"there is no {ADAPTER_CONFIG_FILE}", where=str(folder), hint="Give the folder of a PEFT adapter."
        )


def _is_fitted_to(args: argparse.Namespace, folder: Path, rows: "Dataset") -> bool:
    """Whether a run's folder, or that of an adapter in one, says that it was trained on these rows."""
    from renyi.runs.record import Record, Rows

    kept = Record.read(folder) or Record.read(folder.parent)
    if kept is None or kept.train is None:
        return False
    if kept.held_out is not None and kept.train.rows + kept.held_out.rows == len(rows):
        # Perhaps these rows are the whole file, and the run held out a share of it.
        seed = kept.settings.get("seed")
        if Rows.of(rows.train_test_split(test_size=kept.held_out.rows, seed=seed)["train"]) == kept.train:
            return True
    return Rows.of(rows) == kept.train


def _prepared(args: argparse.Namespace, loaded: "Loaded", rows: "Dataset") -> "tuple[Dataset, Pairs | None]":
    """Rows as tokens, and what they are compared by if they are pairs."""
    from renyi.data import Limits, PairPreparation, Preparation
    from renyi.ensemble.reference import read_preference
    from renyi.inference.diagnose import Pairs
    from renyi.layout import PREFERENCE_FILE

    given, folder, limits = dict(args.preparation), loaded.folder, Limits.of(loaded.ensemble.base)
    are_pairs = {"chosen", "rejected"} <= set(rows.column_names) or (folder / PREFERENCE_FILE).is_file()
    for name in given.keys() - ({"max_length", "beta"} if are_pairs else _PREPARATION.keys()):
        raise ConfigError(f"is for {'other rows than' if are_pairs else 'rows of'} preference pairs", where=f"--{name}")
    if not are_pairs:
        return replace(Preparation.read(folder), **given).prepare(rows, loaded.tokenizer, args.data, limits), None
    loss, reference = read_preference(folder, loaded.ensemble)
    loss = replace(loss, beta=given.pop("beta", loss.beta))
    preparation = replace(PairPreparation.read(folder), **given)
    return preparation.prepare(rows, loaded.tokenizer, args.data, limits), Pairs(loss, reference, preparation)


# ---- What it takes ---------------------------------------------------------------------------------------------------


def _plan(case: _Case, memory: int) -> RenderableType:
    args, ensemble, free = case.args, case.loaded.ensemble, _available(case)
    half, total = len(case.numbers) // 2, plural(case.of, "row")
    rows = {
        "adapter": f"{case.loaded.folder}, member {args.member} of {ensemble.num_members}",
        "base": f"{ensemble.base_model_name} · {str(ensemble.dtype).removeprefix('torch.')} on {ensemble.device}",
        "data": f"{args.data} · {total}"
        + (f", {len(case.numbers)} of them drawn" if len(case.numbers) < case.of else "")
        + f": {len(case.numbers) - half} to find directions, {half} to measure",
        "curvature": f"{args.curvature}, along {plural(args.num_directions, 'direction')} "
        f"of {number_text(_parameters(case))} parameters",
        "memory": f"about {bytes_text(memory)} beside the model and a batch of {args.tokens_per_batch:,} tokens"
        + (f" · {bytes_text(free)} are free" if free is not None else ""),
    }
    return facts(PROG, {name: Text(value) for name, value in rows.items()})


def _parameters(case: _Case) -> int:
    return sum(A.numel() + B.numel() for A, B in case.loaded.ensemble.adapter(0).values())


def _available(case: _Case) -> int | None:
    """Bytes of memory that are free on the device; None if that is not known."""
    import psutil
    import torch

    device = case.loaded.ensemble.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else None


def _check_memory(case: _Case, memory: int) -> None:
    number, free = case.args.num_directions, _available(case)
    if free is None or memory <= free:
        return
    fitting = number * free // memory
    raise ConfigError(
        f"{plural(number, 'direction')} take about {bytes_text(memory)}, and {bytes_text(free)} are free",
        where="--num_directions",
        hint=f"Ask for at most {fitting}." if fitting else "Use a device with more memory.",
    )


# ---- What was found --------------------------------------------------------------------------------------------------


def _is_trained(case: _Case) -> bool:
    """Whether the adapter was trained: B of a fresh adapter is zero."""
    return any(bool(B.any()) for _, B in case.loaded.ensemble.adapter(case.args.member).values())


def _sides(found: "Diagnosis", case: _Case) -> list[list[LoadedExample]]:
    """The examples of the most positive and of the most negative loadings, the farthest from zero first."""
    order = sorted(range(len(found.loadings)), key=found.loadings.__getitem__)
    positive = [i for i in reversed(order) if found.loadings[i] > 0]
    negative = [i for i in order if found.loadings[i] < 0]

    def example(i: int) -> LoadedExample:
        row = found.examples[i]
        return LoadedExample(case.numbers[row], found.loadings[i], text_of(case.rows[row], case.loaded.tokenizer))

    return [[example(i) for i in side[: case.args.show]] for side in (positive, negative)]


def _draw(found: "Diagnosis", file: Path) -> None:
    from renyi.evaluation.stability_plot import draw_diagnosis

    try:
        file.write_bytes(draw_diagnosis(found))
    except OSError as error:
        raise SaveError(f"could not be written ({error})", where=str(file), hint="Free some space.") from error


def _as_json(
    case: _Case, found: "Diagnosis", sides: Sequence[Sequence[LoadedExample]], doubts: Sequence[Doubt]
) -> dict[str, Any]:
    kept = {name: value for name, value in found._asdict().items() if name not in _OF_EXAMPLES}
    kept["groups"] = None if found.groups is None else len(found.groups)
    positive, negative = ([{**e._asdict(), "text": e.text.plain} for e in side] for side in sides)
    return {
        "adapter": str(case.loaded.folder),
        "member": case.args.member,
        "base_model": case.loaded.ensemble.base_model_name,
        "kind": "pairs" if case.pairs else "sequences",
        "curvature": case.args.curvature,
        "num_directions": len(found.eigenvalues),
        "parameters": _parameters(case),
        "examples": len(found.examples),
        **as_json(kept),
        "contradicted": found.contradicted,
        "undecided": found.undecided,
        "warnings": [doubt.what for doubt in doubts],
        "positive": positive,
        "negative": negative,
    }
