"""The settings of a run and of a sweep: the keys that were given, and the objects that they fill.

`Settings` holds keys and values, as a YAML file has them, and is never changed. Building a run makes new objects from
them, because TRL's trainers change their configs. Read next: `single.py` (one run), `grid.py` (a sweep).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from trl import ModelConfig, ScriptArguments

from renyi import training
from renyi.errors import ConfigError
from renyi.keys import Where, checked, converted, filled
from renyi.training.config import EnsembleConfig, require
from renyi.training.trainer import EnsembleTrainer

if TYPE_CHECKING:
    from renyi.evaluation.sweep_choice import Cell


@dataclass
class MemberConfig(ModelConfig):
    """TRL's ModelConfig for members. LoRA is always on, and by default it adapts every linear layer."""

    use_peft: bool = field(default=True, metadata={"help": "Always on: members are LoRA adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, by name or pattern; every linear layer if not given."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_peft:
            raise ConfigError("False is not allowed", where="use_peft", hint="Members are LoRA adapters; leave it out.")
        require("lora_r", self.lora_r, self.lora_r >= 1, "a rank of at least 1")
        # TRL passes a single name on as text. PEFT reads text as a pattern, which no layer's full name matches.
        targets: Any = self.lora_target_modules or "all-linear"
        is_name = isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"\w+", targets)
        self.lora_target_modules = [targets] if is_name else targets


@dataclass
class PolicyConfig(MemberConfig):
    """The same without dropout, for members that are trained on what they write: a score must fit what was written."""

    lora_dropout: float = field(default=0.0, metadata={"help": "Must be 0: what is scored is what was sampled."})


@dataclass
class RunArguments:
    """What a run needs besides TRL's settings."""

    dry_run: bool = field(default=False, metadata={"help": "Show what would be trained, and stop; write nothing."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to hold out for evaluation, if the data have no test split."},
    )

    def __post_init__(self) -> None:
        share = self.test_split_size
        require("test_split_size", share, share is None or 0 < share < 1, "a share between 0 and 1")


@dataclass
class TokenizerArguments:
    """Settings of the tokenizer that TRL's SFTConfig has and its other configs do not have."""

    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or a tokenizer whose chat template is used."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a text, if it is not the tokenizer's own."}
    )


@dataclass
class PaddedTokenizerArguments(TokenizerArguments):
    """The same for TRL's GRPOConfig and KTOConfig, which have no setting for padding either."""

    pad_token: str | None = field(default=None, metadata={"help": "Token to pad with, where the tokenizer has none."})


class Method(NamedTuple):
    """A way of training: its trainer, and the dataclasses of its settings.

    Attributes:
        trainer: the class of the trainer.
        config: its TRL config with our settings.
        members: the settings of members.
        tokenizer: settings of the tokenizer that `config` does not have; None if it has them all.
        example: its word for an example of the data.
        sampled: how many examples members are asked about at the end, to say what each learned.
    """

    trainer: type[EnsembleTrainer]
    config: type[EnsembleConfig]
    members: type[MemberConfig] = MemberConfig
    tokenizer: type[TokenizerArguments] | None = None
    example: str = "example"
    sampled: int = 256

    @property
    def dataclasses(self) -> tuple[type, ...]:
        tokenizer = (self.tokenizer,) if self.tokenizer else ()
        return (ScriptArguments, self.config, self.members, RunArguments, *tokenizer)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sft": Method(training.RenyiSFTTrainer, training.RenyiSFTConfig),
        "dpo": Method(training.RenyiDPOTrainer, training.RenyiDPOConfig, tokenizer=TokenizerArguments, example="pair"),
        "kto": Method(
            training.RenyiKTOTrainer, training.RenyiKTOConfig, tokenizer=PaddedTokenizerArguments, example="thumb"
        ),
        "reward": Method(training.RenyiRewardTrainer, training.RenyiRewardConfig, example="pair", sampled=64),
        "powerflow": Method(
            training.PowerFlowTrainer,
            training.PowerFlowConfig,
            PolicyConfig,
            PaddedTokenizerArguments,
            example="prompt",
            sampled=8,
        ),
    }
)


