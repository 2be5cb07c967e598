"""Reference log-probabilities that are computed before training and kept on disk by content.

The file's name is a hash of everything that decides them: the base's weights, the tokens, where pairs are cut. So
another run over the same pairs finds the file, and a run that differs in anything does not. Read next: `dpo.py`.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from renyi.ensemble import Reference

logger = logging.getLogger(__name__)

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def with_reference(
    dataset: Dataset, reference: Reference, collate: Any, args: Any, accelerator: Accelerator, batch_size: int
) -> Dataset:
    """Add columns `ref_chosen_logps` and `ref_rejected_logps` to prepared pairs: a number, or a list of M.

    Every process computes its share of the pairs; the first writes the file.

    Args:
        dataset: prepared pairs.
        reference: what to compute them under.
        collate: makes a batch of pairs.
        args: the trainer's config: where pairs are cut, and the precision of the forward.
        accelerator: of the trainer.
        batch_size: pairs computed together.
    """
    file = cache_folder() / f"{_content(dataset, reference, args)}.safetensors"
    accelerator.wait_for_everyone()  # all have looked for the same file before one writes it
    if file.is_file():
        found = load_file(file)
    else:
        found = _computed(dataset, reference, collate, args.ld_alpha, accelerator, batch_size)
        if accelerator.is_main_process:
            _keep(found, file)
    accelerator.wait_for_everyone()
    columns = {column: (x[:, 0] if x.shape[1] == 1 else x).tolist() for column, x in found.items()}
    return concatenate_datasets([dataset, Dataset.from_dict({c: columns[c] for c in _COLUMNS})], axis=1)


def cache_folder() -> Path:
    """Where reference log-probabilities are kept: `renyi/reference` in the Hugging Face home."""
    return Path(HF_HOME) / "renyi" / "reference"


def _keep(found: dict[str, Tensor], file: Path) -> None:
    """Write the file whole or not at all. If it cannot be written, the run goes on without it."""
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink()
        logger.warning("The reference log-probabilities are not kept for another run: %s", error)


def _content(dataset: Dataset, reference: Reference, args: Any) -> str:
    settings = [args.max_length, args.truncation_mode, args.ld_alpha, bool(args.bf16), bool(args.fp16)]
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([reference.fingerprint(), settings]).encode())
    for rows in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000):
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _computed(
    dataset: Dataset,
    reference: Reference,
    collate: Any,
    ld_alpha: float | None,
    state: Accelerator,
    batch_size: int,
) -> dict[str, Tensor]:
    """Reference log-probabilities [N, S] of both completions, in the dataset's order."""
    model = reference.ensemble
    found: list[tuple[int, list[float], list[float]]] = []
    training = model.training
    model.eval()
    mine = range(state.process_index, len(dataset), state.num_processes)
    for rows in _batches(dataset, mine, batch_size):
        batch = {name: x.to(state.device) for name, x in collate(list(dataset.select(rows))).items()}
        with state.autocast():
            logps_S2B = reference.log_probs(batch, ld_alpha)
        found += zip(rows, *(half_SB.T.tolist() for half_SB in logps_S2B.chunk(2, dim=1)), strict=True)
    model.train(training)
    # Processes that hold different members compute the same rows.
    everyones = sorted({row[0]: row for row in (gather_object(found) if state.num_processes > 1 else found)}.values())
    return {column: torch.tensor([row[1 + i] for row in everyones]) for i, column in enumerate(_COLUMNS)}


def _batches(dataset: Dataset, rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, so that little is spent on padding."""
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    lengths = {i: sum(map(len, columns[i].values())) for i in rows}
    ordered = sorted(lengths, key=lengths.__getitem__)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
