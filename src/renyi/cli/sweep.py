"""`renyi sweep`: alpha × members with one budget, measured on the same held-out examples, and one of them chosen.

Every cell is what `renyi sft` or `renyi dpo` would train. What a sweep does stands in `renyi.runs.grid`, what its
figures mean in `renyi.evaluation.sweep_choice`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import emit_json, facts, headed, quiet_progress_bars, say, stream
from renyi.cli.dpo import _DPO
from renyi.cli.parser import ConfigFile, StrictParser, converted, keys, parse, split_config
from renyi.cli.sft import _SFT
from renyi.cli.tables import as_json, figures_table, titled
from renyi.cli.training import TrainingCommand
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from renyi.evaluation.sweep_choice import Cell, SweepEvaluation
    from renyi.runs.grid import Outcome, Settings, SweepArguments
    from renyi.runs.single import Run

PROG = "renyi sweep"
METHODS: Mapping[str, type[TrainingCommand]] = {"sft": _SFT, "dpo": _DPO}


class _Request(NamedTuple):
    """What was asked for, and the means to ask for any one cell of it."""

    command: TrainingCommand
    flags: Sequence[str]
    config: ConfigFile
    sweep: "SweepArguments"
    settings: "Settings"
    given: frozenset[str]

    @property
    def output_dir(self) -> Path:
        args: Any = self.settings.args
        return Path(args.output_dir)

    def of_cell(self, cell: "Cell") -> "Settings":
        """The settings of one cell, made anew: a run changes those that it is built from."""
        from renyi.runs.grid import folder_name

        of_cell = {"num_members": cell.members, "alpha": cell.alpha, "output_dir": self.output_dir / folder_name(cell)}
        flags = [text for key, value in of_cell.items() for text in (f"--{key}", str(value))]
        return _parsed(self.command, [*self.flags, *flags], self.config).settings


def run(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        _help()
        return 0
    config, flags = split_config(argv, PROG)  # before the imports: its `env:` may be meant for them
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.errors import TrainingDivergedError
        from renyi.runs.grid import check_same_sweep, recorded, refuse_what_a_sweep_decides, write_result

        quiet_progress_bars()
        _let_flags_override(config, flags)
        request = _parsed(METHODS[_method(flags, config)](), flags, config)
        _placed(refuse_what_a_sweep_decides, config, request.settings.args, request.given)
        settings = recorded(request.settings, request.sweep.method, request.given)
        check_same_sweep(request.output_dir, settings)
    try:
        outcomes = _run_cells(out, err, request, settings)
    except KeyboardInterrupt:
        say("interrupted", "bold yellow", "the same command goes on from where it is")
        return 130
    if request.settings.own.dry_run:
        return 0
    held_out = {cell: o.held_out for cell, o in outcomes.items() if o.held_out is not None}
    if not held_out:
        reasons = {o.failed for o in outcomes.values()}
        raise TrainingDivergedError(
            "every cell failed", where=str(request.output_dir), hint="; ".join(map(str, reasons))
        )
    with err.status("evaluating"):
        from renyi.evaluation.sweep_choice import evaluate_sweep
        from renyi.evaluation.sweep_figure import draw_sweep

        found, unit = evaluate_sweep(held_out), request.command.trainer().unit
        result = _result(request, settings, outcomes, found)
        write_result(request.output_dir, result, draw_sweep(found.cells, found.chosen, unit))
    if request.sweep.json:
        emit_json(result)
        return 0
    out.print(_table(outcomes, found, result))
    _show_end(out, request, found, result)
    return 0


def _method(flags: Sequence[str], config: ConfigFile) -> str:
    """Which method's keys the others are."""
    parser = StrictParser(prog=PROG, add_help=False)
    parser.add_argument("--method")
    flag = parser.parse_known_args(list(flags))[0].method
    value = config.values.get("method", "sft") if flag is None else flag
    return converted(value, str, list(METHODS), config.where("method") if flag is None else "--method")


def _let_flags_override(config: ConfigFile, flags: Sequence[str]) -> None:
    """The file of one run serves a sweep, too: `--alphas` and `--members` override its `alpha` and `num_members`."""
    named = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    for key, instead in (("alpha", "alphas"), ("num_members", "members")):
        if instead in named:
            config.values.pop(key, None)


def _parsed(command: TrainingCommand, flags: Sequence[str], config: ConfigFile) -> _Request:
    from renyi.runs.grid import Settings, SweepArguments

    parsed = parse([*command.settings(), SweepArguments], flags, config, PROG)
    script, args, model, own, *of_tokenizer, sweep = parsed.filled
    own.given = parsed.given
    settings = Settings(command.trainer(), script, args, model, own, of_tokenizer)
    return _Request(command, flags, config, sweep, settings, parsed.given)


