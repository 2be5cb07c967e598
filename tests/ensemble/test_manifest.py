"""`ensemble.json` and its folder, without models: what is read, what is refused and where, what a save moves."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from renyi.ensemble import storage
from renyi.ensemble.storage import Manifest, is_adapter, read_ensemble, read_manifest, resolve_folder, write_folder
from renyi.errors import EnsembleFormatError, SaveError
from renyi.layout import FORMAT_VERSION

MANIFEST = {"base_model": "somebody/base", "members": ["one", "two"], "weights": [0.25, 0.75], "alpha": 0.8}


def folder_with(path: Path, **fields: object) -> Path:
    """A folder that holds an `ensemble.json` and an empty folder for each of the two members."""
    for name in MANIFEST["members"]:
        (path / name).mkdir(parents=True, exist_ok=True)
    (path / "ensemble.json").write_text(json.dumps(MANIFEST | fields), encoding="utf-8")
    return path


def an_adapter(folder: Path, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | fields), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


# Reading


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    assert read_manifest(folder_with(tmp_path)) == Manifest("somebody/base", ["one", "two"], [0.25, 0.75], 0.8)
    given = {"routing_quantity": "length_normalised", "member_kind": "gaussian", "renyi_version": "0.1"}
    read = read_manifest(folder_with(tmp_path, format_version=FORMAT_VERSION, **given))
    assert asdict(read).items() >= (given | {"format_version": FORMAT_VERSION}).items()


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"members": [["one"], "two"]}, "a name is not text"),
        ({"members": {"one": 1, "two": 2}}, "a name is not text"),
        ({"base_model": None}, "a name is not text"),
        ({"routing_quantity": 1}, "a name is not text"),
        ({"member_kind": 1}, "a name is not text"),
        ({"members": ["one", ""]}, "the member name '' leads out of the folder"),
        ({"members": ["one", "a/b"]}, "the member name 'a/b' leads out of the folder"),
        ({"members": ["one", "a\\b"]}, "leads out of the folder"),
        ({"members": ["one", "a\0b"]}, "leads out of the folder"),
        ({"members": ["one", "one"]}, "a member is named twice"),
        ({"base_model": "-x"}, "base_model is '-x', which a command would read as an option"),
        ({"weights": [1.0]}, "members and weights do not match, or the weights do not sum to one"),
        ({"members": [], "weights": []}, "members and weights do not match"),
        ({"weights": [0.25, 0.761]}, "the weights do not sum to one"),
        ({"weights": [0.25, 0.739]}, "the weights do not sum to one"),
        ({"weights": [1.25, -0.25]}, "the weights do not sum to one"),
        ({"num_draws": "1"}, "num_draws is 1, which does not divide the number of members"),
        ({"num_draws": 0}, "num_draws is 0, which does not divide the number of members"),
        ({"num_draws": -1}, "num_draws is -1, which does not divide the number of members"),
        ({"num_draws": 3}, "num_draws is 3, which does not divide the number of members"),
        ({"divergence": 3.0}, "divergence is not a list of numbers"),
        ({"divergence": [1.0, "2"]}, "divergence is not a list of numbers"),
        ({"divergence": [1.0]}, "divergence has 1 numbers for 2 members"),
        ({"alpha": -0.01}, "alpha is -0.01, not between 0 and 1"),
        ({"alpha": 1.01}, "alpha is 1.01, not between 0 and 1"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, fields, what):
    with pytest.raises(EnsembleFormatError) as caught:
        read_manifest(folder_with(tmp_path, **fields))
    assert str(caught.value).startswith(f"{tmp_path / 'ensemble.json'}: cannot be read (")
    assert what in str(caught.value)
    assert caught.value.where == str(tmp_path / "ensemble.json")
    assert caught.value.hint.startswith("Restore it from a checkpoint folder")


@pytest.mark.parametrize(
    "fields",
    [
        {"alpha": 0},
        {"alpha": 1},
        {"weights": [0.0, 1.0]},
        {"num_draws": 2},
        {"divergence": [0, 2.5]},
        {"format_version": 0},
    ],
)
def test_the_ends_of_each_range_are_allowed(tmp_path, fields):
    read = read_manifest(folder_with(tmp_path, **fields))
    assert all(getattr(read, name) == value for name, value in fields.items())


@pytest.mark.parametrize("name", ["X", "...", "two.", "a b", "ä"])
def test_a_member_may_have_any_name_that_stays_in_the_folder(tmp_path, name):
    (folder_with(tmp_path, members=["one", name]) / name).mkdir()
    assert read_manifest(tmp_path).members == ["one", name]


def test_weights_are_normalised_only_if_they_were_rounded(tmp_path):
    weights = [0.3 + 4e-6, 0.7]
    assert read_manifest(folder_with(tmp_path, weights=weights)).weights == weights
    read = read_manifest(folder_with(tmp_path, weights=[0.25, 0.754]))
    assert read.weights == pytest.approx([0.25 / 1.004, 0.754 / 1.004], rel=1e-12)


def test_a_newer_format_is_named_before_its_fields_are_looked_at(tmp_path):
    with pytest.raises(EnsembleFormatError) as caught:
        read_manifest(folder_with(tmp_path, format_version=FORMAT_VERSION + 1, members=7))
    assert "is newer than this renyi reads" in str(caught.value)
    assert caught.value.where == str(tmp_path / "ensemble.json")
    assert caught.value.hint == "Upgrade renyi."


def test_a_missing_or_linked_member_is_named(tmp_path):
    (folder_with(tmp_path) / "two").rmdir()
    with pytest.raises(EnsembleFormatError) as caught:
        read_manifest(tmp_path)
    assert "names two, but there is no such folder beside it" in str(caught.value)
    assert "drop_member" in caught.value.hint
    (tmp_path / "two").symlink_to(tmp_path / "one")
    with pytest.raises(EnsembleFormatError) as linked:
        read_manifest(tmp_path)
    assert "names two, which is a link" in str(linked.value)
    assert linked.value.hint == "Put a copy of the folder in its place."
    for error in (caught.value, linked.value):
        assert error.where == str(tmp_path / "ensemble.json")


def test_a_folder_without_a_manifest_says_what_it_is(tmp_path):
    with pytest.raises(EnsembleFormatError) as caught:
        read_manifest(tmp_path)
    assert "there is no ensemble.json" in str(caught.value)
    assert caught.value.where == str(tmp_path)
    assert "run the training command again" in caught.value.hint
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM", "Other"]}))
    with pytest.raises(EnsembleFormatError) as caught:
        read_manifest(tmp_path)
    assert "is a whole model (LlamaForCausalLM, Other), not an ensemble of adapters" in str(caught.value)
    assert caught.value.where == str(tmp_path)
    assert (
        caught.value.hint
        == f"Train an ensemble on it: renyi sft --model_name_or_path {tmp_path} --dataset_name DATA --output_dir OUT"
    )


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"architectures": null}'])
def test_another_config_is_no_whole_model(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(EnsembleFormatError, match=r"there is no ensemble\.json"):
        read_manifest(tmp_path)


# One adapter


def test_an_adapter_is_a_folder_with_a_config_and_no_manifest(tmp_path):
    assert not is_adapter(tmp_path)
    an_adapter(tmp_path)
    assert is_adapter(tmp_path)
    folder_with(tmp_path)
    assert not is_adapter(tmp_path)
    assert read_ensemble(tmp_path) == read_manifest(tmp_path)


def test_an_adapter_is_an_ensemble_of_one(tmp_path):
    named = an_adapter(tmp_path / "named", base_model_name_or_path="somebody/base")
    assert read_ensemble(named) == Manifest("somebody/base", ["."], [1.0], 1.0)
    assert read_ensemble(named, "another") == Manifest("somebody/base", ["."], [1.0], 1.0)
    assert read_ensemble(an_adapter(tmp_path / "nameless"), "another") == Manifest("another", ["."], [1.0], 1.0)


@pytest.mark.parametrize("name", [None, "", 7])
def test_an_adapter_without_a_base_is_refused(tmp_path, name):
    with pytest.raises(EnsembleFormatError, match="names no base model") as caught:
        read_ensemble(an_adapter(tmp_path, base_model_name_or_path=name))
    assert caught.value.where == str(tmp_path / "adapter_config.json")
    assert "base_model_name_or_path" in caught.value.hint


@pytest.mark.parametrize("text", ["{", "[]", "7"])
def test_a_damaged_adapter_config_is_refused(tmp_path, text):
    an_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(EnsembleFormatError, match="cannot be read") as caught:
        read_ensemble(tmp_path, "somebody/base")
    assert caught.value.where == str(tmp_path / "adapter_config.json")
    assert caught.value.hint == "Copy it again."


# Folders and hub ids


def test_a_folder_is_itself_and_a_hub_id_is_fetched(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "cache"))
    assert resolve_folder(str(tmp_path)) == tmp_path
    assert asked == []
    assert resolve_folder(Path("somebody/ensemble")) == tmp_path / "cache"
    assert asked == ["somebody/ensemble"]


@pytest.mark.parametrize(
    "error", [OSError("offline"), HFValidationError("no id"), LocalEntryNotFoundError("not in the cache")]
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(monkeypatch, error):
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(storage, "snapshot_download", fails)
    with pytest.raises(EnsembleFormatError, match="there is no such folder") as caught:
        resolve_folder(Path("nowhere"))
    assert caught.value.where == "nowhere"
    assert "hub id" in caught.value.hint
    assert caught.value.__cause__ is error


# Writing


def written(folder: Path, *members: str, text: str = "new") -> Manifest:
    """Save an ensemble whose members hold a text."""
    manifest = Manifest("somebody/base", list(members), [1 / len(members)] * len(members), 0.5)

    def write_member(member: int, target: Path) -> None:
        assert target.name == members[member]
        an_adapter(target)
        (target / "README.md").write_text(f"{text} {member}")

    write_folder(folder, manifest, write_member)
    return manifest


def test_a_new_folder_is_made_with_those_above_it(tmp_path):
    folder = tmp_path / "runs" / "ensemble"
    manifest = written(folder, "one", "two")
    assert read_manifest(folder) == manifest
    text = (folder / "ensemble.json").read_text(encoding="utf-8")
    assert text == json.dumps(asdict(manifest), indent=2) + "\n"
    assert sorted(p.name for p in folder.iterdir()) == ["ensemble.json", "one", "two"]
    assert [(folder / name / "README.md").read_text() for name in ("one", "two")] == ["new 0", "new 1"]


def test_a_save_replaces_members_and_removes_those_that_are_gone(tmp_path):
    written(tmp_path, "one", "two", text="old")
    (tmp_path / ".partial" / "left").mkdir(parents=True)  # of a save that was killed
    written(tmp_path, "two", "three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ensemble.json", "three", "two"]
    assert (tmp_path / "two" / "README.md").read_text() == "new 0"


def test_members_without_a_manifest_are_replaced(tmp_path):
    """A save was interrupted after it had removed `ensemble.json`."""
    written(tmp_path, "one", "two", text="old")
    (tmp_path / "one" / "distribution.safetensors").touch()  # "one" has all the files that a member can have
    (tmp_path / "ensemble.json").unlink()
    written(tmp_path, "one")
    assert (tmp_path / "one" / "README.md").read_text() == "new 0"
    assert (tmp_path / "two" / "README.md").read_text() == "old 1"  # nothing says that it was a member


@pytest.mark.parametrize("there", ["a file", "a link", "a dangling link", "other files", "a config and other files"])
def test_what_is_no_member_is_not_replaced(tmp_path, there):
    written(tmp_path, "one", text="old")
    two = tmp_path / "two"
    if there == "a file":
        two.write_text("mine")
    elif there.endswith("link"):
        two.symlink_to(tmp_path / ("one" if there == "a link" else "nowhere"))
    else:
        two.mkdir()
        (two / "notes.txt").write_text("mine")
    if there.startswith("a config"):
        an_adapter(two)
    with pytest.raises(SaveError, match="two exists already and is not a member of an ensemble") as caught:
        written(tmp_path, "one", "two")
    assert caught.value.where == str(tmp_path)
    assert caught.value.hint == "Move it away."
    assert (tmp_path / "one" / "README.md").read_text() == "old 0"
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_member_that_cannot_be_written_leaves_the_folder_as_it_was(tmp_path, error):
    manifest = written(tmp_path, "one", text="old")

    def full(member: int, target: Path) -> None:
        raise error

    with pytest.raises(SaveError, match=r"could not be written .*No space left on device") as caught:
        write_folder(tmp_path, manifest, full)
    assert caught.value.where == str(tmp_path)
    assert caught.value.hint == "Free some space and run the command again."
    assert caught.value.__cause__ is error
    assert (tmp_path / "one" / "README.md").read_text() == "old 0"
    assert not (tmp_path / ".partial").exists()


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="could not be written") as caught:
        written(tmp_path / "file", "one")
    assert caught.value.where == str(tmp_path / "file")


def test_a_file_in_the_place_of_the_staging_folder_is_an_error_of_ours(tmp_path):
    (tmp_path / ".partial").write_text("mine")
    with pytest.raises(SaveError, match="could not be written") as caught:
        written(tmp_path, "one")
    assert caught.value.where == str(tmp_path)
    assert (tmp_path / ".partial").read_text() == "mine"


def test_members_that_cannot_be_moved_are_still_complete_beside(tmp_path, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError("busy")

    monkeypatch.setattr(storage.os, "replace", fails)
    with pytest.raises(SaveError, match=r"the members could not be moved into place \(busy\)") as caught:
        written(tmp_path, "one", "two")
    assert caught.value.where == str(tmp_path)
    assert str(tmp_path / ".partial") in caught.value.hint
    assert "ensemble.json last" in caught.value.hint
    assert sorted(p.name for p in (tmp_path / ".partial").iterdir()) == ["ensemble.json", "one", "two"]
