"""A sweep over alpha and the number of members: every cell is one run, measured on the same held-out examples.

The steps that a command line calls for every cell, as `renyi.runs.single` has them for one run. It prints nothing, and
knows neither flags nor files of settings.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import ScriptArguments

from renyi.errors import ConfigError, EnsembleFormatError, SaveError, TrainingDivergedError
from renyi.evaluation.sweep_choice import Cell, HeldOut
from renyi.inference import score, score_pairs
from renyi.inference.confidence import token_confidence
from renyi.runs.single import MemberConfig, Run, RunArguments, build, save, train
from renyi.training import RenyiDPOTrainer
from renyi.training.config import EnsembleConfig, require
from renyi.training.trainer import EnsembleTrainer

RESULT_FILE, FIGURE_FILE = "sweep.json", "sweep.png"
SECONDS_FILE, FAILED_FILE = "seconds.json", "failed.json"
# Settings that cannot change what a cell becomes: a sweep may go on with others.
_HARMLESS = frozenset(
    {"dry_run", "output_dir", "logging_dir", "logging_steps", "logging_strategy", "report_to", "run_name", "save_steps"}
    | {"save_total_limit", "per_device_eval_batch_size", "dataset_num_proc", "dataloader_num_workers"}
)


@dataclass
class SweepArguments:
    """What a sweep adds to the settings of one run."""

    alphas: list[float] = field(
        default_factory=lambda: [0.0, 0.3, 0.5, 0.8, 1.0], metadata={"help": "Values of alpha to try."}
    )
    members: list[int] = field(
        default_factory=lambda: [1, 4],
        metadata={"help": "Numbers of members to try; 1 is a single adapter, trained once whatever alphas are."},
    )
    method: str = field(
        default="sft", metadata={"help": "What trains the cells: sft or dpo.", "choices": ["sft", "dpo"]}
    )
    json: bool = field(default=False, metadata={"help": "Print the result as one JSON object."})

    def __post_init__(self) -> None:
        for key, values in (("alphas", self.alphas), ("members", self.members)):
            twice = [f"{v:g}" for i, v in enumerate(values) if f"{v:g}" in [f"{w:g}" for w in values[:i]]]
            if twice:
                raise ConfigError(f"{twice[0]} is given twice", where=key, hint="Give every value once.")
            require(key, values, bool(values), "at least one value")
        for alpha in self.alphas:
            require("alphas", alpha, 0 <= alpha <= 1, "numbers between 0 and 1")
        for number in self.members:
            require("members", number, number >= 1, "numbers of at least 1")

    @property
    def cells(self) -> list[Cell]:
        """Every pair, by members and then alpha; one member once."""
        found = {Cell(m, 0.0 if m == 1 else alpha) for m in self.members for alpha in self.alphas}
        return sorted(found)


class Settings(NamedTuple):
    """What `renyi.runs.single.build` takes for one cell; `of_tokenizer` holds its last argument if there is one."""

    trainer: type[EnsembleTrainer]
    script: ScriptArguments
    args: EnsembleConfig
    model: MemberConfig
    own: RunArguments
    of_tokenizer: Sequence[Any] = ()


class Outcome(NamedTuple):
    """What a cell says about the held-out examples, or why it failed, and its seconds of training."""

    held_out: HeldOut | None
    failed: str | None
    seconds: float | None


def folder_name(cell: Cell) -> str:
    return "members_1" if cell.members == 1 else f"alpha_{cell.alpha:g}_members_{cell.members}"


# ---- The sweep as a whole --------------------------------------------------------------------------------------------


def refuse_what_a_sweep_decides(args: Any, given: frozenset[str]) -> None:
    """Raise `ConfigError` for a setting that a sweep sets itself, or that makes no sense for several runs."""
    for key, instead in (("alpha", "alphas"), ("num_members", "members")):
        if key in given:
            raise ConfigError(
                f"was given, and a sweep tries several: give {instead}",
                where=key,
                hint=f"Remove {key} and write {instead}: [{getattr(args, key)}, …] or --{instead} "
                f"{getattr(args, key)} ….",
            )
    if args.output_dir in (None, "", "trainer_output"):  # the last is transformers' placeholder
        raise ConfigError("is not set", where="output_dir", hint="Give a folder for the cells: --output_dir ….")
    if args.resume_from_checkpoint:
        raise ConfigError(
            "was given, and a sweep has many runs", where="resume_from_checkpoint",
            hint="Leave it out: every cell goes on from its own newest complete checkpoint.",
        )  # fmt: skip
    if args.push_to_hub:
        raise ConfigError("true is not allowed", where="push_to_hub", hint="Push the chosen ensemble afterwards.")
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    require("save_strategy", strategy, strategy != "no", "steps or epoch: a finished cell is known by its checkpoint")
    if args.world_size > 1:
        raise ConfigError(
            f"there are {args.world_size} processes, and a sweep is one",
            hint="Train cells by `torchrun … -m renyi sft --output_dir OUT/alpha_0.3_members_4 …` with the sweep's own "
            "settings; the sweep then finds them finished.",
        )


def recorded(settings: Settings, method: str, given: frozenset[str]) -> dict[str, str]:
    """The settings that were given and decide what a cell becomes, as `sweep.json` keeps them."""
    parts = (settings.script, settings.args, settings.model, settings.own, *settings.of_tokenizer)
    decides = given - _HARMLESS - {f.name for f in fields(SweepArguments)}
    values = {key: next(getattr(part, key) for part in parts if hasattr(part, key)) for key in decides}
    return {"method": method} | {key: str(getattr(value, "value", value)) for key, value in sorted(values.items())}


def check_same_sweep(folder: Path, settings: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the folder holds a sweep with other settings: its cells would be taken for this one's."""
    file = folder / RESULT_FILE
    if not file.exists():
        return
    try:
        there = dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("is not the result of a sweep", where=str(file), hint="Choose another output_dir.") from error
    for key in sorted(there.keys() | settings.keys()):
        if there.get(key) != settings.get(key):
            old, new = (repr(s[key]) if key in s else "its default" for s in (there, settings))
            raise ConfigError(
                f"{folder} holds a sweep with {key} {old}, and this one has {new}",
                where="output_dir",
                hint="Choose another output_dir, or give the settings it began with; alphas and members may be others.",
            )


