"""One member is TRL's SFTTrainer; M members at alpha 0 are M runs of it."""

from functools import partial

import pytest
import torch
from datasets import Dataset
from float64 import SAME
from peft import PeftModel
from tiny import adapter_distance, logged, lora, pair_rows, quiet, text_rows, tiny_model, tiny_tokenizer, trainer_of
from trl import SFTConfig, SFTTrainer

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 20
slow = partial(pytest.param, marks=pytest.mark.slow)  # other values on paths that the cases beside them take
SETTINGS = {"max_steps": STEPS, "max_grad_norm": 0.3, "learning_rate": 5e-3, "warmup_steps": 3}


def trl_run(output_dir, dataset, model=None, peft_config=None, **settings) -> SFTTrainer:
    trainer = SFTTrainer(
        tiny_model() if model is None else model,  # a loaded model: drawing it by name would move the seed
        SFTConfig(str(output_dir), **quiet({**SETTINGS, **settings})),
        train_dataset=dataset,
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def completion_rows(number: int) -> Dataset:
    return pair_rows(number).remove_columns("rejected").rename_column("chosen", "completion")


def assert_equal_curves(ours, theirs, names: list[str]) -> None:
    for name in names:
        assert len(logged(theirs, name)) == STEPS
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name


@pytest.mark.parametrize("alpha", [slow(0.0), 0.8, slow(1.0)])
def test_one_member_is_trl_at_any_alpha(tmp_path, alpha):
    dataset = text_rows(48)
    ours = trainer_of(tmp_path / "ours", dataset, num_members=1, alpha=alpha, **SETTINGS)
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora())
    assert_equal_curves(ours, theirs, ["loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy"])
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert max(logged(theirs, "grad_norm")) > SETTINGS["max_grad_norm"]  # clipping is part of what is compared
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME
    assert logged(theirs, "loss")[-1] < 0.95 * logged(theirs, "loss")[0]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"lora_dropout": 0.2}),
        ("llama", {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
        slow("llama", {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "use_rslora": True}),
        ("llama", {"gradient_checkpointing": True}),
        ("llama", {"routing_quantity": "length_normalised"}),
        ("llama", {"packing": True, "max_length": 24}),
        slow("llama", {"optim": "sgd", "learning_rate": 0.5}),
        ("gpt2", {}),
        slow("neox", {}),
        ("gemma2", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_one_member_is_trl_with_other_settings(tmp_path, kind, settings):
    config = {key: settings.pop(key) for key in ("lora_dropout", "use_rslora") if key in settings}
    own = {key: settings.pop(key) for key in ("routing_quantity",) if key in settings}
    # Of GPT-2's rows transformers counts the first token as trained, which no model predicts; a prompt's it does not.
    dataset = text_rows(48) if kind != "gpt2" else completion_rows(48)
    ours = trainer_of(
        tmp_path / "ours",
        dataset,
        model=tiny_model(kind),
        peft_config=lora(**config),
        num_members=1,
        **{**SETTINGS, **settings, **own},
    )
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, tiny_model(kind), lora(**config), **settings)
    assert_equal_curves(ours, theirs, ["loss", "grad_norm"])
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME


def test_evaluation_is_trls(tmp_path):
    dataset, held_out = text_rows(32), text_rows(9, seed=5)
    settings = {**SETTINGS, "per_device_eval_batch_size": 4}
    ours = trainer_of(tmp_path / "ours", dataset, num_members=1, eval_dataset=held_out, **settings)
    ours.train()
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora(), per_device_eval_batch_size=4)
    evaluated, expected = ours.evaluate(), theirs.evaluate(held_out)
    assert evaluated["eval_loss"] == pytest.approx(expected["eval_loss"], rel=SAME)


@pytest.mark.parametrize(
    "settings", [slow({}), {"optim": "sgd", "learning_rate": 0.2, "max_grad_norm": 0.0}], ids=["adamw", "sgd"]
)
def test_three_members_at_alpha_zero_are_three_runs(tmp_path, settings):
    """Each with its own draw of A, the same order of data, and its own clipping. AdamW forgives a wrong scale of the
    gradient, plain gradient descent does not."""
    dataset = text_rows(48)
    ours = trainer_of(tmp_path / "ours", dataset, num_members=3, alpha=0.0, **{**SETTINGS, **settings})
    ours.model.save(tmp_path / "start")
    ours.train()
    member_losses = []
    for member in range(3):
        start = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "start" / f"member_{member}"), is_trainable=True)
        theirs = trl_run(tmp_path / f"trl{member}", dataset, start, **settings)
        assert adapter_distance(ours.model, member, theirs.model) <= SAME
        member_losses.append(torch.tensor(logged(theirs, "loss")))
    mean_loss = torch.stack(member_losses).mean(0)
    torch.testing.assert_close(torch.tensor(logged(ours, "loss")), mean_loss, rtol=SAME, atol=0)
    torch.testing.assert_close(torch.tensor(logged(ours, "nll_members")), mean_loss, rtol=SAME, atol=0)
    assert (member_losses[0] - member_losses[1]).abs().max() > 1e-3  # three different runs


def test_each_member_is_clipped_by_itself(tmp_path):
    """A member with a hundred times the gradient must not shrink the others' steps."""
    dataset = text_rows(8)
    settings = {"num_members": 2, "alpha": 0.0, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0}
    runs = {}
    for limit in (0.05, 1e6):
        trainer = trainer_of(tmp_path / str(limit), dataset, max_grad_norm=limit, **settings)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if name.endswith("lora_A"):
                    parameter[1].mul_(100)
        start = [p.detach().clone() for p in trainer.trained_parameters()]
        trainer.train()
        steps = [p.detach() - s for p, s in zip(trainer.trained_parameters(), start, strict=True)]
        runs[limit] = torch.stack([s.flatten(1).norm(dim=1) for s in steps]).norm(dim=0)
    clipped, free = runs[0.05], runs[1e6]
    assert free[1] > 20 * free[0] > 0.05
    torch.testing.assert_close(clipped, torch.tensor([0.05, 0.05]), rtol=1e-3, atol=0)
