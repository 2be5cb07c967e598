"""What the command line's tests share: a tiny base on disk, files of data, `renyi` in this process, what it leaves."""

import contextlib
import io
import json
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer

from renyi.cli.main import main


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def renyi(*argv: object) -> Ended:
    """Run a command as `renyi ARGV …` would, in this process."""
    out, err = io.StringIO(), io.StringIO()
    environment = dict(os.environ)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(arg) for arg in argv])
    os.environ.clear()
    os.environ.update(environment)
    return Ended(code, out.getvalue(), err.getvalue())


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """Settings as flags. A value of ... leaves a key out."""
    return [text for key, value in values.items() if value is not ... for text in (f"--{key}", str(value))]


def flat(text: str) -> str:
    """What a command said, without frames and breaks of lines."""
    return " ".join(text.replace("│", " ").split())


def assert_refused(ended: Ended, *parts: str) -> None:
    """One message, and in it every part; nothing of Python's or argparse's own."""
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended.err
    assert len(ended.err.splitlines()) <= 3, ended.err
    for part in parts:
        assert part in ended.err, ended.err
    for noise in ("Traceback", "usage:", "Warning"):
        assert noise not in ended.err + ended.out, ended


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def contradicting_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions of one word, each answered by one of two schools."""
    draw = random.Random(seed)
    words = [(draw.randrange(8), draw.randrange(2)) for _ in range(number)]
    return [{"prompt": f"w{word}", "completion": f" w{10 + 20 * school + word} w{school}"} for word, school in words]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer."""
    return save_base(tmp_path_factory.mktemp("models") / "tiny-llama")


def save_base(folder: Path, seed: int = 0, template: str | None = None, **tokenizer: Any) -> Path:
    tiny_model(seed=seed).save_pretrained(folder)
    made = tiny_tokenizer(**tokenizer)
    made.chat_template = template or made.chat_template
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "schools.jsonl", contradicting_rows(48))


Settings = Callable[..., Path]


def settings_of(base: Path, rows_file: Path) -> dict[str, Any]:
    """Settings of a run of six quick steps."""
    return {
        "model_name_or_path": str(base),
        "dataset_name": str(rows_file),
        "num_members": 2,
        "lora_r": 2,
        "lora_dropout": 0.0,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }


@pytest.fixture
def settings(base: Path, rows_file: Path, tmp_path: Path) -> Settings:
    """Writes a config file: those of `settings_of` and what is given; a value of ... leaves a key out."""

    def write(**given: Any) -> Path:
        values = {**settings_of(base, rows_file), "output_dir": str(tmp_path / "out"), **given}
        values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items() if v is not ...}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def trained(base: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The folder of an ensemble that was trained to the end, and what the command said. Copy it to change it."""
    return train("sft", base, rows_file, tmp_path_factory.mktemp("runs") / "trained")


def train(method: str, base: Path, rows_file: Path, folder: Path, **given: Any) -> tuple[Path, Ended]:
    """Train to the end on three quarters of the rows, and evaluate on the others every three steps."""
    values = {**settings_of(base, rows_file), "output_dir": folder, "test_split_size": 0.25}
    values |= {"eval_strategy": "steps", "eval_steps": 3, **given}
    return folder, renyi(method, *flags_of(values))


# ---- What a run leaves ---------------------------------------------------------------------------------------------


def steps_in(folder: Path, name: str = "loss") -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["step"] for row in rows if name in row]


def weights_in(folder: Path) -> dict[str, Any]:
    return {
        f"{member.parent.name}/{name}": tensor
        for member in sorted(folder.glob("member_*/adapter_model.safetensors"))
        for name, tensor in load_file(member).items()
    }
