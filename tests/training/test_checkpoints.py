"""Only what was written to the end is resumed from."""

import json
from pathlib import Path

import pytest

from renyi.training.checkpoints import SEAL_FILE, find_checkpoints, is_complete, seal


def checkpoint(output_dir: Path, step: int, sealed: bool = True) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "member_0").mkdir(parents=True)
    (folder / "ensemble.json").write_text("{}")
    (folder / "member_0" / "adapter_model.safetensors").write_bytes(b"x" * step)
    if sealed:
        seal(folder)
    return folder


def test_a_sealed_checkpoint_is_complete(tmp_path):
    folder = checkpoint(tmp_path, 5)
    assert is_complete(folder)
    assert json.loads((folder / SEAL_FILE).read_text()) == {
        "ensemble.json": 2,
        "member_0/adapter_model.safetensors": 5,
    }
    assert not list(folder.glob("*.partial"))


def unseal(folder: Path) -> None:
    (folder / SEAL_FILE).unlink()


def cut_the_seal(folder: Path) -> None:
    (folder / SEAL_FILE).write_text((folder / SEAL_FILE).read_text()[:9])


def cut_a_file(folder: Path) -> None:
    (folder / "member_0" / "adapter_model.safetensors").write_bytes(b"x")


def lose_a_file(folder: Path) -> None:
    (folder / "ensemble.json").unlink()


def garble_the_seal(folder: Path) -> None:
    (folder / SEAL_FILE).write_text("[1, 2]")


DAMAGES = [unseal, cut_the_seal, cut_a_file, lose_a_file, garble_the_seal]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_not(tmp_path, damage):
    folder = checkpoint(tmp_path, 5)
    damage(folder)
    assert not is_complete(folder)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_complete_one_is_found_behind_a_damaged_one(tmp_path, damage):
    folders = {step: checkpoint(tmp_path, step) for step in (2, 9, 10)}  # 10 comes after 9 as a number only
    assert find_checkpoints(tmp_path) == (folders[10], [])
    damage(folders[10])
    assert find_checkpoints(tmp_path) == (folders[9], [folders[10]])


def test_later_files_do_not_break_a_seal(tmp_path):
    """A tracker or a user may leave notes beside it."""
    folder = checkpoint(tmp_path, 5)
    (folder / "notes.txt").write_text("mine")
    assert is_complete(folder)


def test_an_output_folder_without_checkpoints(tmp_path):
    assert find_checkpoints(tmp_path) == (None, [])
    assert find_checkpoints(tmp_path / "nowhere") == (None, [])
    half = checkpoint(tmp_path, 3, sealed=False)
    assert find_checkpoints(tmp_path) == (None, [half])


def test_names_that_are_not_checkpoints_are_ignored(tmp_path):
    folder = checkpoint(tmp_path, 4)
    for name in ("checkpoint-best", "checkpoint-old-7", "my-checkpoint-9", "checkpoint-"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-8").write_text("a file")
    assert find_checkpoints(tmp_path) == (folder, [])
