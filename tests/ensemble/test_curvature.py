"""Gradients and curvature of one adapter against plain autograd on a tiny model."""

from collections.abc import Iterator

import pytest
import torch
from float64 import in_float64
from tiny import padded_batch, tiny_ensemble
from torch import Tensor
from torch.func import functional_call
from torch.utils.data import DataLoader

from renyi import LoraEnsemble
from renyi.ensemble.curvature import (
    AdapterSpace,
    Batch,
    diagnose_curvature,
    fisher_product,
    hessian_product,
    per_example_gradients,
    project,
    project_pairs,
)
from renyi.errors import ConfigError, DataError
from renyi.measures import critical_directions, cross_fitted, stability_spectrum
from renyi.members.adapters import joint_layers
from renyi.zoo.demo import held_out_seed, train
from renyi.zoo.world import World

KINDS = ["llama", "qwen2", "gpt2", "neox", "gemma2", "cohere", "granite"]
SMALL = {"r": 1, "target_modules": ["q_proj"]}  # few parameters, so that dense matrices fit


# Llama normalises in float32 whatever its own precision; GPT-2 is float64 throughout, as finite differences need.
EXACT = {"kind": "gpt2", "r": 1, "target_modules": ["c_attn"]}


def batch_of(seed: int = 3, prompt: int = 2) -> Batch:
    """Rows of 9, 6 and 4 tokens, the first two of each not trained."""
    input_ids, attention_mask = padded_batch(seed=seed)
    labels = input_ids.masked_fill((attention_mask == 0) | (torch.arange(9) < prompt), -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def space_of(kind: str = "llama", dtype: torch.dtype = torch.float64, **config) -> AdapterSpace:
    return AdapterSpace(tiny_ensemble(3, kind, **config).to(dtype), member=1)


def token_log_probs(space: AdapterSpace, theta: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's own logits of one adapter θ [P], the obvious way: log p of every token [B, T − 1], and p itself."""
    base = space.ensemble.base
    names = joint_layers(base)
    matrices = space.unflatten(theta).values()
    swapped = {}
    for name, (A, B) in zip(names, matrices, strict=True):
        swapped |= {f"{name}.members.lora_A": A[None], f"{name}.members.lora_B": B[None]}
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    log_p = functional_call(base, swapped, kwargs=inputs).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    taken = log_p.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return taken.masked_fill(labels == -100, 0.0), log_p.exp()


def log_likelihoods(space: AdapterSpace, theta: Tensor, batch: Batch) -> Tensor:
    return token_log_probs(space, theta, batch)[0].sum(1)


def looped_gradients(space: AdapterSpace, batch: Batch) -> Tensor:
    theta = space.origin.clone().requires_grad_()
    ell = log_likelihoods(space, theta, batch)
    return torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in ell])


@pytest.fixture(autouse=True)
def _plain_attention() -> Iterator[None]:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@pytest.fixture
def _float64_norms() -> Iterator[None]:
    """Norms in float64, too: in float32 two ways to one figure differ by what the CPU's order of sums leaves."""
    with in_float64():
        yield


