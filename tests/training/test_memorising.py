"""Members that split what they memorise are told from members that part on rows they never saw."""

import logging

import pytest
import torch
from datasets import Dataset
from tiny import WORDS, logged, trainer_of

from renyi import RenyiSFTTrainer
from renyi.training.memorising import HAVE_PARTED, MEMORY_LEADS, Parting, parting


def step(epoch: float, gap: float, effective: float = 1.2, alpha: float = 0.8) -> dict[str, float]:
    return {"epoch": epoch, "jensen_gap": gap, "effective_members": effective, "alpha": alpha}


def evaluation(gap: float, effective: float = 1.9, name: str = "eval") -> dict[str, float]:
    return {f"{name}_jensen_gap": gap, f"{name}_effective_members": effective}


# ---- What is compared ------------------------------------------------------------------------------------------------


def test_the_newest_evaluation_is_compared_with_the_logs_before_it():
    history = [*(step(e, 9.0) for e in (0.5, 1.0)), evaluation(7.0)]
    history += [step(1.5, 9.0), step(2.0, 0.2, 1.1), step(2.5, 0.3, 1.2), step(3.0, 0.7, 1.3), evaluation(0.1)]
    assert parting([*history, step(4.0, 5.0)], 2, 0.8) == Parting(2, pytest.approx(0.4), 0.1, pytest.approx(1.2), 1.9)


def test_rows_that_were_not_seen_before_say_nothing():
    """In the first pass, and in the log that began in it."""
    history = [step(0.4, 9.0), step(0.8, 9.0), step(1.2, 9.0)]
    assert parting([*history, evaluation(0.1)], 2, 0.8) is None
    assert parting([*history, step(1.6, 0.5), evaluation(0.1)], 2, 0.8) == Parting(2, 0.5, 0.1, 1.2, 1.9)


def test_logs_before_alpha_has_its_value_say_nothing():
    history = [step(1.0, 9.0, alpha=0.4), step(2.0, 9.0, alpha=0.8)]
    assert parting([*history, evaluation(0.1)], 2, 0.8) is None
    assert parting([*history, step(3.0, 0.5), evaluation(0.1)], 2, 0.8) == Parting(2, 0.5, 0.1, 1.2, 1.9)


def test_what_there_is_nothing_to_compare_in():
    history = [step(1.0, 9.0), step(2.0, 9.0)]
    assert parting(history, 2, 0.8) is None
    assert parting([*history, evaluation(0.1)], 1, 0.8) is None
    assert parting([*history, evaluation(0.1)], 2, 0.0) is None
    assert parting([*history, evaluation(0.1, name="eval_law")], 2, 0.8) == Parting(2, 9.0, 0.1, 1.2, 1.9)


@pytest.mark.parametrize(
    ("seen", "held_out", "effective", "is_memory"),
    [
        (0.3, 0.05, 1.2, True),
        (0.3, 0.3, 1.2, False),  # they part on both
        (0.3, 0.3 * MEMORY_LEADS, 1.2, False),
        (0.01, 0.0, 2 * HAVE_PARTED, False),  # they share every example
    ],
)
def test_when_it_is_memory(seen, held_out, effective, is_memory):
    assert Parting(2, seen, held_out, effective, 1.9).is_memory is is_memory


# ---- Runs ------------------------------------------------------------------------------------------------------------


def noise(number: int, seed: int) -> Dataset:
    """Rows with nothing to learn but the rows themselves."""
    words = torch.randint(0, len(WORDS), (number, 12), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"text": [" ".join(WORDS[i] for i in row) for row in words.tolist()]})


def two_schools(number: int, seed: int) -> Dataset:
    """Rows of six questions, all answered by one of two schools."""
    generator = torch.Generator().manual_seed(seed)
    schools = torch.randint(0, 2, (number,), generator=generator).tolist()
    asked = torch.randint(0, 8, (number, 6), generator=generator).tolist()
    rows = zip(schools, asked, strict=True)
    return Dataset.from_dict({"text": [" ".join(f"w{q} w{10 + 20 * school + q}" for q in of) for school, of in rows]})


def run(folder, rows: Dataset, held_out: Dataset, passes: int) -> RenyiSFTTrainer:
    steps = passes * len(rows) // 8
    trainer = trainer_of(
        folder,
        rows,
        eval_dataset=held_out,
        per_device_train_batch_size=8,
        max_steps=steps,
        logging_steps=steps // 10,
        eval_strategy="steps",
        eval_steps=steps // 8,
        num_members=2,
    )
    trainer.train()
    return trainer


def test_a_run_that_splits_its_memory_is_warned_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="renyi"):
        trainer = run(tmp_path, noise(32, 0), noise(32, 1), passes=20)
    found = parting(trainer.state.log_history, 2, 0.8)
    assert found is not None
    assert found.is_memory
    assert found.held_out == logged(trainer, "eval_jensen_gap")[-1]
    history = trainer.state.log_history
    partings = [parting(history[: i + 1], 2, 0.8) for i, row in enumerate(history) if "eval_loss" in row]
    assert sum(p.is_memory for p in partings if p) > 1
    warnings = [record.getMessage() for record in caplog.records if "memorise" in record.getMessage()]
    assert len(warnings) == 1
    for part in ("After step", "nats per trained token", "of 2 members", "routing_group"):
        assert part in warnings[0]


def test_members_that_part_on_new_rows_too_are_not_warned_of(tmp_path, caplog):
    """Though every row is seen six times."""
    with caplog.at_level(logging.WARNING, logger="renyi"):
        trainer = run(tmp_path, two_schools(128, 0), two_schools(32, 1), passes=6)
    found = parting(trainer.state.log_history, 2, 0.8)
    assert found is not None
    assert found.effective_held_out < 1.2
    assert not found.is_memory
    assert "memorise" not in caplog.text
