"""A disk that is full at any file of a checkpoint: one error, no half checkpoint, and the earlier one is untouched."""

import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from float64 import SAME
from safetensors import SafetensorError
from tiny import dpo_trainer_of, member_distance, powerflow_trainer_of, tiny_ensemble, tiny_model, trainer_of

from renyi import LoraEnsemble
from renyi.errors import SaveError
from renyi.training.checkpoints import find_checkpoints

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which never has any space")

SETTINGS = {"num_members": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
MEMBERS = [f"member_{m}/adapter_{name}" for m in (0, 1) for name in ("config.json", "model.safetensors")]
OF_ANY = [
    *MEMBERS,
    "ensemble.json",
    "chat_template.jinja",
    "complete.json",
    "logging_state.json",
    "optimizer.pt",
    "preparation.json",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
]
OF_METHOD = {
    "sft": [],
    "dpo": ["preference.json", "reference/ensemble.json", *(f"reference/{name}" for name in MEMBERS)],
    "powerflow": ["rollouts_0.pt", "partition.safetensors"],
}


def trainer(method: str, output_dir: Path) -> Any:
    match method:
        case "sft":
            return trainer_of(output_dir, **SETTINGS)
        case "dpo":
            return dpo_trainer_of(output_dir, model=tiny_ensemble(2), **SETTINGS)
        case _:
            return powerflow_trainer_of(output_dir, partition="learned", **SETTINGS)


def fill_the_disk_at(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `file` of the second checkpoint be one that takes no byte, from when its folder is made."""
    *parents, name = Path(file).parts
    if name.endswith(".safetensors"):  # which is not opened, but replaced
        serialise = safetensors.torch.serialize_file

        def write(data: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            written = "/".join(part for part in Path(path).parts if part != ".partial")
            if written.endswith(f"checkpoint-4/{file}"):
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            serialise(data, path, *args, **kwargs)

        monkeypatch.setattr(safetensors.torch, "serialize_file", write)
        return
    if name == "ensemble.json":  # written beside its place, and then moved there
        parents.append(".partial")
    if name == "complete.json":
        name = f".{name}.{os.getpid()}.partial"
    plain = os.mkdir

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        plain(path, *args, **kwargs)
        made = [part for part in Path(path).parts if part != ".partial" or parents[-1:] == [".partial"]]
        if made[-len(parents) - 1 :] == ["checkpoint-4", *parents]:
            (Path(path) / name).symlink_to("/dev/full")

    monkeypatch.setattr(os, "mkdir", mkdir)


@pytest.mark.parametrize("method", list(OF_METHOD))
def test_a_full_disk_at_any_file_leaves_the_previous_checkpoint(tmp_path, method):
    run, files = trainer(method, tmp_path), [*OF_ANY, *OF_METHOD[method]]
    for file in files if method == "sft" else OF_METHOD[method]:
        with pytest.MonkeyPatch.context() as patch:
            fill_the_disk_at(file, patch)
            with pytest.raises(SaveError) as caught:
                run.train(resume_from_checkpoint=True)
        assert run.state.global_step == 4, file
        assert caught.value.where == str(tmp_path / "checkpoint-4"), file
        assert f"{tmp_path / 'checkpoint-2'} is untouched" in str(caught.value), file
        assert not (tmp_path / "checkpoint-4").exists(), file
        assert find_checkpoints(tmp_path) == (tmp_path / "checkpoint-2", []), file
    run.train(resume_from_checkpoint=True)
    written = {str(f.relative_to(tmp_path / "checkpoint-4")) for f in (tmp_path / "checkpoint-4").rglob("*")}
    assert {f for f in written if "." in f} == set(files)  # these are all


@pytest.mark.parametrize(
    ("method", "file"), [pytest.param("sft", "optimizer.pt", marks=pytest.mark.slow), ("dpo", "preference.json")]
)
def test_a_run_whose_disk_was_full_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch, float64, method, file):
    fill_the_disk_at(file, monkeypatch)
    with pytest.raises(SaveError):
        trainer(method, tmp_path / "full").train()
    monkeypatch.undo()
    again, uninterrupted = trainer(method, tmp_path / "full"), trainer(method, tmp_path / "other")
    again.train(resume_from_checkpoint=True)
    uninterrupted.train()
    assert member_distance(again.model, uninterrupted.model) <= SAME


OF_RESULT = ["tokenizer_config.json", "training_args.bin", "preparation.json", "README.md", "training.png"]


@pytest.mark.parametrize("file", ["ensemble.json", *OF_RESULT])
def test_a_full_disk_at_the_result_leaves_the_checkpoints(tmp_path, file):
    run = trainer("sft", tmp_path)
    run.train()
    (tmp_path / file).unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if file in OF_RESULT:
            (tmp_path / file).symlink_to("/dev/full")
        else:
            plain = Path.write_text

            def full(path: Path, *args: Any, **kwargs: Any) -> int:
                if path.name == "ensemble.json":
                    raise OSError(28, "No space left on device")
                return plain(path, *args, **kwargs)

            patch.setattr(Path, "write_text", full)
        with pytest.raises(SaveError) as caught:
            run.save_model(str(tmp_path))
    assert caught.value.where in (str(tmp_path), str(tmp_path / file))
    assert "Free some space" in str(caught.value)
    assert find_checkpoints(tmp_path) == (tmp_path / "checkpoint-4", [])
    if file in OF_RESULT[:-1]:
        assert f"{tmp_path / 'checkpoint-4'} is untouched" in str(caught.value)
    if file in OF_RESULT:
        (tmp_path / file).unlink()
    again = trainer("sft", tmp_path)
    again.train(resume_from_checkpoint=True)
    again.save_model(str(tmp_path))
    assert member_distance(LoraEnsemble.load(tmp_path, base=tiny_model()), again.model) == 0
