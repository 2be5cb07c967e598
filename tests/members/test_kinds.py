"""A new kind of member is one class: it trains, is saved and loads, and nothing else in the project knows of it."""

import math

import pytest
import torch
from tiny import lora, padded_batch, scatter_members, tiny_ensemble, tiny_model, trainer_of
from torch import nn

from renyi import LoraEnsemble
from renyi.errors import ConfigError, EnsembleFormatError
from renyi.members import KINDS, MemberLayer, kind_of, register


@register
class ToyLayer(MemberLayer):
    """A ~ N(μ, σ² I) with one σ for each member and layer; B is a point."""

    kind = "toy"

    def __init__(self, A_MRI, B_MOR):
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(A_MRI), nn.Parameter(B_MOR)
        self.log_sigma = nn.Parameter(A_MRI.new_full((len(A_MRI), 1, 1), -2.0))

    @classmethod
    def drawn(cls, A_MRI, B_MOR):
        return cls(A_MRI, B_MOR)

    def matrices(self, noise):
        if noise is None:
            return self.mean()
        A, B, sigma = (x.repeat_interleave(noise.draws, dim=0) for x in (self.lora_A, self.lora_B, self.log_sigma))
        return A + sigma.exp() * torch.randn(A.shape, generator=noise.generator(self.number, A.device)), B

    def divergence(self, origin, prior_std):
        moved = (self.lora_A - origin["lora_A"]).square().sum((1, 2)) / prior_std**2
        log_ratio = 2 * (self.log_sigma.flatten() - math.log(prior_std))
        return 0.5 * (moved + self.lora_A[0].numel() * (log_ratio.exp() - 1 - log_ratio))


def toy_ensemble(members: int = 3) -> LoraEnsemble:
    return scatter_members(LoraEnsemble.from_base(tiny_model(), members, lora(), seed=7, member_kind="toy"))


def test_a_new_kind_trains_a_step_and_comes_back_from_its_folder(tmp_path):
    ensemble = toy_ensemble()
    before = [p.detach().clone() for p in ensemble.stack.parameters()]
    trainer_of(tmp_path / "run", model=ensemble, num_members=3, max_steps=1).train()  # σ learns from its noise only
    assert all(not torch.equal(p, q) for p, q in zip(before, ensemble.stack.parameters(), strict=True))
    ensemble.save(tmp_path / "saved")
    loaded = LoraEnsemble.load(tmp_path / "saved", base=tiny_model())
    assert loaded.stack.kind == "toy"
    for p, q in zip(loaded.stack.parameters(), ensemble.stack.parameters(), strict=True):
        assert torch.equal(p, q)
    ensemble.eval()
    torch.testing.assert_close(loaded.log_likelihood(*padded_batch()), ensemble.log_likelihood(*padded_batch()))


def test_the_prior_reaches_all_that_a_member_is(tmp_path):
    """A prior so narrow that it is all of the loss pulls σ down to its own width."""
    ensemble = toy_ensemble()
    trainer_of(tmp_path, model=ensemble, num_members=3, max_steps=2, prior_std=1e-4, max_grad_norm=0.0).train()
    assert all((layer.members.log_sigma < -2.0).all() for layer in ensemble.stack.layers.values())


def test_its_folder_without_what_is_beside_the_mean_is_damaged_and_its_members_are_peft_adapters(tmp_path):
    ensemble = toy_ensemble(2)
    ensemble.save(tmp_path)
    alone = LoraEnsemble.load([tmp_path / "member_1"], base=tiny_model())  # a point: the mean
    torch.testing.assert_close(alone.log_likelihood(*padded_batch())[0], ensemble.log_likelihood(*padded_batch())[1])
    (tmp_path / "member_1" / "distribution.safetensors").unlink()
    with pytest.raises(EnsembleFormatError, match="log_sigma"):
        LoraEnsemble.load(tmp_path, base=tiny_model())
    with pytest.raises(EnsembleFormatError, match="kind of member"):
        tiny_ensemble(2).restore(tmp_path)


def test_members_grow_shrink_and_are_copied_with_all_that_they_are(tmp_path):
    ensemble = toy_ensemble()
    with torch.no_grad():
        for layer in ensemble.stack.layers.values():
            layer.members.log_sigma.copy_(torch.arange(3.0)[:, None, None])
    ensemble.drop_member(1)
    assert all(layer.members.log_sigma.flatten().tolist() == [0, 2] for layer in ensemble.stack.layers.values())
    kept = ensemble.log_likelihood(*padded_batch())
    with ensemble.acting_as(ensemble.snapshot()):
        torch.testing.assert_close(ensemble.log_likelihood(*padded_batch()), kept.detach())
        ensemble.save(tmp_path)
    assert LoraEnsemble.load(tmp_path, base=tiny_model()).stack.kind == "point"


def test_noise_is_the_same_in_every_forward_of_a_step_and_only_there():
    ensemble, (ids, mask) = toy_ensemble(), padded_batch()
    mean = ensemble.log_likelihood(ids, mask)
    ensemble.redraw(5)
    first = ensemble.log_likelihood(ids, mask)
    assert not torch.allclose(first, mean, atol=1e-3)
    torch.testing.assert_close(ensemble.log_likelihood(ids, mask), first)
    with ensemble.pairing([2, 0, 1]):  # a routed step's second forward
        pairs = ensemble.log_likelihood(ids, mask)[0]
    torch.testing.assert_close(pairs, first[[2, 0, 1], [0, 1, 2]], rtol=1e-5, atol=1e-5)
    ensemble.redraw(6)
    assert not torch.allclose(ensemble.log_likelihood(ids, mask), first, atol=1e-3)
    ensemble.redraw(None)
    torch.testing.assert_close(ensemble.log_likelihood(ids, mask), mean)


def test_several_draws_are_rows_of_their_own():
    """M·S rows, member by member; each is the point ensemble of the matrices that were drawn."""
    ensemble, (ids, mask) = toy_ensemble(2), padded_batch()
    ensemble.redraw(3, draws=4)
    noise = ensemble.stack.selection.noise
    drawn = [layer.members.matrices(noise) for layer in ensemble.stack.layers.values()]
    ell = ensemble.log_likelihood(ids, mask)
    assert ell.shape == (8, 3)
    points = LoraEnsemble.from_base(tiny_model(), 8, lora())
    with points.stack.acting_as(drawn):
        torch.testing.assert_close(points.log_likelihood(ids, mask), ell)


def test_a_point_is_its_matrices_and_its_divergence_a_squared_distance():
    ensemble = tiny_ensemble(3)
    ensemble.redraw(1)
    noisy = ensemble.log_likelihood(*padded_batch())
    ensemble.redraw(None)
    assert torch.equal(noisy, ensemble.log_likelihood(*padded_batch()))
    before, divergence = ensemble.snapshot(), ensemble.stack.prior(0.3)
    assert torch.equal(divergence(), torch.zeros(3))
    scatter_members(ensemble, std=0.2, seed=9)
    after = ensemble.snapshot()
    moved = sum(
        (p - q).double().square().sum((1, 2))
        for then, now in zip(before.layers, after.layers, strict=True)
        for p, q in zip(then, now, strict=True)
    )
    torch.testing.assert_close(divergence().double(), moved / (2 * 0.3**2))


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match="gausian"):
        LoraEnsemble.from_base(tiny_model(), 2, lora(), member_kind="gausian")
    assert kind_of("point").kind == "point"
    assert "toy" in KINDS
