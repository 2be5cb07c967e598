"""Compiled blocks: the same run, and no block is compiled anew as batches change."""

import pytest
import torch
from tiny import member_distance, text_rows, tiny_ensemble, trainer_of
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
    models = []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = trainer_of(tmp_path, **SETTINGS, **settings, **given)
        trainer.train()
        models.append(trainer.model)
    assert member_distance(*models) <= 2e-5


def test_few_graphs_serve_all_batches(tmp_path):
    """One for the first block, whose rows are computed once for all members, and one for the others; twice, because
    the first lengths are taken for constants."""
    counter = CompileCounterWithBackend("eager")
    trainer = trainer_of(tmp_path, text_rows(40, shortest=4, longest=30), max_steps=2, **SETTINGS)
    trainer.model.compile(backend=counter)
    trainer.train()
    seen = counter.frame_count
    assert 2 <= seen <= 6
    for length in (7, 19, 26, 33):
        trainer.model.train()(torch.randint(5, 60, (4, length))).log_probs.sum().backward()
    assert counter.frame_count <= seen + 2


def test_names_of_parameters_stay(tmp_path):
    ensemble = tiny_ensemble()
    names = list(ensemble.state_dict())
    ensemble.compile(backend="eager")
    assert list(ensemble.state_dict()) == names
    ensemble.save(tmp_path)