def orthonormal(space: AdapterSpace, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.linalg.qr(torch.randn(space.size, k, generator=generator, dtype=space.origin.dtype))[0]


# Members are examples


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_loop_over_examples(kind):
    space, batch = space_of(kind, torch.float32), batch_of()
    ell, gradients = per_example_gradients(space, batch)
    with torch.no_grad():
        torch.testing.assert_close(ell, space.ensemble.log_likelihood(**batch)[1])
    expected = looped_gradients(space, batch)
    assert (gradients - expected).norm() <= 1e-5 * expected.norm()
    assert gradients.shape == (3, space.size)


def test_gradients_follow_the_order_of_flatten():
    """A step along an example's own gradient of one matrix raises that example, as its squared norm says."""
    space, batch = space_of("gpt2"), batch_of()
    _, gradients = per_example_gradients(space, batch)
    matrices = space.unflatten(gradients)
    assert torch.equal(space.flatten(matrices), gradients)
    name = list(matrices)[3]
    A, B = (torch.zeros_like(x) for x in matrices[name])
    B[0] = matrices[name][1][0]
    only = {n: (torch.zeros_like(x), torch.zeros_like(y)) for n, (x, y) in matrices.items()} | {name: (A, B)}
    step = 1e-6 * space.flatten(only)[0]
    with torch.no_grad():
        up, down = (log_likelihoods(space, space.origin + sign * step, batch)[0] for sign in (1, -1))
    assert ((up - down) / 2e-6).item() == pytest.approx(B[0].square().sum().item(), rel=1e-4)


def test_an_example_without_trained_tokens_has_no_gradient():
    space, batch = space_of(dtype=torch.float32), dict(batch_of())
    batch["labels"] = batch["labels"].clone()
    batch["labels"][1] = -100
    ell, gradients = per_example_gradients(space, batch)
    assert ell[1] == 0
    assert not gradients[1].any()
    assert gradients[0].any()
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    found = project(space, [nothing], orthonormal(space, 2))
    assert not found.curvature.any()


def test_the_ensemble_is_left_as_it_was():
    ensemble = tiny_ensemble(2, lora_dropout=0.5).train()
    space, batch = AdapterSpace(ensemble), batch_of()
    before = {name: p.clone() for name, p in ensemble.named_parameters()}
    _, first = per_example_gradients(space, batch)
    project(space, [batch], orthonormal(space, 2))
    hessian_product(space, [batch], orthonormal(space, 2))
    assert ensemble.training
    assert all(torch.equal(p, before[name]) for name, p in ensemble.named_parameters())
    assert all(p.grad is None for p in ensemble.parameters())
    assert torch.equal(first, per_example_gradients(space, batch)[1])  # no dropout


# V, exactly


def dense_fisher(space: AdapterSpace, batch: Batch) -> Tensor:
    """Σ over tokens that might have followed of p · score scoreᵀ, an example at a time: [N, P, P]."""
    theta = space.origin

    def log_p(theta: Tensor) -> Tensor:
        return token_log_probs(space, theta, batch)[1].log()

    jacobian = torch.func.jacrev(log_p)(theta)
    p = token_log_probs(space, theta, batch)[1].detach()
    trained = (batch["labels"][:, 1:] != -100).double()
    return torch.einsum("nt,ntv,ntvp,ntvq->npq", trained, p, jacobian, jacobian)


@pytest.fixture(scope="module")
def small() -> tuple[AdapterSpace, Batch, Tensor]:
    """A space of few parameters, a batch, and its dense Fisher matrices."""
    space, batch = space_of(**SMALL), batch_of()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return space, batch, dense_fisher(space, batch)


@pytest.mark.parametrize("tokens_per_pass", [1, 60, 1 << 14])
def test_projected_fisher_is_the_sum_over_every_token(small, tokens_per_pass):
    space, batch, dense_NPP = small
    basis = orthonormal(space, 5)
    found = project(space, [batch, batch], basis, tokens_per_pass=tokens_per_pass)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.curvature[:3], basis.T @ dense_NPP @ basis, **close)
    torch.testing.assert_close(found.curvature[3:], found.curvature[:3], **close)
    torch.testing.assert_close(found.gradients[:3], looped_gradients(space, batch) @ basis, **close)
    torch.testing.assert_close(found.log_likelihood[:3], log_likelihoods(space, space.origin, batch), **close)


@pytest.mark.usefixtures("_float64_norms")
def test_the_empirical_matrix_is_of_single_tokens(small):
    space, batch, _ = small
    basis = orthonormal(space, 3)
    by_token = torch.func.jacrev(lambda theta: token_log_probs(space, theta, batch)[0])(space.origin) @ basis
    torch.testing.assert_close(project(space, [batch], basis).empirical, by_token.mT @ by_token)


