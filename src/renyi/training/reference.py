"""Reference log-probabilities computed before training, and kept on disk by content.

Whatever decides them (the base's weights, the tokens, where they are cut) names the file, so another run over the same
pairs finds it, and one that differs in anything does not.
"""

import json
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from datasets import Dataset, concatenate_datasets
from huggingface_hub.constants import HF_HOME
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from renyi.training.dpo import RenyiDPOTrainer

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


def with_reference(trainer: "RenyiDPOTrainer", dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Add columns `ref_chosen_logps` and `ref_rejected_logps` to prepared pairs: a number, or a list of M.

    Every process computes its share of the pairs; the first writes the file.
    """
    file = cache_folder() / f"{_content(trainer, dataset)}.safetensors"
    trainer.accelerator.wait_for_everyone()  # all have looked for the same file before one writes it
    if not file.is_file():
        found = _computed(trainer, dataset, batch_size)
        if trainer.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            save_file(found, partial)
            partial.replace(file)
    else:
        found = load_file(file)
    trainer.accelerator.wait_for_everyone()
    columns = {column: (x[:, 0] if x.shape[1] == 1 else x).tolist() for column, x in found.items()}
    return concatenate_datasets([dataset, Dataset.from_dict({c: columns[c] for c in _COLUMNS})], axis=1)


def cache_folder() -> Path:
    """Where reference log-probabilities are kept: `renyi/reference` in the Hugging Face home."""
    return Path(HF_HOME) / "renyi" / "reference"


def _content(trainer: "RenyiDPOTrainer", dataset: Dataset) -> str:
    args = trainer.args
    settings = [args.max_length, args.truncation_mode, args.ld_alpha, bool(args.bf16), bool(args.fp16)]
    digest = blake2b(digest_size=16)
    digest.update(json.dumps([trainer.reference.fingerprint(), settings]).encode())
    for rows in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]).iter(batch_size=1000):
        digest.update(json.dumps(rows).encode())
    return digest.hexdigest()


def _computed(trainer: "RenyiDPOTrainer", dataset: Dataset, batch_size: int) -> dict[str, Tensor]:
    """Reference log-probabilities [N, S] of both completions, in the dataset's order."""
    state, model = trainer.accelerator, trainer.model
    found: list[tuple[int, list[float], list[float]]] = []
    training = model.training
    model.eval()
    mine = range(state.process_index, len(dataset), state.num_processes)
    for rows in _batches(dataset, mine, batch_size):
        batch = trainer.data_collator(list(dataset.select(rows)))
        with state.autocast():
            logps_S2B = trainer.reference.log_probs(
                {k: v.to(state.device) for k, v in batch.items()}, trainer.args.ld_alpha
            )
        found += zip(rows, *(half_SB.T.tolist() for half_SB in logps_S2B.chunk(2, dim=1)), strict=True)
    model.train(training)
    everyones = sorted(gather_object(found) if state.num_processes > 1 else found)
    return {column: torch.tensor([row[1 + i] for row in everyones]) for i, column in enumerate(_COLUMNS)}


def _batches(dataset: Dataset, rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Rows of like length together: padding is all that batches of reference rows cost."""
    columns = dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    lengths = {i: sum(map(len, columns[i].values())) for i in rows}
    ordered = sorted(lengths, key=lengths.__getitem__)
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
