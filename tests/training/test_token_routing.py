"""One α-loss a token: against the loss of tokens as examples, and what it is combined with."""

import pytest
import torch
from tiny import dpo_trainer_of, lora, text_rows, tiny_ensemble, trainer_of

from renyi.errors import ConfigError
from renyi.objectives import renyi_loss

PARTING = {"num_members": 2, "alpha": 0.8, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}


def first_loss(folder, **settings) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The logged loss of one step on members that differ, and their token log-likelihoods [M, B, T] and mask."""
    ensemble, rows = tiny_ensemble(2), text_rows(4)
    trainer = trainer_of(folder, rows, model=ensemble, max_steps=1, learning_rate=0.0, **{**PARTING, **settings})
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    output = ensemble(batch["input_ids"], batch["attention_mask"], batch["labels"])
    trainer.train()
    return trainer.state.log_history[0]["loss"], output.log_probs.detach(), output.label_mask


def test_the_loss_is_the_mean_over_tokens_of_the_loss_of_each(tmp_path):
    loss, log_probs, mask = first_loss(tmp_path / "token", routing_quantity="token")
    expected = renyi_loss(log_probs[:, mask], 0.8).mean()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    of_sequences, *_ = first_loss(tmp_path / "sequence")
    assert loss < of_sequences - 1e-3  # a mixture that may change its member at every token explains more
    in_parts, *_ = first_loss(tmp_path / "parts", routing_quantity="token", token_budget=30)
    assert in_parts == pytest.approx(loss, rel=1e-5)


def test_at_alpha_zero_tokens_and_sequences_are_the_same(tmp_path):
    token, *_ = first_loss(tmp_path / "token", routing_quantity="token", alpha=0.0)
    sequence, *_ = first_loss(tmp_path / "sequence", alpha=0.0)
    assert token == pytest.approx(sequence, rel=1e-6)


def test_it_trains_distributions_and_logs_shares_of_tokens(tmp_path):
    settings = {"routing_quantity": "token", "member_kind": "gaussian", "num_draws": 2, "max_steps": 3}
    trainer = trainer_of(tmp_path, peft_config=lora(), **PARTING, **settings)
    trainer.train()
    assert sum(trainer.state.log_history[0][f"member_load/{m}"] for m in range(2)) == pytest.approx(1)


def test_it_is_for_texts_only(tmp_path):
    with pytest.raises(ConfigError) as refused:
        dpo_trainer_of(tmp_path, routing_quantity="token", **PARTING)
    assert refused.value.where == "routing_quantity"


@pytest.mark.parametrize("routing", ["sparse", "sampled", "raced", "auto"])
def test_it_needs_dense_routing(tmp_path, routing):
    with pytest.raises(ConfigError) as refused:
        trainer_of(tmp_path, routing=routing, routing_quantity="token", **PARTING)
    assert refused.value.where == "routing"