@pytest.mark.parametrize("kind", KINDS)
def test_projected_fisher_of_every_architecture(kind):
    """Against the curvature of KL(p_θ ‖ p_θ+δ) along each direction, whose Hessian at δ = 0 is the Fisher matrix."""
    space, batch = space_of(kind), batch_of()
    basis = orthonormal(space, 3)
    p = token_log_probs(space, space.origin, batch)[1].detach()
    trained = (batch["labels"][:, 1:] != -100).double()

    def kl(c: Tensor) -> Tensor:
        log_q = token_log_probs(space, space.origin + basis @ c, batch)[1].log()
        return -(trained[..., None] * p * log_q).sum()

    hessian = torch.autograd.functional.hessian(kl, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(project(space, [batch], basis).curvature.sum(0), hessian, rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("_float64_norms")
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_projected_hessian_is_that_of_autograd(kind):
    space, batch = space_of(kind), batch_of()
    basis = orthonormal(space, 4)
    found = project(space, [batch], basis, "hessian")
    for example in range(3):

        def nll(c: Tensor, example: int = example) -> Tensor:
            return -log_likelihoods(space, space.origin + basis @ c, batch)[example]

        expected = torch.autograd.functional.hessian(nll, torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(found.curvature[example], expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.gradients, project(space, [batch], basis).gradients)
    assert found.empirical is None


@pytest.mark.parametrize("tokens_per_pass", [60, 1 << 14])
def test_products_in_the_whole_space(tokens_per_pass):
    """The Fisher matrix's against the dense one, the Hessian's against differences of gradients."""
    space, batch = space_of(**EXACT), batch_of()
    vectors = orthonormal(space, 3)
    found = fisher_product(space, [batch, batch], vectors, tokens_per_pass)
    torch.testing.assert_close(found, dense_fisher(space, batch).mean(0) @ vectors)

    size = 1e-5
    slopes = []
    for sign in (1, -1):
        theta = (space.origin[:, None] + sign * size * vectors).T.clone().requires_grad_()
        nll = torch.stack([-log_likelihoods(space, t, batch).mean() for t in theta])
        slopes.append(torch.autograd.grad(nll.sum(), theta)[0].T)
    finite = (slopes[0] - slopes[1]) / (2 * size)
    torch.testing.assert_close(hessian_product(space, [batch], vectors, tokens_per_pass), finite, rtol=1e-5, atol=1e-7)


def test_fisher_product_under_a_softcap():
    space, batch = space_of("gemma2"), batch_of()
    vectors = orthonormal(space, 2)
    projected = project(space, [batch], vectors).curvature.mean(0)
    torch.testing.assert_close(vectors.T @ fisher_product(space, [batch], vectors), projected)


def test_fisher_is_the_hessian_where_labels_are_the_models_own():
    """On average over labels drawn at every position given the same prefixes, exactly: Σ_y p(y) hessian(y)."""
    space, batch = space_of(**SMALL), dict(batch_of())
    basis = orthonormal(space, 2)
    position = 4  # train the token at this position only, whatever it is
    p = token_log_probs(space, space.origin, batch)[1].detach()[:2, position - 1]
    expected = torch.zeros(2, 2, 2, dtype=torch.float64)
    rows = {name: value[:2] for name, value in batch.items()}
    fisher = None
    for token in range(p.shape[1]):
        labels = torch.full_like(rows["labels"], -100)
        labels[:, position] = token
        relabelled = {**rows, "labels": labels}
        expected += p[:, token, None, None] * project(space, [relabelled], basis, "hessian").curvature
        fisher = project(space, [relabelled], basis).curvature if fisher is None else fisher
    torch.testing.assert_close(expected, fisher, rtol=1e-6, atol=1e-9)


def test_the_gauge_of_lora_moves_nothing():
    """A → (1 + εX)A, B → B(1 − εX): no gradient along it, and no curvature, so V alone is singular."""
    space, batch = space_of(), batch_of()
    matrices = space.unflatten(space.origin)
    X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gauge = space.flatten({name: (X @ A, -B @ X) for name, (A, B) in matrices.items()})[:, None]
    basis = torch.cat([gauge / gauge.norm(), orthonormal(space, 1)], dim=1)
    found = project(space, [batch], basis)
    assert found.gradients[:, 0].abs().max() <= 1e-10 * found.gradients[:, 1].abs().max()
    assert found.curvature[:, 0].abs().max() <= 1e-10 * found.curvature[:, 1, 1].max()
    J = found.gradients.T @ found.gradients / 3
    eigenvalues = torch.linalg.eigvalsh(found.curvature.mean(0))
    assert eigenvalues[0] <= 1e-10 * eigenvalues[1]
    alone = stability_spectrum(found.curvature.mean(0)[1:, 1:], J[1:, 1:])
    damped = stability_spectrum(found.curvature.mean(0), J, damping=1e-9)
    assert damped.critical_alpha == pytest.approx(alone.critical_alpha, rel=1e-5)


def test_iteration_in_the_whole_space_finds_what_dense_matrices_say(small):
    space, batch, dense_NPP = small
    _, gradients = per_example_gradients(space, batch)
    damping = 1.0 * dense_NPP.mean(0).diagonal().mean().item()
    J = gradients.T @ gradients / 3
    dense = stability_spectrum(dense_NPP.mean(0), J, damping)
    found = critical_directions(
        lambda x: fisher_product(space, [batch], x),
        lambda x: gradients.T @ (gradients @ x) / 3,
        space.size,
        2,
        damping,
    )
    assert found.converged
    assert found.critical_alpha == pytest.approx(dense.critical_alpha, rel=1e-5)


# Members along directions


def test_displaced_members_are_where_they_should_be():
    space, batch = space_of("gpt2"), batch_of()
    _, gradients = per_example_gradients(space, batch)
    step = 1e-2 * gradients[0] / gradients[0].norm()
    with space.ensemble.acting_as(space.displaced(torch.stack([0 * step, step, -step, step]))):
        ell = space.ensemble.log_likelihood(**batch)
    assert ell.shape == (4, 3)
    assert torch.equal(ell[0], space.ensemble.log_likelihood(**batch)[1].detach())
    assert torch.equal(ell[1], ell[3])
    torch.testing.assert_close((ell[1] - ell[2]) / 2, gradients @ step, rtol=0.01, atol=1e-4)


# Pairs


def test_pairs_are_bernoulli_trials_of_their_margins():
    space = space_of(**SMALL)
    rows = [batch_of(seed) for seed in (3, 4)]  # chosen, then rejected
    pairs = {name: torch.cat([r[name] for r in rows]) for name in rows[0]}
    pairs["reference"] = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)

    def margin(log_probs: Tensor, batch: Batch) -> Tensor:
        chosen, rejected = log_probs.sum(1).chunk(2)
        return 0.5 * (chosen - rejected) - batch["reference"]

    basis = orthonormal(space, 3)
    found = project_pairs(space, [pairs], basis, margin)

    def log_sigmoid(c: Tensor, sign: float = 1.0) -> Tensor:
        log_probs = token_log_probs(space, space.origin + basis @ c, pairs)[0]
        return torch.nn.functional.logsigmoid(sign * margin(log_probs, pairs))

    start = torch.zeros(3, dtype=torch.float64)
    ell, other = log_sigmoid(start).detach(), log_sigmoid(start, -1.0).detach()
    torch.testing.assert_close(found.log_likelihood.double(), ell, rtol=1e-5, atol=1e-6)
    score, other_score = (torch.func.jacrev(log_sigmoid)(start, sign) for sign in (1.0, -1.0))
    torch.testing.assert_close(found.gradients.double(), score, rtol=1e-5, atol=1e-6)
    # The Fisher matrix: over both outcomes.
    fisher = sum(x.exp()[:, None, None] * s[:, :, None] * s[:, None] for x, s in ((ell, score), (other, other_score)))
    torch.testing.assert_close(found.curvature.double(), fisher, rtol=1e-5, atol=1e-6)
    through = diagnose_curvature(space, [pairs], [pairs], 2, margin=margin)
    assert through.gradients.shape == (3, 2)
    torch.testing.assert_close(through.log_likelihood, found.log_likelihood)


# The whole way


def test_diagnosis_of_a_dataset():
    """Gradients of some examples span the subspace; the others are projected on it, and cross-fitting takes that."""
    space = space_of(dtype=torch.float32)
    data = [batch_of(seed) for seed in range(12)]
    found = diagnose_curvature(space, data[4:], data[:4], num_directions=4)
    assert found.curvature.shape == (24, 4, 4)
    spanned = torch.cat([per_example_gradients(space, b)[1] for b in data[:4]])
    leading = torch.linalg.svd(spanned, full_matrices=False)[2][:4]
    captured, best = (spanned @ found.basis).square().sum(), (spanned @ leading.T).square().sum()
    assert captured >= 0.97 * best
    result = cross_fitted(found.gradients, found.curvature, found.empirical, resamples=20)
    assert result.critical_alpha > 0
    assert result.loadings.shape == (24,)

    chance = diagnose_curvature(space, data[4:6], None, num_directions=4, seed=1)
    assert chance.gradients.square().sum() < found.gradients[:6].square().sum()
    assert torch.equal(chance.basis, diagnose_curvature(space, data[4:5], None, num_directions=4, seed=1).basis)


def test_what_cannot_be_diagnosed():
    space, batch = space_of(dtype=torch.float32), batch_of()
    basis = orthonormal(space, 2)
    with pytest.raises(ConfigError, match="unknown curvature 'jacobian'"):
        project(space, [batch], basis, "jacobian")
    with pytest.raises(DataError, match="no examples"):
        project(space, [], basis)
    with pytest.raises(ConfigError, match="no member 3 of 3"):
        AdapterSpace(space.ensemble, 3)
    with space.ensemble.using([0]), pytest.raises(ConfigError, match="using"):
        per_example_gradients(space, batch)
    assert diagnose_curvature(space, [batch], [batch], 9).basis.shape[1] == 3  # as many as the gradients span


def test_half_precision_bases_are_projected_in_float32():
    ensemble: LoraEnsemble = tiny_ensemble(1)
    exact = AdapterSpace(ensemble)
    basis = orthonormal(exact, 2)
    expected = project(exact, [batch_of()], basis)
    for parameter in ensemble.base.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    rounded = AdapterSpace(ensemble)
    found = project(rounded, [batch_of()], basis)
    assert found.gradients.dtype == found.curvature.dtype == torch.float32
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=0.1, atol=0.1)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=0.15, atol=0.1)
    assert per_example_gradients(rounded, batch_of())[1].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("statements", "formula"), [(4, 0.404), (8, 0.225)])
def test_the_worlds_contradictions_are_found_in_one_fitted_adapter(tmp_path, statements, formula):
    """The critical alpha of DESIGN 3.3, from an adapter that has averaged the two schools, within 15 %."""
    world = World(statements=statements, contested=0.5)
    trainer, _ = train(world, 1, 0.0, tmp_path, seed=0, max_steps=300)
    rows = DataLoader(
        trainer.eval_dataset.select_columns(["input_ids", "labels"]), batch_size=32, collate_fn=trainer.data_collator
    )
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask", "labels")} for batch in rows]
    half = len(batches) // 2
    found = diagnose_curvature(AdapterSpace(trainer.model), batches[half:], batches[:half], num_directions=32)
    for curvature in (found.curvature, found.empirical):
        assert cross_fitted(found.gradients, curvature).critical_alpha == pytest.approx(formula, rel=0.15)
    records = world.records(512, held_out_seed(0))[half * 32 :]
    source = torch.tensor([2.0 * record.source - 1 for record in records])
    loadings = cross_fitted(found.gradients, found.curvature).loadings
    assert abs(torch.corrcoef(torch.stack([loadings.float(), source]))[0, 1]) > 0.8
