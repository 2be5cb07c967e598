"""What must not matter does not: the order of members, how a batch is cut up, packed or recomputed."""

import pytest
import torch
from float64 import SAME
from tiny import logged, lora, member_distance, text_rows, tiny_ensemble, tiny_model, trainer_of
from transformers import TrainerCallback

from renyi import LoraEnsemble

pytestmark = pytest.mark.usefixtures("float64")

# Members part quickly under these.
PARTING = {"alpha": 0.8, "alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "learning_rate": 2e-2, "max_steps": 8}
LOGGED = ("loss", "nll_members", "nll_mixture", "jensen_gap", "effective_members", "member_load/0", "member_load/1")


def assert_equal_logs(one, two, names=LOGGED) -> None:
    for name in names:
        assert logged(one, name), name
        assert logged(one, name) == pytest.approx(logged(two, name), rel=SAME, abs=SAME), name


@pytest.mark.parametrize("alpha_hold_ratio", [0.0, 0.5])
def test_responsibilities_are_uniform_at_the_first_step(tmp_path, alpha_hold_ratio):
    """B = 0: nothing but the draws of A breaks the tie. Exactly while alpha is held at 0, as by default; with alpha
    at work from the first step, to the last bit of a matrix product, which rounds by where in a matrix a row lies."""
    seen = []

    class Watch(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            watched = trainer.logged.watched["train"]
            seen.append([pair[0] for name, pair in watched.state(watched.sums).items() if "load" in name])

        on_pre_optimizer_step = on_substep_end

    trainer = trainer_of(
        tmp_path,
        num_members=4,
        max_steps=1,
        gradient_accumulation_steps=2,
        callbacks=[Watch()],
        alpha=1.0,
        alpha_hold_ratio=alpha_hold_ratio,
        alpha_ramp_ratio=0.0,
    )
    assert all((b == 0).all() for m in range(4) for _, b in trainer.model.adapter(m).values())
    trainer.train()
    tolerance = 0 if alpha_hold_ratio else SAME
    for loads, examples in zip(seen, (4, 8), strict=True):
        assert loads == pytest.approx([examples / 4] * 4, abs=tolerance)
    (row, *_) = trainer.state.log_history
    assert [row[f"member_load/{m}"] for m in range(4)] == pytest.approx([0.25] * 4, abs=tolerance)
    assert row["effective_members"] == pytest.approx(4, abs=SAME)
    assert row["jensen_gap"] == pytest.approx(0, abs=SAME)


def test_members_part_only_because_they_were_drawn_apart(tmp_path):
    """Equal draws stay equal for ever; different draws do not."""
    tied = tiny_ensemble(2, scattered=False)
    for name, parameter in tied.named_parameters():
        if name.endswith("lora_A"):
            parameter.data[1] = parameter.data[0]
    trainer = trainer_of(tmp_path / "tied", model=tied, num_members=2, **PARTING)
    trainer.train()
    assert member_distance(trainer.model, trainer.model, [(0, 1)]) <= SAME
    assert logged(trainer, "effective_members")[-1] == pytest.approx(2, abs=SAME)
    apart = trainer_of(tmp_path / "apart", num_members=2, **PARTING)
    apart.train()
    assert logged(apart, "effective_members")[-1] < 1.99


@pytest.mark.parametrize("mixture_weights", ["uniform", "learned"])
def test_permuting_members_permutes_everything(tmp_path, mixture_weights):
    order = [2, 0, 1]
    tiny_ensemble(3).save(tmp_path / "start")
    settings = {**PARTING, "num_members": 3, "mixture_weights": mixture_weights, "mixture_weights_rate": 0.2}
    trainers = []
    for name, members in (("plain", [0, 1, 2]), ("permuted", order)):
        start = LoraEnsemble.load([tmp_path / "start" / f"member_{m}" for m in members], base=tiny_model())
        trainer = trainer_of(tmp_path / name, model=start, **settings)
        trainer.train()
        trainers.append(trainer)
    plain, permuted = trainers
    assert member_distance(permuted.model, plain.model, list(enumerate(order))) <= SAME
    assert member_distance(permuted.model, plain.model, [(0, 0)]) > 0.1
    for place, member in enumerate(order):
        loads = logged(permuted, f"member_load/{place}")
        assert loads == pytest.approx(logged(plain, f"member_load/{member}"), abs=SAME)
    torch.testing.assert_close(permuted.model.weights, plain.model.weights[order], rtol=SAME, atol=0)
    assert_equal_logs(permuted, plain, names=("loss", "nll_members", "nll_mixture", "jensen_gap", "effective_members"))


def test_accumulating_eight_batches_of_one_is_one_batch_of_eight(tmp_path):
    """Of examples with different numbers of tokens: the loss is per token of the whole batch."""
    trainers = []
    for size, accumulation in ((8, 1), (1, 8)):
        trainer = trainer_of(
            tmp_path / str(size),
            text_rows(32),
            num_members=2,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            prior_std=0.1,
            mixture_weights="learned",
            mixture_weights_rate=0.3,
            **PARTING,
        )
        trainer.train()
        trainers.append(trainer)
    whole, cut = trainers
    assert member_distance(cut.model, whole.model) <= SAME
    torch.testing.assert_close(cut.model.weights, whole.model.weights, rtol=SAME, atol=0)
    assert_equal_logs(cut, whole)
    assert logged(whole, "effective_members")[-1] < 1.99


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, use_reentrant):
    kwargs = None if use_reentrant is None else {"use_reentrant": use_reentrant}
    trainers = []
    for checkpointing in (False, True):
        trainer = trainer_of(
            tmp_path / str(checkpointing),
            num_members=2,
            peft_config=lora(lora_dropout=0.1),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs=kwargs if checkpointing else None,
            **PARTING,
        )
        trainer.train()
        assert trainer.model.base.is_activation_checkpointing == checkpointing
        trainers.append(trainer)
    plain, checkpointed = trainers
    assert member_distance(checkpointed.model, plain.model) <= SAME
    assert_equal_logs(checkpointed, plain)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("routing_quantity", ["sequence", "length_normalised"])
def test_packed_rows_train_as_unpacked_ones(tmp_path, strategy, routing_quantity):
    """All examples in every batch, so that both see the same sets: a packed batch routes examples, not rows."""
    dataset = text_rows(12, shortest=3, longest=9)
    settings = {**PARTING, "num_members": 2, "routing_quantity": routing_quantity, "max_length": 20}
    settings["max_steps"] = 12
    unpacked = trainer_of(tmp_path / "unpacked", dataset, per_device_train_batch_size=12, **settings)
    packed = trainer_of(
        tmp_path / "packed",
        dataset,
        packing=True,
        packing_strategy=strategy,
        per_device_train_batch_size=12,
        **settings,
    )
    assert 1 < len(packed.train_dataset) < 12
    assert packed.padding_free
    for trainer in (unpacked, packed):
        trainer.train()
    assert member_distance(packed.model, unpacked.model) <= SAME
    assert_equal_logs(packed, unpacked)
    assert logged(packed, "num_tokens") == logged(unpacked, "num_tokens")
    assert logged(unpacked, "effective_members")[-1] < 1.99


def test_the_seed_decides_everything(tmp_path):
    """The same seed gives the same bits; another seed gives other members."""
    runs = []
    for seed in (3, 3, 4):
        trainer = trainer_of(tmp_path / str(len(runs)), num_members=2, seed=seed, **PARTING)
        trainer.train()
        runs.append(trainer)
    first, again, other = runs
    assert member_distance(first.model, again.model) == 0
    assert logged(first, "loss") == logged(again, "loss")
    assert member_distance(first.model, other.model) > 0.1
