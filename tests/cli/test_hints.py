"""Command lines, flags and keys that the library's messages tell a user to write: they exist, and take such values.

The source is read. What a message fills in at run time counts as one word here. `test_doors.py` runs what commands
print as their next step.
"""

import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from renyi.cli.main import COMMANDS
from renyi.errors import ConfigError
from renyi.keys import checked
from renyi.runs.settings import METHODS, SweepArguments

ROOT = Path(__file__).parents[2] / "src" / "renyi"
# Flags of other programs that messages name: vLLM's, the harness's, the hub's, torchrun's.
OTHERS = {
    "--additional-config",
    "--max-num-batched-tokens",
    "--scheduler-cls",
    "--gen_kwargs",
    "--exclude",
    "--nproc_per_node",
}


class Said(NamedTuple):
    """A text in the source: where it is, and whether it is the hint of an error."""

    where: str
    text: str
    is_hint: bool


def said(node: ast.AST) -> str:
    """A text as far as the source gives it; `WORD` stands for each part that is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) for part in node.values)
    return "WORD"


def texts() -> Iterator[Said]:
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        hints = {
            id(part)
            for node in ast.walk(tree)
            if (isinstance(node, ast.keyword) and node.arg == "hint")
            or (isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "hint" for t in node.targets))
            for part in ast.walk(node.value)
        }
        for node in ast.walk(tree):
            is_text = isinstance(node, ast.JoinedStr) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            )
            if is_text and id(node) not in inside:
                yield Said(f"{file.relative_to(ROOT)}, line {node.lineno}", said(node), id(node) in hints)


TEXTS = list(texts())
HINTS = [text for text in TEXTS if text.is_hint]


@cache
def flags_of(command: str) -> set[str]:
    """The flags that a command reads."""
    module = importlib.import_module(f"renyi.cli.{command}")
    if command in METHODS:
        fields = {name for cls in METHODS[command].dataclasses for name in cls.__dataclass_fields__}
        return {f"--{name}" for name in fields} | {"--config", "--help"}
    if command == "lm_eval":  # the harness's own
        return {"--model", "--model_args", "--tasks", "--batch_size", "--help"}
    return {flag for action in module.parser()._actions for flag in action.option_strings} | {"--config", "--help"}


def test_every_command_line_in_a_text_is_one_that_the_command_reads() -> None:
    found = 0
    named = "|".join(COMMANDS)
    for where, text, _ in TEXTS:
        for line in re.findall(rf"(?<![\w/.-])renyi (?:{named})\b[^\n`]*", text):
            words = line.split()
            known = flags_of(words[1])
            flags = [w.partition("=")[0].rstrip(".,;:)'") for w in words if re.match(r"--[a-z]", w)]
            assert known.issuperset(flags) or not OTHERS.isdisjoint(flags), (where, line)
            found += bool(flags)
    assert found >= 10


def test_command_lines_of_hints_can_be_pasted() -> None:
    """No ellipsis, no quotation mark without its other half, and nothing left open but words in capitals."""
    found = 0
    for where, text, _ in HINTS:
        if line := re.search(r"(?:^|: )((?:renyi|pip|hf|torchrun) [a-z-].*?)\.?$", text):
            assert "…" not in line[1], (where, line[1])
            shlex.split(line[1])
            found += 1
    assert found >= 5


def test_every_flag_that_a_hint_names_is_there() -> None:
    known = OTHERS | {"--key"} | {flag for command in COMMANDS for flag in flags_of(command)}
    known |= {f"--{field.name}" for field in dataclasses.fields(SweepArguments)}
    found = 0
    for where, text, _ in HINTS:
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
            assert flag in known, (where, flag)
            found += 1
    assert found >= 30


# A key, and a value in the form of YAML, such as `dataloader_drop_last: false`.
SETTING = re.compile(r"(?<![\w-])([a-z]+(?:_[a-z]+)+): (true|false|null|-?\d[\d.e-]*|'?[a-z_]{2,}'?)(?![\w(])")


def test_every_setting_that_a_hint_writes_is_a_key_with_such_a_value() -> None:
    found = 0
    for where, text, _ in HINTS:
        for key, value in SETTING.findall(text):
            takers = [m for m in METHODS.values() if any(key in cls.__dataclass_fields__ for cls in m.dataclasses)]
            assert takers or key in ("model_init_kwargs", "attention_dropout"), (where, key)
            for method in takers:
                checked(method.dataclasses, {key: yaml.safe_load(value)})
            found += bool(takers)
    assert found >= 5


def test_a_wrong_value_would_be_found() -> None:
    with pytest.raises(ConfigError):
        checked(METHODS["sft"].dataclasses, {"dataloader_drop_last": "perhaps"})
    assert SETTING.findall("Write dataloader_drop_last: false, or a batch of at most 3.") == [
        ("dataloader_drop_last", "false")
    ]
