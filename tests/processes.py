"""Training runs in processes of their own, that can be killed at any point or joined by others.

Processes are forked from a server that has imported the libraries once, so one costs a second and not ten.
"""

import gc
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["renyi.training"])

RESULT, KILLED = "result.json", 9


def run(target: Any, *args: Any, processes: int = 1, seconds: float = 240) -> list[int | None]:
    """Call `target(rank, *args)` in processes of their own and return their exit codes."""
    children = [_context.Process(target=_call, args=(target, rank, *args)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join(seconds)
        if child.is_alive():
            child.kill()
    return [child.exitcode for child in children]


def kill_once_written(file: Path, *argv: object, seconds: float = 240) -> None:
    """Run `renyi ARGV …` in a process of its own, and kill it (SIGKILL) as soon as the file is there."""
    with tempfile.NamedTemporaryFile() as said:
        child = _context.Process(target=_renyi, args=([str(arg) for arg in argv], said.name))
        child.start()
        deadline = time.monotonic() + seconds
        while not file.exists():
            assert child.is_alive(), Path(said.name).read_text(encoding="utf-8")
            assert time.monotonic() < deadline, f"no {file} after {seconds} s"
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL


def on_a_full_disk(most: int, *argv: object, seconds: float = 240) -> tuple[int | None, str]:
    """Run `renyi ARGV …` in a process that can write no file above `most` bytes: its exit code and what it said."""
    with tempfile.NamedTemporaryFile() as said:
        child = _context.Process(target=_renyi, args=([str(arg) for arg in argv], said.name, most))
        child.start()
        child.join(seconds)
        child.kill()
        return child.exitcode, Path(said.name).read_text(encoding="utf-8")


@contextmanager
def running(*argv: object, environment: dict[str, str]) -> Iterator[tuple[Any, Path]]:
    """`renyi ARGV …` in a process of its own: the process, and the file that has what it says. Killed at the end."""
    with tempfile.NamedTemporaryFile() as said:
        child = _context.Process(target=_renyi, args=([str(arg) for arg in argv], said.name, None, environment))
        child.start()
        try:
            yield child, Path(said.name)
        finally:
            child.kill()
            child.join()


def _renyi(argv: list[str], said: str, most: int | None = None, environment: dict[str, str] | None = None) -> None:
    """Run a command with what it prints going to a file, perhaps where no file can grow above a size."""
    import resource

    import torch

    from renyi.cli.main import main

    os.environ.update(environment or {})
    with open(said, "wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    torch.set_num_threads(1)
    if most is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    sys.exit(main(argv))


def _call(target: Any, *args: Any) -> None:
    gc.freeze()  # as conftest.py does, and for its reason
    target(*args)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def interrupted_run(
    rank: int,
    output_dir: str,
    kill: tuple[str, int] | None,
    method: str = "sft",
    settings: dict[str, Any] | None = None,
) -> None:
    """Train, or go on training, in `output_dir`; `kill` names an event and the step at which the process dies in it.

    Nothing that could differ between two runs is left out: dropout, accumulation, two epochs, a ramping alpha, learned
    weights, a prior, evaluations with early stopping, and logs that fall between checkpoints.
    """
    import torch
    from tiny import lora
    from transformers import TrainerCallback

    import renyi.training.checkpoints as training
    from renyi.members import adapters

    _quiet()
    torch.set_num_threads(1)
    event, step = kill or ("never", -1)

    class Killer(TrainerCallback):
        def _at(self, name: str, state: Any) -> None:
            if event == name and state.global_step == step:
                os._exit(KILLED)

        def on_step_end(self, args, state, control, **kwargs):
            self._at("after the step", state)

        def on_substep_end(self, args, state, control, **kwargs):
            self._at("between micro-batches", state)

        def on_evaluate(self, args, state, control, **kwargs):
            self._at("after evaluating", state)

        def on_save(self, args, state, control, **kwargs):
            self._at("after saving", state)

    trainer_of, rows = _of(method)
    trainer = trainer_of(
        output_dir,
        rows(24),
        eval_dataset=rows(6, seed=1),
        peft_config=lora(lora_dropout=0.1),
        callbacks=[Killer()],
        num_members=2,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-2,
        alpha_hold_ratio=0.125,
        alpha_ramp_ratio=0.5,
        mixture_weights="learned",
        mixture_weights_rate=0.2,
        prior_std=0.5,
        logging_steps=3,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=4,
        metric_for_best_model="eval_loss",
        early_stopping_patience=5,
        **(settings or {}),
    )
    if event in ("writing a member", "before the seal"):
        module, name = (adapters, "write_adapter") if event == "writing a member" else (training, "seal")
        plain = getattr(module, name)

        def die(*args: Any) -> None:
            if trainer.state.global_step == step and (name == "seal" or args[0].name == "member_1"):
                os._exit(KILLED)
            plain(*args)

        setattr(module, name, die)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    trainer.model.save(Path(output_dir) / "final")
    _write_result(trainer, output_dir)


def _of(method: str) -> tuple[Any, Any]:
    """What makes a trainer of this method, and what makes its rows."""
    import tiny

    return {"sft": (tiny.trainer_of, tiny.text_rows), "dpo": (tiny.dpo_trainer_of, tiny.pair_rows)}[method]


def distributed_run(
    rank: int, output_dir: str, world_size: int, port: int, settings: dict[str, Any], method: str = "sft"
) -> None:
    """Train with others over gloo, in float64; the first process writes the result."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    _quiet()
    torch.set_num_threads(1)
    from float64 import in_float64

    with in_float64():
        train_one(output_dir, {**settings, "ddp_backend": "gloo"}, method, world_size, writes=rank == 0)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train_one(
    output_dir: str | Path, settings: dict[str, Any], method: str = "sft", world_size: int = 1, writes: bool = True
) -> None:
    """What `distributed_run` trains, in this process."""
    trainer_of, rows = _of(method)
    evaluated = {"eval_dataset": rows(8, seed=1)} if "eval_strategy" in settings else {}
    trainer = trainer_of(output_dir, rows(32), **settings, **evaluated)
    assert trainer.accelerator.num_processes == world_size
    trainer.train()
    if writes:
        trainer.model.save(Path(output_dir) / "final")
        _write_result(trainer, str(output_dir))


def _write_result(trainer: Any, output_dir: str) -> None:
    (Path(output_dir) / RESULT).write_text(json.dumps(trainer.state.log_history))


def read_log(output_dir: Path) -> list[dict[str, float]]:
    """What a run logged, without the times."""
    times = ("runtime", "per_second")
    rows = json.loads((output_dir / RESULT).read_text())
    return [{k: v for k, v in row.items() if not k.endswith(times)} for row in rows]


def unsettled(row: dict[str, float]) -> set[str]:
    """What rounding alone decides in a log with the first step: there every margin is 0, and has a sign by chance."""
    return {name for name in row if name.startswith("rewards/accuracies")} if row.get("step", 3) <= 2 else set()


def _quiet() -> None:
    import logging

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    for name in ("accelerate", "trl", "renyi"):
        logging.getLogger(name).setLevel(logging.ERROR)
