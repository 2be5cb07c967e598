"""One training run from settings to a saved ensemble: read the data, build the trainer, train, save.

The steps a command line calls in order. It prints nothing.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from renyi import data
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.adapters import read_adapter
from renyi.ensemble.storage import MANIFEST_FILE, Manifest, read_manifest
from renyi.errors import ConfigError, DataError, RenyiError, SaveError
from renyi.runs.output import check_output_dir, check_targets, checkpoints_of
from renyi.training.checkpoints import Checkpoints
from renyi.training.config import EnsembleConfig
from renyi.training.report import FIGURE_FILE, MetricsFile
from renyi.training.trainer import EnsembleTrainer


@dataclass
class MemberConfig(ModelConfig):
    """TRL's ModelConfig for members: LoRA is always on, and adapts every linear layer unless told otherwise."""

    use_peft: bool = field(default=True, metadata={"help": "Always on: members are LoRA adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt, by name or pattern; every linear layer if not given."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_peft:
            raise ConfigError("False is not allowed", where="use_peft", hint="Members are LoRA adapters; leave it out.")
        # TRL hands a single name on as text, which PEFT takes for a pattern that no layer's full name matches.
        targets: Any = self.lora_target_modules or "all-linear"
        is_name = isinstance(targets, str) and targets != "all-linear" and re.fullmatch(r"\w+", targets)
        self.lora_target_modules = [targets] if is_name else targets


@dataclass
class PolicyConfig(MemberConfig):
    """The same for members that write what they are trained on: one that drops at random is not the one that wrote."""

    lora_dropout: float = field(default=0.0, metadata={"help": "Must be 0: what is scored is what was sampled."})


@dataclass
class RunArguments:
    """What only a command line asks for."""

    given: frozenset[str] = field(default=frozenset(), init=False)  # the keys that the user set
    dry_run: bool = field(default=False, metadata={"help": "Say what would be trained and stop, writing nothing."})
    test_split_size: float | None = field(
        default=None,
        metadata={"help": "Share of the rows to hold out for evaluation, where the data have no test split."},
    )

    def __post_init__(self) -> None:
        if self.test_split_size is not None and not 0 < self.test_split_size < 1:
            raise ConfigError(
                f"{self.test_split_size} is not allowed", where="test_split_size", hint="Give a share between 0 and 1."
            )


@dataclass
class TokenizerArguments:
    """What TRL's SFTConfig says of the tokenizer and its other configs do not; for a command line."""

    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or a tokenizer to take the chat template of."}
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "Token that ends a text, where it is not the tokenizer's own."}
    )


@dataclass
class PolicyTokenizerArguments(TokenizerArguments):
    """The same for TRL's GRPOConfig, which does not speak of padding, either."""

    pad_token: str | None = field(default=None, metadata={"help": "Token to pad with, where the tokenizer has none."})


Rows: TypeAlias = Dataset | IterableDataset


class Run(NamedTuple):
    """A run that is ready to start.

    Attributes:
        trainer: holds the ensemble and the prepared datasets.
        start: folder of the ensemble that is trained further; None if members are fresh.
        tokenizer: as the trainer uses it.
        preparation: how rows become tokens.
        form: of the rows, or "streamed".
        train_rows: as loaded.
        eval_rows: as loaded; None if nothing is held out.
        checkpoints: what the output folder holds already.
        finished: whether the newest checkpoint is the last one of this run.
    """

    trainer: EnsembleTrainer
    start: Path | None
    tokenizer: PreTrainedTokenizerBase
    preparation: data.RowPreparation
    form: str
    train_rows: Rows
    eval_rows: Rows | None
    checkpoints: Checkpoints
    finished: bool

    @property
    def ensemble(self) -> LoraEnsemble:
        return self.trainer.model

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer.args.output_dir or "")


