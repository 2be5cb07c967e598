"""Walsh–Hadamard members against dense matrices, the formula of their moments, and point ensembles of their draws."""

import pytest
import torch
from scipy.linalg import hadamard
from tiny import lora, padded_batch, scatter_members, tiny_model, trainer_of
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from renyi import LoraEnsemble
from renyi.members import Noise, kind_of
from renyi.members.walsh_hadamard import WalshHadamardLayer, walsh_hadamard


def layer_of(members: int = 2, rank: int = 3, features: int = 11, seed: int = 0) -> WalshHadamardLayer:
    """With nothing at its start, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layer = kind_of("walsh_hadamard").drawn(normal(members, rank, features), normal(members, 5, rank))
    with torch.no_grad():
        for parameter in (layer.left, layer.right, layer.log_std):
            parameter.copy_(normal(*parameter.shape))
    return layer


def dense(g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    H = torch.tensor(hadamard(len(g)), dtype=torch.float64) / len(g) ** 0.25
    whole = H @ g.diag() @ H
    return left.diag() @ whole[: len(left), : len(right)] @ right.diag()


@pytest.mark.parametrize("size", [1, 2, 8, 64, 1024])
def test_the_fast_transform_is_the_dense_one(size):
    x = torch.randn(3, size, dtype=torch.float64)
    expected = x @ torch.tensor(hadamard(size), dtype=torch.float64)
    torch.testing.assert_close(walsh_hadamard(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rank", "features"), [(3, 11), (4, 16), (1, 2), (8, 5), (2, 1)])
def test_means_and_draws_are_the_dense_product(rank, features):
    layer = layer_of(2, rank, features)
    A, _ = layer.mean()
    for m in range(2):
        torch.testing.assert_close(A[m], dense(layer.centre[m], layer.left[m], layer.right[m]), rtol=1e-12, atol=1e-12)
    noise = Noise(7, 2)
    normal = noise.normal(layer.number, 2, layer.centre.shape[1], like=layer.centre)
    drawn, B = layer.matrices(noise)
    for m in range(2):
        for s in range(2):
            g = layer.centre[m] + layer.log_std[m].exp() * normal[s]
            expected = dense(g, layer.left[m], layer.right[m])
            torch.testing.assert_close(drawn[2 * m + s], expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(B[2 * m + s], layer.lora_B[m])


def test_moments_are_the_formula():
    """Cov(A) = (S₁ ⊗ S₂) Q diag(σ²) Qᵀ (S₁ ⊗ S₂), Q[ri, d] = H[r, d] H[d, i]."""
    layer, draws = layer_of(1, 2, 3), 200_000
    size = layer.centre.shape[1]
    H = torch.tensor(hadamard(size), dtype=torch.float64) / size**0.25
    Q = (H[:2, None, :] * H[None, :3, :]).flatten(0, 1)
    scale = (layer.left[0, :, None] * layer.right[0, None, :]).flatten()
    covariance = scale[:, None] * (Q @ layer.log_std[0].exp().square().diag() @ Q.T) * scale
    drawn = layer.matrices(Noise(1, draws))[0].flatten(1).detach()
    spread = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - layer.mean()[0].flatten()).abs() < 5 * spread / draws**0.5).all()
    correlation_error = (drawn.T.cov() - covariance) / (spread[:, None] * spread)
    assert correlation_error.abs().max() < 5 * 2**0.5 / draws**0.5
    off = covariance / (spread[:, None] * spread) - torch.eye(6)
    assert off.abs().max() > 0.1  # entries are correlated, which a diagonal Gaussian cannot be


def test_its_divergence_is_that_of_torch_distributions():
    layer = layer_of()
    origin = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prior = Normal(origin["centre"], torch.tensor(0.3, dtype=torch.float64))
    expected = kl_divergence(Normal(layer.centre, layer.log_std.exp()), prior).sum(1)
    for name in ("left", "right", "lora_B"):
        expected = expected + (getattr(layer, name) - origin[name]).square().flatten(1).sum(1) / (2 * 0.3**2)
    torch.testing.assert_close(layer.divergence(origin, 0.3), expected, rtol=1e-12, atol=0)


def test_fresh_members_have_the_variance_of_peft_and_differ():
    points, fresh = (
        LoraEnsemble.from_base(tiny_model(), 3, lora(r=8), seed=1, member_kind=kind).stack.matrices()
        for kind in ("point", "walsh_hadamard")
    )
    for name, (A, _) in points.items():
        ours = fresh[name][0].detach()
        assert (ours.square().mean() / A.square().mean()).sqrt().item() == pytest.approx(1.0, abs=0.3)
        assert (ours[0] - ours[1]).abs().max() > 0.01
        assert torch.linalg.matrix_rank(ours[0]) == 8


def test_it_trains_is_saved_and_its_draws_are_ordinary_adapters(tmp_path):
    settings = {"member_kind": "walsh_hadamard", "num_draws": 2, "initial_std": 0.1, "prior_std": 0.5}
    trainer = trainer_of(tmp_path / "run", num_members=2, max_steps=12, learning_rate=2e-2, **settings)
    before = [p.detach().clone() for p in trainer.model.stack.parameters()]
    trainer.train()
    ensemble = trainer.model
    assert all(not torch.equal(p, q) for p, q in zip(before, ensemble.stack.parameters(), strict=True))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < sum(losses[:3])
    batch = padded_batch()
    ensemble.save(tmp_path / "saved")
    loaded = LoraEnsemble.load(tmp_path / "saved", base=tiny_model())
    assert loaded.stack.kind == "walsh_hadamard"
    ensemble.eval()
    torch.testing.assert_close(loaded.log_likelihood(*batch), ensemble.log_likelihood(*batch))
    torch.testing.assert_close(loaded.draw(2, 1).log_likelihood(*batch), ensemble.draw(2, 1).log_likelihood(*batch))


def test_every_example_sees_a_draw_of_its_own_and_pairs_see_the_same():
    ensemble, (ids, mask) = (
        LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="walsh_hadamard"),
        padded_batch(),
    )
    ensemble.stack.set_std(0.05)
    scatter_members(ensemble)
    ensemble.redraw(3, draws=2)
    with ensemble.of_examples(torch.tensor([4, 9, 2])):
        joint = ensemble.log_likelihood(ids, mask)
    with ensemble.of_examples(torch.tensor([4, 4, 2])):
        other = ensemble.log_likelihood(ids, mask)
    torch.testing.assert_close(joint[:, [0, 2]], other[:, [0, 2]], rtol=1e-5, atol=1e-5)
    assert (joint[:, 1] - other[:, 1]).abs().min() > 1e-4
    with ensemble.pairing([3, 0, 2], torch.tensor([9, 4, 2])):
        pairs = ensemble.log_likelihood(ids[[1, 0, 2]], mask[[1, 0, 2]])[0]
    torch.testing.assert_close(pairs, joint[[3, 0, 2], [1, 0, 2]], rtol=1e-5, atol=1e-5)
