"""What every command that trains an ensemble does: say what it understood, train, and say what came out.

What only one method says, its `TrainingCommand` does; `watch.py` shows how a run goes, and `renyi.runs` runs it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import headed, quiet_progress_bars, say, stream
from renyi.cli.parser import given_keys, keys, split_config

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run


class TrainingCommand(ABC):
    """What one method of training says in its own way.

    Attributes:
        method: one of `renyi.runs.settings.METHODS`.
        trl_config: TRL's config, every key of which works.
        keys: those of its own that the help page shows, by group; `_BEFORE` and `_AFTER` are shown for all methods.
        example: what it calls an example of the data.
        row: what it calls a row of a batch.
        about: what it does, for the help page.
        member, members: what it calls a member, and several.
        sampled: how many examples are asked of members in the end, to say what each learned.
    """

    method: ClassVar[str]
    trl_config: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    example: ClassVar[str]
    row: ClassVar[str]
    about: ClassVar[str] = "Train an α-Rényi LoRA ensemble."
    member: ClassVar[str] = "member"
    members: ClassVar[str] = "members"
    sampled: ClassVar[int] = 256

    @property
    def prog(self) -> str:
        return f"renyi {self.method}"

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
        from renyi.cli.watch import TrainingWatch
        from renyi.runs.output import no_empty_folder
        from renyi.runs.settings import METHODS, Settings
        from renyi.runs.single import prepare, run

        quiet_progress_bars()
        given = given_keys(METHODS[command.method].dataclasses, flags, config, command.prog)
        settings = Settings(command.method, given.values, given.where)
        settings.parts()  # which refuses what does not fit together

    watch = TrainingWatch(command, out, err)
    if settings.values.get("dry_run"):
        with no_empty_folder(settings.values.get("output_dir")):
            watch.show(prepare(settings, watch), is_dry=True)
        out.print("\nA dry run: nothing was written. Without --dry_run this trains.")
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
    from renyi.runs.settings import METHODS

    out, dataclasses = stream(), METHODS[command.method].dataclasses
    out.print(Text.assemble((command.prog, "bold"), " --config FILE.yaml [--key value …]\n"))
    out.print(f"{command.about} A flag overrides the file, the file overrides the default.")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(style="dim", max_width=12, overflow="fold")
    table.add_column()
    for group, names in {**_BEFORE, **command.keys, **_AFTER}.items():
        table.add_row(headed(command.members.capitalize() if group == "Members" else group))
        for key in keys(dataclasses, names.split()):
            table.add_row(f"  {key.name}", Text(key.default), Text(_OUR_HELP.get(key.name, key.help)))
    out.print(table)
    out.print(f"\nEvery other key of TRL's {command.trl_config}, ModelConfig and ScriptArguments works, too.")
