"""`renyi completion`: a script that lets your shell complete commands, flags and file names.

bash:  renyi completion bash > ~/.local/share/bash-completion/completions/renyi
zsh:   renyi completion zsh > ~/.zfunc/_renyi, or to a file _renyi in another folder of $fpath
tcsh:  renyi completion tcsh > ~/.renyi.csh, and `source ~/.renyi.csh` in ~/.tcshrc

Open a new shell afterwards. After an update of renyi, write the script again: it knows the flags of one version.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from renyi.cli.console import stream
from renyi.cli.parser import StrictParser, keys_parser, parse_strictly
from renyi.errors import ConfigError

SHELLS = ("bash", "zsh", "tcsh")
# Arguments and flags whose value is a file or a folder.
_FILES = {"adapter", "base", "config", "data", "ensemble", "figure", "input", "model"}
_FILES |= {"dataset_name", "folder", "model_name_or_path", "output", "output_dir", "report", "write"}


def run(argv: Sequence[str]) -> int:
    args = parse_strictly(parser(), argv)
    if args.shell not in SHELLS:
        raise ConfigError(f"there is no shell {args.shell!r}", where="SHELL", hint=f"Use one of: {', '.join(SHELLS)}.")
    import shtab

    with stream(stderr=True).status("reading every command's flags"):
        whole = _whole()
    print(shtab.complete(whole, shell=args.shell))
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(
        prog="renyi completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shell", metavar="SHELL", help=f"one of: {', '.join(SHELLS)}")
    return parser


def _whole() -> argparse.ArgumentParser:
    """One parser of all commands and their flags, as shtab needs it."""
    import shtab

    from renyi.cli.main import COMMANDS
    from renyi.runs.settings import METHODS

    whole = argparse.ArgumentParser(prog="renyi", add_help=False)
    whole.add_argument("--help", action="store_true", help="what the commands are")
    whole.add_argument("--version", action="store_true", help="which version this is")
    commands = whole.add_subparsers()
    for name, what in COMMANDS.items():
        make: Any = getattr(import_module(f"renyi.cli.{name}"), "parser", None)
        if name in METHODS:
            parents: list[argparse.ArgumentParser] = [_keys([*METHODS[name].dataclasses], name)]
        else:
            parents = [make()] if make else []
        one = commands.add_parser(name, help=what, parents=parents, add_help=False, conflict_handler="resolve")
        one.add_argument("--help", action="help", help="what the command does")
        for action in one._actions:
            action.help = (action.help or "").partition(". ")[0].replace("\n", " ")
            if action.dest in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return whole


def _keys(dataclasses: Sequence[type], name: str) -> argparse.ArgumentParser:
    """A training command's flags: every key, and the file that holds keys."""
    parser = keys_parser(dataclasses, f"renyi {name}")
    parser.add_argument("--config", metavar="FILE.yaml", help="a file of keys")
    return parser
