"""`renyi report`: one page of HTML about a run, to open in a browser or to send.

It shows settings, curves, members, what each learned, and every evaluation that `renyi evaluate --report` left in a
folder inside the run's. The page needs no other file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from renyi.cli.console import stream
from renyi.cli.parser import StrictParser, parse_strictly
from renyi.cli.reading import check_output


def run(argv: Sequence[str]) -> int:
    args = parse_strictly(parser(), argv)
    check_output(args.output)
    with stream(stderr=True).status("reading"):
        from renyi.runs.report import write_run_report

        page = write_run_report(args.folder, args.output)
    stream().print(str(page), soft_wrap=True)
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(
        prog="renyi report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run or of an ensemble, or a hub id")
    parser.add_argument("--output", type=Path, metavar="FILE.html", help="the page (default: run.html in the folder)")
    return parser
