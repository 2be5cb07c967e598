"""Members split over processes are the members of one process: equal members, logs and checkpoints."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from float64 import SAME, in_float64
from processes import free_port, read_log, run, unsettled
from tiny import (
    dpo_trainer_of,
    member_distance,
    pair_rows,
    powerflow_trainer_of,
    sft_config,
    text_rows,
    tiny_ensemble,
    tiny_model,
    trainer_of,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.inference import score
from renyi.training import reference_cache

pytestmark = pytest.mark.usefixtures("float64")

# Nothing whose handling depends on where members are is left out.
SETTINGS = {
    "num_members": 8,
    "alpha_hold_ratio": 0.2,
    "max_grad_norm": 0.3,
    "learning_rate": 3e-3,
    "mixture_weights": "learned",
    "mixture_weights_rate": 0.2,
    "prior_std": 0.5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 3,
}
TWO = {"member_parallel": 2, "ddp_backend": "gloo"}
# Members are drawn, dropped in a race, or left out, each by the shares of all members.
ROUTINGS: dict[str, dict[str, Any]] = {
    "sampled": {},
    "sparse": {"routing_threshold": 0.2},
    "raced": {"routing_threshold": 0.2, "token_budget": 200},
    "kept": {"routing": "sampled", "routing_refresh": 2},
}
TRAINERS = {"sft": (trainer_of, text_rows), "dpo": (dpo_trainer_of, pair_rows)}


class Job(NamedTuple):
    """One training run; `further` starts from members that differ already, and DPO then compares with those."""

    output_dir: Path
    method: str
    settings: dict[str, Any]
    resume: Path | None = None
    further: bool = False


def train(job: Job, rank: int = 0) -> None:
    with in_float64(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("renyi.routing.statistics.MOST_ACTIVE", 1.0)  # "sparse" leaves pairs out even if most matter
        _train(job, rank)


def _train(job: Job, rank: int) -> None:
    trainer_of, rows = TRAINERS[job.method]
    model = {"model": tiny_ensemble(job.settings["num_members"]).train()} if job.further else {}
    trainer = trainer_of(job.output_dir, rows(32), eval_dataset=rows(8, seed=1), **model, **job.settings)
    trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    trainer.save_model(job.output_dir / "final")
    block = [p for name, p in trainer.model.base.model.layers.named_parameters() if "lora_" not in name]
    assert {isinstance(p, DTensor) for p in block} == {job.settings.get("shard_base", False)}
    scored = score(trainer.model, trainer.eval_dataset) if job.method == "sft" else []
    if rank == 0:
        scores = {f"{s.index} {m}": x for s in scored for m, x in enumerate(s.log_likelihood)}
        (job.output_dir / "result.json").write_text(json.dumps([*trainer.state.log_history, scores]))


def join(rank: int, world_size: int, port: int) -> None:
    """Become one of several processes."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)


