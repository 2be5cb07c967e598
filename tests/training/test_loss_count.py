"""The reported loss is the sum of the examples' losses divided by the number of trained tokens, whatever the model."""

import pytest
from datasets import Dataset
from tiny import logged, text_rows, tiny_model, trainer_of


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"token_budget": 30}])
def test_at_alpha_one_the_loss_is_the_mixture_nll_per_trained_token(tmp_path, kind, settings):
    """The NLL is summed from log-likelihoods and trained tokens by itself; transformers counts GPT-2's tokens apart."""
    given = {"alpha": 1.0, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "num_members": 2, "max_steps": 3}
    trainer = trainer_of(tmp_path, text_rows(24), model=tiny_model(kind), **given, **settings)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(logged(trainer, "nll_mixture"), rel=1e-5)


def test_the_first_token_of_a_row_is_no_trained_token(tmp_path):
    """Rows of 2 tokens, of which one is predicted: a count of 2 would halve the loss."""
    rows = Dataset.from_dict({"input_ids": [[5, 9], [7, 11]] * 8})
    trainer = trainer_of(tmp_path, rows, model=tiny_model("gpt2"), num_members=1, alpha=1.0, max_steps=1)
    trainer.train()
    (loss,), (nll,) = logged(trainer, "loss"), logged(trainer, "nll_mixture")
    assert loss == pytest.approx(nll, rel=1e-5)
