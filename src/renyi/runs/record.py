"""`run.json`: the settings and data that a run's folder was trained with, and whether other settings may continue it.

It is written before the first step, and compared before anything is trained or rewritten. Older folders have no such
file. For them `output.py` compares what their checkpoints say.

    {"renyi": "0.1.0", "method": "sft", "settings": {key: value}, "examples_per_step": 16,
     "data": {"train": {"rows": 1000, "sha256": "…"}, "held_out": null, "chat_template": "…"}}
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from renyi import __version__
from renyi.data.rows import ROW_COLUMN
from renyi.errors import ConfigError
from renyi.files import write_whole
from renyi.layout import MANIFEST_FILE
from renyi.runs.settings import METHODS, Settings, SweepArguments
from renyi.training.checkpoints import find_checkpoints
from renyi.training.config import AUTO

RUN_FILE = "run.json"

# Settings that cannot change what is learned, and why. A run may be continued with other values of them.
_HARMLESS = {
    "where a run lies, and from where it goes on": "dry_run output_dir resume_from_checkpoint run_name project "
    "restore_callback_states_from_checkpoint",
    "what is written and shown, and how often": "logging_steps logging_strategy logging_first_step report_to "
    "logging_nan_inf_filter log_level log_level_replica log_on_each_node disable_tqdm save_steps save_strategy "
    "save_total_limit save_on_each_node eval_steps eval_strategy eval_delay eval_on_start log_completions "
    "include_num_input_tokens_seen log_unique_prompts num_completions_to_print log_completions_hub_repo "
    "log_multimodal trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug",
    "the hub": "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_always_push hub_revision",
    "how fast, on what and in how many parts the same is computed": "per_device_eval_batch_size dataset_num_proc "
    "eval_accumulation_steps dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
    "dataloader_prefetch_factor dataloader_in_order dataloader_multiprocessing_context use_cpu member_parallel "
    "shard_base token_budget gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing "
    "activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps ddp_backend ddp_timeout "
    "ddp_bucket_cap_mb ddp_find_unused_parameters ddp_broadcast_buffers ddp_static_graph local_rank torch_compile "
    "torch_compile_backend torch_compile_mode precompute_ref_log_probs precompute_ref_batch_size use_cache "
    "vllm_gpu_memory_utilization vllm_server_host vllm_server_port vllm_server_base_url vllm_server_timeout "
    "vllm_group_port",
}
HARMLESS = frozenset(" ".join(_HARMLESS.values()).split())
# The length of a run may change: alpha and the learning rate then follow the schedule of the new length.
LENGTH = frozenset({"max_steps", "num_train_epochs"})
# Not compared themselves: their product, the examples of a step, is compared.
_BY_EFFECT = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})
_OF_DATA = frozenset({"dataset_name"})


@dataclass(frozen=True)
class Rows:
    """What identifies rows: their number, and a hash of what they hold in their order."""

    rows: int
    sha256: str

    @classmethod
    def of(cls, dataset: Any) -> "Rows | None":
        """The identity of a dataset's rows; None if rows are streamed, or if there is no dataset."""
        if not isinstance(dataset, Dataset):
            return None
        digest = hashlib.sha256()
        columns = [name for name in dataset.column_names if name != ROW_COLUMN]
        for batch in dataset.select_columns(columns).iter(1000):
            digest.update(json.dumps(batch, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        return cls(len(dataset), digest.hexdigest())


@dataclass(frozen=True)
class Record:
    """What `run.json` holds.

    Attributes:
        method: of training.
        settings: every setting that decides what is learned, given or by default.
        examples_per_step: of an optimizer step, over all processes; None where it is not known yet.
        train, held_out: the rows; None where they are streamed, not read yet, or not there.
        chat_template: a hash of the template that renders chats; None where it is not known yet.
    """

    method: str
    settings: Mapping[str, Any]
    examples_per_step: int | None = None
    train: Rows | None = None
    held_out: Rows | None = None
    chat_template: str | None = None

    @classmethod
    def of(
        cls, settings: Settings, args: Any = None, train: Any = None, held_out: Any = None, tokenizer: Any = None
    ) -> "Record":
        """The record of a run.

        Args:
            settings: as they were asked for.
            args: the trainer's config, which has the number of processes.
            train, held_out: rows as loaded.
            tokenizer: whose chat template is used.
        """
        template = getattr(tokenizer, "chat_template", None)
        return cls(
            settings.method,
            deciding(settings),
            args and args.train_batch_size * args.gradient_accumulation_steps * args.data_processes,
            Rows.of(train),
            Rows.of(held_out),
            None if tokenizer is None else hashlib.sha256(json.dumps(template).encode()).hexdigest(),
        )

    @classmethod
    def read(cls, folder: Path) -> "Record | None":
        """The record in a folder; None if there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        file = folder / RUN_FILE
        if not file.exists():
            return None
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            data = kept["data"]
            rows = {name: Rows(**data[name]) if data[name] else None for name in ("train", "held_out")}
            return cls(
                kept["method"], kept["settings"], kept["examples_per_step"], **rows, chat_template=data["chat_template"]
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"cannot be read ({error})", where=str(file), hint="Choose another output_dir."
            ) from error

    def write(self, folder: Path) -> None:
        """Write it to a folder, completely or not at all.

        Raises:
            SaveError: it could not be written.
        """
        data = {name: value and asdict(value) for name, value in (("train", self.train), ("held_out", self.held_out))}
        kept = {
            "renyi": __version__,
            "method": self.method,
            "settings": dict(self.settings),
            "examples_per_step": self.examples_per_step,
            "data": {**data, "chat_template": self.chat_template},
        }
        write_whole(folder / RUN_FILE, (json.dumps(kept, indent=1) + "\n").encode())

    def check(self, folder: Path) -> None:
        """Raise `ConfigError` if what a folder holds was trained with settings or data that are not these."""
        there = Record.read(folder)
        if there is None or not holds_work(folder):
            return
        differing = self.differences(there)
        if differing:
            raise ConfigError(
                f"{folder} holds a run with {'; '.join(differing)}",
                where="output_dir",
                hint="Choose another output_dir, or give the settings that it began with. You may change its length, "
                "and settings that only concern logging, saving and speed.",
            )

    def differences(self, there: "Record") -> list[str]:
        """The differences between this run and another, each as `key old, and this one has new`."""
        pairs: list[tuple[str, Any, Any]] = [("method", there.method, self.method)]
        for key in sorted(there.settings.keys() | self.settings.keys()):
            default = defaults(self.method).get(key)
            old, new = there.settings.get(key, default), self.settings.get(key, default)
            if key in _OF_DATA and there.train and self.train:
                continue  # the rows themselves are compared
            pairs.append((key, old, new))
        pairs.append(("examples_per_step", there.examples_per_step, self.examples_per_step))
        found = [
            f"{key} {_shown(old)}, and this one has {_shown(new)}"
            for key, old, new in pairs
            if old != new and (key in there.settings or key in self.settings or None not in (old, new))
        ]
        for name, old_rows, new_rows in (
            ("train", there.train, self.train),
            ("held out", there.held_out, self.held_out),
        ):
            if old_rows and new_rows and old_rows != new_rows:
                rows = "rows" if name == "train" else "held-out rows"
                same = " of other content" if old_rows.rows == new_rows.rows else ""
                found.append(f"{old_rows.rows:,} {rows}, and this one has {new_rows.rows:,}{same} (dataset_name)")
        if None not in (there.chat_template, self.chat_template) and there.chat_template != self.chat_template:
            found.append("another chat template")
        return found


def deciding(settings: Settings) -> dict[str, Any]:
    """Every setting that decides what is learned: as given, or by default, independent of the machine."""
    values = {**defaults(settings.method), **settings.values}
    base = values.get("model_name_or_path")
    if base and Path(base).is_dir():
        values["model_name_or_path"] = str(Path(base).resolve())
    # The choice of `alpha: auto` holds only for the length that it was made for.
    left_out = HARMLESS | _BY_EFFECT | (LENGTH if values.get("alpha") != AUTO else frozenset())
    return {key: _plain(value) for key, value in sorted(values.items()) if key not in left_out}


def given_and_deciding(settings: Settings) -> dict[str, str]:
    """The settings that were given and decide what is learned, as `sweep.json` keeps them."""
    names = {f.name for f in dataclasses.fields(SweepArguments)}
    kept = {k: v for k, v in settings.values.items() if k not in HARMLESS | names}
    return {key: str(getattr(value, "value", value)) for key, value in sorted(kept.items())}


def defaults(method: str) -> dict[str, Any]:
    fields = [f for cls in METHODS[method].dataclasses for f in dataclasses.fields(cls) if f.init]
    return {
        f.name: _plain(f.default if f.default_factory is dataclasses.MISSING else f.default_factory()) for f in fields
    }


def _plain(value: Any) -> Any:
    """A value after writing it to JSON and reading it back."""
    return json.loads(json.dumps(getattr(value, "value", value), default=str))


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else value


def holds_work(folder: Path) -> bool:
    """Whether something was trained in a folder: a checkpoint, an ensemble, or the adapter of `alpha: auto`."""
    return (
        find_checkpoints(folder).newest is not None or (folder / MANIFEST_FILE).exists() or (folder / "auto").is_dir()
    )
