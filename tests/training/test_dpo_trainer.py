"""What a preference run does besides being TRL's: the coupled gradient, the reference, what is logged and kept."""

import pytest
import torch
from datasets import Dataset
from tiny import (
    dpo_trainer_of,
    logged,
    member_distance,
    pair_rows,
    quiet,
    scatter_members,
    tiny_ensemble,
    tiny_model,
    tiny_tokenizer,
)

from renyi import LoraEnsemble, RenyiDPOConfig, RenyiDPOTrainer
from renyi.ensemble import Reference, completion_labels, read_preference, write_preference
from renyi.errors import ConfigError, DataError, EnsembleFormatError, TrainingDivergedError
from renyi.objectives import (
    LogRatios,
    PreferenceLoss,
    completion_log_prob,
    effective_members,
    preference_log_likelihood,
    renyi_loss,
    responsibilities,
)
from renyi.training import reference_cache

PARTING = {"alpha": 0.8, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "learning_rate": 2e-2, "max_steps": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "HF_HOME", str(tmp_path / "home"))


def batch_of(trainer, rows: int = 4) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def margins(trainer, batch) -> torch.Tensor:
    """Δ [M, B] from two plain forwards, with the gradient."""
    model = trainer.model
    both = model(batch["input_ids"], batch["attention_mask"], completion_labels(batch)).log_probs.sum(-1)
    with torch.no_grad(), model.using(()):
        base = model(batch["input_ids"], batch["attention_mask"], completion_labels(batch)).log_probs.sum(-1)
    chosen, rejected = (both - base).chunk(2, dim=1)
    return trainer.args.beta * (chosen - rejected)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_gradient_is_weighted_by_responsibilities(tmp_path, alpha):
    settings = {"num_members": 3, "alpha": alpha, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}
    trainer = dpo_trainer_of(tmp_path, model=tiny_ensemble(3), reference="base", **settings)
    batch = batch_of(trainer)
    trainer.state.max_steps = 1
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    coupled = [p.grad.clone() for p in trainer.trained_parameters()]
    trainer.model.zero_grad()

    ell = torch.nn.functional.logsigmoid(margins(trainer, batch))
    r = responsibilities(ell.detach(), alpha)
    assert alpha == 0 or (r - 1 / 3).abs().max() > 1e-3  # there is something to weight
    (-3 * (r * ell).sum() / ell.shape[1]).backward()  # M times: a member learns as fast as it would alone
    for ours, weighted in zip(coupled, trainer.trained_parameters(), strict=True):
        torch.testing.assert_close(ours, weighted.grad, rtol=1e-4, atol=1e-7)


def test_the_reported_loss_is_the_objective(tmp_path):
    trainer = dpo_trainer_of(tmp_path, model=tiny_ensemble(3), num_members=3, reference="base", **PARTING)
    trainer.state.max_steps = 1
    batch = batch_of(trainer)
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
        expected = renyi_loss(torch.nn.functional.logsigmoid(margins(trainer, batch)), 0.8).mean()
    torch.testing.assert_close(found, expected)


class Forwards:
    """Counts the rows that go through the base, with and without a gradient."""

    def __init__(self, ensemble: LoraEnsemble):
        self.rows: list[tuple[int, bool]] = []
        layer = ensemble.base.base_model.layers[0]
        layer.register_forward_hook(lambda _, args, __: self.rows.append((len(args[0]), torch.is_grad_enabled())))


def test_the_reference_is_computed_once_for_all_members(tmp_path):
    trainer = dpo_trainer_of(tmp_path, num_members=3, max_steps=2)
    seen = Forwards(trainer.model)
    trainer.train()
    pairs = trainer.args.per_device_train_batch_size
    assert seen.rows == [(2 * pairs, False), (3 * 2 * pairs, True)] * 2


def test_a_precomputed_reference_costs_nothing_in_training(tmp_path):
    trainer = dpo_trainer_of(tmp_path, num_members=3, max_steps=2, precompute_ref_log_probs=True)
    seen = Forwards(trainer.model)
    trainer.train()
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(trainer.train_dataset.column_names)
    assert seen.rows == [(3 * 2 * 4, True)] * 2


