"""`renyi init`: write a YAML file for a training command, with a comment on every key.

The file runs without edits. Without --model_name_or_path it names the tiny model that comes with renyi. Without
--dataset_name, example rows are written beside it. Put in your own model and data, look at the plan with --dry_run,
and train.
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.text import Text

from renyi.cli.command import TrainingCommand, command_of
from renyi.cli.console import stream, typed
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import check_output
from renyi.cli.training import OUR_HELP, groups_of_keys
from renyi.errors import ConfigError, SaveError

if TYPE_CHECKING:
    from renyi.runs.settings import Method

# Keys that are set in the file. The other keys of the help page are there as comments.
_SET = [
    "model_name_or_path",
    "dataset_name",
    "output_dir",
    "num_members",
    "alpha",
    "lora_r",
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "seed",
]
_NOT_IN_A_FILE = ("dry_run",)
_WIDTH = 44


def run(argv: Sequence[str]) -> int:
    args = parse_strictly(parser(), argv)
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.files import write_whole
        from renyi.runs.settings import METHODS

        method = converted(args.method, str, list(METHODS), "METHOD")
    file = args.output or Path(f"{method}.yaml")
    check_output(file)
    rows_file = file.with_suffix(".jsonl")
    for there in (file, *([] if args.dataset_name else [rows_file])):
        if there.exists():
            raise ConfigError(
                f"{there} exists already",
                where="--output",
                hint=f"Choose another name: renyi init {method} --output {shlex.quote(str(_free(file)))}",
            )
    command = command_of(method)
    values: dict[str, Any] = {"output_dir": f"runs/{file.stem}"}
    values |= {"test_split_size": 0.1, "eval_strategy": "epoch"} if command.holds_out else {}
    with err.status("writing"):
        if args.dataset_name is None:
            from renyi.zoo.samples import sample_rows

            rows = sample_rows(METHODS[method].trainer.preparation_class)
            write_whole(rows_file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        if args.model_name_or_path is None:
            from renyi.zoo.base import base_path

            values |= {"model_name_or_path": str(base_path()), **command.for_tiny_model}
        values |= {k: v for k in ("model_name_or_path", "dataset_name") if (v := getattr(args, k)) is not None}
        values.setdefault("dataset_name", str(rows_file))
        try:
            write_whole(file, _text(command, METHODS[method], values, file).encode())
        except SaveError:
            if args.dataset_name is None:
                rows_file.unlink()
            raise
    out.print(Text.assemble((str(file), "bold"), "  settings of ", command.prog), soft_wrap=True)
    if args.dataset_name is None:
        out.print(Text.assemble((str(rows_file), "bold"), "  example rows: put in your own"), soft_wrap=True)
    out.print(typed(f"next  {command.prog} --config {shlex.quote(str(file))} --dry_run"), soft_wrap=True)
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(prog="renyi init", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", metavar="METHOD", help="the training command: sft, dpo, powerflow, …")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="the file to write (default: METHOD.yaml)")
    parser.add_argument("--model_name_or_path", help="your base model, a folder or a hub id")
    parser.add_argument("--dataset_name", help="your data: a json, jsonl, csv or parquet file, or a hub id")
    return parser


def _free(file: Path) -> Path:
    numbers = (file.with_name(f"{file.stem}_{n}{file.suffix}") for n in range(2, 1000))
    return next(f for f in numbers if not f.exists() and not f.with_suffix(".jsonl").exists())


def _text(command: TrainingCommand, method: "Method", values: dict[str, Any], file: Path) -> str:
    """The file: a line a key, with its help; keys that keep their default are comments."""
    fields = {f.name: f for cls in method.dataclasses for f in dataclasses.fields(cls)}
    lines = [
        f"# Settings of `{command.prog}`. {command.about}",
        "#",
        f"#     {command.prog} --config {file} --dry_run    # says what would be trained, and writes nothing",
        f"#     {command.prog} --config {file}",
        "#",
        "# A line that begins with # is a key with its default: remove the # to change it. A flag, such as",
        f"# --learning_rate 1e-4, overrides the file. Every other key of TRL's {command.trl_config} works, too.",
    ]
    for group, names in groups_of_keys(command).items():
        shown = [name for name in names if name in fields and name not in _NOT_IN_A_FILE]
        lines += ["", f"# ---- {group}", ""] if shown else []
        for name in shown:
            is_set = name in values or name in (*_SET, *command.first_keys.split())
            line = f"{'' if is_set else '# '}{name}: {_value(values.get(name, _default(fields[name])))}"
            told = OUR_HELP.get(name, fields[name].metadata.get("help", "")).partition(". ")[0].rstrip(".")
            lines.append(f"{line:<{_WIDTH}}  # {' '.join(told.split())}" if told else line)
    return "\n".join(lines) + "\n"


def _default(field: "dataclasses.Field[Any]") -> Any:
    made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return made.value if isinstance(made, Enum) else None if made is dataclasses.MISSING else made


def _value(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return text.removesuffix("...").strip()
