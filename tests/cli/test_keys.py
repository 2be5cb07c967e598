"""What a message about a setting says: which key, and what to write instead."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import Settings, assert_refused, renyi

from renyi.keys import RENAMED, explained
from renyi.runs.settings import METHODS


def known(method: str) -> set[str]:
    return {f.name for cls in METHODS[method].dataclasses for f in dataclasses.fields(cls) if f.init}


@pytest.mark.parametrize(
    ("command", "key", "instead"),
    [
        ("sft", "warmup_ratio", "Write warmup_steps: a number below 1 is a share"),
        ("sft", "torch_dtype", "Write dtype."),
        ("sft", "group_by_length", "Write train_sampling_strategy: group_by_length"),
        ("powerflow", "reward_funcs", "Write power: PowerFlow has no reward"),
        ("sft", "evaluation_strategy", "Write eval_strategy."),
        ("dpo", "max_seq_length", "Write max_length."),
        ("sft", "lr", "Write learning_rate."),
    ],
)
def test_a_renamed_key_is_named(command: str, key: str, instead: str, settings: Settings) -> None:
    assert_refused(renyi(command, "--config", settings(), f"--{key}", "1"), f"--{key}: there is no such key", instead)


def test_renamed_keys_are_none_and_what_they_are_called_now_is_one() -> None:
    every = known("sft") | known("dpo") | known("powerflow")
    assert not set(RENAMED) & known("sft")
    assert {instead.partition(":")[0] for instead in RENAMED.values()} <= every


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_length", -1),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", "nan"),
        ("learning_rate", -1),
        ("num_train_epochs", -2),
        ("max_steps", -5),
        ("save_steps", 0),
        ("logging_steps", 0),
        ("lora_r", 0),
        ("warmup_steps", -1),
    ],
)
def test_a_size_that_is_none_is_refused(key: str, value: object, settings: Settings) -> None:
    given = {"max_steps": ...} if key == "num_train_epochs" else {}
    ended = renyi("sft", "--config", settings(**given), f"--{key}", value, "--dry_run")
    assert_refused(ended, f"--{key}", "is not allowed", "Give")


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"load_best_model_at_end": True}, "load_best_model_at_end"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"warmth": 2}}, "lr_scheduler_kwargs"),
        ({"report_to": "mlflow"}, "report_to"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"optim": "adamw_8bits"}, "optim"),
    ],
)
def test_what_a_library_refuses_names_the_key(given: dict[str, object], key: str, settings: Settings) -> None:
    ended = renyi("sft", "--config", settings(**given), "--dry_run")
    assert ended.code == 2, ended
    assert f"error: {key}" in ended.err, ended.err
    assert "settings:" not in ended.err


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--bf16", "true", "--use_cpu", "false"), ("--bf16: True", "bf16: false", "use_cpu: true")),
        (("--fp16", "true"), ("--fp16: True", "needs a GPU", "fp16: false")),
        (("--tf32", "true"), ("--tf32: True", "Ampere", "Leave tf32 out")),
        (("--device", "cuda"), ("--device: there is no such key", "Write use_cpu: true trains on the CPU")),
    ],
)
@pytest.mark.parametrize("dry", [(), ("--dry_run",)], ids=["run", "dry"])
def test_hardware_that_is_not_there_is_refused_before_training(
    flags: tuple[str, ...], parts: tuple[str, ...], dry: tuple[str, ...], settings: Settings, tmp_path: Path
) -> None:
    config = settings(bf16=..., use_cpu=...)
    assert_refused(renyi("sft", "--config", config, *flags, *dry), *parts)
    assert not (tmp_path / "out").exists()


class Paired:
    """Stands for a library's class that refuses two keys together."""

    def __init__(self, **given: object):
        if {"one", "two"} <= set(given):
            raise ValueError("these do not go together")


class Twice:
    """Stands for a library's class that finds fault with each of two keys."""

    def __init__(self, **given: object):
        for name in ("one", "two"):
            if name in given:
                raise ValueError("no good")


def test_every_refusal_of_a_library_names_a_key() -> None:
    known = {"one", "two", "three"}
    given = {"one": 1, "two": 2, "three": "cubic spline"}
    assert explained(ValueError("x"), known, given, str, Paired).where == "one"
    assert explained(ValueError("x"), known, given, str, Twice).where == "one"
    assert explained(ValueError("'cubic spline' is not valid"), known, given).where == "three"
    nothing = explained(ValueError("x"), known, given)
    assert nothing.where == "one, two, three"
    assert nothing.hint is not None
    assert explained(ValueError("x"), known, {}).where == "settings"