def build(
    trainer_class: type[EnsembleTrainer],
    script: ScriptArguments,
    args: EnsembleConfig,
    model: MemberConfig,
    own: RunArguments,
    callbacks: list[TrainerCallback],
    of_tokenizer: Any = None,
) -> Run:
    """Load the data and the base model, check both and the output folder, and build the trainer.

    Args:
        trainer_class: which trainer.
        script, args, model, own: the settings.
        callbacks: of the trainer.
        of_tokenizer: `TokenizerArguments`, or whatever has those fields; `args` if None.

    Raises:
        RenyiError: whatever is wrong with settings, data, tokenizer or output folder, before anything is written.
    """
    dataset_name = _given(script.dataset_name, "dataset_name", "a json, jsonl, csv or parquet file, or a hub id")
    name = _given(model.model_name_or_path, "model_name_or_path", "a folder or a hub id")
    # transformers writes its placeholder where nothing was given; two runs that share it would resume each other.
    _given("" if args.output_dir == "trainer_output" else args.output_dir, "output_dir", "a folder for the ensemble")
    _check_base_exists(name)
    start = _take_from_ensemble(Path(name), args, model, own.given) if (Path(name) / MANIFEST_FILE).is_file() else None
    output_dir = Path(args.output_dir or "")
    check_output_dir(output_dir, start.base_model if start else name, args, model)
    checkpoints = checkpoints_of(args)

    tokenizer = _tokenizer(name, start, args, model, of_tokenizer or args)
    preparation = trainer_class._preparation.of(args)
    form, train_rows, eval_rows = _load_rows(script, args, own, preparation, dataset_name)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}),
    }
    with _explained(dataset_name), _nothing_ahead(args, own.dry_run):
        trainer = trainer_class(
            name,
            args,
            train_rows,
            peft_config=None if start else get_peft_config(model),
            quantization_config=get_quantization_config(model),
            eval_dataset=eval_rows if args.eval_strategy != "no" else None,
            processing_class=tokenizer,
            callbacks=[MetricsFile(), *callbacks],
        )
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    check_targets(output_dir, trainer.model)

    finished = checkpoints.newest is not None and trainer.state_at_end(checkpoints.newest) is not None
    return Run(
        trainer,
        Path(name) if start else None,
        tokenizer,
        preparation,
        form,
        train_rows,
        eval_rows,
        checkpoints,
        finished,
    )


def _take_from_ensemble(folder: Path, args: EnsembleConfig, model: MemberConfig, given: frozenset[str]) -> Manifest:
    """Settings of the members, which an ensemble that is trained further brings along.

    Raises:
        ConfigError: another value was given for one of them.
    """
    manifest = read_manifest(folder)
    config = read_adapter(folder / manifest.members[0]).config
    brought = {name: getattr(config, name) for name in ("lora_alpha", "use_rslora")}
    brought |= {"num_members": len(manifest.members), "lora_r": config.r}
    if not isinstance(model, PolicyConfig):
        brought["lora_dropout"] = config.lora_dropout
    for key, value in brought.items():
        settings = args if key == "num_members" else model
        if key in given and getattr(settings, key) != value:
            raise ConfigError(
                f"{getattr(settings, key)} was given, and the ensemble to start from has {value}",
                where=key,
                hint=f"Leave it out: members keep their shape ({folder}).",
            )
        setattr(settings, key, value)
    if "lora_target_modules" in given:
        raise ConfigError(
            "was given, and the ensemble to start from adapts its own layers", where="lora_target_modules",
            hint="Leave it out.",
        )  # fmt: skip
    return manifest


def _given(value: str | None, key: str, what: str) -> str:
    if not value:
        raise ConfigError("is not set", where=key, hint=f"Give {what}: --{key} …, or {key}: … in the config file.")
    return value


def _check_base_exists(name: str) -> None:
    looks_local = name.startswith((".", "/", "~")) or (name.count("/") != 1 and "/" in name)
    if looks_local and not Path(name).is_dir():
        raise ConfigError(
            f"there is no folder {name}", where="model_name_or_path", hint="Give a model folder, or a hub id."
        )


@contextmanager
def _nothing_ahead(args: EnsembleConfig, dry_run: bool) -> Iterator[None]:
    """Keep the trainer of a dry run from computing, and keeping, what a run may compute before it trains."""
    asked = getattr(args, "precompute_ref_log_probs", False)
    if asked and dry_run:
        args.precompute_ref_log_probs = False
    try:
        yield
    finally:
        if asked:
            args.precompute_ref_log_probs = True


# ---- The data --------------------------------------------------------------------------------------------------------


