"""Gaussian members against closed forms, torch.distributions, and point ensembles of their draws."""

import math

import numpy as np
import pytest
import torch
from peft import PeftModel
from tiny import lora, padded_batch, scatter_members, tiny_model
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.members import Noise, kind_of
from renyi.members.kind import MemberLayer
from renyi.objectives import renyi_loss

ALPHAS = (0.1, 0.2, 0.3, 0.5, 0.8, 1.0)  # those of DESIGN 3.3
VARIANCE = 4.0  # of the data


def location(mean: float, std: float) -> MemberLayer:
    """One layer whose draws are θ = B A · 1 ~ N(mean, std²), in float64."""
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    layer = kind_of("gaussian").drawn(mean * one, one.clone())
    layer.set_std(std)
    return layer


def drawn(layer: MemberLayer, seed: int, draws: int) -> Tensor:
    A, B = layer.matrices(Noise(seed, draws))
    return (B @ A).flatten()


def normal_log_density(x: Tensor, theta: Tensor) -> Tensor:
    """[S, N]"""
    return -((x - theta[:, None]) ** 2) / 2 - math.log(2 * math.pi) / 2


def closed_form(x: Tensor, mean: Tensor, variance: Tensor, alpha: float) -> Tensor:
    wide = 1 + alpha * variance
    return math.log(2 * math.pi) / 2 + wide.log() / (2 * alpha) + (x - mean) ** 2 / (2 * wide)


def data(std: float) -> tuple[Tensor, Tensor]:
    """Points and weights of N(0, std²)."""
    x = torch.linspace(-6 * std, 6 * std, 31, dtype=torch.float64)
    return x, (-(x**2) / (2 * std**2)).softmax(0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_loss_of_a_gaussian_member_is_the_closed_form(alpha):
    """The expectation over draws by Gauss–Hermite quadrature: each node is a draw with the node's weight."""
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(80))
    mean, std, x = 0.3, 1.4, torch.linspace(-5, 5, 11, dtype=torch.float64)
    loss = renyi_loss(normal_log_density(x, mean + std * nodes), alpha, weights.log())
    exact = closed_form(x, torch.tensor(mean, dtype=x.dtype), torch.tensor(std**2, dtype=x.dtype), alpha)
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_of_s_draws_falls_to_the_exact_one_from_above_and_at_order_zero_has_no_bias(alpha):
    layer, x = location(0.3, 1.4), torch.tensor([0.5, 2.0], dtype=torch.float64)
    mean, variance = torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.4**2, dtype=torch.float64)
    if alpha:
        exact = closed_form(x, mean, variance, alpha).mean()
    else:
        exact = (math.log(2 * math.pi) / 2 + ((x - mean) ** 2 + variance) / 2).mean()
    theta = drawn(layer, 5, 2**16).detach()
    means, errors = [], []
    for draws in (1, 4, 16, 64):
        estimates = renyi_loss(normal_log_density(x, theta).unflatten(0, (draws, -1)), alpha).mean(dim=1)
        means.append(float(estimates.mean() - exact))
        errors.append(float(estimates.std() / len(estimates) ** 0.5))
    if alpha == 0:
        assert all(abs(bias) < 4 * error for bias, error in zip(means, errors, strict=True))
    else:
        assert means == sorted(means, reverse=True)
        assert means[0] > 20 * errors[0]
        assert means[-1] > -4 * errors[-1]
        assert means[-1] < 0.1 * means[0]


