"""On policy, the group partition's gradient is twice that of TRL's GRPOTrainer, for rewards that PowerFlow implies."""

import pytest
import torch
from float64 import SAME
from peft import PeftModel
from tiny import PAD, powerflow_trainer_of, prompt_rows, quiet, scatter_members, tiny_ensemble, tiny_model
from tiny import tiny_tokenizer as tokenizer
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import pad

pytestmark = pytest.mark.usefixtures("float64")

POWER, GROUP, PROMPTS = 3.0, 4, 3


def as_trl_has_them(scored: dict[str, Tensor], advantages: Tensor) -> dict[str, Tensor]:
    """Our rows, padded on the right, as TRL keeps them: prompts padded on the left, completions on the right."""
    prompts, completions = [], []
    for ids, mask, labels in zip(scored["input_ids"], scored["attention_mask"], scored["labels"], strict=True):
        answered = labels != -100
        prompts.append(ids[(mask == 1) & ~answered])
        completions.append(ids[answered])
    assert len({len(ids) for ids in prompts}) > 1
    assert len({len(ids) for ids in completions}) > 1
    return {
        "prompt_ids": pad(prompts, PAD, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(completions, PAD, "right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0, "right"),
        "advantages": advantages,
    }


@pytest.mark.parametrize("penalised", [False, True])
def test_the_gradient_is_twice_grpos(tmp_path, penalised):
    ensemble = scatter_members(tiny_ensemble(1), std=0.1)
    ensemble.save(tmp_path / "start")
    form = {"format_penalty": "w1", "format_penalty_size": 0.7} if penalised else {}
    batch = {"num_generations": GROUP, "per_device_train_batch_size": GROUP * PROMPTS}
    settings = {"power": POWER, "reference": "base", "num_members": 1, "max_completion_length": 8, **batch, **form}
    ours = powerflow_trainer_of(tmp_path / "ours", model=ensemble, **settings)
    ours.model.train()
    ours.state.max_steps = 1
    rows = [{"prompt": prompt} for prompt in prompt_rows(PROMPTS)["prompt"] for _ in range(GROUP)]
    scored = ours._generate_and_score_completions(rows)
    assert scored["penalty"].any() == penalised
    ours.compute_loss(ours.model, scored).backward()

    tokens = (scored["labels"] != -100).sum(1)
    log_policy = scored["log_behaviour"]  # of the one policy that wrote them, which has not moved since
    reward = POWER * (scored["log_base"][:, 0] / tokens + scored["penalty"]) - log_policy / tokens
    advantages = reward - reward.view(PROMPTS, GROUP).mean(1).repeat_interleave(GROUP)

    theirs = GRPOTrainer(
        PeftModel.from_pretrained(tiny_model(), str(tmp_path / "start" / "member_0"), is_trainable=True),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=GRPOConfig(
            str(tmp_path / "trl"), **quiet({"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0, **batch})
        ),
        train_dataset=prompt_rows(),
        processing_class=tokenizer(),
    )
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 1
    theirs.compute_loss(theirs.model, as_trl_has_them(scored, advantages)).backward()

    gradient_of = {name: p.grad for name, p in theirs.model.named_parameters() if p.requires_grad}
    found, expected = [], []
    for name, layer in ours.model.named_parameters():
        if not layer.requires_grad:
            continue
        path, _, matrix = name.removeprefix("base.").replace(".members.", ".").rpartition(".")
        found.append(layer.grad[0].flatten())
        expected.append(2 * gradient_of[f"base_model.model.{path}.{matrix}.default.weight"].flatten())
    assert len(found) == len(gradient_of)
    found, expected = torch.cat(found), torch.cat(expected)
    assert expected.norm() > 0.1
    assert (found - expected).norm() <= SAME * expected.norm()
