"""What Python starts leaves what the command line leaves: a run, a bare trainer, `alpha: auto`, a sweep."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, contradicting_rows, flags_of, renyi, settings_of, weights_in, write_rows
from datasets import Dataset

from renyi import RenyiSFTConfig, RenyiSFTTrainer, runs
from renyi.data.prepare import Preparation
from renyi.errors import ConfigError
from renyi.runs.build import build
from renyi.runs.learned import LEARNED_FILE
from renyi.runs.record import RUN_FILE
from renyi.runs.settings import METHODS

HELD_OUT = {"test_split_size": 0.25, "eval_strategy": "steps", "eval_steps": 3}


def files_in(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}


def metrics_in(folder: Path) -> list[dict[str, float]]:
    """Without what a clock says."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if "runtime" not in k and "second" not in k} for line in lines]


def test_a_run(trained: tuple[Path, Ended], base: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = runs.Settings.of("sft", **settings_of(base, rows_file), **HELD_OUT, output_dir=tmp_path / "out")
    before = dict(settings.values)
    run = runs.run(settings)
    assert settings.values == before
    folder = tmp_path / "out"
    assert files_in(folder) == files_in(trained[0])
    assert metrics_in(folder) == metrics_in(trained[0])
    assert all(value.equal(weights_in(trained[0])[name]) for name, value in weights_in(folder).items())
    assert run.ensemble.num_members == 2
    kept = [json.loads((place / RUN_FILE).read_text(encoding="utf-8")) for place in (folder, trained[0])]
    assert kept[0] == kept[1]
    ours, theirs = ((place / LEARNED_FILE).read_text(encoding="utf-8").splitlines() for place in (folder, trained[0]))
    assert ours == theirs
    said = trained[1].out.splitlines()
    start = said.index(ours[0])
    assert [line.split() for line in said[start : start + len(ours) - 1]] == [line.split() for line in ours[:-1]]


def test_a_bare_trainer(trained: tuple[Path, Ended], base: Path, rows_file: Path, tmp_path: Path) -> None:
    """Its folder has the files of a run, but for what a run keeps of its settings, and what members say at its end."""
    keys = settings_of(base, rows_file)
    of_members = {"lora_r", "lora_dropout", "model_name_or_path", "dataset_name"}
    args = RenyiSFTConfig(**{k: v for k, v in keys.items() if k not in of_members}, output_dir=str(tmp_path / "out"))
    trainer = RenyiSFTTrainer(str(base), args, Dataset.from_list(contradicting_rows(48)))
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "out"
    assert files_in(folder) == files_in(trained[0]) - {RUN_FILE, LEARNED_FILE}
    assert [row["step"] for row in metrics_in(folder) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---\n")
    assert Preparation.read(folder) == Preparation.read(trained[0])


@pytest.mark.parametrize("seed", [0, 1])
def test_whole_groups_are_held_out(base: Path, tmp_path: Path, seed: int) -> None:
    """At most the share that was asked for; the smallest group if all are larger."""
    rows = [{**row, "author": f"a{min(i // 6, 4)}"} for i, row in enumerate(contradicting_rows(48))]
    keys = {**settings_of(base, write_rows(tmp_path / "rows.jsonl", rows)), "routing_group": "author", "seed": seed}
    for share, held_out in ((0.3, {12}), (0.2, {6}), (0.05, {6})):
        run = build(runs.Settings.of("sft", **keys, test_split_size=share, output_dir=tmp_path / "out"))
        train, held = run.train_rows["author"], run.eval_rows["author"]  # type: ignore[index]
        assert not set(train) & set(held)
        assert sorted([*train, *held]) == sorted(row["author"] for row in rows)
        assert len(held) in held_out, share
    one = write_rows(tmp_path / "one.jsonl", [{**row, "author": "a"} for row in rows])
    keys |= {"dataset_name": str(one), "test_split_size": 0.3, "output_dir": tmp_path / "out"}
    with pytest.raises(ConfigError, match="are of one group"):
        build(runs.Settings.of("sft", **keys))


def test_auto(base: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", contradicting_rows(96))
    keys = {**settings_of(base, data), "alpha": "auto", "max_steps": 10}
    chosen: list[Any] = []

    class Watch(runs.Watch):
        def chosen(self, found: Any, settings: runs.Settings) -> None:
            chosen.append(found)

    runs.run(runs.Settings.of("sft", **keys, output_dir=tmp_path / "python"), Watch())
    flags = flags_of({**keys, "output_dir": tmp_path / "command"})
    assert renyi("sft", *flags).code == 0
    ours, theirs = tmp_path / "python", tmp_path / "command"
    assert files_in(ours) == files_in(theirs)
    kept = [json.loads((place / "auto" / "chosen.json").read_text(encoding="utf-8")) for place in (ours, theirs)]
    assert kept[0] == kept[1] == chosen[0]._asdict()
    assert all(value.equal(weights_in(theirs)[name]) for name, value in weights_in(ours).items())

    with pytest.raises(ConfigError, match=r"learning_rate 0.01, and this one has 0.5"):
        runs.run(runs.Settings.of("sft", **{**keys, "learning_rate": 0.5}, output_dir=ours))
    with pytest.raises(ConfigError, match=r"max_steps 10, and this one has 20"):
        runs.run(runs.Settings.of("sft", **{**keys, "max_steps": 20}, output_dir=ours))


def test_a_sweep(base: Path, rows_file: Path, tmp_path: Path) -> None:
    keys = {k: v for k, v in settings_of(base, rows_file).items() if k != "num_members"} | HELD_OUT
    grid = {"alphas": [0.5], "members": [1, 2]}
    swept = runs.sweep(runs.SweepSettings.of("sft", **keys, **grid, output_dir=tmp_path / "python"))
    flags = flags_of({**keys, "output_dir": tmp_path / "command"})
    ended = renyi("sweep", *flags, "--alphas", 0.5, "--members", 1, 2, "--json")
    assert ended.code == 0, ended
    theirs = json.loads(ended.out)
    for result in (theirs, swept.result):
        result["figure"] = Path(result["figure"]).name
        for cell in result["cells"]:
            cell["seconds"] = cell["seconds"] is not None
    assert swept.result == theirs
    assert files_in(tmp_path / "python") == files_in(tmp_path / "command")


def test_settings_are_filled_anew_and_never_changed(base: Path, rows_file: Path, tmp_path: Path) -> None:
    settings = runs.Settings.of("dpo", model_name_or_path=base, dataset_name=rows_file, output_dir=tmp_path)
    one, other = settings.parts(), settings.parts()
    one.args.learning_rate = 1.0
    assert other.args.learning_rate == METHODS["dpo"].config.learning_rate
    with pytest.raises(TypeError):
        settings.values["beta"] = 0.5  # type: ignore[index]
    changed = settings.replaced(beta="0.5", output_dir=...)
    assert (changed.values["beta"], "output_dir" in changed.values, "beta" in settings.values) == (0.5, False, False)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"num_mebers": 3}, "num_mebers: there is no such key\nThe nearest known one is num_members"),
        ({"num_members": "three"}, "num_members: 'three' is not an integer"),
        ({"alpha": 2.0}, "alpha: 2.0 is not allowed"),
    ],
)
def test_python_hears_what_the_command_line_says(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        runs.Settings.of("sft", **keys)
    with pytest.raises(ConfigError, match=r"'stf' is none of sft, dpo, kto, reward, powerflow"):
        runs.Settings.of("stf")
