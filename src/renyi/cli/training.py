"""What every command that trains an ensemble does: say what it understood, train, and say what came out.

What only one method knows, its `TrainingCommand` says; what training does stands in `renyi.runs.single`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import bytes_text, facts, headed, quiet_progress_bars, say, stream
from renyi.cli.parser import ConfigFile, keys, parse, split_config
from renyi.text import number_text, plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.single import Rows, Run
    from renyi.training.trainer import EnsembleTrainer


class TrainingCommand(ABC):
    """What one method of training says in its own way.

    Attributes:
        prog: the command.
        trl_config: TRL's config, every key of which works.
        keys: those of its own that the help page shows, by group; `_BEFORE` and `_AFTER` are shown for all methods.
        example: what it calls an example of the data.
        row: what it calls a row of a batch.
        about: what it does, for the help page.
        member, members: what it calls a member, and several.
        sampled: how many examples are asked of members in the end, to say what each learned.
    """

    prog: ClassVar[str]
    trl_config: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    example: ClassVar[str]
    row: ClassVar[str]
    about: ClassVar[str] = "Train an α-Rényi LoRA ensemble."
    member: ClassVar[str] = "member"
    members: ClassVar[str] = "members"
    sampled: ClassVar[int] = 256

    @abstractmethod
    def trainer(self) -> "type[EnsembleTrainer]":
        """The trainer's class."""

    @abstractmethod
    def settings(self) -> Sequence[type]:
        """The dataclasses of TRL's script, the method, the members and the run, and of the tokenizer if needed."""

    def ahead(self, args: Any) -> str:
        """What else takes time before the plan can be shown, as the end of a sentence."""
        return ""

    def plan(self, ready: "Run") -> Mapping[str, str]:
        """Lines of the plan that only this method has."""
        return {}

    @abstractmethod
    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        """How much a prepared dataset holds."""

    @abstractmethod
    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        """The first example as the model sees it."""

    @abstractmethod
    def learned(self, ready: "Run", prepared: "Dataset", of: str) -> RenderableType:
        """What each member learned, from examples that are called `of`."""

    def files(self, ready: "Run") -> Mapping[str, str]:
        """What only this method leaves in an ensemble's folder, and what that is."""
        return {}

    @abstractmethod
    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        """Commands that a person may want next."""


def run_training(command: TrainingCommand, argv: Sequence[str]) -> int:
    """Train, or with `--dry_run` only say what would be trained."""
    if {"-h", "--help"} & set(argv):
        _help(command)
        return 0
    config, flags = split_config(argv, command.prog)  # before the imports: its `env:` may be meant for them
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.runs.output import no_empty_folder
        from renyi.runs.single import build
        from renyi.training.config import AUTO

        quiet_progress_bars()
        settings = _settings(command, flags, config)
        script, args, model, own, *of_tokenizer = settings

    from renyi.cli.progress import Progress

    with no_empty_folder(args.output_dir):
        auto = args.alpha == AUTO
        if auto and own.dry_run:
            args.alpha = 0.0
        elif auto:
            _choose_alpha(out, err, command, settings, _settings(command, flags, config))
        progress = Progress()
        with err.status(f"loading the data and the base model{command.ahead(args)}"):
            ready = build(command.trainer(), script, args, model, own, [progress], *of_tokenizer)
        _show_plan(out, command, ready, script.dataset_name, auto and own.dry_run)
        out.print(command.first(ready, _prepared(ready, ready.train_rows, 1), out.is_terminal))
        if own.dry_run:
            _show_memory(out, err, ready)
            out.print("\nA dry run: nothing was written. Without --dry_run this trains.")
            return 0
        return _train(out, err, command, ready, progress, script.dataset_name)


def _settings(command: TrainingCommand, flags: Sequence[str], config: ConfigFile) -> Sequence[Any]:
    """Settings as given, in objects of their own: building a run changes them."""
    parsed = parse(command.settings(), flags, config, command.prog)
    parsed.filled[3].given = parsed.given
    return parsed.filled


