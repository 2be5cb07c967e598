"""Compiled blocks: the same run, and one graph for all batches."""

import pytest
import torch
from tiny import (
    dpo_trainer_of,
    kto_trainer_of,
    logged,
    member_distance,
    pair_rows,
    reward_trainer_of,
    text_rows,
    tiny_ensemble,
    trainer_of,
)
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

SETTINGS = {"num_members": 3, "alpha_hold_ratio": 0.2, "optim": "sgd", "learning_rate": 0.1}


@pytest.fixture(autouse=True)
def _afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        pytest.param(trainer_of, {}, marks=pytest.mark.slow),
        pytest.param(trainer_of, {"routing": "sampled"}, marks=pytest.mark.slow),
        (trainer_of, {"gradient_checkpointing": True}),
        pytest.param(trainer_of, {"packing": True, "max_length": 16}, marks=pytest.mark.slow),
        (dpo_trainer_of, {"eval_strategy": "steps", "eval_steps": 3}),
        pytest.param(kto_trainer_of, {}, marks=pytest.mark.slow),
        pytest.param(reward_trainer_of, {}, marks=pytest.mark.slow),
    ],
    ids=lambda x: " ".join(x) or "plain" if isinstance(x, dict) else x.__name__,
)
def test_a_compiled_run_is_the_same_run(tmp_path, make, settings):
    models, losses = [], []
    for given in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        if "eval_steps" in settings:
            given["eval_dataset"] = pair_rows(8, seed=1)
        trainer = make(tmp_path, **SETTINGS, **settings, **given)
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


def test_a_graph_is_traced_once_and_divides_no_sizes():
    """Quotients of variable sizes pile up from layer to layer. A real block took minutes to compile because of them."""
    ensemble, graphs, counts = tiny_ensemble(num_members=3).train(), [], counters["aot_autograd"]
    before = counts["total"]

    def backend(graph, _):
        graphs.append(graph)
        return graph

    ensemble.compile(dynamic=True, backend=aot_autograd(fw_compiler=backend))
    for rows, length in ((4, 9), (5, 12), (2, 7)):
        ensemble(torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0)))
    assert counts["total"] - before == 1
    assert len(graphs) == 2  # forward and backward
    nodes = [node for graph in graphs for node in graph.graph.nodes]
    sizes = {str(size) for node in nodes for size in getattr(node.meta.get("val"), "shape", ())}
    assert any("s" in size for size in sizes)
    assert not any("//" in size for size in sizes)


def test_only_training_of_all_members_is_compiled():
    """Drawn members change with every pass, and a graph would be compiled for each draw."""
    counter, ensemble = CompileCounterWithBackend("eager"), tiny_ensemble(num_members=3).train()
    ensemble.compile(dynamic=True, backend=counter)
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    for members in ([0, 1, 2, 0], [2, 2, 1, 0]):
        with ensemble.pairing(members):
            ensemble(ids)
    with ensemble.using([1]):
        ensemble(ids)
    with torch.no_grad():
        ensemble(ids)
    assert counter.frame_count == 0
    ensemble(ids)
    assert counter.frame_count == 1


TWO = {"num_members": 2}
LONG = {"bf16": True, "max_steps": 100}


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        (LONG, True),
        ({**LONG, "routing": "auto"}, True),
        ({**LONG, "max_steps": 99}, False),
        ({**LONG, "max_steps": 50, "gradient_accumulation_steps": 2}, True),
        ({**LONG, "max_steps": -1, "num_train_epochs": 12.5}, True),
        ({**LONG, "bf16": False}, True),
        ({**LONG, "max_steps": 200, "num_members": 1}, True),
        ({**LONG, "max_steps": 200, "num_members": 1, "bf16": False}, False),
        ({**LONG, "routing": "sampled"}, False),
        ({**LONG, "member_kind": "gaussian"}, False),
        ({**LONG, "torch_compile": False}, False),
        ({**LONG, "max_steps": 1, "torch_compile": True}, True),
    ],
    ids=str,
)
def test_a_long_run_compiles_unless_told(tmp_path, monkeypatch, settings, compiles):
    """100 steps of 4 rows of 10 tokens on average are just long enough; 32 rows are 8 steps."""
    rows = text_rows(32, shortest=9, longest=10)  # with the end of the text
    trainer = trainer_of(tmp_path, rows, num_members=2, max_steps=1)
    tokens = float(trainer._lengths.double().mean())
    frozen = sum(p.numel() for p in trainer.model.base.parameters() if not p.requires_grad)
    operations = 4 * frozen * 2 * 400 * tokens
    monkeypatch.setattr("renyi.training.steps.LONG_RUN", operations * 0.995)
    monkeypatch.setattr("renyi.training.steps.can_compile", lambda: True)
    assert (trainer_of(tmp_path, rows, **TWO | settings).args.compile_blocks is not None) is compiles
    monkeypatch.setattr("renyi.training.steps.can_compile", lambda: False)
    asked = settings.get("torch_compile", False)
    assert (trainer_of(tmp_path, rows, **TWO | settings).args.compile_blocks is not None) is asked


def test_a_compiler_that_fails_ends_a_run_only_if_it_was_asked_for(tmp_path):
    def failing(graph, inputs):
        raise RuntimeError("no compiler")

    plain = trainer_of(tmp_path, **SETTINGS)
    plain.train()
    for is_asked in (False, True):
        trainer = trainer_of(tmp_path, **SETTINGS)
        trainer.args.compile_blocks = {"backend": failing}
        trainer.args.compiles_if_it_pays = not is_asked
        torch.compiler.reset()
        if is_asked:
            with pytest.raises(Exception, match="no compiler"):
                trainer.train()
        else:
            trainer.train()
            assert member_distance(trainer.model, plain.model) == 0


def test_a_dry_run_takes_the_compiled_step(tmp_path):
    counter = CompileCounterWithBackend("eager")
    trainer = trainer_of(tmp_path, **SETTINGS)
    trainer.args.compile_blocks = {"backend": counter}
    trainer.rehearse()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_batch_that_a_graph_was_compiled_for_does_not_matter():
    """A run that is resumed compiles for another batch, and must stay the same run to the last digit."""
    gradients = []
    for lengths in ((9, 21, 14), (21, 9, 14)):
        torch.compiler.reset()
        ensemble = tiny_ensemble(num_members=3).train()
        ensemble.compile(dynamic=True)
        for length in lengths:
            ids = torch.randint(5, 60, (length // 3, length), generator=torch.Generator().manual_seed(0))
            ensemble.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                ensemble(ids).log_probs.sum().backward()
        gradients.append([p.grad for p in ensemble.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


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
