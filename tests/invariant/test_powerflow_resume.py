"""A PowerFlow run that dies after any step and is started again gives, bit for bit, what it would have given."""

from pathlib import Path

import pytest
from tiny import powerflow_trainer_of, prompt_rows
from transformers import TrainerCallback

STEPS = 9


class KilledError(Exception):
    pass


class DiesAfter(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def run(folder: Path, partition: str, dies_after: int | None = None) -> list[dict]:
    """Go on from the newest checkpoint; the rows logged, without times.

    A batch of rollouts serves two passes of four micro-batches, two to a step: it lasts for four steps, and every
    checkpoint but those after steps 4 and 8 lies within one. Logs fall between checkpoints.
    """
    trainer = powerflow_trainer_of(
        folder,
        eval_dataset=prompt_rows(4, seed=3),
        callbacks=[DiesAfter(dies_after)],
        partition=partition,
        power=3.0,
        num_members=2,
        alpha=0.5,
        alpha_hold_ratio=0.1,
        alpha_ramp_ratio=0.5,
        mixture_weights="learned",
        prior_std=0.5,
        num_generations=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        num_iterations=2,
        format_penalty="w1",
        learning_rate=2e-2,
        max_steps=STEPS,
        logging_steps=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    timed = ("runtime", "per_second", "step_time")
    return [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]


def kept(folder: Path) -> dict[str, bytes]:
    """Members, weights and log Z'."""
    files = [f for pattern in ("*.safetensors", "member_*/*.safetensors") for f in folder.glob(pattern)]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files} | {"": (folder / "ensemble.json").read_bytes()}


@pytest.fixture(scope="module", params=["group", "learned"])
def uninterrupted(request, tmp_path_factory) -> tuple[str, Path, list[dict]]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return request.param, folder, run(folder, request.param)


# In make test once within a batch of rollouts and once at its end.
@pytest.mark.parametrize(
    "step", [pytest.param(step, marks=[] if step in (3, 4) else pytest.mark.slow) for step in range(1, STEPS)]
)
def test_resuming_changes_nothing(tmp_path, uninterrupted, step):
    partition, folder, expected = uninterrupted
    with pytest.raises(KilledError):
        run(tmp_path, partition, dies_after=step)
    assert run(tmp_path, partition) == expected
    assert kept(tmp_path) == kept(folder)
    assert len(kept(folder)) == (4 if partition == "learned" else 3)


def test_what_is_compared_has_something_to_say(uninterrupted):
    _, _, expected = uninterrupted
    trained = [row for row in expected if "log_partition" in row]
    assert [row["step"] for row in trained] == [2, 4, 6, 8, 9]
    assert len({row.get("completions/mean_length") for row in trained}) > 2  # not every step draws rollouts
    assert trained[-1]["clip_fraction"] > 0
    assert abs(trained[-1]["mixture_weight/0"] - 0.5) > 1e-4
    assert sum("eval_loss" in row for row in expected) == 3
