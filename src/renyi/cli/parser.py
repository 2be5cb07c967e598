"""Settings of a command: a dataclass's default, then a YAML file, then a flag.

An error names the key, the value, what was expected, and the place that set it. Read next: `renyi.keys`, which converts
values.
"""

import dataclasses
import os
import re
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from renyi.errors import ConfigError
from renyi.keys import Where, checked, unknown_key
from renyi.keys import converted as converted  # for commands that read columns


class ConfigFile(NamedTuple):
    """What a YAML file sets, and on which line."""

    path: str = ""
    values: dict[str, Any] = {}  # noqa: RUF012 (never changed)
    lines: dict[str, int] = {}  # noqa: RUF012

    def where(self, key: str) -> str:
        return f"{key} ({self.path}, line {self.lines[key]})" if key in self.lines else key


def split_config(argv: Sequence[str], prog: str) -> tuple[ConfigFile, list[str]]:
    """Read the file that `--config` names, and set the environment variables of its `env:`.

    Returns:
        What it sets, and the arguments without `--config`.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
    """
    parser = StrictParser(prog=prog, add_help=False)
    parser.add_argument("--config", metavar="FILE.yaml")
    namespace, rest = parser.parse_known_args(list(argv))
    config = read_config(namespace.config) if namespace.config is not None else ConfigFile()
    env = config.values.pop("env", None) or {}
    if not isinstance(env, dict):
        raise ConfigError(f"{env!r} is not a mapping", where=config.where("env"), hint="Write `env: {NAME: value}`.")
    os.environ.update({name: str(value) for name, value in env.items()})
    return config, rest


def read_config(path: str) -> ConfigFile:
    """Read a YAML mapping, with the line of each key.

    Raises:
        ConfigError: it is missing, not YAML, not a mapping, or sets a key twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError(what, where=path, hint=f"Looked in {Path(path).absolute().parent}.") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return ConfigFile(path, {}, {})
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(
                f"holds a {'list' if isinstance(node, yaml.SequenceNode) else 'single value'}, not a mapping",
                where=path,
                hint="Write one `key: value` a line.",
            )
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if lines.setdefault(key, line) != line:
                raise ConfigError(f"{key} is set on line {lines[key]} already", where=f"{path}, line {line}")
        return ConfigFile(path, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            f"is not YAML ({getattr(error, 'problem', None) or error})",
            where=f"{path}, line {mark.line + 1}" if mark else path,
            hint="Write one `key: value` a line; quote a value that holds `: ` or begins with one of @ % & * [ {.",
        ) from error
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: `no` and `off` are words, 1e-4 is a number, and a date is text."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"(?:[-+]?(?:\.[0-9]+|[0-9]+\.?[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"),
    list("-+0123456789."),
)


class Given(NamedTuple):
    """The keys that a file and flags set, in the types of their fields, and where each was set."""

    values: dict[str, Any]
    where: Where


def given_keys(dataclass_types: Sequence[type], argv: Sequence[str], config: ConfigFile, prog: str) -> Given:
    """The fields of some dataclasses that a config file and flags set.

    Args:
        dataclass_types: no two have a field of one name.
        argv: flags, which override `config`.
        config: what a YAML file sets.
        prog: the command, for messages.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    known = [f.name for cls in dataclass_types for f in dataclasses.fields(cls) if f.init]
    for key in config.values:
        if key not in known:
            raise unknown_key(key, known, config.where(key))
    flags = _flags(dataclass_types, argv, known, prog)

    def where(key: str) -> str:
        return f"--{key}" if key in flags else config.where(key)

    return Given(checked(dataclass_types, {**config.values, **flags}, where), where)


def _flags(dataclass_types: Sequence[type], argv: Sequence[str], known: Iterable[str], prog: str) -> dict[str, Any]:
    """The values of the flags that were given, as text or lists of text (true and false for a bare switch)."""
    parser = keys_parser(dataclass_types, prog)
    for action in parser._actions:
        # Defaults come from the dataclasses and types from `checked`, so that the same rules hold for YAML and flags.
        action.default, action.type, action.choices, action.required = SUPPRESS, None, None, False
    return vars(parse_strictly(parser, argv, known))


def keys_parser(dataclass_types: Sequence[type], prog: str) -> ArgumentParser:
    """A parser with a flag for every field of some dataclasses."""
    from transformers import HfArgumentParser

    class Parser(StrictParser, HfArgumentParser):
        pass

    return Parser(dataclass_types, prog=prog, add_help=False)


class StrictParser(ArgumentParser):
    """An ArgumentParser without abbreviations that raises ConfigError instead of printing its usage."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (\S+?)(?:/\S+)?: (.*)", message, flags=re.DOTALL)
        where, what = match.groups() if match else (None, message)
        raise ConfigError(what, where=where, hint=f"See {self.prog} --help.")


def parse_strictly(parser: ArgumentParser, argv: Sequence[str], known: Iterable[str] | None = None) -> Any:
    """`parser.parse_args`, but an unknown flag is an error that names the nearest known flag."""
    has_arguments = any(not action.option_strings for action in parser._actions)
    # An argument may follow an option, as in `renyi generate ENSEMBLE --max_new_tokens 5 "text"`.
    parse = parser.parse_known_intermixed_args if has_arguments else parser.parse_known_args
    namespace, left_over = parse(list(argv))
    if left_over:
        flag = next((arg for arg in left_over if arg.startswith("--")), None)
        if flag is None:
            raise ConfigError(
                f"{left_over[0]!r} belongs to no flag", hint="Write --key value; quote a value with spaces."
            )
        flags = [
            option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")
        ]
        raise unknown_key(flag.partition("=")[0][2:].replace("-", "_"), known or flags, flag)
    return namespace


# ---- Help ------------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """A key as a help page shows it."""

    name: str
    default: str
    help: str


def keys(dataclass_types: Sequence[type], names: Iterable[str]) -> list[Key]:
    """The default and the help text of some keys."""
    fields = {f.name: f for cls in dataclass_types for f in dataclasses.fields(cls)}

    def default(field: dataclasses.Field[Any]) -> str:
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if made is None or made is dataclasses.MISSING:
            return ""
        if isinstance(made, list):
            return " ".join(map(str, made))
        return str(made.value if isinstance(made, Enum) else made)

    return [Key(n, default(fields[n]), fields[n].metadata.get("help", "").partition(". ")[0]) for n in names]
