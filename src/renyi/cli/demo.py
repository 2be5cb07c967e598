"""`renyi demo`: see an ensemble split into specialists on data that contradict each other.

It trains three models of a small world and shows what they know (`renyi.zoo.demo`).
"""

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from renyi.cli.console import quiet_progress_bars, stream, typed
from renyi.cli.parser import StrictParser, parse_strictly

if TYPE_CHECKING:
    from renyi.cli.progress import Progress
    from renyi.zoo.measure import Measured

QUICK_STEPS = 40
_STORY = """
60 facts about people. Two schools agree on half of them and contradict each other on the other half.
A record is four questions that one school answers. The data do not say which school.
Three runs learn from the records: one adapter, four independent ones (α = 0), and four that share out
the records among them (α = 0.8).
"""
_QUICK = "With so few steps the members have not specialised. To see them specialise, leave out --quick."


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(prog="renyi demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: runs/demo")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the world, its records and the training (default: 0)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a tenth of the steps: shows that everything works, and not what it does"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    return parser


def run(argv: Sequence[str]) -> int:
    args = parse_strictly(parser(), argv)

    from renyi.cli.progress import Progress
    from renyi.zoo.demo import run_demo
    from renyi.zoo.figure import TITLES

    quiet_progress_bars()
    shorter: dict[str, Any] = {"max_steps": QUICK_STEPS} if args.quick else {}

    @contextmanager
    def watch(name: str) -> "Iterator[Progress]":
        stream(stderr=True).print(f"training {TITLES[name]}")
        with Progress() as progress:
            yield progress

    if args.json:
        run_demo(args.output_dir, args.seed, **shorter)
        print(json.dumps(json.loads((args.output_dir / "summary.json").read_text(encoding="utf-8"))))
        return 0
    out = stream()
    out.print(_STORY)
    measured = run_demo(args.output_dir, args.seed, watch, **shorter)
    out.print(_table(measured, TITLES))
    out.print(f"\n{_QUICK if args.quick else _conclusion(measured['alpha_renyi'])}", soft_wrap=True)
    out.print(f"\nfigure    {args.output_dir / 'demo.png'}\nfigures   {args.output_dir / 'summary.json'}")
    ensemble = shlex.quote(str(args.output_dir / "alpha_renyi"))
    out.print(f"next      {typed(f'renyi info {ensemble}')}", soft_wrap=True)
    return 0


def _conclusion(found: "Measured") -> str:
    return (
        f"The members of the α-Rényi ensemble disagree by {found.mi_contested:.2f} nats on contested facts (a coin "
        f"toss between two schools is ln 2 = 0.69),\nand by {found.mi_agreed:.3f} nats on agreed facts: it knows what "
        "it does not know."
    )


def _table(measured: "Mapping[str, Measured]", titles: Mapping[str, str]) -> Table:
    """One column a run."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("", style="dim")
    for name in measured:
        table.add_column(titles[name], justify="right")
    rows = {
        "mixture NLL, nats an answer": lambda m: f"{m.mixture_nll:.3f}",
        "accuracy on agreed facts": lambda m: f"{m.agreed_accuracy:.1%}",
        "disagreement: contested facts, nats": lambda m: f"{m.mi_contested:.3f}",
        "disagreement: agreed facts, nats": lambda m: f"{m.mi_agreed:.4f}",
        "each member's share of records": lambda m: " ".join(f"{x:.0%}" for x in m.member_load),
        "the school each follows": lambda m: " ".join(map(_school, m.source_followed)),
        "training time": lambda m: f"{m.seconds:.0f} s",
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(m) for m in measured.values()))
    return table


def _school(followed: Sequence[float]) -> str:
    """The school that a member follows more often, and how often it does, such as A:100%."""
    best = max(range(len(followed)), key=followed.__getitem__)
    return f"{chr(65 + best)}:{followed[best]:.0%}"
