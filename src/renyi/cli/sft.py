"""`renyi sft`: train an ensemble on a dataset, from settings in a YAML file and flags.

It says what it understood, trains, and says what came out; what it does stands in `renyi.training.run`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from renyi.cli.console import facts, number_text, plural, quiet_progress_bars, say, stream
from renyi.cli.members import members_table
from renyi.cli.parser import keys, parse, split_config

if TYPE_CHECKING:
    from renyi.training.run import Rows, Run

PROG = "renyi sft"
SCORED = 256  # examples scored to say what each member learned
LONGEST_SPAN = 300  # characters shown of either end of a long piece of the first example

# The keys that a help page shows; every key of TRL's SFTConfig, ModelConfig and ScriptArguments works, too.
HELP = {
    "What": "model_name_or_path dataset_name output_dir",
    "Ensemble": "num_members alpha alpha_hold_ratio alpha_ramp_ratio routing_quantity mixture_weights prior_std",
    "LoRA": "lora_r lora_alpha lora_dropout lora_target_modules use_rslora",
    "Data": "max_length completion_only_loss assistant_only_loss packing dataset_text_field dataset_train_split "
    "dataset_test_split test_split_size chat_template_path pad_token eos_token",
    "Training": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "lr_scheduler_type dtype bf16 load_in_4bit gradient_checkpointing seed",
    "Watching": "dry_run logging_steps eval_strategy eval_steps save_steps save_total_limit early_stopping_patience "
    "report_to",
}

# Where TRL's own words would mislead.
OUR_HELP = {
    "output_dir": "The folder for checkpoints and the ensemble; the same command goes on from what it holds",
    "pad_token": "Token to pad with, where the tokenizer has none or pads with its end of text",
    "bf16": "Mixed precision; on unless fp16 is set",
}


def run(argv: Sequence[str]) -> int:
    """Train, or with `--dry_run` only say what would be trained."""
    if {"-h", "--help"} & set(argv):
        _help()
        return 0
    config, flags = split_config(argv, PROG)  # before the imports: its `env:` may be meant for them
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from trl import ScriptArguments

        from renyi.training import RenyiSFTConfig
        from renyi.training.output import no_empty_folder
        from renyi.training.run import MemberConfig, RunArguments, build

        quiet_progress_bars()
        types = (ScriptArguments, RenyiSFTConfig, MemberConfig, RunArguments)
        script, args, model, own = parse(types, flags, config, PROG)

    from renyi.cli.progress import Progress

    with no_empty_folder(args.output_dir):
        progress = Progress()
        with err.status("loading the data and the base model"):
            ready = build(script, args, model, own, [progress])
        _show_plan(out, ready, script.dataset_name)
        _show_first_example(out, ready)
        if own.dry_run:
            out.print("\nA dry run: nothing was written. Without [bold]--dry_run[/] this trains.")
            return 0
        return _train(out, err, ready, progress, script.dataset_name)


def _train(out: Console, err: Console, ready: "Run", progress: Any, dataset_name: str) -> int:
    from renyi.training.checkpoints import find_checkpoints
    from renyi.training.run import save, train

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
    _show_end(out, ready)
    with err.status("saving"):
        save(ready, dataset_name)
    with err.status("scoring examples under every member"):  # in every process: preparing data waits for them all
        table = _what_members_learned(ready)
    out.print(table)
    _show_files(out, ready, dataset_name)
    ready.trainer.end()
    return 0


# ---- Before ----------------------------------------------------------------------------------------------------------


def _show_plan(out: Console, ready: "Run", dataset_name: str) -> None:
    """What was understood of the settings, the base and the data."""
    trainer, args, ensemble = ready.trainer, ready.trainer.args, ready.ensemble
    config, steps = ensemble.peft_config, ready.trainer.num_steps
    trained = sum(p.numel() for p in trainer.trained_parameters())
    base = ensemble.base.num_parameters() - trained
    targets = config.target_modules
    targets = ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, set | list) else targets
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else ""
    precision = f"{str(ensemble.dtype).removeprefix('torch.')}{f', {mixed} autocast' if mixed else ''}"
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    parts = [f"{args.train_batch_size} rows"]
    parts += [f"{args.gradient_accumulation_steps} accumulated"] if args.gradient_accumulation_steps > 1 else []
    parts += [f"{args.world_size} processes"] if args.world_size > 1 else []
    epochs = "" if args.max_steps > 0 else f" ({args.num_train_epochs:g} epochs)"
    rows = {
        "base": f"{ensemble.base_model_name} · {number_text(base)} parameters · {precision} on {args.device}",
        "members": f"{ensemble.num_members} × LoRA rank {config.r}, lora_alpha {config.lora_alpha}, on {targets}",
        "trainable": f"{number_text(trained / ensemble.num_members)} parameters a member, "
        f"{number_text(trained)} in all ({trained / base:.1%} of the base)",
        "alpha": _schedule(args, steps),
        "data": f"{dataset_name} · {ready.form}",
        "train": _sizes(trainer.train_dataset, ready.train_rows),
        "held out": _sizes(trainer.eval_dataset, ready.eval_rows),
        "steps": f"{number_text(steps)}{epochs}, {plural(batch, 'row')} each"
        + (f" ({' × '.join(parts)})" if len(parts) > 1 else ""),
        "output": f"{ready.output_dir}",
    }
    out.print(facts(PROG, {name: Text(value) for name, value in rows.items()}))


def _schedule(args: Any, steps: int) -> str:
    routed = "" if args.routing_quantity == "sequence" else f", routed by {args.routing_quantity} log-likelihood"
    weights = "" if args.mixture_weights == "uniform" else f", {args.mixture_weights} mixture weights"
    hold, ramp = args.alpha_hold_ratio, args.alpha_ramp_ratio
    if args.alpha == 0:
        return f"0: every member fits everything{weights}"
    if hold + ramp == 0:
        return f"{args.alpha:g} from the first step{routed}{weights}"
    there = round((hold + ramp) * steps)
    return f"0 until step {round(hold * steps)}, then rising to {args.alpha:g} at step {there}{routed}{weights}"


def _sizes(prepared: Any, rows: "Rows | None") -> str:
    """How much a dataset holds, prepared or, if the trainer has no use for it, as rows."""
    from datasets import Dataset

    from renyi.data import count_tokens

    if rows is None:
        return "none"
    if not isinstance(rows, Dataset):
        return "streamed"
    if not isinstance(prepared, Dataset) or "labels" not in prepared.column_names:
        return plural(len(rows), "example")
    counts = count_tokens(prepared)
    packed = f" packed in {plural(len(prepared), 'row')}" if len(prepared) != counts.examples else ""
    return (
        f"{plural(counts.examples, 'example')}{packed} · {plural(counts.tokens, 'token')}, "
        f"{number_text(counts.trained)} of them trained"
    )


def _show_first_example(out: Console, ready: "Run") -> None:
    """The first example as the model sees it, its trained tokens in colour (or between « » without a terminal)."""
    from renyi.data import IGNORED, Preparation, prepare, sample

    first = prepare(sample(ready.train_rows, 1), ready.tokenizer, Preparation.of(ready.trainer.args))[0]
    ids, is_trained = first["input_ids"], [label != IGNORED for label in first["labels"]]
    is_trained[0] = False  # nothing predicts the first token
    text, before, start = Text(), "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_trained[end] != is_trained[start]:
            # Decoded from the beginning each time, because some tokenizers drop the space that a piece begins with.
            whole = str(ready.tokenizer.decode(ids[:end]))
            piece = whole[len(before) :] if whole.startswith(before) else str(ready.tokenizer.decode(ids[start:end]))
            text.append_text(_span(piece, is_trained[start], out.is_terminal))
            before, start = whole, end
    how = "in green" if out.is_terminal else "between « »"
    title = f"[bold]first example[/] [dim]· {sum(is_trained)} of {len(ids)} tokens are trained, {how}[/]"
    out.print(Panel(text, title=title, title_align="left", border_style="dim", padding=(0, 1)))


def _span(piece: str, trained: bool, coloured: bool) -> Text:
    if len(piece) > 2 * LONGEST_SPAN + 50:
        piece = f"{piece[:LONGEST_SPAN]} … {piece[-LONGEST_SPAN:]}"
    if not trained:
        return Text(piece, "dim")
    if coloured:
        return Text(piece, "green")
    inside = piece.strip()
    left, right = piece[: piece.find(inside)], piece[piece.find(inside) + len(inside) :]
    return Text(f"{left}«{inside}»{right}")


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


def _show_end(out: Console, ready: "Run") -> None:
    """Where training ended, if not at its last step, and which members were kept, if not the last ones."""
    state, trainer = ready.trainer.state, ready.trainer
    if state.global_step < state.max_steps:
        out.print(f"\nstopped early, at step {state.global_step} of {state.max_steps}")
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        best = state.best_model_checkpoint.rpartition("/")[2]
        out.print(f"the members are those of {best}, the best by {trainer.args.metric_for_best_model}")


# ---- After -----------------------------------------------------------------------------------------------------------


def _what_members_learned(ready: "Run") -> Any:
    from renyi.data import Preparation, prepare, sample
    from renyi.inference import score, summarise_members

    held_out = ready.eval_rows is not None
    rows = sample(ready.eval_rows if ready.eval_rows is not None else ready.train_rows, SCORED)
    prepared = prepare(rows, ready.tokenizer, Preparation.of(ready.trainer.args))
    with ready.trainer.accelerator.autocast():
        scores = score(ready.ensemble, prepared)
    members = summarise_members(scores, ready.ensemble.weights)
    clearest = [_snippet(ready, prepared[m.clearest]) if m.clearest is not None else "–" for m in members]
    of = "held-out" if held_out else "training"
    return members_table(members, "What each member learned", f"from {len(scores)} {of} examples", clearest)


def _snippet(ready: "Run", example: dict[str, Any]) -> str:
    """The trained part of an example on one line."""
    from renyi.data import IGNORED

    ids = [i for i, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED]
    return " ".join(str(ready.tokenizer.decode(ids[:60], skip_special_tokens=True)).split())


def _show_files(out: Console, ready: "Run", dataset_name: str) -> None:
    from renyi.training.report import FIGURE_FILE, METRICS_FILE

    folder = str(ready.output_dir)
    last = ready.ensemble.num_members - 1
    table = Table.grid(padding=(0, 3))
    table.add_row("  ensemble.json", "[dim]the ensemble: base, members, weights, alpha[/]")
    table.add_row(f"  member_0{f' … member_{last}' if last else ''}", "[dim]ordinary PEFT adapters[/]")
    table.add_row(f"  {METRICS_FILE}, {FIGURE_FILE}", "[dim]every logged step, and the curves[/]")
    table.add_row("  README.md", "[dim]model card[/]")
    out.print(f"\n[bold]Saved in[/] {folder}")
    out.print(table)
    out.print("\n[bold]Next[/]")
    out.print(f"  renyi info {folder}", soft_wrap=True)
    out.print(f"  renyi score {folder} {dataset_name} --output scores.jsonl", soft_wrap=True)
    out.print(f'  from renyi import LoraEnsemble; LoraEnsemble.load("{folder}")   [dim]in Python[/]', soft_wrap=True)


# ---- Help ------------------------------------------------------------------------------------------------------------


def _help() -> None:
    from trl import ScriptArguments

    from renyi.training import RenyiSFTConfig
    from renyi.training.run import MemberConfig, RunArguments

    out = stream()
    out.print(f"[bold]{PROG}[/] --config FILE.yaml [--key value …]\n", markup=True)
    out.print("Train an α-Rényi LoRA ensemble. A flag overrides the file, the file overrides the default.")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", max_width=12, overflow="fold")
    table.add_column()
    for group, names in HELP.items():
        table.add_row(f"\n[bold]{group}[/]")
        for key in keys((ScriptArguments, RenyiSFTConfig, MemberConfig, RunArguments), names.split()):
            table.add_row(f"  {key.name}", Text(key.default), Text(OUR_HELP.get(key.name, key.help)))
    out.print(table)
    out.print("\nEvery other key of TRL's SFTConfig, ModelConfig and ScriptArguments works, too.")