def test_precomputed_references_are_those_of_training(tmp_path):
    settings = {"num_members": 2, "ld_alpha": 0.5, "model": tiny_ensemble(2), **PARTING}
    trainer = dpo_trainer_of(tmp_path, precompute_ref_log_probs=True, **settings)
    batch = batch_of(trainer, 7)
    known, computed = trainer.known_log_probs(batch), trainer.reference_log_probs(batch)
    assert sorted(known) == ["ref_chosen_logps", "ref_rejected_logps"]
    for name, known_SB in known.items():
        assert known_SB.shape == (2, 7)
        torch.testing.assert_close(known_SB, computed[name], rtol=1e-5, atol=1e-5)


def test_a_second_run_over_the_same_pairs_reads_the_first_ones_references(tmp_path, monkeypatch):
    computed = []
    plain = reference_cache._computed
    monkeypatch.setattr(reference_cache, "_computed", lambda *args: computed.append(1) or plain(*args))

    def run(number: int, rows: Dataset | None = None, **settings) -> list[float]:
        trainer = dpo_trainer_of(
            tmp_path / str(number), rows or pair_rows(), num_members=2, precompute_ref_log_probs=True, **settings
        )
        return trainer.train_dataset["ref_chosen_logps"]

    first = run(0)
    assert run(1) == first  # another dataset object, another model object, another folder
    assert run(2, beta=0.7, loss_type="ipo", learning_rate=1.0) == first  # which the reference knows nothing of
    assert len(computed) == 1
    for different in ({"max_length": 7}, {"ld_alpha": 0.5}, {"model": tiny_model(seed=1)}, {"rows": pair_rows(seed=3)}):
        assert run(3, **different) != first
    assert len(computed) == 5
    assert not list((tmp_path / "home").rglob("*.partial"))


def test_a_streamed_dataset_cannot_be_precomputed(tmp_path):
    with pytest.raises(ConfigError, match="streamed"):
        dpo_trainer_of(tmp_path, pair_rows().to_iterable_dataset(), precompute_ref_log_probs=True)


def test_a_streamed_dataset_trains(tmp_path):
    trainer = dpo_trainer_of(tmp_path, pair_rows().to_iterable_dataset(), num_members=2, max_steps=2)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2


@pytest.mark.parametrize("which", ["start", "base"])
def test_the_reference_is_chosen(tmp_path, which):
    ensemble = tiny_ensemble(2)
    before = ensemble.snapshot()
    trainer = dpo_trainer_of(tmp_path, model=ensemble, num_members=2, reference=which, **PARTING)
    batch = batch_of(trainer)
    expected = Reference(ensemble, before if which == "start" else None).log_probs(batch)
    trainer.train()
    assert expected.shape[0] == (2 if which == "start" else 1)
    torch.testing.assert_close(trainer.reference.log_probs(batch), expected)  # training has not moved it
    if which == "start":
        assert logged(trainer, "loss")[0] == pytest.approx(0.6931472, rel=1e-5)
    else:
        assert abs(logged(trainer, "loss")[0] - 0.6931472) > 1e-2


def test_fresh_members_are_the_base(tmp_path):
    assert dpo_trainer_of(tmp_path, num_members=2).reference.start is None


@pytest.mark.parametrize("which", ["start", "base"])
def test_a_saved_ensemble_keeps_what_its_margins_are_measured_by(tmp_path, which):
    loss = {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [1.0, 0.5], "beta": 0.4, "ld_alpha": 0.3}
    trainer = dpo_trainer_of(tmp_path, model=tiny_ensemble(2), num_members=2, reference=which, **loss, **PARTING)
    trainer.train()
    trainer.save_model()
    loaded = LoraEnsemble.load(tmp_path, base=tiny_model())
    kept = read_preference(tmp_path, loaded)
    assert kept.loss == PreferenceLoss(0.4, ("sigmoid", "bco_pair"), (1.0, 0.5), ld_alpha=0.3)
    batch = batch_of(trainer)
    torch.testing.assert_close(kept.reference.log_probs(batch), trainer.reference.log_probs(batch))
    assert (tmp_path / "reference").exists() == (which == "start")
    assert member_distance(loaded, trainer.model) == 0  # looking at the reference has not moved the members


def test_an_ensemble_of_another_kind_has_the_defaults(tmp_path):
    ensemble = tiny_ensemble(2)
    kept = read_preference(tmp_path, ensemble)
    assert (kept.loss, kept.reference.start) == (PreferenceLoss(), None)
    (tmp_path / "preference.json").write_text('{"reference": "base", "gamma": 1}')
    with pytest.raises(EnsembleFormatError, match="gamma"):
        read_preference(tmp_path, ensemble)


