"""What a step optimises and what is logged about it, recomputed from the definitions; and how a run can end."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from tiny import (
    logged,
    lora,
    member_distance,
    scatter_members,
    sentences,
    sft_config,
    text_rows,
    tiny_ensemble,
    tiny_model,
    tiny_tokenizer,
    trainer_of,
)
from torch import Tensor
from transformers import TrainerCallback

from renyi import LoraEnsemble, RenyiSFTTrainer
from renyi.errors import ConfigError, TrainingDivergedError
from renyi.training import checkpoints
from renyi.training.checkpoints import find_checkpoints
from renyi.training.schedule import scheduled_alpha

NOW = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}  # alpha at full strength from the first step
ALL = {"per_device_train_batch_size": 8, "max_steps": 1}  # one step on the eight rows of `EIGHT`
EIGHT = sentences(8)


def eight_rows() -> Dataset:
    return Dataset.from_dict({"text": EIGHT})


class Scores:
    """Everything about the eight rows under an ensemble, from its logits and plain definitions in float64."""

    def __init__(self, ensemble: LoraEnsemble, texts: list[str] = EIGHT):
        tokenizer = tiny_tokenizer()
        log_p, self.tokens = [], []
        entropy, correct = 0.0, 0
        for text in texts:
            ids = tokenizer(text + "<eos>", return_tensors="pt").input_ids
            logits = ensemble.logits(ids)[:, 0, :-1].double()
            p = logits.log_softmax(-1)
            targets = ids[0, 1:]
            log_p.append(p[:, torch.arange(len(targets)), targets].sum(-1))
            self.tokens.append(len(targets))
            entropy -= (p.exp() * p).sum().item()
            correct += int((logits.argmax(-1) == targets).sum())
        self.ell_MB = torch.stack(log_p, dim=1)
        self.n_B = torch.tensor(self.tokens, dtype=torch.float64)
        self.num_tokens, members = sum(self.tokens), len(self.ell_MB)
        self.entropy, self.accuracy = (x / self.num_tokens / members for x in (entropy, correct))

    def loss(self, alpha: float, weights: Tensor, normalised: bool = False) -> Tensor:
        """−(1/α) log Σ w exp(α ℓ) per trained token, the textbook way."""
        routed = self.n_B if normalised else torch.ones_like(self.n_B)
        ell = self.ell_MB / routed
        per_example = (
            -(weights.double().log()[:, None] + alpha * ell).logsumexp(0) / alpha
            if alpha
            else -(weights.double() @ ell)
        )
        return (routed * per_example).sum() / self.num_tokens

    def responsibilities(self, alpha: float, weights: Tensor, normalised: bool = False) -> Tensor:
        routed = self.n_B if normalised else torch.ones_like(self.n_B)
        return (weights.double().log()[:, None] + alpha * self.ell_MB / routed).softmax(0)


@pytest.fixture(scope="module")
def competent(tmp_path_factory) -> Path:
    """Three members that each learned the sentences."""
    folder = tmp_path_factory.mktemp("competent")
    trainer = trainer_of(folder / "run", num_members=3, alpha=0.0, max_steps=40, learning_rate=2e-2)
    trainer.train()
    assert logged(trainer, "loss")[-1] < 0.7 * logged(trainer, "loss")[0]
    trainer.model.save(folder / "ensemble")
    return folder / "ensemble"


def with_useless_members(folder: Path, *useless: int) -> LoraEnsemble:
    """The competent ensemble, in which some members answer at random."""
    ensemble = LoraEnsemble.load(folder, base=tiny_model())
    for layer in ensemble.stack.layers.values():
        layer.members.lora_B.data[list(useless)] = torch.randn(len(useless), *layer.members.lora_B.shape[1:])
    return ensemble


def first_row(trainer) -> dict[str, float]:
    return trainer.state.log_history[0]


# One step: the loss, its gradient, and the figures


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_logged_figures_are_the_definitions(tmp_path, alpha, normalised):
    ensemble = tiny_ensemble(3)
    weights = torch.tensor([0.5, 0.3, 0.2])
    ensemble.weights.copy_(weights)
    expected = Scores(ensemble)
    trainer = trainer_of(
        tmp_path,
        eight_rows(),
        model=ensemble,
        num_members=3,
        alpha=alpha,
        routing_quantity="length_normalised" if normalised else "sequence",
        **NOW,
        **ALL,
    )
    trainer.train()
    row = first_row(trainer)
    assert row["loss"] == pytest.approx(expected.loss(alpha, weights, normalised).item(), rel=1e-5)
    members, mixture = (expected.loss(a, weights).item() for a in (0.0, 1.0))
    assert row["nll_members"] == pytest.approx(members, rel=1e-5)
    assert row["nll_mixture"] == pytest.approx(mixture, rel=1e-5)
    assert row["jensen_gap"] == pytest.approx(members - mixture, rel=1e-3)
    r = expected.responsibilities(alpha, weights, normalised)
    assert [row[f"member_load/{m}"] for m in range(3)] == pytest.approx(r.mean(1).tolist(), rel=1e-4)
    perplexity = (-(r * r.log()).sum(0)).exp().mean().item()
    assert row["effective_members"] == pytest.approx(perplexity, rel=1e-4)
    assert row["entropy"] == pytest.approx(expected.entropy, rel=1e-5)
    assert row["mean_token_accuracy"] == pytest.approx(expected.accuracy, rel=1e-6)
    assert row["num_tokens"] == expected.num_tokens + 8  # the first token of each row is seen, too
    assert row["alpha"] == alpha


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_a_step_follows_m_times_the_gradient_of_the_loss(tmp_path, alpha, normalised):
    """Plain gradient descent by 1, so that the step is the gradient."""
    twin = tiny_ensemble(3)
    (3 * Scores(twin).loss(alpha, twin.weights, normalised)).backward()
    gradient = [p.grad for p in twin.parameters() if p.requires_grad]
    trainer = trainer_of(
        tmp_path,
        eight_rows(),
        model=tiny_ensemble(3),
        num_members=3,
        alpha=alpha,
        routing_quantity="length_normalised" if normalised else "sequence",
        optim="sgd",
        learning_rate=1.0,
        max_grad_norm=0.0,
        **NOW,
        **ALL,
    )
    start = [p.detach().clone() for p in trainer.trained_parameters()]
    trainer.train()
    for before, after, grad in zip(start, trainer.trained_parameters(), gradient, strict=True):
        torch.testing.assert_close(before - after.detach(), grad, atol=2e-6, rtol=1e-3)


def test_the_logged_gradient_norm_is_the_mean_of_the_members(tmp_path):
    twin = tiny_ensemble(2)
    (2 * Scores(twin).loss(0.8, twin.weights)).backward()
    norms = torch.stack([p.grad.flatten(1).norm(dim=1) for p in twin.parameters() if p.requires_grad]).norm(dim=0)
    trainer = trainer_of(tmp_path, eight_rows(), model=tiny_ensemble(2), num_members=2, **NOW, **ALL)
    trainer.train()
    assert first_row(trainer)["grad_norm"] == pytest.approx(norms.mean().item(), rel=1e-4)


def test_a_log_of_many_steps_and_batches_adds_up(tmp_path):
    """Token by token and example by example, not a mean of means."""
    every, third = (
        trainer_of(tmp_path / str(n), num_members=2, max_steps=6, logging_steps=n, gradient_accumulation_steps=2, **NOW)
        for n in (1, 3)
    )
    every.train()
    third.train()
    seen = torch.tensor([0, *logged(every, "num_tokens")]).diff()
    trained = (seen - 8).double()  # eight rows a step
    for name in ("nll_members", "nll_mixture", "jensen_gap", "entropy", "mean_token_accuracy"):
        values = torch.tensor(logged(every, name), dtype=torch.float64)
        expected = [(values[i : i + 3] @ trained[i : i + 3] / trained[i : i + 3].sum()).item() for i in (0, 3)]
        assert logged(third, name) == pytest.approx(expected, rel=1e-5, abs=1e-9), name
    for name in ("loss", "effective_members", "member_load/0", "member_load/1"):
        values = torch.tensor(logged(every, name), dtype=torch.float64)
        assert logged(third, name) == pytest.approx(values.view(2, 3).mean(1).tolist(), rel=1e-5), name


def test_evaluation_figures_are_the_definitions_over_the_whole_set(tmp_path):
    """In batches of 3, 3 and 2, with the final alpha whatever the schedule says."""
    ensemble = tiny_ensemble(2)
    expected = Scores(ensemble)
    trainer = trainer_of(
        tmp_path, model=ensemble, num_members=2, alpha=0.7, eval_dataset=eight_rows(), per_device_eval_batch_size=3
    )
    row = trainer.evaluate()
    members, mixture = (expected.loss(a, ensemble.weights).item() for a in (0.0, 1.0))
    assert row["eval_nll_members"] == pytest.approx(members, rel=1e-5)
    assert row["eval_nll_mixture"] == pytest.approx(mixture, rel=1e-5)
    r = expected.responsibilities(0.7, ensemble.weights)
    assert [row[f"eval_member_load/{m}"] for m in range(2)] == pytest.approx(r.mean(1).tolist(), rel=1e-4)
    assert row["eval_mean_token_accuracy"] == pytest.approx(expected.accuracy, rel=1e-6)
    assert trainer.evaluate()["eval_nll_mixture"] == row["eval_nll_mixture"]  # sums begin anew


LOGGED = {"loss", "nll_members", "nll_mixture", "jensen_gap", "effective_members", "member_load/0", "member_load/1"}
TRL_LOGGED = {"learning_rate", "grad_norm", "epoch", "step", "entropy", "mean_token_accuracy", "num_tokens"}


def test_every_promised_name_is_logged(tmp_path):
    trainer = trainer_of(
        tmp_path, num_members=2, eval_dataset=text_rows(4), eval_strategy="steps", eval_steps=2, max_steps=4
    )
    trainer.train()
    rows = trainer.state.log_history
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval_loss" in row]
    assert len(steps) == 4
    assert len(evaluations) == 2
    for row in steps:
        assert {*LOGGED, *TRL_LOGGED, "alpha"} <= row.keys()
        assert not any(name.startswith("eval_") for name in row)
        assert all(math.isfinite(value) for value in row.values())
    for row in evaluations:
        assert {f"eval_{name}" for name in LOGGED | {"entropy", "mean_token_accuracy"}} <= row.keys()
        assert not LOGGED & row.keys()


def test_alpha_is_logged_as_scheduled(tmp_path):
    trainer = trainer_of(tmp_path, num_members=2, max_steps=10, alpha=0.6, alpha_hold_ratio=0.3, alpha_ramp_ratio=0.4)
    used = []
    plain = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: used.append(trainer.current_alpha) or plain(*args, **kwargs)
    trainer.train()
    assert used == [scheduled_alpha(step / 10, 0.6, 0.3, 0.4) for step in range(10)]
    assert logged(trainer, "alpha") == [scheduled_alpha(step / 10, 0.6, 0.3, 0.4) for step in range(1, 11)]
    trainer.model.eval()
    assert trainer.current_alpha == 0.6


def test_training_is_logged_as_such_after_an_evaluation(tmp_path):
    """An evaluation leaves the model in evaluation mode; the log of the epoch that ends with it is still training's."""
    trainer = trainer_of(
        tmp_path,
        text_rows(16),
        num_members=2,
        max_steps=8,
        logging_strategy="epoch",
        eval_dataset=text_rows(4),
        eval_strategy="steps",
        eval_steps=4,
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        assert {*LOGGED, "alpha", "num_tokens"} <= row.keys()
    assert rows[0]["alpha"] == 0.8  # half of training is over


def test_several_evaluation_sets_are_told_apart(tmp_path):
    sets = {"easy": text_rows(4, seed=1), "hard": text_rows(6, seed=2)}
    trainer = trainer_of(
        tmp_path,
        num_members=2,
        eval_dataset=sets,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=2,
        metric_for_best_model="eval_hard_nll_mixture",
    )
    trainer.train()
    rows = {name: row for row in trainer.state.log_history for name in sets if f"eval_{name}_loss" in row}
    assert rows.keys() == sets.keys()
    assert trainer.state.best_metric == rows["hard"]["eval_hard_nll_mixture"]
    assert rows["easy"]["eval_easy_nll_mixture"] != rows["hard"]["eval_hard_nll_mixture"]
    assert not any("hard" in name for name in rows["easy"])


# Learned weights


def test_learned_weights_follow_expectation_maximisation(tmp_path):
    """After a step: w + rate · (mean responsibility − w), over all micro-batches of the step."""
    ensemble = tiny_ensemble(3)
    weights = torch.tensor([0.5, 0.3, 0.2])
    ensemble.weights.copy_(weights)
    loads = Scores(ensemble).responsibilities(0.8, weights).mean(1)
    trainer = trainer_of(
        tmp_path,
        eight_rows(),
        model=ensemble,
        num_members=3,
        mixture_weights="learned",
        mixture_weights_rate=0.25,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        max_steps=1,
        **NOW,
    )
    trainer.train()
    expected = 0.75 * weights.double() + 0.25 * loads
    assert ensemble.weights.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert [first_row(trainer)[f"mixture_weight/{m}"] for m in range(3)] == ensemble.weights.tolist()
    trainer.save_model()
    assert json.loads((tmp_path / "ensemble.json").read_text())["weights"] == ensemble.weights.tolist()


def test_a_useless_member_loses_its_vote(tmp_path, competent):
    ensemble = with_useless_members(competent, 1)
    trainer = trainer_of(
        tmp_path,
        model=ensemble,
        num_members=3,
        mixture_weights="learned",
        mixture_weights_rate=0.2,
        max_steps=30,
        learning_rate=1e-5,
        **NOW,
    )
    trainer.train()
    votes = logged(trainer, "mixture_weight/1")
    assert votes == sorted(votes, reverse=True)
    assert votes[-1] < 0.01
    assert min(ensemble.weights[0], ensemble.weights[2]) > 0.2
    assert ensemble.weights.sum().item() == pytest.approx(1)


def test_learned_weights_rest_while_alpha_is_held_at_zero(tmp_path):
    ensemble = tiny_ensemble(3)
    ensemble.weights.copy_(torch.tensor([0.5, 0.3, 0.2]))
    trainer = trainer_of(
        tmp_path,
        model=ensemble,
        num_members=3,
        mixture_weights="learned",
        mixture_weights_rate=0.5,
        alpha_hold_ratio=1.0,
        alpha_ramp_ratio=0.0,
    )
    trainer.train()
    assert ensemble.weights.tolist() == pytest.approx([0.5, 0.3, 0.2], rel=1e-5)


def test_uniform_weights_stay_as_they_are(tmp_path):
    trainer = trainer_of(tmp_path, num_members=3, **NOW)
    trainer.train()
    assert trainer.model.weights.tolist() == pytest.approx([1 / 3] * 3)
    assert not any("mixture_weight/0" in row for row in trainer.state.log_history)


# The prior


@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_prior_adds_its_formula_to_loss_and_gradient(tmp_path, accumulation):
    """(1/M) Σ ‖φ − φ⁰‖² / 2σ² over the dataset's tokens, whose gradient a member feels M times."""
    std, members = 0.3, 2
    size = 8 // accumulation
    settings = {**NOW, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    runs = []
    for prior_std in (None, std):
        trainer = trainer_of(
            tmp_path / str(prior_std), eight_rows(), num_members=members, prior_std=prior_std, **settings
        )
        moved = scatter_members(trainer.model)  # away from where the prior is centred
        start = [p.detach().clone() for p in trainer.trained_parameters()]
        trainer.train()
        steps = [s - p.detach() for s, p in zip(start, trainer.trained_parameters(), strict=True)]
        runs.append((first_row(trainer)["loss"], steps, moved))
    (plain_loss, plain_steps, ensemble), (loss, steps, _) = runs
    origin = LoraEnsemble.from_base(tiny_model(), members, lora(), seed=42)
    offsets = [s - o.detach() for s, o in zip(start, (p for p in origin.parameters() if p.requires_grad), strict=True)]
    num_tokens = Scores(ensemble).num_tokens
    squares = sum(o.double().square().sum().item() for o in offsets)
    assert squares > 1
    expected = squares / (2 * std**2 * members * num_tokens)
    assert loss - plain_loss == pytest.approx(expected, rel=1e-4)
    for step, plain, offset in zip(steps, plain_steps, offsets, strict=True):
        torch.testing.assert_close(step - plain, offset / (std**2 * num_tokens), atol=2e-6, rtol=1e-3)


def test_a_wide_prior_changes_nothing_and_a_narrow_one_pins_the_members(tmp_path):
    settings = {"num_members": 2, "max_steps": 12, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, **NOW}
    trainers = {}
    for std in (None, 1e6, 0.02):
        trainers[std] = trainer_of(tmp_path / str(std), eight_rows(), prior_std=std, **settings)
        trainers[std].train()
    start = LoraEnsemble.from_base(tiny_model(), 2, lora(), seed=42)
    travelled = {std: member_distance(trainer.model, start) for std, trainer in trainers.items()}
    assert member_distance(trainers[1e6].model, trainers[None].model) <= 1e-6
    assert travelled[0.02] < 0.1 * travelled[None]
    assert travelled[None] > 1e-3


# Starving members


def test_a_starving_member_is_warned_of_once(tmp_path, caplog, competent):
    """Though two starve, and for many logs."""
    ensemble = with_useless_members(competent, 1, 2)
    with caplog.at_level(logging.WARNING, logger="renyi"):
        trainer = trainer_of(
            tmp_path, model=ensemble, num_members=3, max_steps=12, learning_rate=1e-5, alpha_hold_ratio=0.25
        )
        trainer.train()
    assert max(logged(trainer, "member_load/1")[-5:]) < 1 / 30
    warnings = [record.getMessage() for record in caplog.records if "starves" in record.getMessage()]
    assert len(warnings) == 1
    for part in ("Member 1 starves", "alpha_hold_ratio", "num_members", "drop_member(1)", "33.3%"):
        assert part in warnings[0]


def test_members_that_share_are_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="renyi"):
        trainer_of(tmp_path, num_members=3, max_steps=12, **NOW).train()
    assert "starves" not in caplog.text


# How a run ends


def test_early_stopping_keeps_the_best_members(tmp_path):
    """A learning rate at which evaluation grows worse; training stops, and the best members come back."""
    trainer = trainer_of(
        tmp_path,
        num_members=2,
        eval_dataset=text_rows(6, seed=9),
        max_steps=60,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        early_stopping_patience=2,
        metric_for_best_model="nll_mixture",
    )
    trainer.train()
    values = {row["step"]: row["eval_nll_mixture"] for row in trainer.state.log_history if "eval_loss" in row}
    assert trainer.state.global_step < 60
    best = min(values, key=values.get)
    assert trainer.state.global_step == best + 4
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_nll_mixture"] == pytest.approx(values[best], rel=1e-6)


def test_a_loss_that_is_no_number_stops_and_names_step_and_batch(tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for n, p in trainer.model.named_parameters() if n.endswith("lora_B"))[1].fill_(math.nan)

    trainer = trainer_of(tmp_path, num_members=2, save_strategy="steps", save_steps=2, callbacks=[Poison()])
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "step 4" in message
    assert "members [1]" in message
    assert "batch of 4 starting 'w" in message
    assert "learning_rate" in message
    newest = find_checkpoints(tmp_path).newest
    assert newest.name == "checkpoint-2"
    for member in range(2):
        weights = load_file(newest / f"member_{member}" / "adapter_model.safetensors")
        assert all(w.isfinite().all() for w in weights.values())


def test_older_checkpoints_go_only_after_the_newer_is_sealed(tmp_path, monkeypatch):
    seen = []
    plain = checkpoints.seal

    def watching(checkpoint: Path) -> None:
        seen.append(sorted(p.name for p in tmp_path.glob("checkpoint-*")))
        plain(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", watching)
    trainer_of(tmp_path, num_members=2, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_resuming_a_run_that_stopped_early_trains_no_more(tmp_path):
    settings = {
        "num_members": 2,
        "eval_dataset": text_rows(6, seed=9),
        "max_steps": 60,
        "learning_rate": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "early_stopping_patience": 1,
    }
    first = trainer_of(tmp_path, **settings)
    first.train()
    assert first.state.global_step < 60
    again = trainer_of(tmp_path, **settings)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == first.state.global_step
    assert member_distance(again.model, first.model) == 0


def test_a_finished_run_goes_on_where_more_steps_are_asked_for(tmp_path):
    settings = {"num_members": 2, "save_strategy": "steps", "save_steps": 3}
    trainer_of(tmp_path, max_steps=6, **settings).train()
    longer = trainer_of(tmp_path, max_steps=9, **settings)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 9
    assert find_checkpoints(tmp_path).newest.name == "checkpoint-9"


# What is left behind


def test_the_saved_run_loads_as_it_was_trained(tmp_path):
    trainer = trainer_of(tmp_path, num_members=2, alpha=0.6, routing_quantity="length_normalised")
    trainer.train()
    trainer.save_model()
    ensemble = LoraEnsemble.load(tmp_path, base=tiny_model())
    assert (ensemble.alpha, ensemble.routing_quantity) == (0.6, "length_normalised")
    assert member_distance(ensemble, trainer.model) == 0
    assert (tmp_path / "tokenizer.json").is_file()


def test_the_model_card_renders(tmp_path):
    trainer = trainer_of(
        tmp_path, num_members=2, eval_dataset=text_rows(4), eval_strategy="steps", eval_steps=3, seed=5
    )
    trainer.train()
    trainer.create_model_card(dataset_name="somebody/data", tags=["mine"])
    card = (tmp_path / "README.md").read_text()
    front, body = card.split("---\n")[1:3]
    front = yaml.safe_load(front)
    assert front["library_name"] == "peft"
    assert {"renyi", "mine", "lora"} <= set(front["tags"])
    assert front["datasets"] == ["somebody/data"]
    row = next(r for r in reversed(trainer.state.log_history) if "nll_mixture" in r)
    held_out = next(r for r in reversed(trainer.state.log_history) if "eval_nll_mixture" in r)
    for part in (
        f"# {tmp_path.name}",
        "2 LoRA adapters",
        "rank 4",
        "| seed | 5 |",
        f"{row['nll_mixture']:.4f} | {held_out['eval_nll_mixture']:.4f} |",
        f'LoraEnsemble.load("{tmp_path.name}")',
        "member_0",
    ):
        assert part in body
    assert "{" not in body
    assert "None" not in body


def test_the_card_of_a_run_without_logs_has_dashes(tmp_path):
    trainer = trainer_of(tmp_path, num_members=2)
    trainer.create_model_card()
    assert "| – | – |" in (tmp_path / "README.md").read_text()


def test_tensorboard_gets_every_figure(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(tmp_path, num_members=2, report_to="tensorboard", max_steps=2)
    trainer.train()
    events = next(tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {f"train/{name}" for name in LOGGED | {"alpha"}} <= tags


# What a trainer is given


def test_an_ensemble_goes_on_training(tmp_path):
    """Two runs of three steps that are two trainers' differ from one run only by its schedules; here there are none."""
    settings = {"num_members": 2, "lr_scheduler_type": "constant", "optim": "sgd", **NOW}
    rows = eight_rows()
    whole = trainer_of(tmp_path / "whole", rows, per_device_train_batch_size=8, **{**settings, "max_steps": 6})
    whole.train()
    ensemble = trainer_of(tmp_path / "half", rows, per_device_train_batch_size=8, **{**settings, "max_steps": 3})
    ensemble.train()
    second = trainer_of(
        tmp_path / "rest", rows, model=ensemble.model, per_device_train_batch_size=8, **{**settings, "max_steps": 3}
    )
    second.train()
    assert member_distance(second.model, whole.model) <= 1e-5


def test_an_ensemble_of_another_size_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="the ensemble has 3 members"):
        trainer_of(tmp_path, model=tiny_ensemble(3), num_members=2)
    with pytest.raises(ConfigError, match="of its own config"):
        trainer_of(tmp_path, model=tiny_ensemble(3), num_members=3, peft_config=lora())


def test_what_needs_logits_is_refused(tmp_path):

    with pytest.raises(ConfigError, match="compute_metrics needs logits"):
        RenyiSFTTrainer(tiny_model(), sft_config(tmp_path), text_rows(), compute_metrics=len)


def test_a_folder_names_the_model_and_rank_sixteen_is_the_default(tmp_path):

    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = RenyiSFTTrainer(str(tmp_path / "base"), sft_config(tmp_path / "out"), text_rows())
    assert trainer.model.num_members == 4
    assert trainer.model.peft_config.r == 16
    assert trainer.model.base_model_name == str(tmp_path / "base")
    trainer.train()
    trainer.save_model()
    assert LoraEnsemble.load(tmp_path / "out").num_members == 4


@pytest.mark.slow
def test_a_compiled_run_is_the_plain_one(tmp_path):
    plain, compiled = (
        trainer_of(
            tmp_path / name,
            eight_rows(),
            num_members=2,
            max_steps=2,
            per_device_train_batch_size=8,
            optim="sgd",
            learning_rate=0.1,
            **settings,
            **NOW,
        )
        for name, settings in (
            ("plain", {}),
            ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        )
    )
    plain.train()
    compiled.train()
    torch._dynamo.reset()
    assert member_distance(compiled.model, plain.model) <= 1e-5
    assert logged(compiled, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


def test_bf16_autocast_trains_float32_adapters(tmp_path):
    exact, rounded = (
        trainer_of(tmp_path / str(bf16), num_members=2, bf16=bf16, max_steps=4, **NOW) for bf16 in (False, True)
    )
    exact.train()
    rounded.train()
    assert all(p.dtype == torch.float32 for p in rounded.trained_parameters())
    assert logged(rounded, "loss") == pytest.approx(logged(exact, "loss"), rel=0.01)
    assert logged(rounded, "loss") != logged(exact, "loss")
