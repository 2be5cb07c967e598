"""Reference log-probabilities that are computed before training and kept on disk by content.

The file's name is a hash of everything that decides them: the base's weights, the tokens, where rows are cut. So
another run over the same rows finds the file, and a run that differs in anything does not. Read next: `referenced.py`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save
from torch import Tensor

from renyi.ensemble import Reference
from renyi.errors import SaveError
from renyi.files import write_whole

logger = logging.getLogger(__name__)

LogProbs = Callable[[dict[str, Any]], Mapping[str, Tensor]]  # of a batch: log-probabilities [S, B] by column


def with_reference(
    dataset: Dataset,
    reference: Reference,
    compute: LogProbs,
    collate: Any,
    settings: Sequence[Any],
    accelerator: Accelerator,
    batch_size: int,
) -> Dataset:
    """Add the columns that `compute` gives to prepared rows: a number each, or a list of M.

    Every process computes its share of the rows; the first writes the file.

    Args:
        dataset: prepared rows, with columns of token ids that end with `ids`.
        reference: what log-probabilities are computed under.
        compute: computes them for a batch.
        collate: makes a batch of rows.
        settings: what decides the result besides tokens and reference: where rows are cut, the precision.
        accelerator: of the trainer.
        batch_size: rows computed together.
    """
    file = cache_folder() / f"{_content(dataset, reference, settings)}.safetensors"
    accelerator.wait_for_everyone()  # all have looked for the same file before one writes it
    if file.is_file():
        found = load_file(file)
    else:
        found = _computed(dataset, reference, compute, collate, accelerator, batch_size)
        if accelerator.is_main_process:
            _keep(found, file)
    accelerator.wait_for_everyone()
    columns = {column: (x[:, 0] if x.shape[1] == 1 else x).tolist() for column, x in found.items()}
    return concatenate_datasets([dataset, Dataset.from_dict({c: columns[c] for c in sorted(columns)})], axis=1)


def cache_folder() -> Path:
    """Where reference log-probabilities are kept: `renyi/reference` in the Hugging Face home."""
    return Path(HF_HOME) / "renyi" / "reference"


def _keep(found: dict[str, Tensor], file: Path) -> None:
    """Write the file. If it cannot be written, the run goes on without it."""
    try:
        write_whole(file, save(found))
    except SaveError as error:
        logger.warning("The reference log-probabilities are not kept for another run: %s %s", error.where, error.what)


def _content(dataset: Dataset, reference: Reference, settings: Sequence[Any]) -> str:
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([reference.fingerprint(), list(settings)]).encode())
    for rows in _ids(dataset).iter(batch_size=1000):
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _ids(dataset: Dataset) -> Dataset:
    """Only the columns of token ids."""
    return dataset.select_columns(sorted(c for c in dataset.column_names if c.endswith("ids")))


def _computed(
    dataset: Dataset, reference: Reference, compute: LogProbs, collate: Any, state: Accelerator, batch_size: int
) -> dict[str, Tensor]:
    """Reference log-probabilities [N, S] by column, in the dataset's order."""
    model = reference.ensemble
    found: list[tuple[int, dict[str, list[float]]]] = []
    training = model.training
    model.eval()
    mine = range(state.process_index, len(dataset), state.num_processes)
    for rows in _batches(dataset, mine, batch_size):
        batch = {name: x.to(state.device) for name, x in collate(list(dataset.select(rows))).items()}
        with state.autocast():
            logps = {column: x_SB.T.tolist() for column, x_SB in compute(batch).items()}
        found += [(row, {column: x[i] for column, x in logps.items()}) for i, row in enumerate(rows)]
    model.train(training)
    # Processes that hold different members compute the same rows.
    everyones = dict(gather_object(found) if state.num_processes > 1 else found)
    ordered = [everyones[row] for row in sorted(everyones)]
    return {column: torch.tensor([logps[column] for logps in ordered]) for column in ordered[0]}


def _batches(dataset: Dataset, rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Batches of rows of similar length, so that little is spent on padding."""
    columns = _ids(dataset)
    lengths = {i: sum(map(len, columns[i].values())) for i in rows}
    ordered = sorted(lengths, key=lengths.__getitem__)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