def test_what_is_logged_is_what_the_members_say(tmp_path):
    settings = {"num_members": 3, "reference": "base", "max_steps": 1, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}
    trainer = dpo_trainer_of(tmp_path, pair_rows(4), model=tiny_ensemble(3), alpha=0.8, **settings)
    trainer.model.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    batch, weights = batch_of(trainer), torch.tensor([[0.5], [0.3], [0.2]])
    with torch.no_grad():
        delta = margins(trainer, batch)
    trainer.train()
    (row, *_) = trainer.state.log_history
    ell = torch.nn.functional.logsigmoid(delta)
    r = responsibilities(ell, 0.8, weights.log().flatten())
    expected = {
        "loss": renyi_loss(ell, 0.8, weights.log().flatten()).mean(),
        "nll_members": -(weights * ell).sum(0).mean(),
        "nll_mixture": -(weights * ell.exp()).sum(0).log().mean(),
        "effective_members": effective_members(r).mean(),
        "rewards/margins": (weights * delta).sum(0).mean(),
        "rewards/accuracies": ((weights * delta.sigmoid()).sum(0) > 0.5).float().mean(),
        **{f"rewards/margins/{m}": delta[m].mean() for m in range(3)},
        **{f"rewards/accuracies/{m}": (delta[m] > 0).float().mean() for m in range(3)},
        **{f"member_load/{m}": r[m].mean() for m in range(3)},
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-6), name
    assert row["jensen_gap"] == pytest.approx(row["nll_members"] - row["nll_mixture"], abs=1e-6)
    assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-5)


def test_length_normalised_routing_is_order_alpha_over_tokens(tmp_path):
    settings = {**PARTING, "num_members": 3, "reference": "base", "routing_quantity": "length_normalised"}
    trainer = dpo_trainer_of(tmp_path, pair_rows(1), model=tiny_ensemble(3), **settings)
    batch = batch_of(trainer, 1)
    tokens = int(batch["completion_mask"].sum())
    trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(trainer.model, batch)
        ell = torch.nn.functional.logsigmoid(margins(trainer, batch))
    torch.testing.assert_close(found, renyi_loss(ell, 0.8 / tokens).mean())


def test_the_prior_pulls_members_back(tmp_path):
    free, held = (dpo_trainer_of(tmp_path / str(std), num_members=2, prior_std=std, **PARTING) for std in (None, 1e-2))
    for trainer in (free, held):
        trainer.train()
    moved = [
        sum(float(b.detach().square().sum()) for _, b in trainer.model.adapter(0).values()) for trainer in (free, held)
    ]
    assert moved[1] < 0.5 * moved[0]


def test_learned_weights_follow_the_loads(tmp_path):
    settings = {**PARTING, "mixture_weights": "learned", "mixture_weights_rate": 0.5}
    trainer = dpo_trainer_of(tmp_path, num_members=3, model=tiny_ensemble(3), reference="base", **settings)
    trainer.train()
    assert trainer.model.weights.sum().item() == pytest.approx(1)
    assert (trainer.model.weights - 1 / 3).abs().max() > 1e-3
    assert "mixture_weight/0" in trainer.state.log_history[0]


def test_permuting_members_permutes_everything(tmp_path):
    order = [2, 0, 1]
    tiny_ensemble(3).save(tmp_path / "start")
    trainers = []
    for name, members in (("plain", [0, 1, 2]), ("permuted", order)):
        start = LoraEnsemble.load([tmp_path / "start" / f"member_{m}" for m in members], base=tiny_model())
        trainer = dpo_trainer_of(tmp_path / name, model=start, num_members=3, **PARTING)
        trainer.train()
        trainers.append(trainer)
    plain, permuted = trainers
    assert member_distance(plain.model, permuted.model, [(m, i) for i, m in enumerate(order)]) <= 1e-4


@pytest.mark.parametrize("cut", [(8, 1), (2, 4)])
def test_how_a_batch_is_cut_up_does_not_matter(tmp_path, cut):
    size, accumulation = cut
    settings = {"num_members": 2, **PARTING, "optim": "sgd", "learning_rate": 0.3}
    whole = dpo_trainer_of(tmp_path / "whole", per_device_train_batch_size=8, **settings)
    parts = dpo_trainer_of(
        tmp_path / "parts", per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **settings
    )
    for trainer in (whole, parts):
        trainer.train()
    assert member_distance(whole.model, parts.model) <= 1e-5
    assert logged(parts, "nll_mixture") == pytest.approx(logged(whole, "nll_mixture"), rel=1e-4)