def _choose_alpha(
    out: Console, err: Console, command: TrainingCommand, settings: Sequence[Any], of_fit: Sequence[Any]
) -> None:
    """Do what `alpha: auto` does ahead of training, say what it found, and set what it chose in `settings`."""
    from renyi.cli.progress import Progress
    from renyi.runs.auto import fit_and_spread, go_on_with

    script, args, model, own, *of_tokenizer = of_fit
    progress = Progress()
    with progress:
        chosen = fit_and_spread(command.trainer(), script, args, model, own, [progress], *of_tokenizer)
    _, args, model, own, *_ = settings
    calibration = "" if chosen.calibration is None else f" · calibration {chosen.calibration:.2f}"
    rows = {
        "one adapter": f"fitted for {plural(chosen.fit_steps, 'step')}",
        "critical alpha": f"{chosen.critical_alpha:.2f} [{chosen.low:.2f}, {chosen.high:.2f}]; "
        f"above it {command.members} part",
        "alpha": f"{chosen.alpha:g} · {args.num_members} {command.members} start apart along the directions found; "
        f"the diagnosis would take {chosen.members}",
        "how sure": f"{chosen.mean_share:.0%} of the leading direction is unfinished fitting{calibration}",
    }
    out.print(facts("alpha: auto", {name: Text(value) for name, value in rows.items()}))
    go_on_with(chosen, args, model, own)


def _train(out: Console, err: Console, command: TrainingCommand, ready: "Run", progress: Any, dataset_name: str) -> int:
    from renyi.runs.single import save, train
    from renyi.training.checkpoints import find_checkpoints

    out.print()
    _show_resuming(out, ready)
    try:
        with progress:
            train(ready)
    except KeyboardInterrupt:
        newest = find_checkpoints(ready.output_dir).newest
        then = f"goes on from {newest.name}" if newest else "starts again: there is no checkpoint yet"
        say("interrupted", "bold yellow", f"the same command {then}")
        return 130
    _show_end(out, command, ready)
    with err.status("saving"):
        save(ready, dataset_name)
    with err.status(f"asking every {command.member} what it learned"):  # in every process: preparing waits for all
        learned = _what_members_learned(command, ready)
    out.print(learned)
    _show_files(out, command, ready, dataset_name)
    ready.trainer.end()
    return 0


def _prepared(ready: "Run", rows: "Rows", size: int) -> "Dataset":
    """At most `size` rows as training sees them."""
    from renyi.data import sample

    return ready.preparation.prepare(sample(rows, size), ready.tokenizer)


# ---- Before ----------------------------------------------------------------------------------------------------------


def _show_plan(out: Console, command: TrainingCommand, ready: "Run", dataset_name: str, undecided: bool) -> None:
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
        "data": f"{dataset_name} · {ready.form}",
        "train": _sizes(command, ready, trainer.train_dataset, ready.train_rows),
        "held out": _sizes(command, ready, trainer.eval_dataset, ready.eval_rows),
        "steps": _steps(command, args, steps),
        "output": f"{ready.output_dir}",
    }
    out.print(facts(command.prog, {name: Text(value) for name, value in rows.items()}))


def _show_memory(out: Console, err: Console, ready: "Run") -> None:
    """What the largest step takes, by taking it."""
    from datasets import Dataset

    trainer = ready.trainer
    if not trainer.splits_batches or not isinstance(trainer.train_dataset, Dataset):
        return
    if getattr(trainer.args, "precompute_ref_log_probs", False):  # and a dry run does not
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


def _sizes(command: TrainingCommand, ready: "Run", prepared: Any, rows: "Rows | None") -> str:
    """How much a dataset holds, prepared or, if the trainer has no use for it, as rows."""
    from datasets import Dataset

    if rows is None:
        return "none"
    if not isinstance(rows, Dataset):
        return "streamed"
    return command.sizes(ready, prepared) if isinstance(prepared, Dataset) else plural(len(rows), command.example)


def _steps(command: TrainingCommand, args: Any, steps: int) -> str:
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.data_processes
    parts = [plural(args.train_batch_size, command.row)]
    parts += [f"{args.gradient_accumulation_steps} accumulated"] if args.gradient_accumulation_steps > 1 else []
    parts += [f"{args.data_processes} processes"] if args.data_processes > 1 else []
    epochs = "" if args.max_steps > 0 else f" ({args.num_train_epochs:g} epochs)"
    product = f" ({' × '.join(parts)})" if len(parts) > 1 else ""
    return f"{number_text(steps)}{epochs}, {plural(batch, command.row)} each{product}"


def _show_resuming(out: Console, ready: "Run") -> None:
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
        out.print(f"resuming from {newest.name} of {ready.trainer.num_steps}{ignoring}")


