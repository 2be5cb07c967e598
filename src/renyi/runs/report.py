"""One page about a run, from the files in its folder: settings, curves, members, what each learned, evaluations.

Nothing is trained or loaded here but the adapters' files. Read next: `renyi.evaluation.page`, which makes the HTML.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from renyi.ensemble.describe import Description, describe
from renyi.ensemble.storage import resolve_folder
from renyi.errors import EnsembleFormatError
from renyi.evaluation.page import write_page
from renyi.evaluation.sections import (
    Cell,
    Chart,
    Column,
    Example,
    Examples,
    Lines,
    Note,
    Report,
    Section,
    Table,
    shortened,
)
from renyi.evaluation.stored import SECTIONS_FILE, read_sections
from renyi.layout import MANIFEST_FILE
from renyi.runs.learned import LEARNED_FILE
from renyi.runs.record import RUN_FILE, Record, defaults
from renyi.text import number_text
from renyi.training.report import FIGURE_FILE, METRICS_FILE

Step = Mapping[str, Any]  # what was logged at one step

PAGE_FILE = "run.html"
# What is shown of the last logged step, if it is there; other figures are in metrics.jsonl.
_LAST = {
    "loss": "loss",
    "nll_mixture": "NLL of the mixture",
    "nll_members": "mean NLL of the members",
    "jensen_gap": "Jensen gap",
    "effective_members": "effective members",
    "rewards/accuracies": "chosen preferred",
    "logps/policy": "log π, nats a token",
    "logps/base": "log p of the base, nats a token",
    "log_partition": "log Z'",
    "residual/variance": "variance of the residual",
}


def write_run_report(folder: str | Path, file: Path | None = None) -> Path:
    """Write one page of HTML about a run; the page needs no other file.

    Args:
        folder: of the run, or of any ensemble, or a hub id. What the folder lacks, the page leaves out.
        file: the page; `run.html` in the folder if None.

    Returns:
        The page's path.

    Raises:
        EnsembleFormatError: the folder holds no ensemble, or a file in it is damaged.
        SaveError: the page could not be written.
    """
    there = resolve_folder(folder)
    file = file or there / PAGE_FILE
    write_page(file, run_report(there))
    return file


def run_report(folder: Path) -> Report:
    """What there is to show about a run."""
    found, record, steps = describe(folder), Record.read(folder), _logged(folder)
    sections: list[Section] = [_facts(found, record, steps)]
    sections += _last(steps)
    figure = folder / FIGURE_FILE
    sections += [Chart("How it went", "training", figure.read_bytes)] if figure.is_file() else []
    sections.append(_members(found, steps))
    learned = folder / LEARNED_FILE
    if learned.is_file():
        title, _, text = learned.read_text(encoding="utf-8").strip("\n").partition("\n")
        sections.append(Lines(title, text))
    sections += _settings(record) if record else []
    sections += _evaluations(folder)
    method = f"renyi {record.method}" if record else "an ensemble"
    return Report(folder.resolve().name, f"{method} · written by renyi {found.manifest.renyi_version}", sections)


def _logged(folder: Path) -> list[dict[str, Any]]:
    """The logged steps; none if the folder has no such file."""
    file = folder / METRICS_FILE
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise EnsembleFormatError(
            f"is damaged ({error})", where=str(file), hint="Remove it: the page then has no figures of training."
        ) from error
    return [row for row in rows if isinstance(row, dict)]


def _facts(found: Description, record: Record | None, steps: Sequence[Step]) -> Section:
    manifest, rows = found.manifest, dict[str, str]()
    rows["base"] = manifest.base_model
    rows["members"] = (
        f"{len(manifest.members)} × LoRA rank {found.rank}, {number_text(found.parameters)} parameters each"
    )
    rows["adapted layers"] = f"{', '.join(found.targets)} ({found.layers} layers)"
    if len(manifest.members) > 1:
        rows["alpha"] = f"{manifest.alpha:g}, {manifest.routing_quantity} routed"
    if record:
        rows["data"] = str(record.settings.get("dataset_name", ""))
        for name, kept in (("trained rows", record.train), ("held-out rows", record.held_out)):
            if kept:
                rows[name] = number_text(kept.rows)
        if record.examples_per_step:
            rows["examples a step"] = number_text(record.examples_per_step)
    if steps:
        rows["steps"] = number_text(max(int(row.get("step", 0)) for row in steps))
    seconds = next((row["train_runtime"] for row in reversed(steps) if "train_runtime" in row), None)
    if seconds is not None:
        rows["training time"] = f"{seconds:.0f} s"
    return _named("", rows)


def _named(title: str, rows: Mapping[str, str], note: str = "") -> Examples:
    """Names and texts, which wrap where the page is narrow."""
    return Examples(title, note, [Example("", "", "", (), list(rows.items()))])


def _last(steps: Sequence[Step]) -> list[Section]:
    """The figures of the last logged step and of the last evaluation during training."""
    trained: Step = next((row for row in reversed(steps) if "loss" in row), {})
    held_out: Step = next((row for row in reversed(steps) if "eval_loss" in row), {})
    rows: list[list[Cell]] = [
        [name, _number(trained.get(key)), _number(held_out.get(f"eval_{key}"))]
        for key, name in _LAST.items()
        if key in trained or f"eval_{key}" in held_out
    ]
    if not rows:
        return []
    columns: list[Column | str] = ["", Column("training", ".4g"), Column("held out", ".4g")]
    ends = [f"training at step {trained['step']}"] if trained else []
    ends += [f"held out at step {held_out['step']}"] if held_out else []
    return [Table("Where it ended", columns, rows, f"{', '.join(ends)} · every step is in {METRICS_FILE}")]


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _members(found: Description, steps: Sequence[Step]) -> Table:
    """Of each member its weight, its last load, the size of its update, and the distances to the others."""
    members = range(len(found.norms))
    loads: Step = next((row for row in reversed(steps) if "member_load/0" in row), {})
    columns: list[Column | str] = ["member", Column("weight", ".3f")]
    columns += [Column("load", ".1%")] if loads else []
    columns += [Column("‖update‖", ".3g"), *([Column(f"to {m}", ".3g") for m in members] if len(members) > 1 else [])]
    rows: list[list[Cell]] = []
    for m in members:
        row: list[Cell] = [str(m), found.manifest.weights[m]]
        row += [_number(loads.get(f"member_load/{m}"))] if loads else []
        row.append(float(found.norms[m]))
        row += [None if m == n else float(found.distances[m, n]) for n in members] if len(members) > 1 else []
        rows.append(row)
    parts = ["‖scaling·BA‖ over all layers"]
    parts += ["to m: distance to member m's update"] if len(members) > 1 else []
    parts += ["load: share of the examples that it learned from, at the last logged step"] if loads else []
    return Table("Members", columns, rows, " · ".join(parts))


def _settings(record: Record) -> list[Section]:
    """The settings that decide what is learned, where they are not the defaults."""
    default = defaults(record.method)
    given = {k: v for k, v in record.settings.items() if k not in default or default[k] != v}
    rows = {key: f"{_shown(value)}  (default: {_shown(default.get(key))})" for key, value in sorted(given.items())}
    rest = len(record.settings) - len(given)
    note = f"{number_text(rest)} other settings have their defaults; {RUN_FILE} has them all"
    return [_named("Settings", rows, note) if rows else Note("Settings", note)]


def _shown(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value), 120)


def _evaluations(folder: Path) -> list[Section]:
    """What `renyi evaluate --report` left in folders inside this one."""
    sections: list[Section] = []
    for file in sorted({*folder.glob(f"*/{SECTIONS_FILE}"), *folder.glob(f"*/*/{SECTIONS_FILE}")}):
        report = read_sections(file.parent)
        inside = file.parent.relative_to(folder)
        sections += [Note(f"Evaluation: {report.title}", f"{report.subtitle} (from {inside})"), *report.sections]
    if not sections and (folder / MANIFEST_FILE).is_file():
        quoted, target = shlex.quote(str(folder)), shlex.quote(str(folder / "evaluation"))
        how = f"renyi evaluate {quoted} DATA --task choice --report {target}"
        sections = [Note("Evaluation", f"There is none in this folder. To add one: {how}")]
    return sections