def test_a_diverging_run_says_where(tmp_path):
    ensemble = tiny_ensemble(2)
    for name, parameter in ensemble.named_parameters():
        if name.endswith("lora_B"):
            parameter.data[1] = float("nan")
    trainer = dpo_trainer_of(tmp_path, model=ensemble, num_members=2, reference="base")
    with pytest.raises(TrainingDivergedError, match=r"members \[1\]") as caught:
        trainer.train()
    assert "step 1" in caught.value.where


def test_what_makes_no_sense_is_refused(tmp_path):
    args = RenyiDPOConfig(str(tmp_path), **quiet({}))
    for unsupported, match in (({"ref_model": tiny_model()}, "never needed"), ({"compute_metrics": print}, "logits")):
        with pytest.raises(ConfigError, match=match):
            RenyiDPOTrainer(tiny_model(), args, pair_rows(), processing_class=tiny_tokenizer(), **unsupported)
    rows = pair_rows(3).to_list()
    rows[1]["rejected"] = rows[1]["chosen"]
    with pytest.raises(DataError, match="row 2"):
        dpo_trainer_of(tmp_path, Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_type", "aot"),
        ("loss_type", ["sigmoid", "sft"]),
        ("loss_type", "aot_unpaired"),
        ("loss_type", "sigmod"),
        ("beta", 0.0),
        ("beta", -0.1),
        ("ld_alpha", 1.1),
        ("label_smoothing", 0.1),
        ("reference", "second"),
        ("use_weighting", True),
        ("sync_ref_model", True),
        ("num_members", 0),
        ("alpha", 1.5),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(tmp_path, key, value):
    with pytest.raises(ConfigError) as caught:
        RenyiDPOConfig(str(tmp_path), **quiet({key: value}))
    assert caught.value.where == key
    assert caught.value.hint


def test_smoothing_is_refused_where_it_has_no_part(tmp_path):
    for settings in ({"loss_type": "exo_pair"}, {"loss_type": "robust", "label_smoothing": 0.5}):
        with pytest.raises(ConfigError) as caught:
            RenyiDPOConfig(str(tmp_path), **quiet(settings))
        assert caught.value.where == "label_smoothing"


def test_snapshots_are_frozen_and_leave_no_trace(tmp_path):
    ensemble = tiny_ensemble(2)
    taken = ensemble.snapshot()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = ensemble.log_likelihood(ids)
    scatter_members(ensemble, seed=9)
    now = ensemble.log_likelihood(ids)
    with ensemble.acting_as(taken):
        torch.testing.assert_close(ensemble.log_likelihood(ids), before)
    torch.testing.assert_close(ensemble.log_likelihood(ids), now)
    assert (before - now).abs().max() > 1e-3

    three = tiny_ensemble(3)
    scatter_members(three, seed=4)
    three.save(tmp_path)
    with ensemble.acting_as(ensemble.read_snapshot(tmp_path)):
        assert ensemble.num_members == 3
        torch.testing.assert_close(ensemble.log_likelihood(ids), three.log_likelihood(ids))
    torch.testing.assert_close(ensemble.log_likelihood(ids), now)

    write_preference(tmp_path, PreferenceLoss(), Reference(three, three.snapshot()))
    with pytest.raises(EnsembleFormatError, match="holds 3 members"):
        read_preference(tmp_path, ensemble)


def test_log_probabilities_of_completions_leave_prompts_out(tmp_path):
    trainer = dpo_trainer_of(tmp_path, num_members=1)
    batch = batch_of(trainer)
    output = trainer.model(batch["input_ids"], batch["attention_mask"], completion_labels(batch))
    assert output.label_mask.sum() == batch["completion_mask"].sum()
    whole = completion_log_prob(output.log_probs, batch["completion_mask"][:, 1:])
    zero = LogRatios(*(whole - whole).chunk(2, dim=1))
    assert preference_log_likelihood(zero).exp().eq(0.5).all()


def test_references_that_cannot_be_kept_are_used_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(reference_cache, "HF_HOME", str(tmp_path / "a file"))
    trainer = dpo_trainer_of(tmp_path, num_members=2, precompute_ref_log_probs=True)
    assert "ref_chosen_logps" in trainer.train_dataset.column_names
    assert "not kept" in caplog.text
