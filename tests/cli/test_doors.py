"""What a newcomer meets first: the list of commands, a file to begin with, a page about a run, and completion."""

import importlib
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import Ended, assert_refused, renyi

from renyi.cli.command import command_of
from renyi.cli.console import typed
from renyi.cli.init import groups_of_keys
from renyi.cli.main import COMMANDS, GROUPS
from renyi.keys import EXTRAS, install_line
from renyi.runs.settings import METHODS

ROOT = Path(__file__).parents[2]


def test_help_groups_commands_by_what_a_person_wants() -> None:
    lines = renyi("--help").out.splitlines()
    of_group, group = {}, ""
    for line in lines[1:]:
        group = line.strip() if line.strip() in GROUPS else group
        if match := re.match(r"  renyi (\w+)", line):
            of_group[match[1]] = group
    assert of_group == {name: group for group, inside in GROUPS.items() for name in inside}


# ---- renyi init ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_first_file_runs_as_it_is(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = renyi("init", method)
    assert told.code == 0, told
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{method}.jsonl", f"{method}.yaml"]
    (following,) = re.findall(r"next +(renyi .+)", told.out)
    planned = renyi(*shlex.split(following)[1:])
    assert planned.code == 0, planned
    assert "A dry run: nothing was written" in planned.out
    assert sorted(f.name for f in tmp_path.iterdir()) == [f"{method}.jsonl", f"{method}.yaml"]


