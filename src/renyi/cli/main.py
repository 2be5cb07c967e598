"""`renyi`: finds the command, and ends every error a user can meet as one message and exit code 2.

It imports no command before it is asked for: `renyi --help` answers at once.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.table import Table
from rich.text import Text

from renyi import __version__
from renyi.cli.console import quiet_libraries, say, show_error, stream, typed
from renyi.errors import ConfigError, RenyiError

# What each command does, grouped by what a person wants.
GROUPS = {
    "Begin": {
        "demo": "train an ensemble on contradictory data, and see its members specialise (minutes)",
        "init": "write a commented YAML file for a training command, to change and run",
    },
    "Look at your data": {
        "audit": "find the rows of a dataset that contradict each other, before you train on them",
        "diagnose": "find out whether data contradict a fitted adapter, and above which alpha members part",
    },
    "Train": {
        "sft": "train an α-Rényi LoRA ensemble on a dataset",
        "dpo": "train an α-Rényi LoRA ensemble on preference pairs (DPO)",
        "kto": "train an α-Rényi LoRA ensemble on thumbs up and down (KTO)",
        "reward": "train an ensemble of reward models on preference pairs",
        "powerflow": "tune toward a power of the base distribution, without labels or rewards",
        "sweep": "try several alphas and numbers of members on held-out data, and choose",
    },
    "Ask": {
        "generate": "answer prompts, and show how much the members disagree, or each member's answer",
        "serve": "serve an ensemble over OpenAI's API, with its uncertainty and a playground",
        "score": "compute the log-likelihood and responsibility of every member for every example",
    },
    "Evaluate": {
        "evaluate": "measure how good an ensemble and its members are, and whether they know their errors",
        "report": "make one page about a run, to open or to send: settings, curves, members, evaluation",
        "info": "show what an ensemble is and how far apart its members are, from its files alone",
    },
    "Use elsewhere": {
        "export": "write the members as PEFT adapters or plain models, or print a vLLM command line",
        "lm_eval": "run EleutherAI's lm-evaluation-harness on an ensemble",
        "completion": "let your shell complete commands, flags and file names",
    },
}
COMMANDS = {name: what for group in GROUPS.values() for name, what in group.items()}
INTERRUPTED = 130
# Variables that are read once, when a command imports torch.
_BEFORE_TORCH = {
    # OpenMP's threads spin while they wait, by default. Then two runs on one machine hold each other's cores and become
    # many times slower.
    "OMP_WAIT_POLICY": "passive",
    # Tensors of 2 MB and more begin at a page. At other places malloc leaves gaps before them, which it cannot join
    # again: a step with gradient checkpointing took 2 GB of which no tensor was left.
    "THP_MEM_ALLOC_ENABLE": "1",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that the message explains, 130 if interrupted."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    try:
        if command in ("-h", "--help"):
            _help()
            return 0
        if command == "--version":
            stream().print(f"renyi {__version__}")
            return 0
        if command not in COMMANDS:
            raise ConfigError(f"there is no command {command!r}", hint=f"The commands are {', '.join(COMMANDS)}.")
        for name, value in _BEFORE_TORCH.items():
            os.environ.setdefault(name, value)
        with quiet_libraries():
            return import_module(f"renyi.cli.{command}").run(rest)
    except RenyiError as error:
        show_error(error)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough, as in `renyi score … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        say("interrupted", "bold yellow", "nothing more is written")
        return INTERRUPTED


def _help() -> None:
    out = stream()
    about = "post-train a language model into a distribution over LoRA adapters"
    out.print(Text.assemble(("renyi", "bold"), f" {__version__}   {about}\n"))
    commands = Table.grid(padding=(0, 3))
    for number, (group, inside) in enumerate(GROUPS.items()):
        commands.add_row(Text(f"{chr(10) if number else ''}{group}", "dim"), "")
        for name, what in inside.items():
            commands.add_row(Text(f"  renyi {name}", "bold"), what)
    out.print(commands)
    bold = [Text(typed(f"renyi {what}"), "bold") for what in ("demo", "init sft", "COMMAND --help", "--version")]
    out.print(Text.assemble("\nStart with ", bold[0], ", then ", bold[1], "."))
    out.print(Text.assemble(bold[2], " says more, ", bold[3], " which version this is."))


if __name__ == "__main__":
    sys.exit(main())
