"""Compiled blocks: the same run, one graph for all batches, and by default only where they pay and can be built."""

import pytest
import torch
from tiny import logged, member_distance, text_rows, tiny_ensemble, trainer_of
from torch._dynamo.testing import CompileCounterWithBackend

from renyi.training import compiling

SETTINGS = {"num_members": 3, "alpha_hold_ratio": 0.2, "optim": "sgd", "learning_rate": 0.1}
# On a CPU in half precision, as on a machine where it pays
HALF = {"bf16": True, "gradient_checkpointing": False, "max_steps": 2}


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


def test_only_long_runs_compile_by_themselves(tmp_path, monkeypatch):
    """The arithmetic of the rule, at its limit."""
    trainer = trainer_of(tmp_path, **SETTINGS, **HALF)
    assert trainer.args.compile_blocks is None
    model, args = trainer.model, trainer.args
    a_token = 4 * model.base.num_parameters() * 3 / (compiling.RATE * torch.get_num_threads())
    tokens = compiling.LEAST_SECONDS / a_token
    assert compiling.compiling_pays(model, args, lambda: tokens * 1.01)
    assert not compiling.compiling_pays(model, args, lambda: tokens * 0.99)
    monkeypatch.setattr(compiling, "LEAST_SECONDS", 0)
    assert trainer_of(tmp_path, **SETTINGS, **HALF).args.compile_blocks == {"backend": "inductor", "mode": None}
    grouped = {"routing_group": "author"}
    rows = text_rows(8).add_column("author", list("aabbccdd"))
    assert trainer_of(tmp_path, rows, **SETTINGS, **HALF).args.compile_blocks is not None
    assert trainer_of(tmp_path, rows, **SETTINGS, **HALF, **grouped).args.compile_blocks is None
    for other in ({"torch_compile": False}, {"bf16": False}, {"gradient_checkpointing": True}, {"routing": "sampled"}):
        assert trainer_of(tmp_path, **SETTINGS, **{**HALF, **other}).args.compile_blocks is None


def test_the_tokens_of_a_run_are_counted(tmp_path):
    trainer = trainer_of(
        tmp_path, text_rows(8, shortest=4, longest=30), num_train_epochs=3, max_steps=-1, per_device_train_batch_size=4
    )
    assert trainer._tokens() == 3 * sum(map(len, trainer.train_dataset["input_ids"]))


def test_a_run_goes_on_where_blocks_cannot_be_compiled(tmp_path):
    def broken(graph, examples):
        raise RuntimeError("no compiler is here\nsecond line")

    plain, other = (trainer_of(tmp_path, **SETTINGS, **HALF) for _ in range(2))
    other.args.compile_blocks = {"backend": broken}
    plain.train()
    with pytest.warns(UserWarning, match="blocks could not be compiled .* no compiler is here"):
        other.train()
    assert member_distance(plain.model, other.model) == 0


def test_blocks_that_were_asked_for_must_compile(tmp_path):
    def broken(graph, examples):
        raise RuntimeError("no compiler is here")

    trainer = trainer_of(tmp_path, **SETTINGS, **HALF, torch_compile=True)
    trainer.args.compile_blocks = {"backend": broken}
    with pytest.raises(RuntimeError, match="no compiler is here"):
        trainer.train()


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

    expected = loss()
    with ensemble.stack.casting(torch.bfloat16):
        assert all(layer.cast[0].dtype == torch.bfloat16 for layer in layers)
        torch.testing.assert_close(loss(), expected, atol=0, rtol=0)
    assert all(layer.cast is None for layer in layers)
    with ensemble.stack.casting(None):
        assert all(layer.cast is None for layer in layers)
