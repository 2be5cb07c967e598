"""One member is TRL's RewardTrainer, with its head; M at alpha 0 are M runs of it; members are PEFT adapters."""

from functools import partial
from typing import Any

import pytest
import torch
from float64 import SAME
from peft import AutoPeftModelForSequenceClassification, PeftModel
from tiny import (
    adapter_distance,
    logged,
    lora,
    member_distance,
    pair_rows,
    quiet,
    reward_trainer_of,
    tiny_reward_model,
)
from tiny import tiny_tokenizer as tokenizer
from trl import RewardConfig, RewardTrainer

from renyi import LoraEnsemble

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 12
SETTINGS = {"max_steps": STEPS, "max_grad_norm": 0.3, "learning_rate": 1e-2, "warmup_steps": 2}
slow = partial(pytest.param, marks=pytest.mark.slow)  # other values on paths that the cases beside them take


def trl_run(
    output_dir: Any, dataset: Any, model: Any = None, peft_config: Any = None, **settings: Any
) -> RewardTrainer:
    trainer = RewardTrainer(
        tiny_reward_model() if model is None else model,
        args=RewardConfig(str(output_dir), **quiet({**SETTINGS, **settings})),
        train_dataset=dataset,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def head_of(model: Any) -> torch.Tensor:
    named = dict(model.named_parameters())
    return next(p for name, p in named.items() if name.endswith("score.modules_to_save.default.weight")).detach()


def with_margins(number: int) -> Any:
    rows = pair_rows(number)
    return rows.add_column("margin", [0.1 * (i % 5) for i in range(number)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"center_rewards_coefficient": 0.05, "gradient_accumulation_steps": 2, "margin": True},
        slow({"alpha": 0.0}),
        slow({"gradient_checkpointing": True}),
        slow({"disable_dropout": False}),
    ],
    ids=lambda settings: " ".join(map(str, settings)) or "plain",
)
def test_one_member_is_trl(tmp_path, settings):
    settings = dict(settings)
    dataset = with_margins(30) if settings.pop("margin", False) else pair_rows(30)
    ours = reward_trainer_of(tmp_path / "ours", dataset, num_members=1, **{**SETTINGS, **settings})
    ours.train()
    settings.pop("alpha", None)
    theirs = trl_run(tmp_path / "trl", dataset, peft_config=lora(task_type="SEQ_CLS"), **settings)
    names = ["loss", "grad_norm", "learning_rate"]
    if "gradient_accumulation_steps" not in settings:  # TRL then takes means over means, ours are exact
        names += ["mean_reward", "margin", "accuracy"]
    for name in names:
        assert len(logged(theirs, name)) == STEPS, name
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name
    assert logged(ours, "num_tokens") == logged(theirs, "num_tokens")
    assert adapter_distance(ours.model, 0, theirs.model) <= SAME
    torch.testing.assert_close(ours.model.stack.head.weight[0].detach(), head_of(theirs.model), rtol=SAME, atol=SAME)
    assert (head_of(theirs.model) - tiny_reward_model().score.weight).abs().max() > 1e-2
    assert logged(theirs, "loss")[-1] < logged(theirs, "loss")[0]


def test_two_members_at_alpha_zero_are_two_runs_and_members_load_in_peft(tmp_path):
    dataset = pair_rows(30)
    settings = {"optim": "sgd", "learning_rate": 0.3}
    base = tmp_path / "base"
    tiny_reward_model().save_pretrained(base)
    model = tiny_reward_model(base)
    ours = reward_trainer_of(
        tmp_path / "ours", dataset, model=model, num_members=2, alpha=0.0, **{**SETTINGS, **settings}
    )
    ours.model.save(tmp_path / "start")
    ours.train()
    losses = []
    for member in range(2):
        start = PeftModel.from_pretrained(
            tiny_reward_model(base), str(tmp_path / "start" / f"member_{member}"), is_trainable=True
        )
        theirs = trl_run(tmp_path / f"trl{member}", dataset, start, **settings)
        assert adapter_distance(ours.model, member, theirs.model) <= SAME
        head = ours.model.stack.head.weight[member].detach()
        torch.testing.assert_close(head, head_of(theirs.model), rtol=SAME, atol=SAME)
        for name in ("margin", "mean_reward"):
            assert logged(ours, f"{name}/{member}") == pytest.approx(logged(theirs, name), rel=SAME, abs=SAME), name
        losses.append(torch.tensor(logged(theirs, "loss")))
    torch.testing.assert_close(torch.tensor(logged(ours, "loss")), torch.stack(losses).mean(0), rtol=SAME, atol=0)
    assert (losses[0] - losses[1]).abs().max() > 1e-4  # two different runs

    ours.model.save(tmp_path / "saved")
    ids = torch.tensor([[5, 9, 12, 1], [7, 8, 1, 0]])
    mask = (ids != 0).long()
    rewards = ours.model.eval().rewards(ids, mask)
    assert (rewards[0] - rewards[1]).abs().min() > 1e-4
    again = LoraEnsemble.load(tmp_path / "saved")
    again.config.get_text_config().pad_token_id = 0
    torch.testing.assert_close(again.rewards(ids, mask), rewards, rtol=SAME, atol=SAME)
    for member in range(2):
        alone = AutoPeftModelForSequenceClassification.from_pretrained(
            str(tmp_path / "saved" / f"member_{member}"), num_labels=1, dtype=torch.float64
        ).eval()
        alone.config.get_text_config().pad_token_id = 0
        theirs_B = alone(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(rewards[member], theirs_B, rtol=SAME, atol=SAME)
        merged = again.merged(member).eval()
        torch.testing.assert_close(
            merged(input_ids=ids, attention_mask=mask).logits[:, 0], theirs_B, rtol=SAME, atol=SAME
        )


def test_labels_count_as_often_as_they_were_given(tmp_path):
    """One label is a plain pair, on either side; k labels at order α are k times the loss of one at order kα."""
    rows = pair_rows(24)
    turned = rows.rename_columns({"chosen": "rejected", "rejected": "chosen"})

    def trained(name, dataset, votes=None, alpha=0.9, rate=0.3):
        for column, count in zip(("votes_chosen", "votes_rejected"), votes or (), strict=False):
            dataset = dataset.add_column(column, [count] * len(dataset))
        settings = {"optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, "max_steps": 4}
        at_once = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "center_rewards_coefficient": 0.02}
        trainer = reward_trainer_of(tmp_path / name, dataset, num_members=2, alpha=alpha, **settings, **at_once)
        trainer.train()
        return trainer

    plain = trained("plain", rows)
    runs = {"one": (trained("one", rows, (1, 0)), 1), "turned": (trained("turned", turned, (0, 1)), 1)}
    runs["three"] = trained("three", rows, (3, 0), 0.3, 0.1), 3
    for trainer, times in runs.values():
        assert logged(trainer, "loss") == pytest.approx([times * x for x in logged(plain, "loss")], rel=SAME)
        assert member_distance(trainer.model, plain.model) <= SAME
        heads = [x.model.stack.head.weight for x in (trainer, plain)]
        torch.testing.assert_close(*heads, rtol=SAME, atol=SAME)
    assert logged(plain, "loss")[-1] < logged(plain, "loss")[0]