def _placed(check: Any, config: ConfigFile, *values: Any) -> None:
    """Run a check of settings, and name the line of the file that an error of it is about."""
    from renyi.errors import ConfigError

    try:
        check(*values)
    except ConfigError as error:
        key = error.where or ""
        where = config.where(key) if key in config.values else f"--{key}" if key else None
        raise ConfigError(error.what, where=where, hint=error.hint) from error


# ---- The cells -------------------------------------------------------------------------------------------------------


def _run_cells(out: Console, err: Console, request: _Request, settings: Mapping[str, str]) -> "dict[Cell, Outcome]":
    """Train and measure every cell; of a dry run only say what would be done."""
    from renyi.runs.grid import RESULT_FILE, failed_before, folder_name, write_result
    from renyi.runs.output import no_empty_folder

    shown = Console(quiet=True) if request.sweep.json else out
    cells, outcomes, has_plan = request.sweep.cells, {}, False
    for number, cell in enumerate(cells, start=1):
        folder, title = request.output_dir / folder_name(cell), headed(f"{number}/{len(cells)}", str(cell))
        outcome = failed_before(folder)
        if outcome is not None:
            shown.print(title + f": failed before; remove {folder} to try again", soft_wrap=True)
        else:
            with no_empty_folder(folder):
                ready, training = _ready(err, request, cell)
                if not has_plan:
                    shown.print(_plan(request, ready))
                    has_plan = True
                if request.settings.own.dry_run:
                    shown.print("\nA dry run: nothing was written. Without --dry_run this trains.")
                    break
                if not (request.output_dir / RESULT_FILE).exists():
                    write_result(request.output_dir, {"settings": settings, "cells": [], "chosen": None})
                shown.print(title + _from_where(ready))
                outcome = _trained(err, request, ready, training)
                del ready  # its base, before the next one is loaded
        if outcome.failed:
            say("failed", "bold yellow", f"{cell}: {outcome.failed}")
        outcomes[cell] = outcome
    return outcomes


def _ready(err: Console, request: _Request, cell: "Cell") -> "tuple[Run, Any]":
    """A cell up to its training, and what shows how that goes."""
    from renyi.cli.progress import Progress
    from renyi.runs.grid import prepare_cell

    training = nullcontext() if request.sweep.json else Progress()
    callbacks = [training] if isinstance(training, Progress) else []
    with err.status(f"loading the data and the base model{request.command.ahead(request.settings.args)}"):
        return prepare_cell(request.of_cell(cell), callbacks), training


def _trained(err: Console, request: _Request, ready: "Run", training: Any) -> "Outcome":
    from renyi.runs.grid import run_cell

    return run_cell(ready, request.settings.script.dataset_name, training, lambda: err.status("measuring"))


def _from_where(ready: "Run") -> str:
    newest, half_written = ready.checkpoints
    if newest is None:
        return "; a half-written checkpoint is ignored" if half_written else ""
    return ": finished already" if ready.finished else f": resuming from {newest.name} of {ready.trainer.num_steps}"


def _plan(request: _Request, ready: "Run") -> RenderableType:
    """What was understood, as of the first cell that is trained."""
    cells, command, trainer = request.sweep.cells, request.command, ready.trainer
    several = sorted({c.members for c in cells if c.members > 1})
    parts = ["one adapter"] if any(c.members == 1 for c in cells) else []
    if several:
        alphas = ", ".join(f"{a:g}" for a in sorted(request.sweep.alphas))
        parts.append(f"{' and '.join(map(str, several))} members at alpha {alphas}")
    prepared = ready.preparation.prepare(ready.eval_rows, ready.tokenizer)
    rows = {
        "base": f"{ready.ensemble.base_model_name} · {str(ready.ensemble.dtype).removeprefix('torch.')} "
        f"on {trainer.args.device}",
        "method": request.sweep.method,
        "cells": f"{len(cells)}: {'; '.join(parts)}",
        "data": f"{request.settings.script.dataset_name} · {ready.form}",
        "train": command.sizes(ready, trainer.train_dataset),
        "held out": command.sizes(ready, prepared),
        "steps": f"{number_text(trainer.num_steps)} in every cell, seed {trainer.args.seed}",
        "output": str(request.output_dir),
    }
    return facts(PROG, {name: Text(value) for name, value in rows.items()})


# ---- What came out ---------------------------------------------------------------------------------------------------