def fitted(loss, layer: MemberLayer, steps: int, rate: float = 0.1) -> tuple[float, float]:
    """Mean and variance after minimising `loss(seed)` over μ and log σ; the mean of the second half of the steps."""
    trained = [layer.lora_A, layer.log_std]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
        seen.append((layer.lora_A.item(), layer.log_std.item()))
    mean, log_std = np.mean(seen[steps // 2 :], axis=0)
    return float(mean), float(np.exp(2 * log_std))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_one_gaussian_member_reaches_the_optimal_variance(alpha):
    """max(0, s² − 1/α): what eight points only approach (0.643, 1.977, 2.780, 3.089 for the last four)."""
    x, weights = data(VARIANCE**0.5)
    layer = location(0.2, 1.0)

    def loss(step: int) -> Tensor:
        return weights @ renyi_loss(normal_log_density(x, drawn(layer, step, 1024)), alpha)

    _, variance = fitted(loss, layer, steps=300)
    best = max(0.0, VARIANCE - 1 / alpha)
    assert variance == pytest.approx(best, rel=0.02, abs=0.02)


def test_at_order_zero_a_prior_gives_the_conjugate_posterior():
    prior_std, x = 0.7, torch.tensor([0.4, 1.9, 2.2, 1.1, 3.0], dtype=torch.float64)
    layer = location(0.0, 0.1)
    origin = {name: value.clone() for name, value in layer.state_dict().items()}

    def loss(step: int) -> Tensor:
        fit = renyi_loss(normal_log_density(x, drawn(layer, step, 256)), 0.0).mean()
        return fit + layer.divergence(origin, prior_std)[0] / len(x)

    mean, variance = fitted(loss, layer, steps=500)
    precision = len(x) + 1 / prior_std**2
    assert mean == pytest.approx(float(x.sum()) / precision, rel=0.02)
    assert variance == pytest.approx(1 / precision, rel=0.02)


def test_its_divergence_is_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    A, moved = (torch.randn(3, 2, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    layer = kind_of("gaussian").drawn(A.clone(), torch.zeros(3, 4, 2, dtype=torch.float64))
    origin = {name: value.clone() for name, value in layer.state_dict().items()}
    with torch.no_grad():
        layer.lora_A.add_(moved)
        layer.log_std.add_(torch.randn(3, 2, 5, generator=generator))
        layer.lora_B.fill_(0.3)
    posterior, prior = Normal(layer.lora_A, layer.log_std.exp()), Normal(A, torch.tensor(0.2, dtype=torch.float64))
    expected = kl_divergence(posterior, prior).sum((1, 2)) + 8 * 0.3**2 / (2 * 0.2**2)
    torch.testing.assert_close(layer.divergence(origin, 0.2), expected, rtol=1e-12, atol=0)


# Draws for each example


def gaussian_ensemble(members: int = 2, std: float = 0.05, model=None) -> LoraEnsemble:
    ensemble = LoraEnsemble.from_base(model or tiny_model(), members, lora(), seed=7, member_kind="gaussian")
    ensemble.stack.set_std(std)
    return scatter_members(ensemble)


def draws_of(ensemble: LoraEnsemble, example: int, draws: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's A [M·S, R, I] and B that one example sees, by applying every draw to the identity."""
    selection, found = ensemble.stack.selection, []
    for layer in ensemble.stack.layers.values():
        A, B = layer.members.matrices(selection.noise)
        eye = torch.eye(A.shape[2], dtype=A.dtype).expand(len(A), -1, -1)
        with ensemble.of_examples(torch.tensor([example])):
            found.append((layer.members.project(eye, A, selection).transpose(1, 2), B))
    return found


def test_every_example_sees_a_draw_of_its_own_and_the_joint_forward_is_the_loop_over_their_adapters():
    ensemble, (ids, mask) = gaussian_ensemble(2), padded_batch()
    mean = ensemble.log_likelihood(ids, mask)
    ensemble.redraw(3, draws=3)
    with ensemble.of_examples(torch.tensor([4, 9, 2])):
        joint = ensemble.log_likelihood(ids, mask)
        assert joint.shape == (6, 3)
    points = LoraEnsemble.from_base(tiny_model(), 6, lora())
    for row, example in enumerate((4, 9, 2)):
        with points.stack.acting_as(draws_of(ensemble, example, 3)):
            alone = points.log_likelihood(ids[row : row + 1], mask[row : row + 1])[:, 0]
        torch.testing.assert_close(joint[:, row], alone, rtol=1e-5, atol=1e-5)
    with ensemble.pairing([5, 0, 3, 3], torch.tensor([9, 4, 2, 4])):  # a routed step's second forward
        pairs = ensemble.log_likelihood(ids[[1, 0, 2, 0]], mask[[1, 0, 2, 0]])[0]
    torch.testing.assert_close(pairs, joint[[5, 0, 3, 3], [1, 0, 2, 0]], rtol=1e-5, atol=1e-5)
    ensemble.redraw(None)
    torch.testing.assert_close(ensemble.log_likelihood(ids, mask), mean)


def test_noise_of_examples_draws_entries_and_layers_is_uncorrelated_and_has_the_right_moments():
    ensemble = gaussian_ensemble(1, std=0.05)
    first, second = list(ensemble.stack.layers.values())[:2]
    selection, seen = ensemble.stack.selection, []
    eye = torch.eye(first.members.lora_A.shape[2]).expand(2, -1, -1)
    for seed in range(400):
        ensemble.redraw(seed, draws=2)
        with ensemble.of_examples(torch.tensor([0, 1])):
            both = torch.cat([eye, eye], dim=1)
            found = [
                layer.members.project(both, layer.members.matrices(selection.noise)[0], selection)
                for layer in (first, second)
            ]
        # [layer, draw, example, I, R] around the mean
        noise = torch.stack([f.unflatten(1, (2, -1)) for f in found])
        noise = noise - torch.stack([x.members.lora_A[0].T for x in (first, second)])[:, None, None]
        seen.append(noise.flatten(0, 2)[:, :3, :2].flatten())  # a few entries
    noise = torch.stack(seen).double() / 0.05  # [400, 8 · 6], standard normal each, and uncorrelated
    assert noise.mean(dim=0).abs().max() < 4.5 / 20
    correlation = noise.T @ noise / 400
    assert (correlation.diagonal() - 1).abs().max() < 4.5 * 2**0.5 / 20
    assert (correlation - correlation.diagonal().diag()).abs().max() < 5 / 20


def test_signs_are_balanced_and_unlike_for_examples_draws_layers_and_steps():
    places = torch.arange(64)
    draws, examples = torch.zeros_like(places)[None], places[None]
    some = [
        Noise(seed, 1).signs(layer, draws + draw, examples + shift, 256)[0]
        for seed, layer, draw, shift in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 64))
    ]
    signs = torch.cat(some)  # [5 · 64, 256]
    assert (signs.abs() == 1).all()
    assert abs(signs.mean()) < 4 / signs.numel() ** 0.5
    alike = signs @ signs.T / 256
    alike.fill_diagonal_(0)
    assert alike.abs().max() < 6 / 16
    columns = signs.T @ signs / len(signs)
    columns.fill_diagonal_(0)
    assert columns.abs().max() < 6 / len(signs) ** 0.5
    assert torch.equal(some[0][5:9], Noise(0, 1).signs(0, draws[:, :4], examples[:, 5:9], 256)[0])


def test_without_spread_draws_are_the_mean():
    ensemble, batch = gaussian_ensemble(2, std=0.0), padded_batch()
    mean = ensemble.log_likelihood(*batch)
    ensemble.redraw(1)
    torch.testing.assert_close(ensemble.log_likelihood(*batch), mean, rtol=1e-6, atol=1e-6)


# Draws and means as ordinary ensembles


def test_draws_are_an_ordinary_ensemble_that_peft_agrees_with(tmp_path):
    """Its members are PEFT adapters: the joint forward is the loop over them, and the weights are π/S."""
    ensemble, (ids, mask) = gaussian_ensemble(2), padded_batch()
    ensemble.weights.copy_(torch.tensor([0.7, 0.3]))
    drawn = ensemble.draw(3, seed=5)
    assert (drawn.num_members, drawn.num_draws, drawn.stack.kind) == (6, 3, "point")
    torch.testing.assert_close(drawn.weights, torch.tensor([0.7, 0.7, 0.7, 0.3, 0.3, 0.3]) / 3)
    ell = drawn.log_likelihood(ids, mask)
    drawn.save(tmp_path / "drawn")
    for member in range(6):
        alone = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "drawn" / f"member_{member}"))
        with torch.no_grad():
            logits = alone(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0].mul(mask[:, 1:]).sum(-1)
        torch.testing.assert_close(ell[member], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ensemble.draw(3, seed=5).log_likelihood(ids, mask), ell)
    assert not torch.equal(ensemble.draw(3, seed=6).log_likelihood(ids, mask), ell)
    loaded = LoraEnsemble.load(tmp_path / "drawn", base=tiny_model())
    assert loaded.num_draws == 3
    torch.testing.assert_close(loaded.log_likelihood(ids, mask), ell)


def test_the_mean_is_an_ensemble_of_points_and_the_base_is_shared():
    ensemble, batch = gaussian_ensemble(2), padded_batch()
    mean = ensemble.mean()
    torch.testing.assert_close(mean.log_likelihood(*batch), ensemble.log_likelihood(*batch))
    base, other = ensemble.base.model, mean.base.model
    assert base is not other
    assert base.embed_tokens.weight is other.embed_tokens.weight
    with torch.no_grad():
        ensemble.stack.parameters()[0].add_(1.0)  # members are copies
    assert not torch.allclose(mean.log_likelihood(*batch), ensemble.log_likelihood(*batch), atol=1e-3)
    with ensemble.using([1]), torch.no_grad():
        assert mean.log_likelihood(*batch).shape == (2, 3)  # the selection is not shared
    with pytest.raises(ConfigError, match="nothing to draw"):
        mean.draw(2)
    with pytest.raises(ConfigError, match="is 0"):
        ensemble.draw(0)


def test_the_mean_of_many_draws_approaches_the_mean_and_their_variance_the_spread():
    ensemble = gaussian_ensemble(1, std=0.05)
    drawn = ensemble.draw(2000, seed=1).stack.matrices()
    for name, (A, B) in ensemble.stack.matrices().items():
        samples = drawn[name][0].double()
        assert (samples.mean(0) - A[0]).abs().max() < 5 * 0.05 / 2000**0.5
        assert ((samples - A[0]).square().mean() / 0.05**2 - 1).abs() < 0.02
        assert torch.equal(drawn[name][1], B.expand_as(drawn[name][1]))


def test_a_folder_keeps_the_distribution_beside_adapters_of_the_mean(tmp_path):
    ensemble, batch = gaussian_ensemble(2), padded_batch()
    with torch.no_grad():
        for layer in ensemble.stack.layers.values():
            layer.members.log_std.add_(torch.randn_like(layer.members.log_std))
    ensemble.save(tmp_path)
    loaded = LoraEnsemble.load(tmp_path, base=tiny_model())
    torch.testing.assert_close(loaded.draw(2, 3).log_likelihood(*batch), ensemble.draw(2, 3).log_likelihood(*batch))
    mean = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "member_1"))
    A = dict(mean.named_parameters())["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"]
    assert torch.equal(A, ensemble.adapter(1)["model.layers.0.self_attn.q_proj"][0])


def test_uncertainty_of_generated_tokens_has_three_parts():
    ensemble, (ids, mask) = gaussian_ensemble(2, std=0.5), padded_batch("left")
    found = ensemble.draw(3, 1).generate(ids, mask, max_new_tokens=4)
    assert found.within_members.amax() > 1e-4
    assert found.between_members.amax() > 1e-4
    torch.testing.assert_close(found.aleatoric + found.within_members + found.between_members, found.total)
    torch.testing.assert_close(found.within_members + found.between_members, found.epistemic)
    plain = ensemble.generate(ids, mask, max_new_tokens=4)
    assert (plain.within_members == 0).all()
    assert torch.equal(plain.between_members, plain.epistemic)
