"""What every command that trains an ensemble does: show what it understood, train, and show the results.

Read next: `command.py` (what differs between methods), `watch.py` (what is shown), `renyi.runs` (the run itself).
"""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from renyi.cli.command import TrainingCommand
from renyi.cli.console import headed, quiet_progress_bars, say, stream
from renyi.cli.parser import given_keys, keys, split_config


def run_training(command: TrainingCommand, argv: Sequence[str]) -> int:
    """Train, or with `--dry_run` only say what would be trained."""
    if {"-h", "--help"} & set(argv):
        _help(command)
        return 0
    config, flags = split_config(argv, command.prog)  # before the imports: its `env:` may be meant for them
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.cli.watch import TrainingWatch
        from renyi.runs.output import no_empty_folder
        from renyi.runs.settings import METHODS, Settings
        from renyi.runs.single import prepare, run

        quiet_progress_bars()
        given = given_keys(METHODS[command.method].dataclasses, flags, config, command.prog)
        settings = Settings(command.method, given.values, given.where)
        settings.parts()  # it refuses settings that do not fit together

    watch = TrainingWatch(command, out, err)
    if settings.values.get("dry_run"):
        with no_empty_folder(settings.values.get("output_dir")):
            watch.show(prepare(settings, watch), is_dry=True)
        out.print("\nA dry run: nothing was written. Without --dry_run, the same command trains.")
        return 0
    try:
        run(settings, watch)
    except KeyboardInterrupt:
        say("interrupted", "bold yellow", watch.after_interruption())
        return 130
    return 0


# ---- Help ------------------------------------------------------------------------------------------------------------

# The keys that every help page shows, before and after those of the method.
_BEFORE = {
    "What": "model_name_or_path dataset_name output_dir",
    "Members": "num_members alpha alpha_hold_ratio alpha_ramp_ratio alpha_hold_shared routing_quantity routing_group "
    "mixture_weights member_kind num_draws prior_std kl_warmup_ratio",
    "LoRA": "lora_r lora_alpha lora_dropout lora_target_modules use_rslora",
}
_AFTER = {
    "Training": "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "lr_scheduler_type dtype bf16 load_in_4bit gradient_checkpointing seed",
    "Speed and memory": "token_budget routing routing_threshold member_parallel",
    "Watching": "dry_run logging_steps eval_strategy eval_steps save_steps save_total_limit early_stopping_patience "
    "report_to",
}
# Help for keys for which TRL's own text would mislead.
OUR_HELP = {
    "model_name_or_path": "The base model, a folder or a hub id; or an ensemble or adapter, to train it further",
    "dataset_name": "Your data: a json, jsonl, csv or parquet file, or a hub id",
    "output_dir": "The folder for checkpoints and the ensemble; the same command continues from what is there",
    "lora_r": "Rank of each adapter",
    "lora_alpha": "An adapter's update is multiplied by lora_alpha / lora_r",
    "completion_only_loss": "Train completions only; by default so for rows of prompt and completion",
    "assistant_only_loss": "Train the assistant's messages only, instead of all tokens of a chat",
    "chat_template_path": "A .jinja file, or a tokenizer whose chat template is used",
    "max_steps": "Number of steps, instead of num_train_epochs; -1 for none",
    "pad_token": "Token to pad with, if the tokenizer has none or pads with its end of text",
    "ld_alpha": "Weight of the tokens that make one completion longer than the other; 1 if not given",
    "bf16": "Mixed precision; on unless fp16 is set",
}


def groups_of_keys(command: TrainingCommand) -> dict[str, list[str]]:
    """The keys that a user should know, by group."""
    return {
        command.members.capitalize() if group == "Members" else group: names.split()
        for group, names in {**_BEFORE, **command.keys, **_AFTER}.items()
    }


def _help(command: TrainingCommand) -> None:
    from renyi.runs.settings import METHODS

    out, dataclasses = stream(), METHODS[command.method].dataclasses
    out.print(Text.assemble((command.prog, "bold"), " --config FILE.yaml [--key value …]\n"))
    out.print(f"{command.about} A flag overrides the file, the file overrides the default.")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", max_width=12, overflow="fold")
    table.add_column()
    for group, names in groups_of_keys(command).items():
        table.add_row(headed(group))
        for key in keys(dataclasses, names):
            table.add_row(f"  {key.name}", Text(key.default), Text(OUR_HELP.get(key.name, key.help)))
    out.print(table)
    out.print(f"\nEvery other key of TRL's {command.trl_config}, ModelConfig and ScriptArguments works, too.")