class Parts(NamedTuple):
    """The objects that are made from settings for one build. The build may change them.

    Attributes:
        data: TRL's object for the dataset and its splits.
        args: the trainer's TRL config with our settings.
        members: the base and the members' LoRA shape.
        own: settings that only this library has.
        tokenizer: the settings of the tokenizer; the same object as `args` if that has them.
    """

    data: ScriptArguments
    args: Any
    members: MemberConfig
    own: RunArguments
    tokenizer: Any


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        method: one of `METHODS`.
        values: the keys that were given, in the types of their fields; every other key has its default.
        where: from a key to the place that set it, for messages.
    """

    method: str
    values: Mapping[str, Any]
    where: Where = str

    @classmethod
    def of(cls, method: str, **values: Any) -> "Settings":
        """Settings from the keys of a config file, such as `Settings.of("sft", num_members=4, …)`.

        Raises:
            ConfigError: an unknown method or key, or a value that does not fit.
        """
        made = cls(converted(method, str, list(METHODS), "method"), values)
        made.parts()
        return made

    def __post_init__(self) -> None:
        values = checked(METHODS[self.method].dataclasses, self.values, self.where)
        object.__setattr__(self, "values", MappingProxyType(values))

    def replaced(self, **values: Any) -> "Settings":
        """The same settings with other values for some keys. The value `...` removes a key: it then has its default."""
        kept = {key: value for key, value in {**self.values, **values}.items() if value is not ...}
        return Settings(self.method, kept, self.where)

    def parts(self) -> Parts:
        """New objects made from the settings.

        Raises:
            ConfigError: values are out of range, or at odds with each other.
        """
        data, args, members, own, *tokenizer = filled(METHODS[self.method].dataclasses, self.values, self.where)
        return Parts(data, args, members, own, tokenizer[0] if tokenizer else args)

    @property
    def trainer(self) -> type[EnsembleTrainer]:
        return METHODS[self.method].trainer


@dataclass
class SweepArguments:
    """The settings that a sweep adds to those of one run."""

    alphas: list[float] = field(
        default_factory=lambda: [0.0, 0.3, 0.5, 0.8, 1.0], metadata={"help": "Values of alpha to try."}
    )
    members: list[int] = field(
        default_factory=lambda: [1, 4],
        metadata={"help": "Numbers of members to try; 1 is a single adapter, trained once for all alphas."},
    )

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


SWEPT = ("sft", "dpo")  # methods with an alpha that has an effect, measured on held-out examples


@dataclass(frozen=True)
class SweepSettings:
    """The settings of a sweep over alpha and the number of members.

    Attributes:
        run: the settings that all cells share.
        alphas, members: the values that are tried.
    """

    run: Settings
    alphas: Sequence[float]
    members: Sequence[int]

    @classmethod
    def of(cls, method: str, where: Where = str, **values: Any) -> "SweepSettings":
        """Settings from the keys of a run's config file, `alphas` and `members`.

        Args:
            method: "sft" or "dpo".
            where: names the place that set a key, for messages.
            values: keys of one run, and of `SweepArguments`.

        Raises:
            ConfigError: an unknown key, a value that does not fit, or one that a sweep decides by itself.
        """
        converted(method, str, SWEPT, where("method"))
        own: dict[str, Any] = {key: values.pop(key) for key in ("alphas", "members") if key in values}
        (sweep,) = filled([SweepArguments], own, where)
        for key, instead in (("alpha", "alphas"), ("num_members", "members")):
            if key in values:
                raise ConfigError(
                    f"was given, and a sweep tries several: give {instead}",
                    where=where(key),
                    hint=f"Remove {key} and write {instead}: [{values[key]}, …] or --{instead} {values[key]} ….",
                )
        run = Settings(method, values, where)
        _refuse_what_several_runs_cannot(run)
        return cls(run, tuple(sweep.alphas), tuple(sweep.members))

    @property
    def cells(self) -> "list[Cell]":
        """Every pair of members and alpha, in that order. One member appears once, because its alpha has no effect."""
        from renyi.evaluation.sweep_choice import Cell  # scikit-learn comes with it, which other commands do not need

        return sorted({Cell(m, 0.0 if m == 1 else alpha) for m in self.members for alpha in self.alphas})


def _refuse_what_several_runs_cannot(run: Settings) -> None:
    args, where = run.parts().args, run.where
    if args.output_dir in (None, "", "trainer_output"):  # the last is transformers' placeholder
        raise ConfigError("is not set", where=where("output_dir"), hint="Give a folder for the cells: --output_dir ….")
    if args.resume_from_checkpoint:
        raise ConfigError(
            "was given, and a sweep has many runs", where=where("resume_from_checkpoint"),
            hint="Leave it out: every cell goes on from its own newest complete checkpoint.",
        )  # fmt: skip
    if args.push_to_hub:
        raise ConfigError(
            "true is not allowed", where=where("push_to_hub"), hint="Push the chosen ensemble afterwards."
        )
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    expected = "steps or epoch: a finished cell is known by its checkpoint"
    require(where("save_strategy"), strategy, strategy != "no", expected)
    if args.world_size > 1:
        raise ConfigError(
            f"there are {args.world_size} processes, and a sweep is one",
            hint="Train a cell by itself with the sweep's settings, and the sweep finds it finished: torchrun "
            "--nproc_per_node 2 -m renyi sft --config FILE.yaml --output_dir OUT/alpha_0.3_members_4 --alpha 0.3 "
            "--num_members 4",
        )
