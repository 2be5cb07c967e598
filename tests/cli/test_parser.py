"""Settings: default < YAML < flag, types, and messages that say which key, which value and where."""

import os
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from renyi.cli.parser import ConfigFile, given_keys, keys, read_config, split_config
from renyi.errors import ConfigError
from renyi.keys import filled


class Speed(Enum):
    SLOW = "slow"
    FAST = "fast"


@dataclass
class Walk:
    steps: int = 10
    pace: float = 1.5
    name: str = "stroll"
    rests: bool = True
    limit: int | None = 100
    stops: list[str] | None = None
    options: dict[str, Any] | str | None = None
    speed: Speed | str = Speed.SLOW
    mood: str = field(default="calm", metadata={"choices": ["calm", "brisk"]})
    report_to: None | str | list[str] = "none"  # noqa: RUF036 (as transformers has it)
    rain: bool | None = None
    paths: list[str] = field(default_factory=lambda: ["field", "wood"], metadata={"help": "Ways. Any number."})

    def __post_init__(self) -> None:
        if self.pace < 0:
            raise ConfigError(f"{self.pace} is not allowed", where="pace", hint="Give a positive number.")
        if self.steps == 13:
            raise ValueError("thirteen steps are unlucky")


def walk(yaml: str | None = None, *flags: str, folder: Path | None = None) -> Walk:
    config = ConfigFile()
    if yaml is not None:
        assert folder is not None
        (folder / "walk.yaml").write_text(yaml, encoding="utf-8")
        config = read_config(str(folder / "walk.yaml"))
    given = given_keys((Walk,), list(flags), config, "walk")
    (made,) = filled((Walk,), given.values, given.where)
    return made


def refused(yaml: str | None, *flags: str, folder: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        walk(yaml, *flags, folder=folder)
    return caught.value


def test_default_then_yaml_then_flag(tmp_path: Path) -> None:
    made = walk("steps: 20\npace: 2\n", "--pace", "3", folder=tmp_path)
    assert (made.steps, made.pace, made.name) == (20, 3.0, "stroll")


def test_given_are_the_keys_of_the_file_and_the_flags(tmp_path: Path) -> None:
    (tmp_path / "walk.yaml").write_text("steps: 10\npace: 2\n", encoding="utf-8")
    config = read_config(str(tmp_path / "walk.yaml"))
    given = given_keys((Walk,), ["--pace", "3", "--no_rests"], config, "walk")
    assert set(given.values) == {"steps", "pace", "rests"}  # steps, too, though it is as by default


def test_a_help_page_shows_defaults_of_any_kind() -> None:
    names = ("steps", "speed", "rain", "paths")
    assert [(key.name, key.default) for key in keys((Walk,), names)] == [
        ("steps", "10"), ("speed", "slow"), ("rain", ""), ("paths", "field wood"),
    ]  # fmt: skip
    assert keys((Walk,), ["paths"])[0].help == "Ways"


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("pace: 1e-4", "pace", 1e-4),  # YAML 1.1 reads text
        ("pace: 5", "pace", 5.0),
        ("pace: .inf", "pace", float("inf")),
        ("steps: 1e3", "steps", 1000),
        ("name: no", "name", "no"),  # YAML 1.1 reads false
        ("name: 2024-01-01", "name", "2024-01-01"),
        ("name: 7", "name", "7"),
        ("rests: no", "rests", False),
        ("rests: true", "rests", True),
        ("limit: null", "limit", None),
        ("limit: none", "limit", None),
        ("limit:", "limit", None),
        ("stops: [a, b]", "stops", ["a", "b"]),
        ("stops: a", "stops", ["a"]),
        ("paths: [a, b]", "paths", ["a", "b"]),
        ("paths: a", "paths", ["a"]),
        ("options: {depth: 2}", "options", {"depth": 2}),
        ("speed: fast", "speed", "fast"),
        ("mood: brisk", "mood", "brisk"),
        ("report_to: none", "report_to", "none"),
        ("report_to: [a, b]", "report_to", ["a", "b"]),
        ("rain: true", "rain", True),
    ],
)
def test_yaml_values(line: str, key: str, value: object, tmp_path: Path) -> None:
    made = getattr(walk(line, folder=tmp_path), key)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--pace=2"], "pace", 2.0),
        (["--limit", "null"], "limit", None),
        (["--stops", "a", "b"], "stops", ["a", "b"]),
        (["--paths", "a"], "paths", ["a"]),
        (["--paths", "a", "b", "--pace", "2"], "paths", ["a", "b"]),
        (["--options", '{"depth": 2}'], "options", {"depth": 2}),
        (["--rests", "false"], "rests", False),
        (["--no_rests"], "rests", False),
        (["--rests"], "rests", True),
        (["--rain", "no"], "rain", False),
        (["--report-to", "none"], "report_to", "none"),
        (["--steps", str(2**60 + 1)], "steps", 2**60 + 1),
    ],
)
def test_flag_values(flags: list[str], key: str, value: object) -> None:
    assert getattr(walk(None, *flags), key) == value


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("steps: four", ["steps", "line 2", "'four' is not an integer"]),
        ("steps: 2.5", ["steps", "2.5 is not an integer"]),
        ("steps: true", ["steps", "True is not an integer"]),
        ("steps: [1]", ["steps", "[1] is not an integer"]),
        ("steps: null", ["steps", "null is not an integer"]),
        ("pace: fast", ["pace", "'fast' is not a number"]),
        ("rests: maybe", ["rests", "'maybe' is not true or false"]),
        ("name: [a]", ["name", "['a'] is not text"]),
        ("limit: many", ["limit", "an integer, or null"]),
        ("stops: {a: 1}", ["stops", "is not a list of names"]),
        ("speed: fats", ["speed", "'fats' is none of slow, fast", "Did you mean fast?"]),
        ("mood: brsk", ["mood", "none of calm, brisk", "Did you mean brisk?"]),
        ("stepps: 3", ["stepps", "line 2", "there is no such key", "nearest known one is steps"]),
        ("pace: -1", ["pace", "walk.yaml, line 2", "-1.0 is not allowed", "Give a positive number."]),
        ("steps: 13", ["walk.yaml", "thirteen steps are unlucky"]),
    ],
)
def test_refused_yaml_says_key_value_and_place(line: str, parts: list[str], tmp_path: Path) -> None:
    message = str(refused(f"# a walk\n{line}\n", folder=tmp_path))
    for part in parts:
        assert part in message
    assert "usage" not in message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--steps", "four"], ["--steps", "'four' is not an integer"]),
        (["--steps"], ["--steps", "expected one argument", "walk --help"]),
        (["--ste", "4"], ["--ste", "nearest known one is steps"]),  # no abbreviations
        (["--step-s", "4"], ["--step-s", "nearest known one is steps"]),
        (["--pase=4"], ["--pase=4", "nearest known one is pace"]),
        (["forwards"], ["'forwards' belongs to no flag"]),
        (["--pace", "2", "forwards"], ["'forwards' belongs to no flag"]),
    ],
)
def test_refused_flags(flags: list[str], parts: list[str], tmp_path: Path) -> None:
    message = str(refused(None, *flags, folder=tmp_path))
    for part in parts:
        assert part in message


