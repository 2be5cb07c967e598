"""Tasks of evaluation: a new one is one class, Python and the command line agree, and settings are checked."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import assert_refused, renyi, write_rows
from datasets import Dataset
from tiny import lora, scatter_members, tiny_reward_model, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.ensemble import KeptReward, KeptThumbs, Reference, write_reward, write_thumbs
from renyi.errors import ConfigError, DataError, EnsembleFormatError
from renyi.evaluation import Models, Settings, Task, evaluate, find_task, register, running, setting, task_names
from renyi.evaluation.estimate import Estimate
from renyi.evaluation.sections import Column, Report, Table, best_cells, cell_text
from renyi.objectives import ThumbLoss

# ---- A new task ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthSettings(Settings):
    least: int = setting(1, "rows of fewer tokens are left out", "N")

    def validate(self) -> None:
        self.require(self.least > 0, "least", "Give a number above 0.")


class Lengths(NamedTuple):
    rows: int
    tokens: float


class Length(Task):
    """How many tokens the rows have: a toy, and all that a task needs."""

    name = "length"
    Settings = LengthSettings

    def read(self, files: Any, settings: LengthSettings) -> list[str]:
        return list(files[0].rows["text"])

    def ask(self, models: Models, data: list[str], settings: LengthSettings) -> list[int]:
        found = [len(models.model.tokenizer(text)["input_ids"]) for text in data]
        return [n for n in found if n >= settings.least]

    def evaluate(self, data: list[str], answers: list[int], settings: LengthSettings) -> Lengths:
        return Lengths(len(answers), sum(answers) / len(answers))

    def report(self, data: list[str], answers: list[int], found: Lengths, settings: LengthSettings) -> Report:
        table = Table("How long?", ["", Column("tokens", ".2f")], [["mean", found.tokens]])
        return Report("Length", f"{found.rows} rows", [table])


@pytest.fixture
def length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_REGISTERED", {})
    register(Length())


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "ensemble"
    ensemble = scatter_members(LoraEnsemble.from_base(base, 2, lora(), seed=7), std=0.3)
    ensemble.save(path)
    write_thumbs(path, KeptThumbs(ThumbLoss(), Reference(ensemble), torch.tensor([0.1, 0.3])))
    return path


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of reward models."""
    made = tmp_path_factory.mktemp("rewards")
    tiny_reward_model().save_pretrained(made / "base")
    tiny_tokenizer().save_pretrained(made / "base")
    base = tiny_reward_model(made / "base")
    ensemble = scatter_members(LoraEnsemble.from_base(base, 2, lora(task_type="SEQ_CLS"), seed=7), std=0.3)
    ensemble.save(made / "ensemble")
    write_reward(made / "ensemble", KeptReward(torch.tensor([0.2, -0.1])))
    return made / "ensemble"


ROWS = [{"text": "w1 w2 w3"}, {"text": "w4"}]


@pytest.mark.usefixtures("length")
def test_a_new_task_is_one_class(folder: Path, tmp_path: Path) -> None:
    """From Python, and with its own flag, table, page and JSON on the command line."""
    assert "length" in task_names()
    found = evaluate("length", ROWS, folder)
    assert found.result == {"task": "length", "rows": 2, "tokens": 2.0}
    assert evaluate("length", ROWS, folder, least=2).result["tokens"] == 3
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    flags = ("evaluate", folder, data, "--task", "length")
    assert json.loads(renyi(*flags, "--json").out) == found.result
    ended = renyi(*flags, "--least", 2, "--report", tmp_path / "report")
    assert next(line for line in ended.out.splitlines() if line.startswith("mean")).split() == ["mean", "3.00"]
    assert "How long?" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert_refused(renyi(*flags, "--least", 0), "--least: is 0", "above 0")
    assert_refused(renyi(*flags, "--samples", 2), "--samples: --task length has no such flag", "--task sampling")


# ---- Python and the command line -------------------------------------------------------------------------------------

TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choice": (
        [{"question": f"w{i}", "choices": ["w1", "w2 w3"], "answer": "w1", "who": str(i % 2)} for i in range(6)],
        {"choice_by": "text", "group": "who", "resamples": 20},
    ),
    "perplexity": ([{"prompt": f"w{i}", "completion": " w3 w4"} for i in range(4)], {"resamples": 20}),
    "preference": ([{"prompt": f"w{i}", "chosen": " w3 w4", "rejected": " w5"} for i in range(4)], {"beta": 0.3}),
    "refusal": ([{"prompt": f"w{i}", "said": ["I cannot help.", "w1"]} for i in range(3)], {"completions": "said"}),
    "reward": (
        [
            {"prompt": f"w{i}", "chosen": " w3 w4", "rejected": " w5", "votes_chosen": i, "votes_rejected": 1}
            for i in range(4)
        ],
        {"lcb_width": 0.5, "resamples": 20},
    ),
    "thumbs": (
        [{"prompt": f"w{i}", "completion": " w3 w4", "label": i % 2 == 0, "who": str(i % 3)} for i in range(6)],
        {"group": "who", "resamples": 20},
    ),
    "sampling": (
        [{"prompt": f"w{i}", "answer": "w5"} for i in range(2)],
        {"samples": 2, "max_new_tokens": 3, "resamples": 20, "baseline": ["base"]},
    ),
}


