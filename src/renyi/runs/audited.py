"""An audit with models: adapters are fitted to a part of the rows, and say what they think of the other part.

Everything long is kept in OUT/model, so a killed audit goes on where it was:

    OUT/model/fit_0, fit_1    an adapter for each half of the rows
    OUT/model/ensemble        or an ensemble on the first half
    OUT/model/measured.jsonl  what they say of the rows

Read next: `renyi.audit.with_model`, which does the reading.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from renyi.audit import Audit
from renyi.audit.examples import Examples, Rows, draw, examples_of
from renyi.audit.kept import Kept
from renyi.audit.measuring import Judge, prepared
from renyi.audit.with_model import Diagnosed, Stages, judged, no_stages
from renyi.data import load_tokenizer
from renyi.ensemble import LoraEnsemble
from renyi.ensemble.reference import read_preference
from renyi.files import write_whole
from renyi.inference.diagnose import FEWEST_MEASURED, Pairs, diagnose
from renyi.runs.build import Watch
from renyi.runs.load import load
from renyi.runs.settings import Settings
from renyi.runs.single import run
from renyi.training import RenyiDPOTrainer

MAX_EXAMPLES = 512
NUM_DIRECTIONS = 8
# One pass over half of the rows, with a small rank: enough to learn what rows have in common, too little to learn them
# by heart.
FIT: Mapping[str, Any] = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "linear",
    "lora_r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "max_length": 512,
    "dtype": "bfloat16",
    "report_to": "none",
    "gradient_checkpointing": False,
}


def audit_with_adapter(
    found: Audit,
    rows: Rows,
    base: str,
    *,
    folder: str | Path | None = None,
    text_field: str = "text",
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
    stages: Stages = no_stages,
    watch: Watch | None = None,
    **settings: Any,
) -> Audit:
    """Add to an audit what single adapters say. Each reads the rows that it was not fitted to.

    The drawn rows are halved at random. An adapter is fitted to each half and reads the other. The stability diagnosis
    is of the first adapter, on the second half; all rows are then laid along the directions that it found.

    Args:
        found: by reading alone.
        rows: that were read.
        base: a folder or a hub id of a causal language model.
        folder: for what is kept; a temporary one by default.
        text_field: the column of a row of text.
        max_examples: the most rows that are used; see `renyi.audit.examples.draw` for which.
        seed: of every draw.
        stages: shows progress of the reading.
        watch: told about the fits.
        settings: for the fits, as for `renyi sft` or `renyi dpo`, in the place of those of `FIT`.

    Raises:
        RenyiError: whatever is wrong with rows, base or settings; see `renyi.runs.run`.
    """
    return _audit(found, rows, base, None, folder, text_field, max_examples, seed, stages, watch, settings)


def audit_with_members(
    found: Audit,
    rows: Rows,
    base: str,
    members: int,
    *,
    folder: str | Path | None = None,
    text_field: str = "text",
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
    stages: Stages = no_stages,
    watch: Watch | None = None,
    **settings: Any,
) -> Audit:
    """Add to an audit what an ensemble says. It is trained on a random half of the drawn rows, and reads all of them.

    Args:
        members: of the ensemble.

    The other arguments, and errors, are those of `audit_with_adapter`.
    """
    return _audit(found, rows, base, members, folder, text_field, max_examples, seed, stages, watch, settings)


def audit_with_ensemble(
    found: Audit,
    rows: Rows,
    ensemble: str | Path,
    *,
    base: str | None = None,
    folder: str | Path | None = None,
    text_field: str = "text",
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
    stages: Stages = no_stages,
) -> Audit:
    """Add to an audit what an ensemble in a folder says. It reads the rows as its training prepared them.

    Args:
        ensemble: the folder that `renyi sft` or `renyi dpo` left.
        base: the base model, if it is no longer where the ensemble says.

    The other arguments, and errors, are those of `audit_with_adapter`.
    """
    loaded = load(ensemble, base=base)
    is_chat = bool(getattr(loaded.tokenizer, "chat_template", None))
    examples = examples_of(rows, draw(rows, found.groups, max_examples, seed), text_field, is_chat)
    everything = range(len(examples.rows))
    if examples.method == "dpo":
        preparation: Any = loaded.pair_preparation
        pairs = Pairs(*read_preference(loaded.folder, loaded.ensemble), preparation)
        judge = Judge(loaded.ensemble, loaded.tokenizer, preparation, pairs, everything)
    else:
        judge = Judge(loaded.ensemble, loaded.tokenizer, loaded.preparation, None, everything)
    of = {"ensemble": str(Path(ensemble).resolve()), "rows": examples.content, "seed": seed}
    kept = Kept(None if folder is None else Path(folder) / "model" / "measured.jsonl", of)
    read = judged(found, examples, [judge], kept=kept, seed=seed, stages=stages)
    return _told(read, examples, rows, 3, {"model_name_or_path": loaded.ensemble.base_model_name})


def _audit(
    found: Audit,
    rows: Rows,
    base: str,
    members: int | None,
    folder: str | Path | None,
    text_field: str,
    max_examples: int,
    seed: int,
    stages: Stages,
    watch: Watch | None,
    settings: Mapping[str, Any],
) -> Audit:
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            rest = text_field, max_examples, seed, stages, watch, settings
            return _audit(found, rows, base, members, made, *rest)
    out, watch = Path(folder) / "model", watch or Watch()
    with watch.doing("drawing the rows"):
        is_chat = bool(getattr(load_tokenizer(base), "chat_template", None))
        examples = examples_of(rows, draw(rows, found.groups, max_examples, seed), text_field, is_chat)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples.rows), generator=generator).tolist()
    halves = [sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])]
    chosen = {**FIT, "model_name_or_path": base, "seed": seed, **settings}
    of = {"rows": examples.content, "settings": {k: str(v) for k, v in chosen.items()}, "members": members}
    kept = Kept(out / "measured.jsonl", of)
    if members is not None:
        everything = list(range(len(order)))
        ensemble = {"num_members": members, **chosen}
        judges = [_fitted(examples, halves[0], everything, out / "ensemble", ensemble, watch)]
        return _told(judged(found, examples, judges, kept=kept, seed=seed, stages=stages), examples, rows, 3, chosen)
    chosen = {"num_members": 1, "alpha": 0.0, **chosen}
    judges = [_fitted(examples, halves[i], halves[1 - i], out / f"fit_{i}", chosen, watch) for i in (0, 1)]
    diagnosed = _diagnosed(judges[0], examples, out / "directions.pt", kept, seed, stages)
    read = judged(found, examples, judges, diagnosed, kept=kept, seed=seed, stages=stages)
    return _told(read, examples, rows, 2, chosen)


def _fitted(
    examples: Examples,
    fit_to: Sequence[int],
    unseen: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
    watch: Watch,
) -> Judge:
    """A model that was fitted to some examples, or goes on where it was."""
    lines = "".join(json.dumps(examples.content[i]) + "\n" for i in fit_to)
    data = folder.with_suffix(".jsonl")
    write_whole(data, lines.encode("utf-8", "surrogatepass"))
    made = run(Settings.of(examples.method, dataset_name=str(data), output_dir=str(folder), **settings), watch)
    pairs = None
    if isinstance(made.trainer, RenyiDPOTrainer):
        preparation: Any = made.preparation
        pairs = Pairs(made.trainer.args.preference_loss, made.trainer.reference, preparation)
    ensemble: LoraEnsemble = made.ensemble
    preparation = made.preparation
    return Judge(ensemble, made.tokenizer, preparation, pairs, unseen)


def _diagnosed(judge: Judge, examples: Examples, file: Path, kept: Kept, seed: int, stages: Stages) -> Diagnosed | None:
    """The stability diagnosis on the examples that the model has not seen; None if they are too few."""
    if len(judge.unseen) < 2 * FEWEST_MEASURED:
        return None
    if "stability" in kept and file.is_file():
        return Diagnosed(kept.get("stability", dict), torch.load(file, weights_only=True))
    rows = prepared(judge, [examples.content[i] for i in judge.unseen])
    with stages("diagnosing", len(rows)) as progress:
        found = diagnose(
            judge.ensemble,
            rows,
            judge.pairs,
            num_directions=min(NUM_DIRECTIONS, len(rows) // 2),
            max_examples=len(rows),
            seed=seed,
            progress=progress,
        )
    made = Diagnosed.of(found)
    torch.save(made.directions, file)
    kept.get("stability", lambda: made.figures)
    return made


def _told(read: Audit, examples: Examples, rows: Rows, level: int, settings: Mapping[str, Any]) -> Audit:
    """The audit with what was done in its settings."""
    read.settings.update(
        level=level,
        model=settings.get("model_name_or_path"),
        read_by_model=len(examples.rows),
        drawn="all rows with an answer"
        if len(examples.rows) == len(rows)
        else "rows that reading found in a conflict, up to half of them; the others at random",
    )
    return read
