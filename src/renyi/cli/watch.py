"""What a user sees of a training run: the plan, its progress, and its results.

`renyi.runs.run` calls `TrainingWatch` as the run goes on. Read next: `command.py`, what differs between methods.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from renyi.cli.command import TrainingCommand
from renyi.cli.console import bytes_text, facts, headed, typed
from renyi.cli.members import shown_table
from renyi.cli.progress import Progress
from renyi.data import told_cut, told_tokenizer
from renyi.ensemble.attention import HALF, SHORT, chooses_by_length
from renyi.inference import MemberTable
from renyi.layout import REFERENCE_FOLDER
from renyi.runs.auto import Chosen
from renyi.runs.build import Rows, Run, Watch
from renyi.runs.learned import LEARNED_FILE
from renyi.runs.settings import METHODS, Settings
from renyi.text import number_text, plural
from renyi.training.checkpoints import find_checkpoints
from renyi.training.config import AUTO
from renyi.training.memorising import parting
from renyi.training.report import FIGURE_FILE, METRICS_FILE
from renyi.training.steps import peak_memory


class TrainingWatch(Watch):
    """Shows a run on a terminal, or line by line where there is none."""

    def __init__(self, command: TrainingCommand, out: Console, err: Console):
        self._command, self._out, self._err = command, out, err
        self._folder: Path | None = None  # of the checkpoints that are being written

    def doing(self, what: str) -> AbstractContextManager[Any]:
        return self._err.status(what)

    @contextmanager
    def training(self) -> Iterator[Sequence[TrainerCallback]]:
        with Progress() as progress:
            yield [progress]

    def chosen(self, chosen: Chosen, settings: Settings) -> None:
        self._out.print(_what_was_chosen(self._command, chosen, settings.parts().args.num_members))

    def ready(self, run: Run) -> None:
        self.show(run)
        self._out.print()
        _show_resuming(self._out, run)
        self._folder = run.output_dir

    def show(self, run: Run, is_dry: bool = False) -> None:
        """Show the plan and the first example; in a dry run also the memory of a step."""
        auto_undecided = is_dry and run.record.settings["alpha"] == AUTO
        self._out.print(_plan(self._command, run, auto_undecided))
        first = run.prepared(run.train_rows, 1)
        self._out.print(self._command.first(run, first, self._out.is_terminal))
        if is_dry:
            _show_memory(self._out, self._err, run)

    def trained(self, run: Run) -> None:
        _show_end(self._out, self._command, run)

    def learned(self, table: MemberTable) -> None:
        self._out.print(shown_table(table))

    def saved(self, run: Run) -> None:
        _show_files(self._out, self._command, run)

    def after_interruption(self) -> str:
        """What the same command would do after an interruption."""
        newest = find_checkpoints(self._folder).newest if self._folder else None
        if newest:
            return f"the same command goes on from {newest.name}"
        return "the same command starts again: there is no checkpoint yet"


def _what_was_chosen(command: TrainingCommand, chosen: Chosen, num_members: int) -> RenderableType:
    """What `alpha: auto` found and chose."""
    calibration = "" if chosen.calibration is None else f" · calibration {chosen.calibration:.2f}"
    rows = {
        "one adapter": f"fitted for {plural(chosen.fit_steps, 'step')}",
        "critical alpha": f"{chosen.critical_alpha:.2f} [{chosen.low:.2f}, {chosen.high:.2f}]; "
        f"above it {command.members} part",
        "alpha": f"{chosen.alpha:g} · {num_members} {command.members} start apart along the directions found; "
        f"the diagnosis would take {chosen.members}",
        "how sure": f"{chosen.mean_share:.0%} of the leading direction is unfinished fitting{calibration}",
    }
    return facts("alpha: auto", {name: Text(value) for name, value in rows.items()})


# ---- Before ----------------------------------------------------------------------------------------------------------


def _plan(command: TrainingCommand, ready: Run, undecided: bool) -> RenderableType:
    """What was understood of the settings, the base and the data."""
    trainer, args, ensemble = ready.trainer, ready.trainer.args, ready.ensemble
    config, steps = ensemble.peft_config, ready.trainer.num_steps
    a_member = sum(p.numel() for p in trainer.trained_parameters()) / len(ensemble.members)
    trained = a_member * ensemble.num_members
    base = ensemble.base.num_parameters() - sum(p.numel() for p in ensemble.base.parameters() if p.requires_grad)
    targets = config.target_modules
    targets = ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, set | list) else targets
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
    precision = f"{str(ensemble.dtype).removeprefix('torch.')}{f', {mixed} autocast' if mixed else ''}"
    further = f", going on from {ready.start}" if ready.start else ""
    further += f", split over {args.member_parallel} processes" if args.member_parallel > 1 else ""
    rows = {
        "base": f"{ensemble.base_model_name} · {number_text(base)} parameters · {precision} on {args.device}",
        command.members: f"{ensemble.num_members} × LoRA rank {config.r}, lora_alpha {config.lora_alpha}, on {targets}"
        f"{further}",
        "trainable": f"{number_text(a_member)} parameters a {command.member}, "
        f"{number_text(trained)} in all ({trained / base:.1%} of the base)",
        **(
            {
                "alpha": "auto: decided by one adapter, which is fitted first"
                if undecided
                else _schedule(command, args, steps)
            }
            if ensemble.num_members > 1 or args.alpha > 0
            else {}
        ),
        **command.plan(ready),
        "data": f"{ready.settings.values['dataset_name']} · {ready.form}",
        **told_tokenizer(ready.tokenizer),
        "train": _sizes(command, ready, trainer.train_dataset, ready.train_rows),
        "held out": _sizes(command, ready, trainer.eval_dataset, ready.eval_rows),
        **_cut(ready),
        "steps": _steps(command, args, steps),
        "passes": _passes(trainer),
        "output": f"{ready.output_dir}",
    }
    return facts(command.prog, {name: Text(value) for name, value in rows.items()})


def _passes(trainer: Any) -> str:
    """In what parts a batch is run, and whether blocks are run again, or compiled."""
    args, budget = trainer.args, trainer.router.plan.token_budget
    size = f"of at most {budget:,} tokens, all members counted" if budget else "of a whole batch"
    again = "blocks run again in the backward" if args.gradient_checkpointing else "activations are kept"
    told = f"{size} · {again} (gradient_checkpointing: {str(bool(args.gradient_checkpointing)).lower()})"
    if chooses_by_length(trainer.model.base) and (args.bf16 or args.fp16 or trainer.model.base.dtype in HALF):
        told += f" · attention by matrix products in rows of up to {SHORT} tokens"
    if args.compile_blocks is not None:
        told += " · blocks are compiled, which takes a minute or more (torch_compile: true)"
    return told


def _cut(ready: Run) -> dict[str, str]:
    """How many rows lose tokens, if any do."""
    of_all = sum(ready.trainer.cut_rows.values())
    told = told_cut(of_all, getattr(ready.preparation, "max_length", None), ready.trainer.limits)
    return {"cut": told} if told else {}


def _show_memory(out: Console, err: Console, ready: Run) -> None:
    """Show the memory of the largest step, measured by running it."""
    trainer = ready.trainer
    if not trainer.splits_batches or not isinstance(trainer.train_dataset, Dataset):
        return
    if getattr(trainer.args, "precompute_ref_log_probs", False):  # a dry run does not compute them
        return
    with err.status("taking the largest step"):
        peak = trainer.rehearse()
    out.print(
        f"\nA step on the longest examples, optimizer state included, peaks at {_memory(trainer.args.device, peak)}."
    )


def _memory(device: Any, peak: int) -> str:
    return f"{bytes_text(peak)} of {'the GPU' if device.type == 'cuda' else 'memory, this program included'}"


def _schedule(command: TrainingCommand, args: Any, steps: int) -> str:
    routed = "" if args.routing_quantity == "sequence" else f", routed by {args.routing_quantity} log-likelihood"
    weights = "" if args.mixture_weights == "uniform" else f", {args.mixture_weights} mixture weights"
    hold, ramp = args.alpha_hold_ratio, args.alpha_ramp_ratio
    if args.num_members == 1:
        return f"without effect: there is one {command.member}"
    if args.alpha == 0:
        return f"0: every {command.member} fits everything{weights}"
    if hold + ramp == 0:
        return f"{args.alpha:g} from the first step{routed}{weights}"
    there = round((hold + ramp) * steps)
    if hold == 0:
        return f"rising to {args.alpha:g} at step {there}{routed}{weights}"
    return f"0 until step {round(hold * steps)}, then rising to {args.alpha:g} at step {there}{routed}{weights}"


def _sizes(command: TrainingCommand, ready: Run, prepared: Any, rows: "Rows | None") -> str:
    """How much a dataset holds, prepared or, if the trainer has no use for it, as rows."""
    if rows is None:
        return "none"
    if not isinstance(rows, Dataset):
        return "streamed"
    example = METHODS[command.method].example
    return command.sizes(ready, prepared) if isinstance(prepared, Dataset) else plural(len(rows), example)


def _steps(command: TrainingCommand, args: Any, steps: int) -> str:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.data_processes
    parts = [plural(args.train_batch_size, command.row)]
    parts += [f"{args.gradient_accumulation_steps} accumulated"] if args.gradient_accumulation_steps > 1 else []
    parts += [f"{args.data_processes} processes"] if args.data_processes > 1 else []
    epochs = "" if args.max_steps > 0 else f" ({args.num_train_epochs:g} epochs)"
    product = f" ({' × '.join(parts)})" if len(parts) > 1 else ""
    return f"{number_text(steps)}{epochs}, {plural(batch, command.row)} each{product}"


def _show_resuming(out: Console, ready: Run) -> None:
    newest, half_written = ready.checkpoints
    if newest is None and not half_written:
        return
    ignoring = ", ".join(c.name for c in half_written)
    ignoring = f"; ignoring half-written {ignoring}" if ignoring else ""
    if newest is None:
        out.print(f"no complete checkpoint: training from the start{ignoring}")
    elif ready.finished:
        out.print(f"already finished: {newest.name} is the last of this run, nothing is left to train{ignoring}")
    else:
        steps = ready.trainer.num_steps
        out.print(f"resuming from {newest.name} of {steps}{ignoring}")
        if ready.steps_before not in (None, steps):
            then = f"from here alpha and the learning rate follow the schedules of {steps}"
            out.print(f"the run had {ready.steps_before} steps: {then}")


# ---- After -----------------------------------------------------------------------------------------------------------


def _show_end(out: Console, command: TrainingCommand, ready: Run) -> None:
    """Where training ended, if not at its last step, and which members were kept, if not the last ones."""
    state, trainer = ready.trainer.state, ready.trainer
    if not ready.finished:
        out.print(f"\npeak memory: {_memory(trainer.args.device, peak_memory(trainer.args.device))}", style="dim")
    if state.global_step < state.max_steps:
        out.print(f"\nstopped early, at step {state.global_step} of {state.max_steps}")
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = state.best_model_checkpoint.rpartition("/")[2]
        out.print(f"the {command.members} are those of {best}, the best by {trainer.args.metric_for_best_model}")
    found = parting(state.log_history, ready.ensemble.num_members, trainer.args.alpha)
    if found and found.is_memory:
        out.print(f"\n{found.told(trainer.unit)}", style="yellow")


def _show_files(out: Console, command: TrainingCommand, ready: Run) -> None:
    folder = str(ready.output_dir)
    last, has_reference = ready.ensemble.num_members - 1, (ready.output_dir / REFERENCE_FOLDER).is_dir()
    files = {
        "ensemble.json": "the ensemble: base, members, weights, alpha",
        f"member_0{f' … member_{last}' if last else ''}": "ordinary PEFT adapters",
        **command.files(ready),
        **({REFERENCE_FOLDER: "the members as they were when training began"} if has_reference else {}),
        f"{METRICS_FILE}, {FIGURE_FILE}": "every logged step, and the curves",
        LEARNED_FILE: "the table above",
        "README.md": "model card",
    }
    table = Table.grid(padding=(0, 3))
    for name, what in files.items():
        table.add_row(f"  {name}", Text(what, "dim"))
    out.print(headed("Saved in", folder), soft_wrap=True)
    out.print(table)
    if ready.trainer.args.push_to_hub:
        out.print(f"\nPushed to {ready.trainer.hub_model_id}", soft_wrap=True)
    out.print(headed("Next"))
    quoted, data = (shlex.quote(name) for name in (folder, ready.settings.values["dataset_name"]))
    for line in (f"renyi report {quoted}", *command.next(quoted, data)):
        out.print(f"  {typed(line)}", soft_wrap=True)
    in_python = f"  import renyi; renyi.load({json.dumps(folder, ensure_ascii=False)})"
    out.print(Text.assemble(in_python, ("   in Python", "dim")), soft_wrap=True)
