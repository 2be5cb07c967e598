"""Compiled blocks: the same run, and one graph for all batches."""

import pytest
import torch
from tiny import logged, member_distance, text_rows, tiny_ensemble, trainer_of
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


def test_a_graph_is_traced_once_and_divides_no_sizes():
    """Quotients of variable sizes pile up from layer to layer. A real block took minutes to compile because of them."""
    ensemble, graphs, counts = tiny_ensemble(num_members=3).train(), [], counters["aot_autograd"]
    before = counts["total"]

    def backend(graph, _):
        graphs.append(graph)
        return graph

    ensemble.compile(dynamic=True, backend=aot_autograd(fw_compiler=backend))
    for rows, length in ((4, 9), (5, 12), (2, 7)):
        ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ensemble(ids)
    assert len(graphs) == counts["total"] - before == 1
    sizes = {str(size) for node in graphs[0].graph.nodes for size in getattr(node.meta.get("val"), "shape", ())}
    assert any("s" in size for size in sizes)
    assert not any("//" in size for size in sizes)


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