def _tokenizer(
    name: str, start: Manifest | None, args: Any, model: MemberConfig, settings: Any
) -> PreTrainedTokenizerBase:
    if start and not (Path(name) / "tokenizer_config.json").is_file():
        name = start.base_model
    padding = args if hasattr(args, "pad_token") else settings
    tokenizer = data.load_tokenizer(
        name, padding.pad_token, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    padding.pad_token = None  # settled; TRL would warn
    if settings.chat_template_path:
        data.load_chat_template(tokenizer, settings.chat_template_path)
        settings.chat_template_path = None
    if settings.eos_token is not None and settings.eos_token not in tokenizer.get_vocab():
        raise ConfigError(f"{settings.eos_token!r} is not in the vocabulary", where="eos_token")
    tokenizer.eos_token = settings.eos_token or tokenizer.eos_token
    if getattr(args, "assistant_only_loss", False):
        data.training_template(tokenizer)
    return tokenizer


def _load_rows(
    script: ScriptArguments,
    args: EnsembleConfig,
    own: RunArguments,
    preparation: data.RowPreparation,
    name: str,
) -> tuple[str, Rows, Rows | None]:
    """The form of the rows, the rows to train on, and the rows held out."""
    splits = data.load_splits(name, script.dataset_config, script.dataset_streaming)
    train = data.choose_split(splits, script.dataset_train_split, name, "dataset_train_split")
    test_split = script.dataset_test_split
    evaluates = args.eval_strategy != "no"
    if own.test_split_size is not None and test_split in splits:
        raise ConfigError(
            f"{name} has a split {test_split!r} already",
            where="test_split_size",
            hint="Leave test_split_size out, or point dataset_test_split elsewhere.",
        )
    test = None
    if isinstance(train, Dataset):
        form = preparation.check(train, name)
        train = data.number_rows(train)
        if own.test_split_size is not None:
            train, test = _held_out(train, own.test_split_size, args.seed, name)
    else:
        form = "streamed"
        if args.max_steps <= 0:
            raise ConfigError("is not set, and the dataset is streamed", where="max_steps", hint="Give --max_steps.")
    if evaluates and test is None:
        if test_split not in splits:
            raise ConfigError(
                f"eval_strategy is set, and {name} has no split {test_split!r}",
                where="dataset_test_split",
                hint="Hold out a share with --test_split_size 0.05, name another split, or set eval_strategy to no.",
            )
        test = data.choose_split(splits, test_split, name, "dataset_test_split")
        if isinstance(test, Dataset):
            preparation.check(test, f"{name}, {test_split} split")
    return form, train, test


def _held_out(rows: Dataset, share: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    held_out = round(share * len(rows))
    if not 0 < held_out < len(rows):
        raise ConfigError(
            f"{share} of {len(rows)} rows is {held_out} rows",
            where="test_split_size",
            hint=f"{name} needs at least one row on either side.",
        )
    parts = rows.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


@contextmanager
def _explained(dataset_name: str) -> Iterator[None]:
    """Say whose rows are meant, and turn what the libraries raise about settings into our error."""
    try:
        yield
    except DataError as error:
        where = f"{dataset_name}, {error.where}" if error.where and "row" in error.where else error.where
        raise DataError(error.what, where=where, hint=error.hint) from error
    except RenyiError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
        raise ConfigError(str(error).strip() or type(error).__name__, where="settings") from error


# ---- Training ------------------------------------------------------------------------------------------------------


def train(run: Run) -> None:
    """Train from the newest complete checkpoint, or from the start; draw the curves if it ends early.

    A finished run only gets back the members it ended with.

    Raises:
        SaveError: a checkpoint could not be written; earlier ones are untouched.
        TrainingDivergedError: the loss is no number any more.
    """
    newest = run.checkpoints.newest
    try:
        run.trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except BaseException:
        with suppress(Exception):  # the disk may be full; what went wrong first is what counts
            _draw(run)
        raise


def _draw(run: Run) -> None:
    if run.trainer.is_world_process_zero():
        run.trainer.draw(run.output_dir / FIGURE_FILE)


def save(run: Run, dataset_name: str | None) -> None:
    """Write the ensemble, its tokenizer, its model card and its curves into the output folder.

    Raises:
        SaveError: something could not be written; checkpoints are untouched.
    """
    trainer = run.trainer
    try:
        trainer.save_model(trainer.args.output_dir)
        trainer.create_model_card(dataset_name=dataset_name)
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            f"could not be written ({error})",
            where=str(run.output_dir),
            hint="Free some space and run the same command.",
        ) from error
    _draw(run)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
