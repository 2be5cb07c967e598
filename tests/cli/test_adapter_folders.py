"""The folder of one PEFT adapter is taken for an ensemble of one wherever an ensemble's folder is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Settings, assert_refused, renyi, write_rows
from peft import get_peft_model
from tiny import lora, member_distance
from transformers import AutoModelForCausalLM

from renyi import LoraEnsemble
from renyi.ensemble import read_preference

OWN_SHAPE = {"num_members": ..., "lora_r": ..., "lora_dropout": ...}


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT leaves it: no tokenizer, no `ensemble.json`."""
    folder = tmp_path_factory.mktemp("adapters") / "alice"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, lora(init_lora_weights=False, lora_dropout=0.1)).save_pretrained(folder)
    return folder


def test_info_of_an_adapter_is_that_of_an_ensemble_of_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    LoraEnsemble.load(adapter).save(tmp_path / "one")
    ended, expected = (renyi("info", folder, "--json") for folder in (adapter, tmp_path / "one"))
    assert ended.code == 0, ended
    told, of_ensemble = json.loads(ended.out), json.loads(expected.out)
    for key in ("base_model", "num_members", "weights", "lora_r", "lora_alpha", "layers", "update_norm"):
        assert told[key] == of_ensemble[key], key
    assert told["num_members"] == 1
    assert told["base_model"] == str(base)


def test_export_of_an_adapter_is_that_of_an_ensemble_of_one(adapter: Path, base: Path, tmp_path: Path) -> None:
    ended = renyi("export", adapter, "--format", "merged", "--output", tmp_path / "merged")
    assert ended.code == 0, ended
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "alice")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = LoraEnsemble.load(adapter).logits(ids)[0]
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    ended = renyi("export", adapter, "--format", "adapters", "--output", tmp_path / "adapters")
    assert ended.code == 0, ended
    assert LoraEnsemble.load(tmp_path / "adapters" / "alice").num_members == 1


def test_training_goes_on_from_an_adapter(adapter: Path, settings: Settings, tmp_path: Path) -> None:
    """With learning rate 0 the member that comes out is the adapter; its shape is the adapter's, not the defaults'."""
    ended = renyi("sft", "--config", settings(model_name_or_path=adapter, **OWN_SHAPE, learning_rate=0.0))
    assert ended.code == 0, ended
    assert f"going on from {adapter}" in " ".join(ended.out.split()), ended.out
    started, trained = LoraEnsemble.load(adapter), LoraEnsemble.load(tmp_path / "out")
    assert trained.num_members == 1
    assert member_distance(trained, started) == 0
    assert trained.peft_config.lora_alpha == started.peft_config.lora_alpha
    refused = renyi("sft", "--config", settings(model_name_or_path=adapter, **{**OWN_SHAPE, "num_members": 3}))
    assert_refused(refused, "num_members", "3 was given, and the ensemble to start from has 1")


def test_preferences_are_measured_against_the_adapter_that_training_began_with(
    adapter: Path, settings: Settings, tmp_path: Path
) -> None:
    rows = [{"prompt": f"w{i}", "chosen": f" w{i + 1}", "rejected": f" w{i + 2}"} for i in range(8)]
    given = {**OWN_SHAPE, "dataset_name": write_rows(tmp_path / "pairs.jsonl", rows), "max_steps": 2}
    ended = renyi("dpo", "--config", settings(model_name_or_path=adapter, **given))
    assert ended.code == 0, ended
    trained = LoraEnsemble.load(tmp_path / "out")
    kept, start = read_preference(tmp_path / "out", trained).reference.start, LoraEnsemble.load(adapter).snapshot()
    assert kept is not None
    for ours, theirs in zip(kept.layers, start.layers, strict=True):
        assert all(map(torch.equal, ours, theirs))
    assert member_distance(trained, LoraEnsemble.load(adapter)) > 0


def test_an_adapter_that_names_no_base_is_refused(adapter: Path, settings: Settings, tmp_path: Path) -> None:
    nameless = tmp_path / "nameless"
    shutil.copytree(adapter, nameless)
    file = nameless / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    for argv in (
        ("sft", "--config", settings(model_name_or_path=nameless, **OWN_SHAPE)),
        ("export", nameless, "--format", "vllm"),
        ("info", nameless),
    ):
        assert_refused(renyi(*argv), "adapter_config.json: names no base model", "base_model_name_or_path")


def test_saving_an_ensemble_beside_an_adapter_leaves_the_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "both")
    LoraEnsemble.load(adapter).save(tmp_path / "both")
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()


def test_evaluation_of_an_adapter_is_that_of_an_ensemble_of_one(adapter: Path, rows_file: Path, tmp_path: Path) -> None:
    LoraEnsemble.load(adapter).save(tmp_path / "one")
    ended, expected = (
        renyi("evaluate", folder, rows_file, "--task", "perplexity", "--resamples", "20", "--json")
        for folder in (adapter, tmp_path / "one")
    )
    assert (ended.code, expected.code) == (0, 0), ended
    told, of_ensemble = json.loads(ended.out), json.loads(expected.out)
    named = {key for key in told if told[key] != of_ensemble[key]}
    assert named <= {"ensemble", "folder"}, named
