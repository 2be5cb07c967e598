"""`renyi sweep`: alpha × members with one budget, measured on the same held-out examples, and one of them chosen.

Every cell is what `renyi sft` or `renyi dpo` would train. Read next: `renyi.runs.grid` (runs it), `sweep_watch.py`
(shows progress), `renyi.evaluation.sweep_choice` (what the figures mean).
"""

import shlex
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.command import TrainingCommand
from renyi.cli.console import emit_json, headed, quiet_progress_bars, say, stream, typed
from renyi.cli.dpo import DPO
from renyi.cli.parser import ConfigFile, StrictParser, given_keys, keys, keys_parser, split_config
from renyi.cli.sft import SFT
from renyi.cli.tables import figures_table, titled
from renyi.keys import converted
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.runs.grid import Sweep

PROG = "renyi sweep"
COMMANDS: Mapping[str, type[TrainingCommand]] = {"sft": SFT, "dpo": DPO}


@dataclass
class _Asked:
    """What the command line adds to the settings of a sweep."""

    method: str = field(
        default="sft", metadata={"help": "What trains the cells: sft or dpo.", "choices": list(COMMANDS)}
    )
    json: bool = field(default=False, metadata={"help": "Print the result as one JSON object."})


def run(argv: Sequence[str]) -> int:
    if {"-h", "--help"} & set(argv):
        _help()
        return 0
    config, flags = split_config(argv, PROG)  # before the imports: its `env:` may be meant for them
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.cli.sweep_watch import ShownSweep
        from renyi.runs.grid import sweep
        from renyi.runs.settings import METHODS, SweepArguments, SweepSettings

        quiet_progress_bars()
        _let_flags_override(config, flags)
        method = _method(flags, config)
        given = given_keys([*METHODS[method].dataclasses, SweepArguments, _Asked], flags, config, PROG)
        as_json = given.values.pop("json", False)
        settings = SweepSettings.of(**{**given.values, "method": method}, where=given.where)

    watch = ShownSweep(settings, COMMANDS[method](), out, err, is_silent=as_json)
    if settings.run.values.get("dry_run"):
        watch.dry_run()
        return 0
    try:
        found = sweep(settings, watch)
    except KeyboardInterrupt:
        say("interrupted", "bold yellow", "the same command goes on from where it is")
        return 130
    if as_json:
        emit_json(found.result)
    else:
        out.print(_table(found))
        _show_end(out, found, Path(settings.run.values["output_dir"]))
    return 0


def parser() -> ArgumentParser:
    """What the command reads, with `sft` as its method."""
    from renyi.runs.settings import METHODS, SweepArguments

    return keys_parser([*METHODS["sft"].dataclasses, SweepArguments, _Asked], PROG)


def _method(flags: Sequence[str], config: ConfigFile) -> str:
    """The method that the other keys belong to."""
    parser = StrictParser(prog=PROG, add_help=False)
    parser.add_argument("--method")
    flag = parser.parse_known_args(list(flags))[0].method
    value = config.values.get("method", "sft") if flag is None else flag
    return converted(value, str, list(COMMANDS), config.where("method") if flag is None else "--method")


def _let_flags_override(config: ConfigFile, flags: Sequence[str]) -> None:
    """A run's config file also works for a sweep: `--alphas` and `--members` override `alpha` and `num_members`."""
    named = {flag.partition("=")[0][2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    for key, instead in (("alpha", "alphas"), ("num_members", "members")):
        if instead in named:
            config.values.pop(key, None)


# ---- What came out ---------------------------------------------------------------------------------------------------


def _table(swept: "Sweep") -> RenderableType:
    outcomes, found, result = swept
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


def _show_end(out: Console, swept: "Sweep", folder: Path) -> None:
    from renyi.runs.grid import FIGURE_FILE, RESULT_FILE

    result = swept.result
    out.print(Text.assemble("\n", ("chosen  ", "bold"), result["why"], "."))
    out.print(headed("Saved in", str(folder)), soft_wrap=True)
    table = Table.grid(padding=(0, 3))
    table.add_row(f"  {RESULT_FILE}, {FIGURE_FILE}", Text("every cell's figures and the choice, and the curves", "dim"))
    table.add_row(f"  {result['chosen']}", Text("the chosen ensemble; every other cell lies beside it", "dim"))
    out.print(table)
    out.print(headed("Next"))
    chosen = shlex.quote(str(folder / result["chosen"]))
    out.print(typed(f"  renyi generate {chosen} 'your question' --members\n  renyi info {chosen}"), soft_wrap=True)


def _help() -> None:
    from renyi.runs.settings import SweepArguments

    out = stream()
    out.print(Text.assemble((PROG, "bold"), " --config FILE.yaml [--alphas A …] [--members M …] [--key value …]\n"))
    out.print(
        "Train every pair of alpha and number of members with the same data, seed and steps, measure them on the same\n"
        "held-out examples, and choose one. The same command continues from what is there."
    )
    table = Table.grid(padding=(0, 2))
    table.add_row("")
    for key in keys([SweepArguments, _Asked], ["alphas", "members", "method", "json"]):
        table.add_row(f"  {key.name}", Text(key.default, "dim"), Text(key.help))
    out.print(table)
    out.print(
        "\nEvery key of `renyi sft` works, too (of `renyi dpo` with --method dpo), and so does its config file.\n"
        "--alphas and --members replace its alpha and num_members. Examples must be held out: give\n"
        "--test_split_size 0.1, or --eval_strategy epoch if the data have a test split."
    )