def test_a_flag_that_replaces_a_bad_value_in_the_file_is_named_itself(tmp_path: Path) -> None:
    assert refused("pace: 1\n", "--pace", "-1.5", folder=tmp_path).where == "--pace"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: 1\npace: [1\n", ["line", "is not YAML"]),
        ("- steps\n- pace\n", ["holds a list, not a mapping"]),
        ("steps\n", ["holds a single value, not a mapping"]),
        ("steps: 1\npace: 2\nsteps: 3\n", ["line 3", "steps is set on line 1 already"]),
        ("name: a: b\n", ["line 1", "is not YAML"]),
    ],
)
def test_files_that_are_no_mapping(text: str, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config(str(tmp_path / "bad.yaml"))
    for part in ["bad.yaml", *parts]:
        assert part in str(caught.value)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file") as caught:
        read_config(str(tmp_path / "nowhere.yaml"))
    assert str(tmp_path) in str(caught.value.hint)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    assert walk("# nothing yet\n", folder=tmp_path) == Walk()


def test_env_is_set_and_is_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RENYI_TEST_ENV", "before")
    (tmp_path / "walk.yaml").write_text("env: {RENYI_TEST_ENV: 3}\nsteps: 4\n", encoding="utf-8")
    config, rest = split_config(["--pace", "2", "--config", str(tmp_path / "walk.yaml")], "walk")
    assert os.environ["RENYI_TEST_ENV"] == "3"
    assert config.values == {"steps": 4}
    assert rest == ["--pace", "2"]


def test_env_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "walk.yaml").write_text("env: 3\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"env \(.*line 1\): 3 is not a mapping"):
        split_config([f"--config={tmp_path / 'walk.yaml'}"], "walk")
