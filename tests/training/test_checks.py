"""What a run could not use is refused when its config or trainer is made, by its key."""

from importlib.util import find_spec

import pytest
import torch
from tiny import sft_config, text_rows, trainer_of

from renyi.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("learning_rate", {"learning_rate": float("nan")}),
        ("learning_rate", {"learning_rate": float("inf")}),
        ("learning_rate", {"learning_rate": -1e-3}),
        ("weight_decay", {"weight_decay": float("nan")}),
        ("max_grad_norm", {"max_grad_norm": float("nan")}),
        ("per_device_train_batch_size", {"per_device_train_batch_size": 0}),
        ("per_device_eval_batch_size", {"per_device_eval_batch_size": 0}),
        ("gradient_accumulation_steps", {"gradient_accumulation_steps": 0}),
        ("lr_scheduler_kwargs", {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 3}}),
        ("lr_scheduler_kwargs", {"lr_scheduler_type": "cosine_with_min_lr"}),
        ("report_to", {"report_to": "comet_ml"}),
        ("report_to", {"report_to": ["no_such_tracker"]}),
        ("use_liger_kernel", {"use_liger_kernel": True}),
    ],
    ids=str,
)
def test_a_setting_that_no_run_could_use_is_refused_by_its_key(tmp_path, monkeypatch, key, settings):
    monkeypatch.setattr("renyi.training.checks.is_liger_kernel_available", lambda: False)
    monkeypatch.setattr("renyi.training.checks.get_available_reporting_integrations", list)
    with pytest.raises(ConfigError) as caught:
        sft_config(tmp_path, **settings)
    assert caught.value.where == key
    assert caught.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 3}},
        {"lr_scheduler_type": "constant"},
        {"learning_rate": 0.0},
        {"max_grad_norm": 0.0},
    ],
    ids=str,
)
def test_settings_that_fit_are_not_refused(tmp_path, settings):
    sft_config(tmp_path, **settings)


@pytest.mark.skipif(find_spec("grokadamw") is not None, reason="grokadamw is installed")
def test_an_optimizer_whose_package_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="grokadamw") as caught:
        sft_config(tmp_path, optim="grokadamw")
    assert caught.value.where == "optim"


def test_a_dropped_last_batch_must_leave_one(tmp_path):
    settings = {"num_members": 2, "dataloader_drop_last": True, "per_device_train_batch_size": 4}
    with pytest.raises(ConfigError, match="3 rows are less than a batch of 4") as caught:
        trainer_of(tmp_path, text_rows(3), **settings)
    assert caught.value.where == "dataloader_drop_last"
    assert trainer_of(tmp_path, text_rows(4), **settings).num_steps > 0


NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


@NO_GPU
@pytest.mark.parametrize(
    ("key", "settings", "write"),
    [
        ("bf16", {"bf16": True, "use_cpu": False}, "use_cpu: true"),
        ("bf16_full_eval", {"bf16_full_eval": True, "use_cpu": False}, "use_cpu: true"),
        ("fp16", {"fp16": True}, "fp16: false"),
        ("fp16", {"fp16": True, "use_cpu": False}, "fp16: false"),
        ("fp16_full_eval", {"fp16_full_eval": True}, "fp16_full_eval: false"),
        ("fp16", {"bf16": True, "fp16": True}, "fp16: false"),
        ("tf32", {"tf32": True}, "Leave tf32 out"),
    ],
    ids=str,
)
def test_a_precision_that_the_machine_lacks_is_refused_by_its_key(tmp_path, key, settings, write):
    with pytest.raises(ConfigError, match="True is not allowed") as caught:
        sft_config(tmp_path, **settings)
    assert caught.value.where == key
    assert write in caught.value.hint


def test_half_precision_on_a_cpu_is_not_refused(tmp_path):
    assert sft_config(tmp_path, bf16=True, use_cpu=True).bf16
    assert sft_config(tmp_path, bf16=False, fp16=False, tf32=False).bf16 is False
