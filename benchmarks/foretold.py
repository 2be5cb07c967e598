"""Does the critical alpha of one adapter foretell where members part, on a real chat model?

    python benchmarks/foretold.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--studies NAME …]

One adapter is trained as in the studies of members, with the same rows and settings, and then diagnosed: the critical
alpha with its interval, of rows by themselves and of groups that share a responsibility. At α = 0.8 members should part
where it is below 0.8.

    translations   verses, each in one of three translations: trained ones, held-out ones, and groups of eight held-out
                   ones of one translation
    questions      trained questions with both answers; and trained rows that nothing contradicts
    refusal        labels of two kinds of annotators for held-out prompts; groups of two labels of one kind
    precision      60 trained verses, diagnosed in float32 and in the precision of training

Printed beside it: the order that `alpha: auto` would choose, and of translations the shares of the variance of rows
along the leading direction that belong to the translation and to the book (R², adjusted: 0 by chance). Seconds are
those since the line before, so the first line of a study has its training, too.

`--data` has `translations/`, `conflict/`, `alpaca_en_demo.json` and `xstest/`.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import contested_questions
import numpy as np
import real_model
import refusal
import translations
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging

from renyi.data import GROUP_COLUMN, PairPreparation
from renyi.inference import Diagnosis, diagnose
from renyi.inference.diagnose import Pairs

ROWS, ROWS_IN_GROUPS = 160, 320  # verses
DIRECTIONS = 16


class Part(NamedTuple):
    """One diagnosis, and what each of its measured rows belongs to, if that is known."""

    rows: str
    found: Diagnosis
    labels: dict[str, list[str]]


def of_rows(
    trainer: Any, rows: list[dict[str, Any]], groups: list[str] | None = None, autocast: bool = True
) -> Diagnosis:
    prepared = trainer.preparation.prepare(Dataset.from_list(rows), trainer.processing_class)
    if groups is not None:
        prepared = prepared.add_column(GROUP_COLUMN, groups)
    with trainer.accelerator.autocast() if autocast else nullcontext():
        return diagnose(trainer.model, prepared, num_directions=DIRECTIONS)


def explained(values: Sequence[float], labels: Sequence[str]) -> float:
    """The share of the values' variance that the labels explain: R², adjusted for the number of labels."""
    x_N, (_, of_N) = np.array(values), np.unique(labels, return_inverse=True)
    means = np.bincount(of_N, x_N) / np.bincount(of_N)
    left = np.square(x_N - means[of_N]).sum() / (len(x_N) - len(means))
    return float(1 - left / x_N.var(ddof=1))


def of_translations(args: argparse.Namespace, seed: int) -> Iterator[Part]:
    trainer, seen, unseen = one_adapter_of_verses(args, seed)
    for name, rows in (("trained verses", seen[:ROWS]), ("verses", unseen[:ROWS]), ("groups of eight verses", unseen)):
        groups = [row.example()["group"] for row in rows] if rows is unseen else None
        found = of_rows(trainer, plain(rows), groups)
        measured = [rows[number] for number in found.examples]
        labels = {
            "translation": [translations.SOURCES[row.source] for row in measured],
            "book": [row.verse.book for row in measured],
        }
        yield Part(name, found, labels)


def of_precision(args: argparse.Namespace, seed: int) -> Iterator[Part]:
    trainer, seen, _ = one_adapter_of_verses(args, seed)
    rows = plain(seen[:60])
    found, seconds = [], []
    for name, autocast in (("in training's precision", True), ("in float32", False)):
        began = time.perf_counter()
        found.append(of_rows(trainer, rows, autocast=autocast))
        seconds.append(time.perf_counter() - began)
        yield Part(name, found[-1], {})
    correlation = abs(np.corrcoef(found[0].loadings, found[1].loadings)[0, 1])  # a direction has no sign
    print(
        f"the diagnoses alone took {seconds[0]:.0f} and {seconds[1]:.0f} s; their loadings correlate: {correlation:.4f}"
    )


def one_adapter_of_verses(args: argparse.Namespace, seed: int) -> tuple[Any, list[Any], list[Any]]:
    """A trained adapter, and rows that were trained and that were not."""
    given = ["--model", args.model, "--data", str(args.data / "translations"), "--rows", "960"]
    study = translations.parser().parse_args(given)
    trained, held_out = translations.split(translations.read_verses(study.data, study.prompt), seed)
    seen = translations.training_rows(trained, study, seed)
    _, trainer = translations.run(study, "one", seen, seed)
    study = argparse.Namespace(**{**vars(study), "rows": ROWS_IN_GROUPS})
    return trainer, seen, translations.training_rows(held_out, study, seed)[:ROWS_IN_GROUPS]