def _result(
    request: _Request, settings: Mapping[str, str], outcomes: "Mapping[Cell, Outcome]", found: "SweepEvaluation"
) -> dict[str, Any]:
    """The object of `sweep.json` and `--json`."""
    from renyi.evaluation.sweep_choice import why
    from renyi.runs.grid import FIGURE_FILE, folder_name

    cells = []
    for cell, outcome in sorted(outcomes.items()):
        quality = found.cells.get(cell)
        cells.append(
            {
                "folder": folder_name(cell),
                "members": cell.members,
                "alpha": None if cell.members == 1 else cell.alpha,
                "failed": outcome.failed,
                "seconds": outcome.seconds,
                **(as_json(quality) if quality else {}),
            }
        )
    units = next(o.held_out.units for o in outcomes.values() if o.held_out is not None)
    unit = request.command.trainer().unit
    return {
        "settings": dict(settings),
        "examples": len(units),
        "unit": unit,
        "units": int(units.sum()),
        "cells": cells,
        "best": folder_name(found.best),
        "chosen": folder_name(found.chosen),
        "runner_up": folder_name(found.runner_up) if found.runner_up else None,
        "why": why(found, unit),
        "figure": str(request.output_dir / FIGURE_FILE),
    }


def _table(outcomes: "Mapping[Cell, Outcome]", found: "SweepEvaluation", result: Mapping[str, Any]) -> RenderableType:
    unit = result["unit"]
    table = figures_table(["", "alpha", "mixture NLL", "behind best", "members", "gap", "eff.", "ECE", "least", "time"])
    for cell, outcome in sorted(outcomes.items()):
        name = f"{'→ ' if cell == found.chosen else '  '}{plural(cell.members, 'member')}"
        alpha = "any" if cell.members == 1 else f"{cell.alpha:g}"
        q = found.cells.get(cell)
        if q is None:
            table.add_row(name, alpha, "failed")
            continue
        table.add_row(
            Text(name, "bold" if cell == found.chosen else ""),
            alpha,
            _pm(q.mixture_nll),
            "best" if cell == found.best else _pm(q.behind),
            f"{q.member_nll:.4f}",
            f"{q.jensen_gap:.4f}",
            f"{q.effective_members:.2f}",
            f"{q.ece:.3f}",
            f"{min(q.member_load):.1%}",
            "–" if outcome.seconds is None else f"{outcome.seconds:.0f} s",
        )
    subtitle = f"{plural(result['examples'], 'held-out example')}" + (
        f", {plural(result['units'], unit)}" if unit != "pair" else ""
    )
    legend = (
        f"NLL of the mixture and mean of its members', and their gap, in nats a {unit} · ± half a 95 % interval over "
        "examples, of differences a paired one · eff.: effective members, and the least member's load, at order 1"
    )
    return Group(titled("Held out"), Text(subtitle, "dim"), table, Text(legend, "dim"))


def _pm(estimate: Any) -> str:
    value, low, high = estimate
    return f"{value:.4f}" if low != low else f"{value:.4f} ±{(high - low) / 2:.4f}"


def _show_end(out: Console, request: _Request, found: "SweepEvaluation", result: Mapping[str, Any]) -> None:
    from renyi.runs.grid import FIGURE_FILE, RESULT_FILE

    folder = request.output_dir
    out.print(Text.assemble("\n", ("chosen  ", "bold"), result["why"], "."))
    out.print(headed("Saved in", str(folder)), soft_wrap=True)
    table = Table.grid(padding=(0, 3))
    table.add_row(f"  {RESULT_FILE}, {FIGURE_FILE}", Text("every cell's figures and the choice, and the curves", "dim"))
    table.add_row(f"  {result['chosen']}", Text("the chosen ensemble; every other cell lies beside it", "dim"))
    out.print(table)
    out.print(headed("Next"))
    out.print(f"  renyi generate {folder / result['chosen']}", soft_wrap=True)


def _help() -> None:
    from renyi.runs.grid import SweepArguments

    out = stream()
    out.print(Text.assemble((PROG, "bold"), " --config FILE.yaml [--alphas A …] [--members M …] [--key value …]\n"))
    out.print(
        "Train every pair of alpha and number of members with the same data, seed and steps, measure them on the same\n"
        "held-out examples, and choose one. The same command goes on from whatever is there."
    )
    table = Table.grid(padding=(0, 2))
    table.add_row("")
    for key in keys([SweepArguments], ["alphas", "members", "method", "json"]):
        table.add_row(f"  {key.name}", Text(key.default, "dim"), Text(key.help))
    out.print(table)
    out.print(
        "\nEvery key of `renyi sft`, or of `renyi dpo` with --method dpo, works too, and so does its\n"
        "config file: --alphas and --members stand for its alpha and num_members. Examples must be held out: by\n"
        "--test_split_size 0.1, or by --eval_strategy epoch where the data have a test split."
    )
