"""One member is TRL's DPOTrainer, whatever the loss; M members at alpha 0 are M runs of it."""

import math
from functools import partial

import pytest
import torch
from float64 import SAME
from peft import PeftModel
from tiny import adapter_distance, dpo_trainer_of, logged, lora, pair_rows, quiet, tiny_ensemble, tiny_model
from tiny import tiny_tokenizer as tokenizer
from trl import DPOConfig, DPOTrainer

from renyi import LoraEnsemble

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 20
SETTINGS = {"max_steps": STEPS, "max_grad_norm": 0.3, "learning_rate": 5e-3, "warmup_steps": 3, "beta": 0.3}
slow = partial(pytest.param, marks=pytest.mark.slow)  # other values on paths that the cases beside them take
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]


def trl_run(output_dir, dataset, model=None, peft_config=None, **settings) -> DPOTrainer:
    trainer = DPOTrainer(
        tiny_model() if model is None else model,
        args=DPOConfig(str(output_dir), **quiet({**SETTINGS, **settings})),
        train_dataset=dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def assert_equal_curves(ours, theirs, names: list[str]) -> None:
    for name in names:
        assert len(logged(theirs, name)) == STEPS, name
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("renyi.training.reference_cache.HF_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("alpha", [slow(0.0), 0.8, slow(1.0)])
def test_one_member_is_trl_at_any_alpha(tmp_path, alpha):
    dataset = pair_rows(48)
    ours = dpo_trainer_of(tmp_path / "ours", dataset, num_members=1, alpha=alpha, **SETTINGS)
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora())
    assert_equal_curves(ours, theirs, ["loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"])
    assert_equal_curves(ours, theirs, ["num_tokens", "logps/chosen", "logps/rejected"])
    assert_equal_curves(ours, theirs, REWARDS)
    for name in REWARDS:
        assert logged(ours, f"{name}/0") == pytest.approx(logged(ours, name))
    assert max(logged(theirs, "grad_norm")) > SETTINGS["max_grad_norm"]
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME
    assert logged(theirs, "loss")[-1] < 0.95 * logged(theirs, "loss")[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "ipo"},
        slow({"loss_type": "hinge"}),
        {"loss_type": "robust", "label_smoothing": 0.1},
        slow({"loss_type": "apo_zero"}),
        slow({"loss_type": "apo_down"}),
        slow({"loss_type": "exo_pair", "label_smoothing": 1e-3}),
        slow({"loss_type": "nca_pair"}),
        slow({"loss_type": "bco_pair"}),
        slow({"loss_type": "sppo_hard"}),
        slow({"loss_type": "discopop"}),
        slow({"loss_type": "sigmoid_norm"}),
        {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.3]},
        slow({"f_divergence_type": "forward_kl"}),
        {"f_divergence_type": "js_divergence"},
        slow({"f_divergence_type": "alpha_divergence"}),
        slow({"loss_type": "ipo", "f_divergence_type": "js_divergence"}),
        slow({"ld_alpha": 0.5}),
        {"ld_alpha": 0.0, "precompute_ref_log_probs": True},
        slow({"precompute_ref_log_probs": True}),
        {"max_length": 7},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
        {"disable_dropout": False},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())) or "plain",
)
def test_one_member_is_trl_with_other_settings(tmp_path, settings):
    dataset = pair_rows(48)
    ours = dpo_trainer_of(tmp_path / "ours", dataset, num_members=1, **{**SETTINGS, **settings})
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora(), **settings)
    assert_equal_curves(ours, theirs, ["loss", "grad_norm"])
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME


@pytest.mark.parametrize("loss_type", [slow("sigmoid"), "ipo"])
def test_three_members_at_alpha_zero_are_three_runs(tmp_path, loss_type):
    dataset = pair_rows(48)
    settings = {"loss_type": loss_type, "optim": "sgd", "learning_rate": 0.2}
    ours = dpo_trainer_of(tmp_path / "ours", dataset, num_members=3, alpha=0.0, **{**SETTINGS, **settings})
    ours.model.save(tmp_path / "start")
    ours.train()
    losses = []
    for member in range(3):
        start = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "start" / f"member_{member}"), is_trainable=True)
        theirs = trl_run(tmp_path / f"trl{member}", dataset, start, **settings)
        assert adapter_distance(ours.model, member, theirs.model) <= SAME
        losses.append(torch.tensor(logged(theirs, "loss")))
        for name in ("rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert logged(ours, f"{name}/{member}") == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name
    mean_loss = torch.stack(losses).mean(0)
    torch.testing.assert_close(torch.tensor(logged(ours, "loss")), mean_loss, rtol=SAME, atol=0)
    assert (losses[0] - losses[1]).abs().max() > 1e-4  # three different runs


@pytest.mark.parametrize("precompute", [slow(False), True])
def test_a_trained_adapter_is_its_own_reference_as_in_trl(tmp_path, precompute):
    """Going on from trained members, each is measured against its own start; TRL does so with a copy of the adapter."""
    tiny_ensemble(2).save(tmp_path / "start")
    dataset = pair_rows(48)
    start = LoraEnsemble.load(tmp_path / "start", base=tiny_model())
    settings = {**SETTINGS, "alpha": 0.0, "num_members": 2, "precompute_ref_log_probs": precompute}
    ours = dpo_trainer_of(tmp_path / "ours", dataset, model=start, **settings)
    ours.train()
    for member in range(2):
        adapter = PeftModel.from_pretrained(
            tiny_model(), str(tmp_path / "start" / f"member_{member}"), is_trainable=True
        )
        theirs = trl_run(tmp_path / f"trl{member}", dataset, adapter)
        assert logged(theirs, "loss")[0] == pytest.approx(math.log(2), rel=SAME)
        assert adapter_distance(ours.model, member, theirs.model) <= SAME


def test_evaluation_is_trls(tmp_path):
    dataset, held_out = pair_rows(32), pair_rows(9, seed=5)
    settings = {**SETTINGS, "per_device_eval_batch_size": 3}
    ours = dpo_trainer_of(tmp_path / "ours", dataset, num_members=1, eval_dataset=held_out, **settings)
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora(), per_device_eval_batch_size=3)
    evaluated, expected = ours.evaluate(), theirs.evaluate(held_out)
    for name in ("loss", *REWARDS, "logps/chosen", "logps/rejected"):
        assert evaluated[f"eval_{name}"] == pytest.approx(expected[f"eval_{name}"], rel=SAME), name
