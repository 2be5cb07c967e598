"""One member is TRL's KTOTrainer; M members at alpha 0 are M runs of it."""

from functools import partial

import pytest
import torch
from float64 import SAME
from peft import PeftModel
from tiny import adapter_distance, kto_trainer_of, logged, lora, quiet, thumb_rows, tiny_ensemble, tiny_model
from tiny import tiny_tokenizer as tokenizer
from trl import KTOConfig, KTOTrainer

from renyi import LoraEnsemble

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 12
SETTINGS = {"max_steps": STEPS, "max_grad_norm": 0.3, "learning_rate": 2e-2, "warmup_steps": 2, "beta": 0.3}
LOGGED = ["kl", *(f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected"))]
slow = partial(pytest.param, marks=pytest.mark.slow)  # other values on paths that the cases beside them take


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("renyi.training.reference_cache.HF_HOME", str(tmp_path / "home"))


def trl_run(output_dir, dataset, model=None, peft_config=None, **settings) -> KTOTrainer:
    trainer = KTOTrainer(
        tiny_model() if model is None else model,
        args=KTOConfig(str(output_dir), **quiet({**SETTINGS, **settings})),
        train_dataset=dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def assert_equal_curves(ours, theirs, names: list[str], suffix: str = "") -> None:
    for name in names:
        assert len(logged(theirs, name)) >= STEPS // 2, name  # a batch may have thumbs of one kind only
        assert logged(ours, name + suffix) == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name


@pytest.mark.parametrize(
    "settings",
    [
        {"desirable_weight": 1.5, "undesirable_weight": 0.8},
        slow({"alpha": 0.0}),
        slow({"loss_type": "apo_zero_unpaired"}),
        {"max_length": 6, "gradient_accumulation_steps": 2, "precompute_ref_log_probs": True},
        slow({"gradient_checkpointing": True}),
        slow({"disable_dropout": False}),
    ],
    ids=lambda settings: " ".join(map(str, settings)),
)
def test_one_member_is_trl(tmp_path, settings):
    dataset = thumb_rows(30)  # not a multiple of the batch
    ours = kto_trainer_of(tmp_path / "ours", dataset, num_members=1, **{**SETTINGS, **settings})
    ours.train()
    settings.pop("alpha", None)
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora(), **settings)
    assert_equal_curves(ours, theirs, ["loss", "grad_norm", "learning_rate"])
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME
    if "gradient_accumulation_steps" not in settings:  # TRL then takes means over means, ours are exact
        assert_equal_curves(ours, theirs, [*LOGGED, "rewards/margins", "entropy"])
    if ours.args.loss_type == "kto":
        assert max(logged(theirs, "kl")) > 0.01
    assert logged(theirs, "loss")[-1] < logged(theirs, "loss")[0]


def test_three_members_at_alpha_zero_are_three_runs_each_against_its_own_start(tmp_path):
    tiny_ensemble(3).save(tmp_path / "start")
    dataset = thumb_rows(30)
    settings = {"optim": "sgd", "learning_rate": 0.2}
    start = LoraEnsemble.load(tmp_path / "start", base=tiny_model())
    ours = kto_trainer_of(tmp_path / "ours", dataset, model=start, num_members=3, alpha=0.0, **{**SETTINGS, **settings})
    ours.train()
    losses = []
    for member in range(3):
        adapter = PeftModel.from_pretrained(
            tiny_model(), str(tmp_path / "start" / f"member_{member}"), is_trainable=True
        )
        theirs = trl_run(tmp_path / f"trl{member}", dataset, adapter, **settings)
        assert adapter_distance(ours.model, member, theirs.model) <= SAME
        assert_equal_curves(ours, theirs, LOGGED, f"/{member}")
        losses.append(torch.tensor(logged(theirs, "loss")))
    mean_loss = torch.stack(losses).mean(0)
    torch.testing.assert_close(torch.tensor(logged(ours, "loss")), mean_loss, rtol=SAME, atol=0)
    assert (losses[0] - losses[1]).abs().max() > 1e-4  # three different runs