def write_result(folder: Path, result: Mapping[str, Any], figure: bytes | None = None) -> None:
    """Write `sweep.json`, and `sweep.png` if there is one, each whole or not at all.

    Raises:
        SaveError: a file could not be written.
    """
    files = {RESULT_FILE: (json.dumps(result, indent=1) + "\n").encode()} | ({FIGURE_FILE: figure} if figure else {})
    for name, content in files.items():
        _write(folder / name, content)


def _write(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise SaveError(f"could not be written ({error})", where=str(file), hint="Free some space.") from error


# ---- A cell ----------------------------------------------------------------------------------------------------------


def prepare_cell(settings: Settings, callbacks: Sequence[TrainerCallback]) -> Run:
    """Everything of a cell up to its training.

    Raises:
        RenyiError: whatever is wrong with settings, data or folder, before anything is written; also if nothing is held
            out.
    """
    gc.collect()  # a trainer is in circles with its callbacks: the cell before still holds its base
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    args: Any = settings.args
    run = build(*settings[:-1], [*callbacks, _Clock(Path(args.output_dir))], *settings.of_tokenizer)
    if run.eval_rows is None:
        raise ConfigError(
            "nothing is held out to measure the cells on",
            where="test_split_size",
            hint="Hold out a share with --test_split_size 0.1, or set --eval_strategy epoch where the data have a test "
            "split.",
        )
    if not isinstance(run.eval_rows, Dataset):
        raise ConfigError(
            "the held-out rows are streamed, and every cell is measured on all of them",
            where="dataset_streaming",
            hint="Load the dataset whole.",
        )
    return run


def run_cell(
    run: Run,
    dataset_name: str | None,
    training: AbstractContextManager[Any],
    measuring: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Outcome:
    """Train a cell, or go on with it, save its ensemble and measure it.

    A loss that is no number, members that give none, and a lack of memory on the device are failures of this cell. They
    are kept in its folder, so that it is not tried again until the folder is removed.

    Args:
        run: as `prepare_cell` made it.
        dataset_name: for the model card.
        training: a context that training runs in.
        measuring: gives a context that saving and measuring run in.

    Raises:
        SaveError: something could not be written; the same sweep goes on from there.
    """
    folder = run.output_dir
    try:
        with training:
            train(run)
        with measuring():
            save(run, dataset_name)
            held_out = _measure(run)
    except (TrainingDivergedError, torch.OutOfMemoryError) as error:
        is_ours = isinstance(error, TrainingDivergedError)
        reason = str(error).splitlines()[0] if is_ours else "the device has too little memory for it"
        _write(folder / FAILED_FILE, (json.dumps({"reason": reason}) + "\n").encode())
        return Outcome(None, reason, _read_seconds(folder))
    finally:
        run.trainer.end()
    return Outcome(held_out, None, _read_seconds(folder))


def failed_before(folder: Path) -> Outcome | None:
    """The outcome of a cell that failed when this sweep ran before."""
    file = folder / FAILED_FILE
    if not file.is_file():
        return None
    return Outcome(None, str(json.loads(file.read_text(encoding="utf-8"))["reason"]), _read_seconds(folder))


def _measure(run: Run) -> HeldOut:
    assert isinstance(run.eval_rows, Dataset)
    prepared = run.preparation.prepare(run.eval_rows, run.tokenizer)
    measured = _measured_pairs if isinstance(run.trainer, RenyiDPOTrainer) else _measured_texts
    try:
        with run.trainer.accelerator.autocast():
            return measured(run, prepared)
    except EnsembleFormatError as error:  # of members that were just trained: no finite likelihood
        raise TrainingDivergedError(error.what, where=f"held out, {error.where}", hint=error.hint) from error


def _measured_texts(run: Run, prepared: Dataset) -> HeldOut:
    ensemble = run.ensemble
    scores = score(ensemble, prepared)
    sure = token_confidence(ensemble, prepared)
    ell_MN = torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T
    tokens_N = torch.tensor([s.tokens for s in scores])
    return HeldOut(ell_MN, tokens_N, ensemble.weights.cpu(), sure.confidence, sure.is_right)


def _measured_pairs(run: Run, prepared: Dataset) -> HeldOut:
    """The likelihood of a label is Bradley and Terry's σ(Δ), whatever loss the margins were trained with."""
    ensemble, trainer, preparation = run.ensemble, run.trainer, run.preparation
    assert isinstance(trainer, RenyiDPOTrainer)
    pairs: Any = preparation
    scores = score_pairs(ensemble, prepared, trainer.args.preference_loss, trainer.reference, pairs)
    ell_MN = logsigmoid(torch.tensor([s.margin for s in scores], dtype=torch.float64).T)
    p_N = torch.tensor([s.preference for s in scores], dtype=torch.float64)
    return HeldOut(ell_MN, torch.ones(len(scores)), ensemble.weights.cpu(), torch.maximum(p_N, 1 - p_N), p_N > 0.5)


class _Clock(TrainerCallback):
    """Keeps a cell's seconds of training, those of runs that were killed up to their last checkpoint included."""

    def __init__(self, folder: Path):
        self._folder, self._before, self._since = folder, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._before = (_read_seconds(self._folder) or 0.0) if state.global_step else 0.0
        self._since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._keep()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep()

    def _keep(self) -> None:
        seconds = self._before + time.perf_counter() - self._since
        _write(self._folder / SECONDS_FILE, f"{seconds:.3f}\n".encode())


def _read_seconds(folder: Path) -> float | None:
    try:
        return float((folder / SECONDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
