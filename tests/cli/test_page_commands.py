"""The command lines of README and docs. All of them are read, and those of a page are run, in order, on small data.

Hub ids on the pages are folders here, with the zoo's tiny model. Training commands take one step.
"""

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import renyi, write_rows

from renyi.cli.main import COMMANDS
from renyi.runs.settings import METHODS
from renyi.zoo.base import base_path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(f.relative_to(ROOT)) for f in (ROOT / "docs").glob("*.md"))]
# Not run: what needs a hub dataset, other processes, another program, minutes, or does not end.
NOT_RUN = ("lm_eval", "serve", "sweep")
SLOW = {
    "README.md",
    "docs/audit.md",
    "docs/choosing-alpha.md",
    "docs/evaluation.md",
    "docs/powerflow.md",
    "docs/preferences.md",
}
LINE = re.compile(rf"(?:^|[ /])renyi (?P<command>{'|'.join(COMMANDS)})(?P<rest>(?: .*)?)$")


def command_lines(page: str) -> list[tuple[str, list[str]]]:
    """The lines of a page's shell blocks that run `renyi`: what is before it, and its arguments."""
    found = []
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if match := LINE.search(line):
                words = shlex.split(match["rest"], comments=True)
                found.append((line[: match.start()].strip(), [match["command"], *words]))
    return found


def is_run(before: str, command: str) -> bool:
    """Whether a line is run: `renyi …` by itself, without another program that starts it."""
    return command not in NOT_RUN and before in ("", "$", ".venv/bin")


def known_flags(command: str) -> set[str]:
    module = importlib.import_module(f"renyi.cli.{command}")
    if command in METHODS:
        return {f"--{name}" for cls in METHODS[command].dataclasses for name in cls.__dataclass_fields__} | {"--config"}
    return {flag for action in module.parser()._actions for flag in action.option_strings} | {"--config"}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_example_file_of_the_pages_is_there(page: str) -> None:
    for _, (command, *words) in command_lines(page):
        for word in words:
            if word.startswith("--") and command != "lm_eval":
                assert word.partition("=")[0] in known_flags(command), (page, command, word)
            if word.startswith("examples/"):
                assert (ROOT / word).is_file(), (page, word)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with all that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("examples", "src"):
            Path(name).symlink_to(ROOT / name)
        for name in (
            "Qwen/Qwen2.5-0.5B-Instruct",
            "Qwen/Qwen2.5-0.5B",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "MODEL",
            "BASE",
        ):
            shutil.copytree(base_path(), name)
        chats = (ROOT / "examples" / "two_schools.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("my_chats", "more_chats", "rows", "candidates", "data"):
            several = chats[: 40 if name == "rows" else 12]  # a diagnosis needs more rows than directions
            Path(f"{name}.jsonl").write_text("\n".join(several) + "\n", encoding="utf-8")
        asked: list[dict[str, Any]] = [
            {"question": "where does oskar live ?", "choices": ["cairo", "oslo"], "answer": n % 2} for n in range(12)
        ]
        Path("questions").mkdir()
        for name in ("questions", "questions/geography", "questions/people"):
            write_rows(Path(f"{name}.jsonl"), [{"prompt": "where does mira live ?", **row} for row in asked])
        write_rows(Path("prompts.jsonl"), [{"prompt": "where does oskar live ?"}])
        thumbs = [
            {"prompt": "home of ines ?", "completion": " rome .", "label": n % 2 == 0, "user": n % 3} for n in range(8)
        ]
        for name in ("thumbs", "more_thumbs"):
            write_rows(Path(f"{name}.jsonl"), thumbs)
        answers = [("rome", "oslo"), ("oslo", "rome")] * 4
        pairs = [{"prompt": "home of ines ?", "chosen": f" {a} .", "rejected": f" {b} ."} for a, b in answers]
        for name in ("pairs", "held_out_pairs"):
            write_rows(Path(f"{name}.jsonl"), pairs)
        write_rows(Path("to_rate.jsonl"), [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs])
        quick = ["--max_steps", "1", "--eval_strategy", "no"]
        assert renyi("sft", "--config", "examples/two_schools.yaml", "--output_dir", "runs/mine", *quick).code == 0
        for name in ("runs/alpha_0", "runs/my_ensemble", "OUT"):
            shutil.copytree("runs/mine", name)
        random = ["--member_kind", "gaussian", "--prior_std", "0.2", "--output_dir", "runs/gaussian"]
        assert renyi("sft", "--config", "examples/two_schools.yaml", *random, *quick).code == 0
        shutil.copytree("runs/mine/member_0", "PEFT_FOLDER")
        yield folder


def ran(command: str, words: list[str]) -> Any:
    if command in METHODS:
        if "--dry_run" in words:
            words = [*words, "--output_dir", "planned"]
        elif (folder := made_by(words)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        words = [*words, "--max_steps", "1", *(["--eval_strategy", "no"] if command != "powerflow" else [])]
    return renyi(command, *words)


def made_by(words: list[str]) -> str | None:
    """The folder that a training command writes."""
    if "--output_dir" in words:
        return words[words.index("--output_dir") + 1]
    config = Path(words[words.index("--config") + 1]).read_text(encoding="utf-8")
    return next((line.split()[1] for line in config.splitlines() if line.startswith("output_dir:")), None)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
        for page in PAGES
        if any(is_run(before, command) for before, (command, *_) in command_lines(page))
    ],
)
def test_the_command_lines_of_a_page_run(page: str, world: Path) -> None:
    del world
    for needed in ("two_schools", "annotators", "policy", "thumbs"):
        if not Path("runs", needed).exists() and f"runs/{needed}" in (ROOT / page).read_text(encoding="utf-8"):
            shutil.copytree("runs/mine", f"runs/{needed}")
    for before, (command, *words) in command_lines(page):
        if not is_run(before, command):
            continue
        ended = ran(command, words)
        failing = "--fail_over" in words  # it is meant to exit with 1
        assert ended.code == (1 if failing else 0), (page, command, words, ended)
        if "--json" in words:
            json.loads(ended.out)
