"""The demo: one contradictory corpus, three trainings, and whether each model knows what it does not know.

A single adapter, an ensemble at α = 0 and an α-Rényi ensemble learn from the same unlabelled records of two schools
that contradict each other on half of the facts. Read next: `measure.py`, what is measured.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from renyi.ensemble import LoraEnsemble
from renyi.training import RenyiSFTConfig, RenyiSFTTrainer
from renyi.zoo.base import load_base
from renyi.zoo.figure import draw_demo
from renyi.zoo.measure import Measured, measure
from renyi.zoo.world import World

TRAIN_RECORDS, HELD_OUT_RECORDS = 6400, 512
# name: members, alpha
RUNS = {"single": (1, 0.0), "alpha_0": (4, 0.0), "alpha_renyi": (4, 0.8)}


def run_demo(
    output_dir: Path,
    seed: int = 0,
    watch: Callable[[str], AbstractContextManager[TrainerCallback | None]] | None = None,
    **overrides: Any,
) -> dict[str, Measured]:
    """Train the three runs on one world, measure them, and write `summary.json` and `demo.png`.

    Args:
        output_dir: where the three ensembles, the summary and the figure go.
        seed: of the world, its records, and the training.
        watch: called with a run's name; returns a context around its training, which may give a callback to follow it.
        overrides: training settings that differ from the demo's, as in `RenyiSFTConfig`.
    """
    world = World(seed=seed)
    measured = {}
    for name, (num_members, alpha) in RUNS.items():
        with watch(name) if watch else nullcontext() as callback:
            trainer, seconds = train(world, num_members, alpha, output_dir / name, seed, callback, **overrides)
        measured[name] = measure(trainer, world, seconds)
    summary = {name: m._asdict() for name, m in measured.items()}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    (output_dir / "summary.json").write_text(
        json.dumps(summary | {"seed": seed, "machine": machine}, indent=2) + "\n", encoding="utf-8"
    )
    draw_demo(measured, output_dir / "demo.png")
    return measured


def train(
    world: World,
    num_members: int,
    alpha: float,
    output_dir: Path,
    seed: int,
    callback: TrainerCallback | None = None,
    start: Path | None = None,
    **overrides: Any,
) -> tuple[RenyiSFTTrainer, float]:
    """Fine-tune the zoo's base, or the ensemble in the folder `start`; returns the trainer and its seconds."""
    base, tokenizer = load_base()
    fresh = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    settings: dict[str, Any] = {
        "num_members": num_members,
        "alpha": alpha,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "max_steps": 500,
        "assistant_only_loss": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": seed,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": "none",
        **overrides,
    }
    trainer = RenyiSFTTrainer(
        LoraEnsemble.load(start, base=base) if start else base,
        RenyiSFTConfig(str(output_dir), **settings),
        train_dataset=world.dataset(TRAIN_RECORDS, seed),
        eval_dataset=world.dataset(HELD_OUT_RECORDS, held_out_seed(seed)),
        peft_config=None if start else fresh,
        processing_class=tokenizer,
        callbacks=[callback] if callback else None,
    )
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model()
    return trainer, seconds


def held_out_seed(seed: int) -> int:
    """The seed of the held-out records of a training seed: other combinations of the same facts."""
    return seed + 1_000_000
