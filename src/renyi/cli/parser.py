"""Settings of a command: a dataclass's default, then a YAML file, then a flag.

Whatever does not fit says which key, which value, what was expected and where it stands. It knows no command and no
setting by name.
"""

import dataclasses
import difflib
import json
import os
import re
import types
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from renyi.errors import ConfigError


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
    """Read a YAML mapping with the lines its keys stand on.

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


class Parsed(NamedTuple):
    """Settings: one object a dataclass, and the keys that were given rather than left at their defaults."""

    filled: tuple[Any, ...]
    given: frozenset[str]


def parse(dataclass_types: Sequence[type], argv: Sequence[str], config: ConfigFile, prog: str) -> Parsed:
    """Fill dataclasses from a config file and flags.

    Args:
        dataclass_types: as for transformers' HfArgumentParser; no two have a field of one name.
        argv: flags, which override `config`.
        config: what a YAML file sets.
        prog: the command, for messages.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or a dataclass refuses its values.
    """
    hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    fields = {f.name: f for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}
    for key in config.values:
        if key not in fields:
            raise unknown_key(key, fields, config.where(key))
    given = dict(config.values)
    flags = _flags(dataclass_types, argv, fields, prog)
    given.update(flags)
    for key, value in given.items():
        where = f"--{key}" if key in flags else config.where(key)
        given[key] = converted(value, hints[key], fields[key].metadata.get("choices"), where)
    filled = []
    for cls in dataclass_types:
        try:
            filled.append(cls(**{f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}))
        except ConfigError as error:
            key = error.where or ""
            where = f"--{key}" if key in flags else config.where(key)
            raise ConfigError(error.what, where=where or None, hint=error.hint) from error
        except (ValueError, TypeError, ImportError, OSError, RuntimeError) as error:
            raise ConfigError(str(error).strip(), where=config.path or "settings") from error
    return Parsed(tuple(filled), frozenset(given))


def _flags(dataclass_types: Sequence[type], argv: Sequence[str], known: Iterable[str], prog: str) -> dict[str, Any]:
    """The values of the flags that were given, as text or lists of text (true and false for a bare switch)."""
    from transformers import HfArgumentParser

    class Parser(StrictParser, HfArgumentParser):
        pass

    parser = Parser(dataclass_types, prog=prog, add_help=False)
    for action in parser._actions:
        # Defaults and types are the dataclasses' and `converted`'s, so that YAML and flags obey one rule.
        action.default, action.type, action.choices, action.required = SUPPRESS, None, None, False
    return vars(parse_strictly(parser, argv, known))


class StrictParser(ArgumentParser):
    """An ArgumentParser that knows no abbreviations and raises ConfigError where that one prints its usage."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        match = re.fullmatch(r"argument (\S+?)(?:/\S+)?: (.*)", message, flags=re.DOTALL)
        where, what = match.groups() if match else (None, message)
        raise ConfigError(what, where=where, hint=f"See {self.prog} --help.")


def parse_strictly(parser: ArgumentParser, argv: Sequence[str], known: Iterable[str] | None = None) -> Any:
    """`parser.parse_args`, but what is left over is an error that names the nearest known flag."""
    namespace, left_over = parser.parse_known_args(list(argv))
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


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a key that nobody knows, naming the nearest one that is known."""
    alike = [k for k in known if key and (k.startswith(key) or key.startswith(k))]
    (nearest,) = difflib.get_close_matches(key, alike or known, n=1, cutoff=0.0)
    return ConfigError("there is no such key", where=where, hint=f"The nearest known one is {nearest}.")


# ---- Types -----------------------------------------------------------------------------------------------------------


def converted(value: Any, hint: Any, choices: Sequence[Any] | None, where: str) -> Any:
    """A value from YAML (anything) or a flag (text) as the type that a dataclass's field wants.

    Raises:
        ConfigError: it does not fit.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    literals = [arg for option in options if get_origin(option) is Literal for arg in get_args(option)]
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    choices = choices or literals or [member.value for enum in enums for member in enum]
    if type(None) in options and (value is None or _is_null_text(value, options)):
        return None
    if choices:
        value = next((choice for choice in choices if value == choice or str(value) == str(choice)), value)
        if value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            raise ConfigError(
                f"{_shown(value)} is none of {', '.join(map(str, choices))}",
                where=where,
                hint=f"Did you mean {near[0]}?" if near else None,
            )
        return value
    for option in sorted(options, key=_narrowest_first):
        fits, result = _as_type(value, option)
        if fits:
            return result
    expected = " or ".join(dict.fromkeys(_described(o) for o in options if o is not type(None)))
    nothing = ", or null" if type(None) in options else ""
    raise ConfigError(f"{_shown(value)} is not {expected}", where=where, hint=f"Give {expected}{nothing}.")


def _is_null_text(value: Any, options: Sequence[Any]) -> bool:
    return str not in options and isinstance(value, str) and value.lower() in ("none", "null")


_ORDER = (bool, int, float, dict, str, list)
_DESCRIBED = {bool: "true or false", int: "an integer", float: "a number", dict: "a mapping", str: "text"}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _narrowest_first(option: Any) -> int:
    kind = get_origin(option) or option
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _described(option: Any) -> str:
    kind = get_origin(option) or option
    if kind is list:
        (item,) = get_args(option) or (str,)
        return {str: "a list of names", int: "a list of integers", float: "a list of numbers"}.get(item, "a list")
    return _DESCRIBED.get(kind, str(getattr(kind, "__name__", kind)))


def _as_type(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether a value fits a type, and the value in that type."""
    kind = get_origin(option) or option
    if kind is bool:
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).lower()) if _is_plain(value) else None
        return truth is not None, truth
    if kind in (int, float) and _is_plain(value) and not isinstance(value, bool):
        try:
            if kind is float:
                return True, float(value)
            if re.fullmatch(r"[-+]?\d+", str(value)):
                return True, int(value)
            return float(value).is_integer(), int(float(value))  # 1e3 is an integer, too
        except (ValueError, OverflowError):
            return False, None
    if kind is dict:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                return False, None
        return isinstance(value, dict), value
    if kind is list:
        (item,) = get_args(option) or (Any,)
        items = value if isinstance(value, list) else [value]
        results = [(True, i) if item is Any else _as_type(i, item) for i in items]
        return all(fits for fits, _ in results) and not isinstance(value, dict), [result for _, result in results]
    if kind is str:
        return _is_plain(value) and not isinstance(value, bool), str(value)
    return kind is Any, value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


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
