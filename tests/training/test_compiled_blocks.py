"""Compiled blocks: the same run, and one graph for all batches."""

import pytest
import torch
from tiny import logged, member_distance, text_rows, tiny_ensemble, trainer_of
from torch._dynamo.testing import CompileCounterWithBackend

SETTINGS = {"num_members": 3, "alpha_hold_ratio": 0.2, "optim": "sgd", "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def _afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"routing": "sampled"}, marks=pytest.mark.slow),
        {"gradient_checkpointing": True},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_a_compiled_run_is_the_same_run(tmp_path, settings):
    models, losses = [], []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(tmp_path, **SETTINGS, **settings, **given)
        trainer.train()
        models.append(trainer.model)
        losses.append(logged(trainer, "loss"))
    assert member_distance(*models) <= 2e-5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_one_graph_serves_all_batches_and_training_alone(tmp_path):
    counter = CompileCounterWithBackend("eager")
    rows = text_rows(40, shortest=4, longest=30)
    trainer = trainer_of(tmp_path, rows, max_steps=4, gradient_checkpointing=False, **SETTINGS)
    trainer.args.compile_blocks = {"backend": counter}
    trainer.train()
    assert counter.frame_count == 1
    trainer.model.train()(torch.randint(5, 60, (4, 9))).log_probs.sum().backward()
    trainer.evaluate(trainer.train_dataset)
    assert counter.frame_count == 1


def test_names_of_parameters_stay(tmp_path):
    ensemble = tiny_ensemble()
    names = list(ensemble.state_dict())
    ensemble.compile(backend="eager")
    assert list(ensemble.state_dict()) == names
    ensemble.save(tmp_path)


def test_frozen_weights_are_cast_once_and_not_kept():
    """Their values are those of a cast in every step."""
    ensemble = tiny_ensemble().train()
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    layers = list(ensemble.stack.layers.values())

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return ensemble(ids).log_probs

    expected, plain = loss(), ensemble(ids).log_probs
    with ensemble.stack.casting(torch.bfloat16):
        torch.testing.assert_close(ensemble(ids).log_probs, plain, atol=0, rtol=0)  # without autocast: float32
        assert all(layer.cast[0].dtype == torch.bfloat16 for layer in layers)
        torch.testing.assert_close(loss(), expected, atol=0, rtol=0)
    assert all(layer.cast is None for layer in layers)
    with ensemble.stack.casting(None):
        assert all(layer.cast is None for layer in layers)