def leave() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_together(rank: int, world_size: int, port: int, jobs: list[Job]) -> None:
    join(rank, world_size, port)
    reference_cache.HF_HOME = str(jobs[0].output_dir)
    for job in jobs:
        train(job, rank)
    leave()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by `one` process and by `two`; one that goes on from the other's checkpoint is called resumed."""
    folder = tmp_path_factory.mktemp("runs")
    dpo = {**SETTINGS, "num_members": 4}
    precomputed = {**dpo, "precompute_ref_log_probs": True}
    one, two = folder / "one", folder / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_cache, "HF_HOME", str(one))  # where precomputed references are kept
        train(Job(one / "sft", "sft", SETTINGS))
        train(Job(one / "dpo", "dpo", precomputed))
        train(Job(one / "further", "dpo", dpo, further=True))
    jobs = [
        Job(two / "sft", "sft", {**SETTINGS, **TWO}),
        Job(two / "resumed", "sft", {**SETTINGS, **TWO}, one / "sft" / "checkpoint-3"),
        Job(two / "dpo", "dpo", {**precomputed, **TWO}),
        Job(two / "further", "dpo", {**dpo, **TWO}, further=True),
    ]
    assert run(train_together, 2, free_port(), jobs, processes=2) == [0, 0]
    train(Job(one / "resumed", "sft", SETTINGS, two / "sft" / "checkpoint-3"))
    return folder


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each routing by `one` process and by `two`, from members that differ."""
    folder = tmp_path_factory.mktemp("routed")
    settings = {
        kind: {**SETTINGS, "num_members": 4, "alpha": 1.0, "routing": kind, **more} for kind, more in ROUTINGS.items()
    }
    for kind, given in settings.items():
        train(Job(folder / "one" / kind, "sft", given, further=True))
    jobs = [Job(folder / "two" / kind, "sft", {**given, **TWO}, further=True) for kind, given in settings.items()]
    assert run(train_together, 2, free_port(), jobs, processes=2) == [0, 0]
    return folder


def assert_same_runs(folder: Path, expected: Path, but: tuple[str, ...] = ()) -> None:
    ours, theirs = (LoraEnsemble.load(f / "final", base=tiny_model()) for f in (folder, expected))
    assert member_distance(ours, theirs) <= SAME
    assert ours.weights.tolist() == pytest.approx(theirs.weights.tolist(), rel=SAME)
    log, other = read_log(folder), read_log(expected)
    assert len(log) == len(other) > 3
    for row, other_row in zip(log, other, strict=True):
        assert row.keys() == other_row.keys()
        for name in row.keys() - set(but) - unsettled(row):
            assert row[name] == pytest.approx(other_row[name], rel=SAME, abs=SAME), name


@pytest.mark.parametrize("method", ["sft", "dpo", "further"])
def test_two_processes_with_half_of_the_members_are_one(runs, method):
    assert_same_runs(runs / "two" / method, runs / "one" / method)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_processes_leave_out_the_pairs_that_one_process_leaves_out(routed, routing):
    assert_same_runs(routed / "two" / routing, routed / "one" / routing)
    active = [row["routing/active"] for row in read_log(routed / "one" / routing) if "routing/active" in row]
    assert min(active) < 1


@pytest.mark.parametrize("layout", ["one", "two"])
def test_a_run_goes_on_in_another_layout(runs, layout):
    assert_same_runs(runs / layout / "resumed", runs / "one" / "sft")


def test_checkpoints_are_those_of_one_process(runs):
    ours, theirs = (runs / layout / "sft" / "checkpoint-6" for layout in ("two", "one"))
    files = [
        {f.relative_to(c) for c in [folder] for f in c.rglob("*") if "rng_state" not in f.name}
        for folder in (ours, theirs)
    ]
    assert files[0] == files[1]
    assert (runs / "two" / "further" / "final" / "reference" / "member_3").is_dir()
    state, other = (torch.load(c / "optimizer.pt")["state"] for c in (ours, theirs))
    assert state.keys() == other.keys()
    for i, of in state.items():
        for name, value in of.items():
            torch.testing.assert_close(value, other[i][name], rtol=SAME, atol=1e-15)


@pytest.mark.parametrize("base", [pytest.param("whole", marks=pytest.mark.slow), "sharded"])
def test_a_mesh_of_members_and_data(runs, tmp_path, base):
    settings = {**SETTINGS, **TWO, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    if base == "sharded":
        settings |= {"shard_base": True, "gradient_checkpointing": True}
    assert run(train_together, 4, free_port(), [Job(tmp_path, "sft", settings)], processes=4) == [0] * 4
    assert_same_runs(tmp_path, runs / "one" / "sft", but=("eval_loss",))


class Traffic(TorchDispatchMode):
    """Counts the bytes that every process holds of a collective's result."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            results = torch.utils._pytree.tree_leaves(args[0])
            self.bytes += sum(x.nbytes for x in results if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Steps(TrainerCallback):
    """The bytes after each step."""

    def __init__(self, traffic: Traffic):
        self.traffic, self.after = traffic, []

    def on_step_end(self, args, state, control, **kwargs):
        self.after.append(self.traffic.bytes)


def count_bytes(rank: int, port: int, file: Path) -> None:
    join(rank, 2, port)
    counted = {}
    for batch in (4, 8, 16):
        with Traffic() as traffic:
            steps = Steps(traffic)
            settings = {"num_members": 8, "per_device_train_batch_size": batch, "logging_steps": 100, **TWO}
            trainer_of(file.parent / str(batch), text_rows(64), callbacks=[steps], max_steps=4, **settings).train()
        counted[batch] = [b - a for a, b in zip(steps.after, steps.after[1:], strict=False)]
    if rank == 0:
        file.write_text(json.dumps(counted))
    leave()


def test_a_step_exchanges_a_float_for_every_member_and_example(tmp_path):
    file = tmp_path / "bytes.json"
    assert run(count_bytes, free_port(), file, processes=2) == [0, 0]
    counted = json.loads(file.read_text())
    rest = {step - 4 * 8 * int(batch) for batch, steps in counted.items() for step in steps}
    assert len(rest) == 1
    assert 0 < rest.pop() < 200


def refuse(rank: int, port: int, folder: Path) -> None:
    join(rank, 2, port)
    with pytest.raises(ConfigError, match="3 members do not divide"):
        trainer_of(folder, num_members=3, **TWO)
    with pytest.raises(ConfigError, match=r"member_parallel.*2 is not"):
        powerflow_trainer_of(folder, num_members=2, **TWO)
    with pytest.raises(ConfigError, match="fp16"):
        sft_config(folder, fp16=True, **TWO)
    with pytest.raises(ConfigError, match="shard_base"):
        sft_config(folder, shard_base=True, **TWO)
    with pytest.raises(ConfigError, match="precompute_ref_log_probs"):
        dpo_trainer_of(folder, model=tiny_ensemble(2), num_members=2, precompute_ref_log_probs=True, **TWO)
    with pytest.raises(ConfigError, match="member_parallel"):
        trainer_of(folder, model=trainer_of(folder, num_members=2, **TWO).model, num_members=2, ddp_backend="gloo")
    leave()


def test_what_cannot_be_split_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)member_parallel.*number of processes \(1;"):
        sft_config(tmp_path, member_parallel=2)
    assert run(refuse, free_port(), tmp_path, processes=2) == [0, 0]