def plain(rows: Sequence[Any]) -> list[dict[str, str]]:
    return [{name: row.example()[name] for name in ("prompt", "completion")} for row in rows]


def of_questions(args: argparse.Namespace, seed: int) -> Iterator[Part]:
    study = argparse.Namespace(
        **vars(args), source="conflictqa", contested=50, one_sided=30, rank=16, members=1, alpha=0.0
    )
    study = argparse.Namespace(**vars(study), epochs=9.0, learning_rate=1e-3)
    questions, rows = contested_questions.read(study, seed)
    trainer = real_model.train_system(study, rows, seed, "one", contested_questions.SYSTEMS["one"])
    for kinds, name in ((["contested"], "both answers trained"), (["one-sided", "record"], "nothing contradicts")):
        of_kinds = [q for q in questions if q.kind in kinds]
        yield Part(
            name, of_rows(trainer, [{"prompt": q.prompt, "completion": a} for q in of_kinds for a in q.answers]), {}
        )


def of_refusal(args: argparse.Namespace, seed: int) -> Iterator[Part]:
    data = args.data / "xstest" / "completions_mistralinstruct_gpteval.csv"
    study = argparse.Namespace(model=args.model, data=data, pairs=64, held_out=40, words=16, members=1, alpha=0.0)
    study = argparse.Namespace(**vars(study), rank=16, learning_rate=1e-3, epochs=7.0, beta=0.5)
    train, test = refusal.read(study, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = refusal.tuned(study, folder, train, seed, refusal.SYSTEMS["one"], study.rank)
    random.Random(seed).shuffle(test)
    helped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in test]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in [*test, *helped]]
    preparation = replace(PairPreparation.of(trainer.args), routing_group=None)
    prepared = preparation.prepare(Dataset.from_list(rows), trainer.processing_class)
    pairs = Pairs(trainer.args.preference_loss, trainer.reference, preparation)
    grouped = prepared.add_column(GROUP_COLUMN, [str(n // 2) for n in range(len(prepared))])
    for name, measured in (("pairs", prepared), ("groups of two labels", grouped)):
        with trainer.accelerator.autocast():
            yield Part(name, diagnose(trainer.model, measured, pairs, num_directions=DIRECTIONS), {})


STUDIES = {
    "translations": of_translations,
    "questions": of_questions,
    "refusal": of_refusal,
    "precision": of_precision,
}


BY_DEFAULT = [study for study in STUDIES if study != "precision"]


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        for study in args.studies:
            began = time.perf_counter()
            for name, found, labels in STUDIES[study](args, seed):
                yield {
                    "study": study,
                    "seed": seed,
                    "rows": name,
                    "critical_alpha": found.critical_alpha,
                    "low": found.low,
                    "high": found.high,
                    "directions": sum(eigenvalue > 1 / 0.8 for eigenvalue in found.eigenvalues),
                    "mean_share": found.mean_share,
                    "calibration": found.calibration,
                    "alpha": found.alpha,
                    **{name: explained(found.loadings, of) for name, of in labels.items()},
                    "seconds": time.perf_counter() - began,
                }
                began = time.perf_counter()


def told(line: dict[str, Any]) -> str:
    calibration = "    –" if line["calibration"] is None else f"{line['calibration']:5.2f}"
    shares = " ".join(f"{line[of]:11.2f}" if of in line else f"{'–':>11}" for of in ("translation", "book"))
    return (
        f"{line['study']:13} {line['seed']:4} {line['rows']:24} {line['critical_alpha']:8.3f} "
        f"[{line['low']:.3f}, {line['high']:.3f}] {line['directions']:10} {line['mean_share']:9.2f} {calibration:>11} "
        f"{line['alpha']:5.2f} {shares} {line['seconds']:6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with all studies' data")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=BY_DEFAULT)
    parser.add_argument("--json", type=Path, help="a file to which a line is added for each diagnosis")
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    print(
        "study         seed rows                     critical alpha, 95 %     directions mean share calibration alpha "
        "translation        book seconds"
    )
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