@pytest.mark.parametrize("method", METHODS)
def test_every_key_of_the_help_is_there_and_what_is_commented_out_is_the_default(method: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    renyi("init", method, "--output", file, "--model_name_or_path", "gpt2", "--dataset_name", "rows.jsonl")
    assert not file.with_suffix(".jsonl").exists()
    text = file.read_text(encoding="utf-8")
    given = yaml.safe_load(text)
    assert given["model_name_or_path"] == "gpt2"
    assert given["dataset_name"] == "rows.jsonl"
    uncommented = re.sub(r"(?m)^# (?=\w+: )", "", text)
    everything = yaml.safe_load(uncommented)
    wanted = {name for names in groups_of_keys(command_of(method)).values() for name in names}
    fields = {f for cls in METHODS[method].dataclasses for f in cls.__dataclass_fields__}
    assert everything.keys() == (wanted & fields) - {"dry_run"}
    assert all(re.match(r"(# )?\w+: |# |#$|$", line) for line in text.splitlines())


def test_no_file_is_overwritten_and_the_next_name_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.jsonl").write_text("mine", encoding="utf-8")
    refused = renyi("init", "sft")
    assert_refused(refused, "sft.jsonl exists already")
    assert (tmp_path / "sft.jsonl").read_text(encoding="utf-8") == "mine"
    assert not (tmp_path / "sft.yaml").exists()
    assert renyi(*commands_in(refused.err)[0]).code == 0
    assert (tmp_path / "sft_2.yaml").is_file()
    before = (tmp_path / "sft_2.yaml").read_bytes()
    assert_refused(renyi("init", "sft", "--output", "sft_2.yaml"), "sft_2.yaml exists already")
    assert (tmp_path / "sft_2.yaml").read_bytes() == before
    assert_refused(renyi("init", "stf"), "'stf' is none of", "Did you mean sft?")


# ---- renyi report ----------------------------------------------------------------------------------------------------


def test_the_page_shows_the_run(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, said = trained
    page = tmp_path / "page.html"
    assert renyi("report", folder, "--output", page) == Ended(0, f"{page}\n", "")
    html = page.read_text(encoding="utf-8")
    manifest = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = next(row["loss"] for row in reversed(last) if "loss" in row)
    for shown in (
        manifest["base_model"],
        "2 × LoRA rank 2",
        "36",
        "12",
        f"{loss:.4g}",
        "‖update‖",
        "learning_rate",
        "0.01",
    ):
        assert shown in html, shown
    clearest = [line for line in said.out.partition("What each member learned")[2].splitlines() if "%" in line]
    assert len(clearest) == 2
    assert all(line.split()[-1] in html for line in clearest)
    assert "data:image/png;base64" in html
    assert not re.search(r'(src|href)="(?!data:)', html)  # it needs no other file
    assert "There is none in this folder" in html


def test_an_evaluation_inside_the_folder_is_on_the_page(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.symlink_to(trained[0])
    rows = tmp_path / "questions.jsonl"
    asked = [{"question": f"w{n} <b>", "choices": ["w3", "w4"], "answer": n % 2} for n in range(4)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    found = tmp_path / "run" / "evaluation"
    assert renyi("evaluate", folder, rows, "--task", "choice", "--report", found).code == 0
    assert renyi("report", folder, "--output", tmp_path / "page.html").code == 0
    html, alone = (f.read_text(encoding="utf-8") for f in (tmp_path / "page.html", found / "report.html"))
    body = alone.partition("</p>")[2].partition("</body>")[0].strip()
    assert body in html
    (found / "sections.json").write_text("{", encoding="utf-8")
    assert_refused(renyi("report", folder, "--output", tmp_path / "page.html"), "sections.json", "cannot be read")
    for file in found.iterdir():
        file.unlink()
    found.rmdir()


def test_a_folder_that_is_no_ensemble(tmp_path: Path) -> None:
    assert_refused(renyi("report", tmp_path), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- Next steps ------------------------------------------------------------------------------------------------------


def commands_in(text: str) -> list[list[str]]:
    """The `renyi …` command lines in a text, without `renyi`. Each goes to the end of its line."""
    named = "|".join(COMMANDS)
    return [shlex.split(line.rstrip("."))[1:] for line in re.findall(rf"renyi (?:{named})\b[^\n`]*", text)]


def test_what_training_says_to_do_next_works(
    trained: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, said = trained
    following = commands_in(said.out.partition("\nNext\n")[2].replace(str(folder), "run"))
    assert len(following) >= 3
    (tmp_path / "run").symlink_to(folder)
    for command in following:
        ended = renyi(*command)
        assert ended.code == 0, (command, ended)
    (folder / "run.html").unlink()


def test_next_steps_name_the_program_as_it_was_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In an environment that is not activated, the shell finds neither `renyi` nor its `pip`."""
    hint = "Train some by `renyi reward`, or pip install 'renyi[serve]'. Upgrade renyi."
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [".venv/bin/renyi", "sft"])
    expected = (
        "Train some by `.venv/bin/renyi reward`, or .venv/bin/python -m pip install 'renyi[serve]'. Upgrade renyi."
    )
    assert typed(hint) == expected
    assert "See .venv/bin/renyi score --help." in renyi("score").err
    monkeypatch.setattr("sys.argv", ["a folder/renyi/__main__.py", "sft"])
    monkeypatch.setattr("sys.executable", "/opt/my python")
    assert typed("Run renyi diagnose") == "Run '/opt/my python' -m renyi diagnose"
    (tmp_path / "renyi").touch(mode=0o755)
    assert typed(hint) == hint  # the shell finds it


def test_the_help_that_an_error_names_is_there(base: Path) -> None:
    refused = renyi("score")
    assert_refused(refused, "See renyi score --help.")
    with pytest.raises(SystemExit) as ended:
        renyi(*commands_in(refused.err)[0])
    assert ended.value.code == 0


def test_install_lines_name_extras_of_this_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        assert [re.split(r"[<>=]", line)[0] for line in extras[extra]] == [package]
        assert install_line(package) == f"pip install 'renyi[{extra}]'"
    assert install_line("liger_kernel") == "pip install liger-kernel"


def test_a_missing_extra_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renyi.cli.lm_eval.find_spec", lambda name: None)
    assert_refused(renyi("lm_eval", "run"), "lm_eval: is not installed", "pip install 'renyi[lm-eval]'")


# ---- Completion ------------------------------------------------------------------------------------------------------


def test_bash_completes_commands_flags_and_files(tmp_path: Path) -> None:
    script = tmp_path / "renyi.bash"
    script.write_text(renyi("completion", "bash").out, encoding="utf-8")
    (tmp_path / "my.yaml").touch()

    def completed(*words: str) -> list[str]:
        line = " ".join(f"'{word}'" for word in words)
        asked = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMPREPLY=(); _shtab_renyi; echo ${{COMPREPLY[@]}}"
        whole = f"source {script}\n{asked}\n"
        ran = subprocess.run(["bash", "-c", whole], cwd=tmp_path, capture_output=True, text=True, check=True)
        return ran.stdout.split()

    assert set(completed("renyi", "")) >= set(COMMANDS)
    assert completed("renyi", "sft", "--num_mem") == ["--num_members"]
    assert "--target_risk" in completed("renyi", "evaluate", "--t")
    assert completed("renyi", "dpo", "--config", "my") == ["my.yaml"]
    assert completed("renyi", "info", "my") == ["my.yaml"]


def test_every_command_but_the_harness_says_what_it_reads() -> None:
    """A command without a function `parser`, or an entry in METHODS, would be completed without its flags."""
    silent = [
        name
        for name in COMMANDS
        if name not in METHODS and not hasattr(importlib.import_module(f"renyi.cli.{name}"), "parser")
    ]
    assert silent == ["lm_eval"]


def test_there_is_no_other_shell() -> None:
    assert_refused(renyi("completion", "fish"), "there is no shell 'fish'", "bash, zsh, tcsh")
