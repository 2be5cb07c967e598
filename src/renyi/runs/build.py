"""The stages of a training run: `build` reads the data and makes the trainer, `train` trains, `save` leaves the folder.

Nothing is printed here: a `Watch` is told how a run goes, and the command line shows it. Read next: `settings.py`,
`record.py` (the settings that a folder keeps), `single.py` (all stages in one call).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset, IterableDataset
from torch.optim import SGD
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback, get_scheduler
from trl import ScriptArguments, get_peft_config, get_quantization_config

from renyi import data
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.storage import Manifest, is_adapter, read_ensemble
from renyi.errors import ConfigError, DataError, RenyiError
from renyi.inference import MemberTable
from renyi.inference.diagnose import FEWEST_MEASURED
from renyi.keys import Where, explained
from renyi.layout import MANIFEST_FILE
from renyi.members.adapters import read_adapter
from renyi.runs.output import check_length, check_output_dir, check_targets, checkpoints_of, steps_of
from renyi.runs.record import Record, defaults
from renyi.runs.settings import MemberConfig, PolicyConfig, RunArguments, Settings
from renyi.training.checkpoints import Checkpoints, saved, state_at_end
from renyi.training.config import EnsembleConfig
from renyi.training.trainer import EnsembleTrainer

# The fewest rows that a fit must leave for its diagnosis, because half of them are measured.
FEWEST_PROBES = 2 * FEWEST_MEASURED

Rows: TypeAlias = Dataset | IterableDataset


class Run(NamedTuple):
    """A run that is ready to start.

    Attributes:
        settings: what it was built from.
        record: what `run.json` keeps of it.
        trainer: holds the ensemble and the prepared datasets.
        start: folder of the ensemble that is trained further; None if members are fresh.
        tokenizer: as the trainer uses it.
        preparation: how rows become tokens.
        form: of the rows.
        train_rows: as loaded.
        eval_rows: as loaded; None if nothing is held out.
        probe_rows: the train rows that the trainer does not see; None if it sees all.
        checkpoints: what the output folder holds already.
        finished: whether the newest checkpoint is the last one of this run.
        steps_before: steps that the run had when the newest checkpoint was written; None if there is no checkpoint.
    """

    settings: Settings
    record: Record
    trainer: EnsembleTrainer
    start: Path | None
    tokenizer: PreTrainedTokenizerBase
    preparation: data.RowPreparation
    form: data.Form
    train_rows: Rows
    eval_rows: Rows | None
    probe_rows: Rows | None
    checkpoints: Checkpoints
    finished: bool
    steps_before: int | None

    @property
    def ensemble(self) -> LoraEnsemble:
        return self.trainer.model

    @property
    def output_dir(self) -> Path:
        return Path(self.trainer.args.output_dir or "")

    def prepared(self, rows: Rows, most: int | None = None) -> Dataset:
        """Rows as training sees them: all of them, or at most so many, evenly spaced."""
        some = rows if most is None else data.sample(rows, most)
        return self.preparation.prepare(some, self.tokenizer, limits=self.trainer.limits)


class Watch:
    """Callbacks of a run, for showing its progress. They do nothing by default; override those that you need."""

    def doing(self, what: str) -> AbstractContextManager[Any]:
        """A context around work that takes a while, such as "loading the data and the base model"."""
        return nullcontext()

    def training(self) -> AbstractContextManager[Sequence[TrainerCallback]]:
        """A context around the training of an adapter or an ensemble. It gives callbacks for the trainer."""
        return nullcontext(())

    def chosen(self, chosen: Any, settings: Settings) -> None:
        """`alpha: auto` has chosen for a run of these settings: a `renyi.runs.auto.Chosen`."""

    def ready(self, run: Run) -> None:
        """Everything is loaded and checked; training begins."""

    def trained(self, run: Run) -> None:
        """Training has ended; saving begins."""

    def learned(self, table: MemberTable) -> None:
        """Every member was asked what it learned. The table is in the folder, too."""

    def saved(self, run: Run) -> None:
        """The folder is complete."""


def build(settings: Settings, asked: Settings | None = None, probes: int = 0) -> Run:
    """Load the data and the base model, check both and the output folder, and build the trainer.

    Args:
        settings: of the run; they stay as they are.
        asked: the settings that the user gave, which the folder's record keeps; `settings` if None.
        probes: the most rows to keep from the trainer. It is a fifth of them, and at least `FEWEST_PROBES`.

    Raises:
        RenyiError: whatever is wrong with settings, data, tokenizer or output folder, before anything is written.
    """
    script, args, model, own, of_tokenizer = settings.parts()
    where = settings.where
    dataset_name = _given(script.dataset_name, "dataset_name", "a json, jsonl, csv or parquet file, or a hub id")
    name = _given(model.model_name_or_path, "model_name_or_path", "a folder or a hub id")
    # transformers writes its placeholder where nothing was given; two runs that share it would resume each other.
    _given("" if args.output_dir == "trainer_output" else args.output_dir, "output_dir", "a folder for the ensemble")
    _check_base_exists(name)
    is_ensemble = (Path(name) / MANIFEST_FILE).is_file() or is_adapter(Path(name))
    start = _take_from_ensemble(Path(name), args, model, settings.values) if is_ensemble else None
    output_dir = Path(args.output_dir or "")
    check_output_dir(output_dir, start.base_model if start else name, args, model)
    checkpoints = checkpoints_of(args)

    tokenizer = _tokenizer(name, start, args, model, of_tokenizer)
    preparation = settings.trainer.preparation_class.of(args)
    form, train_rows, eval_rows = _load_rows(script, args, own, preparation, dataset_name)
    fit_rows, probe_rows = (
        _without_probes(train_rows, probes, args.seed, dataset_name, args.routing_group)
        if probes
        else (train_rows, None)
    )
    record = Record.of(asked or settings, args, train_rows, eval_rows, tokenizer)
    record.check(output_dir)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}),
    }
    with _explained(dataset_name, settings), _nothing_ahead(args, own.dry_run):
        trainer = settings.trainer(
            name,
            args,
            fit_rows,
            peft_config=None if start else get_peft_config(model),
            quantization_config=get_quantization_config(model),
            eval_dataset=eval_rows if args.eval_strategy != "no" else None,
            processing_class=tokenizer,
        )
        check_schedule(trainer, settings.where)
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    check_targets(output_dir, trainer.model)
    check_length(checkpoints.newest, trainer.num_steps, where)

    finished = checkpoints.newest is not None and state_at_end(checkpoints.newest, trainer.num_steps) is not None
    return Run(
        settings,
        record,
        trainer,
        Path(name) if start else None,
        tokenizer,
        preparation,
        form,
        train_rows,
        eval_rows,
        probe_rows,
        checkpoints,
        finished,
        steps_of(checkpoints.newest),
    )


def _take_from_ensemble(folder: Path, args: Any, model: MemberConfig, given: Mapping[str, Any]) -> Manifest:
    """Take the settings of the members from an ensemble that is trained further.

    Raises:
        ConfigError: another value was given for one of them.
    """
    manifest = read_ensemble(folder)
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


def check_schedule(trainer: EnsembleTrainer, where: Where) -> None:
    """Look up the optimizer and make the schedule now, so that their errors are not raised only when training begins.

    Raises:
        ConfigError: arguments do not fit the schedule of the learning rate.
    """
    args, steps = trainer.args, trainer.num_steps
    trainer.get_optimizer_cls_and_kwargs(args)  # raises if the optimizer's package is missing
    try:
        get_scheduler(
            args.lr_scheduler_type,
            SGD([torch.zeros(1, requires_grad=True)]),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, KeyError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ConfigError(
            f"{args.lr_scheduler_kwargs!r} does not fit the schedule {kind!r} ({error})",
            where=where("lr_scheduler_kwargs"),
            hint="Give the arguments that transformers' schedule of that name takes, or another lr_scheduler_type.",
        ) from error


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
    padding.pad_token = None  # it is set already, and TRL would warn
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
) -> tuple[data.Form, Rows, Rows | None]:
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
            train, test = _held_out(train, own.test_split_size, args.seed, name, args.routing_group)
    else:
        form = preparation.form(train, name)
        form = replace(form, name=f"{form.name}, streamed")
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


def _held_out(rows: Dataset, share: float, seed: int, name: str, group: str | None) -> tuple[Dataset, Dataset]:
    """Rows to train on, and a random share of rows to evaluate on. Groups are not divided, so the share is at most it.

    If all groups are larger than the share, the smallest one is held out. Annotations of a row belong to several
    groups, so with `routing_group: annotator` rows are drawn one by one.

    Raises:
        ConfigError: there are too few rows or groups.
    """
    held_out = round(share * len(rows))
    if not 0 < held_out < len(rows):
        raise ConfigError(
            f"{share} of {len(rows)} rows is {held_out} rows",
            where="test_split_size",
            hint=f"{name} needs at least one row on either side.",
        )
    if group is None or group not in rows.column_names:
        parts = rows.train_test_split(test_size=held_out, seed=seed)
        return parts["train"], parts["test"]
    of_rows = list(map(str, rows[group]))
    sizes = Counter(of_rows)
    if len(sizes) < 2:
        raise ConfigError(
            f"all rows of {name} are of one group, and a group is not divided",
            where="test_split_size",
            hint="Leave it out, or routing_group.",
        )
    kept, left = set[str](), held_out
    for each in _shuffled(sorted(sizes), seed):
        if sizes[each] <= left:
            kept.add(each)
            left -= sizes[each]
    return _apart(rows, of_rows, kept or {min(sorted(sizes), key=sizes.__getitem__)})


def _shuffled(names: Sequence[str], seed: int) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]


def _apart(rows: Dataset, of_rows: Sequence[str], kept: set[str]) -> tuple[Dataset, Dataset]:
    """The rows of other groups, and those of the groups that are kept."""
    is_kept = [group in kept for group in of_rows]
    return (
        rows.select([i for i, is_one in enumerate(is_kept) if not is_one]),
        rows.select([i for i, is_one in enumerate(is_kept) if is_one]),
    )


def _without_probes(rows: Rows, most: int, seed: int, name: str, group: str | None) -> tuple[Rows, Rows]:
    """Rows to fit to, and rows to diagnose the fit with: a fifth, at least `FEWEST_PROBES`; of a stream the first.

    With a column of groups, whole groups are kept, at least as many.

    Raises:
        DataError: there are fewer rows than twice the fewest.
    """
    if not isinstance(rows, Dataset):
        return rows.skip(most), rows.take(most)
    if len(rows) < 2 * FEWEST_PROBES:
        raise DataError(
            f"{len(rows)} rows are too few for alpha: auto, which keeps {FEWEST_PROBES} to diagnose the fit with",
            where=name,
            hint=f"Give at least {2 * FEWEST_PROBES} rows, or a number for alpha.",
        )
    if group is not None and group in rows.column_names:
        return _without_groups(rows, most, seed, name, group)
    if group is not None:  # a row of annotations has several
        raise ConfigError(
            "auto measures whole groups, and a row here belongs to several annotators",
            where="alpha",
            hint="Give a number for alpha, or a row for each annotation with a column `annotator`.",
        )
    parts = rows.train_test_split(test_size=min(most, max(FEWEST_PROBES, len(rows) // 5)), seed=seed)
    return parts["train"], parts["test"]


def _without_groups(rows: Dataset, most: int, seed: int, name: str, group: str) -> tuple[Dataset, Dataset]:
    """The same in whole groups: a fifth of them, at least `FEWEST_PROBES`, and of small ones no more rows than `most`.

    Raises:
        DataError: there are fewer groups than twice the fewest.
    """
    of_rows = list(map(str, rows[group]))
    names = sorted(set(of_rows))
    if len(names) < 2 * FEWEST_PROBES:
        raise DataError(
            f"{len(names)} groups are too few for alpha: auto, which keeps {FEWEST_PROBES} to diagnose the fit with",
            where=name,
            hint=f"Give at least {2 * FEWEST_PROBES} groups of {group}, or a number for alpha.",
        )
    many = min(max(FEWEST_PROBES, len(names) // 5), max(FEWEST_PROBES, most * len(names) // len(rows)))
    return _apart(rows, of_rows, set(_shuffled(names, seed)[:many]))


@contextmanager
def _explained(dataset_name: str, settings: Settings) -> Iterator[None]:
    """Name the dataset in errors, and turn the libraries' errors about settings into ours."""
    try:
        yield
    except DataError as error:
        where = f"{dataset_name}, {error.where}" if error.where and "row" in error.where else error.where
        raise DataError(error.what, where=where, hint=error.hint) from error
    except RenyiError:
        raise
    except (ValueError, TypeError, RuntimeError, OSError, ImportError, AttributeError, KeyError) as error:
        known = set(defaults(settings.method))
        raise explained(error, known, settings.values, settings.where) from error


# ---- Training ------------------------------------------------------------------------------------------------------


def train(run: Run, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train from the newest complete checkpoint, or from the start; draw the curves if it ends early.

    A finished run is not trained: its members are loaded as they were at its end.

    Args:
        run: as `build` made it.
        callbacks: for the trainer, besides its own.

    Raises:
        SaveError: a checkpoint could not be written; earlier ones are untouched.
        TrainingDivergedError: the loss is no number any more.
    """
    trainer, newest = run.trainer, run.checkpoints.newest
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        run.record.write(run.output_dir)
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    except BaseException:
        with suppress(Exception):  # the disk may be full; the first error is the one to report
            trainer.draw()
        raise


def save(run: Run) -> None:
    """Write the ensemble, its tokenizer, its model card and its curves into the output folder.

    Raises:
        SaveError: something could not be written; checkpoints are untouched.
    """
    trainer, name = run.trainer, run.settings.values["dataset_name"]
    with saved(run.output_dir):
        trainer.save_model(trainer.args.output_dir)
        trainer.create_model_card(dataset_name=name)
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=name)