# ---- After -----------------------------------------------------------------------------------------------------------


def _show_end(out: Console, command: TrainingCommand, ready: "Run") -> None:
    """Where training ended, if not at its last step, and which members were kept, if not the last ones."""
    from renyi.training.steps import peak_memory

    state, trainer = ready.trainer.state, ready.trainer
    if not ready.finished:
        out.print(f"\npeak memory: {_memory(trainer.args.device, peak_memory(trainer.args.device))}", style="dim")
    if state.global_step < state.max_steps:
        out.print(f"\nstopped early, at step {state.global_step} of {state.max_steps}")
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = state.best_model_checkpoint.rpartition("/")[2]
        out.print(f"the {command.members} are those of {best}, the best by {trainer.args.metric_for_best_model}")


def _what_members_learned(command: TrainingCommand, ready: "Run") -> RenderableType:
    held_out = ready.eval_rows is not None
    prepared = _prepared(ready, ready.eval_rows if ready.eval_rows is not None else ready.train_rows, command.sampled)
    of = f"{len(prepared)} {'held-out' if held_out else 'training'} {command.example}s"
    with ready.trainer.accelerator.autocast():
        return command.learned(ready, prepared, of)


def _show_files(out: Console, command: TrainingCommand, ready: "Run", dataset_name: str) -> None:
    from renyi.training.report import FIGURE_FILE, METRICS_FILE

    folder = str(ready.output_dir)
    last = ready.ensemble.num_members - 1
    files = {
        "ensemble.json": "the ensemble: base, members, weights, alpha",
        f"member_0{f' … member_{last}' if last else ''}": "ordinary PEFT adapters",
        **command.files(ready),
        f"{METRICS_FILE}, {FIGURE_FILE}": "every logged step, and the curves",
        "README.md": "model card",
    }
    table = Table.grid(padding=(0, 3))
    for name, what in files.items():
        table.add_row(f"  {name}", Text(what, "dim"))
    out.print(headed("Saved in", folder), soft_wrap=True)
    out.print(table)
    out.print(headed("Next"))
    for line in command.next(folder, dataset_name):
        out.print(f"  {line}", soft_wrap=True)
    in_python = f'  from renyi import LoraEnsemble; LoraEnsemble.load("{folder}")'
    out.print(Text.assemble(in_python, ("   in Python", "dim")), soft_wrap=True)


# ---- Help ------------------------------------------------------------------------------------------------------------

# The keys that every help page shows, before and after those of the method.
_BEFORE = {
    "What": "model_name_or_path dataset_name output_dir",
    "Members": "num_members alpha alpha_hold_ratio alpha_ramp_ratio routing_quantity mixture_weights prior_std",
    "LoRA": "lora_r lora_alpha lora_dropout lora_target_modules use_rslora",
}
_AFTER = {
    "Training": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "lr_scheduler_type dtype bf16 load_in_4bit gradient_checkpointing seed",
    "Speed and memory": "token_budget routing routing_threshold member_parallel",
    "Watching": "dry_run logging_steps eval_strategy eval_steps save_steps save_total_limit early_stopping_patience "
    "report_to",
}
# Where TRL's own words would mislead.
_OUR_HELP = {
    "model_name_or_path": "The base model, or the folder of an ensemble to go on training: a folder or a hub id",
    "output_dir": "The folder for checkpoints and the ensemble; the same command goes on from what it holds",
    "pad_token": "Token to pad with, where the tokenizer has none or pads with its end of text",
    "ld_alpha": "Weight of the tokens by which a completion is longer than the other; 1 if not given",
    "bf16": "Mixed precision; on unless fp16 is set",
}


def _help(command: TrainingCommand) -> None:
    out = stream()
    out.print(Text.assemble((command.prog, "bold"), " --config FILE.yaml [--key value …]\n"))
    out.print(f"{command.about} A flag overrides the file, the file overrides the default.")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", max_width=12, overflow="fold")
    table.add_column()
    for group, names in {**_BEFORE, **command.keys, **_AFTER}.items():
        table.add_row(headed(command.members.capitalize() if group == "Members" else group))
        for key in keys(command.settings(), names.split()):
            table.add_row(f"  {key.name}", Text(key.default), Text(_OUR_HELP.get(key.name, key.help)))
    out.print(table)
    out.print(f"\nEvery other key of TRL's {command.trl_config}, ModelConfig and ScriptArguments works, too.")