def test_every_task_has_an_example() -> None:
    assert task_names() == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_python_finds_what_the_command_finds(name: str, folder: Path, rewards: Path, tmp_path: Path) -> None:
    rows, settings = TASKS[name]
    folder = rewards if name == "reward" else folder
    found = evaluate(name, rows, folder, **settings)
    flags = [text for k, v in settings.items() for text in (f"--{k}", str(v[0] if isinstance(v, list) else v))]
    data, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "lines.jsonl"
    ended = renyi("evaluate", folder, data, "--task", name, *flags, "--json", "--output", output)
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(json.dumps(found.result)) == json.loads(ended.out)
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert json.loads(json.dumps(found.lines)) == lines
    page = found.write(tmp_path / "report")
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text(encoding="utf-8")) == json.loads(ended.out)
    assert found.report.title in page.read_text(encoding="utf-8")


def test_rows_and_models_in_every_form(folder: Path, tmp_path: Path) -> None:
    rows, settings = TASKS["perplexity"]
    data = write_rows(tmp_path / "rows.jsonl", rows)

    class Loaded(NamedTuple):
        folder: Path | None
        ensemble: LoraEnsemble
        tokenizer: Any

    loaded = Loaded(folder, LoraEnsemble.load(folder), tiny_tokenizer())
    expected = evaluate("perplexity", rows, folder, **settings).result
    for given in (Dataset.from_list(rows), str(data), data):
        assert evaluate("perplexity", given, loaded, **settings).result == expected
    twice = evaluate("perplexity", [data, data], str(folder), **settings).result
    assert (twice["examples"], [g["group"] for g in twice["groups"]]) == (8, ["rows"])
    without = evaluate("perplexity", rows, loaded._replace(folder=None), **settings)
    assert without.result == expected


def test_settings_are_checked(folder: Path) -> None:
    rows, _ = TASKS["preference"]
    with pytest.raises(ConfigError, match=r"task: 'preferences' is none of.*\n.*Did you mean preference\?"):
        evaluate("preferences", rows, folder)
    with pytest.raises(ConfigError, match=r"grup: task preference has no such setting\n.*nearest known one is group"):
        evaluate("preference", rows, folder, grup="x")
    with pytest.raises(ConfigError, match="beta: is -1"):
        evaluate("preference", rows, folder, beta=-1.0)
    with pytest.raises(ConfigError, match="reference: 'start' is none of kept, base"):
        evaluate("preference", rows, folder, reference="start")
    with pytest.raises(ConfigError, match="group: there is no column 'x'"):
        evaluate("preference", rows, folder, group="x")
    with pytest.raises(ConfigError, match="rows: are no rows"):
        evaluate("preference", [], folder)
    with pytest.raises(DataError, match="rows, row 1, column rejected"):
        evaluate("preference", [{"prompt": "w1", "chosen": " w1", "rejected": " w1"}], folder)
    assert find_task("choice").Settings() == find_task("choice").Settings()


def test_a_folder_of_another_kind_is_named(folder: Path, rewards: Path) -> None:
    pairs, thumbs = TASKS["reward"][0], TASKS["thumbs"][0]
    with pytest.raises(EnsembleFormatError, match=r"holds no reward models\n.*renyi reward"):
        evaluate("reward", pairs, folder)
    with pytest.raises(EnsembleFormatError, match=r"was not trained on thumbs.*\n.*renyi kto"):
        evaluate("thumbs", thumbs, rewards)
    with pytest.raises(ConfigError, match=r"is a reward model.*\n.*--task reward"):
        evaluate("preference", pairs, rewards)


def test_rows_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    def load(name: str) -> Any:
        raise AssertionError("a model is loaded")

    for name in ("choice", "refusal", "sampling", "thumbs"):
        with pytest.raises((ConfigError, DataError)):
            evaluate(name, [{"nothing": "w1"}], Models(tmp_path, load))


# ---- Tables ----------------------------------------------------------------------------------------------------------


def test_bold_is_the_best_of_its_column() -> None:
    columns = ["", Column("up", ".1f", "high"), Column("down", ".1f", "low"), Column("neither", ".1f")]
    rows = [["a", 1.0, Estimate(2, 1, 3), 9.0], ["b", 3.0, Estimate(1, 0, 9), 8.0], ["c", 3.0, None, 7.0]]
    assert best_cells(Table("", columns, rows)) == {(1, 1), (2, 1), (1, 2)}
    assert best_cells(Table("", columns, rows[:1])) == set()  # one of one is no best


@pytest.mark.parametrize(
    ("cell", "plain", "brackets"),
    [
        (Estimate(0.5, 0.4, 0.62), "0.50 ±0.11", "0.50 [0.40, 0.62]"),
        (Estimate(0.5, float("nan"), float("nan")), "0.50 ±–", "0.50 [–]"),
        (Estimate(0.5, 0.5, 0.5), "0.50 ±–", "0.50 [–]"),
        (Estimate(float("nan"), float("nan"), float("nan")), "–", "–"),
        (float(torch.nan), "–", "–"),
        (None, "–", "–"),
        ("x", "x", "x"),
        (0.25, "0.25", "0.25"),
    ],
)
def test_cells(cell: Any, plain: str, brackets: str) -> None:
    column = Column("figure", ".2f")
    assert (cell_text(cell, column), cell_text(cell, column, brackets=True)) == (plain, brackets)
