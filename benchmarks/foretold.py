"""Does the critical alpha of one adapter foretell where members part, on a real chat model?

    python benchmarks/foretold.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--studies NAME …]

One adapter is trained as in the studies of members, with the same rows and settings, and then diagnosed: the critical
alpha with its interval, of rows by themselves and of groups that share a responsibility. At α = 0.8 members should part
where it is below 0.8.

    translations   held-out verses, each in one of three translations; groups of eight verses of one translation
    questions      trained questions with both answers; and trained rows that nothing contradicts
    refusal        labels of two kinds of annotators for held-out prompts; groups of two labels of one kind

`--data` has `translations/`, `conflict/`, `alpaca_en_demo.json` and `xstest/`.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import contested_questions
import real_model
import refusal
import translations
from datasets import Dataset, disable_progress_bars
from transformers.utils import logging

from renyi.data import GROUP_COLUMN, PairPreparation
from renyi.inference import Diagnosis, diagnose
from renyi.inference.diagnose import Pairs

ROWS = 320  # of held-out verses
DIRECTIONS = 16
Found = Iterator[tuple[str, Diagnosis]]


def of_rows(trainer: Any, rows: list[dict[str, Any]], groups: list[str] | None = None) -> Diagnosis:
    prepared = trainer.preparation.prepare(Dataset.from_list(rows), trainer.processing_class)
    if groups is not None:
        prepared = prepared.add_column(GROUP_COLUMN, groups)
    return diagnose(trainer.model, prepared, num_directions=DIRECTIONS)


def of_translations(args: argparse.Namespace, seed: int) -> Found:
    given = ["--model", args.model, "--data", str(args.data / "translations"), "--rows", "960"]
    study = translations.parser().parse_args(given)
    trained, held_out = translations.split(translations.read_verses(study.data, study.prompt), seed)
    _, trainer = translations.run(study, "one", translations.training_rows(trained, study, seed), seed)
    rows = translations.training_rows(held_out, argparse.Namespace(**{**vars(study), "rows": ROWS}), seed)
    examples = [row.example() for row in rows]
    plain = [{name: example[name] for name in ("prompt", "completion")} for example in examples]
    yield "verses", of_rows(trainer, plain)
    yield "groups of eight verses", of_rows(trainer, plain, [example["group"] for example in examples])


def of_questions(args: argparse.Namespace, seed: int) -> Found:
    study = argparse.Namespace(**vars(args), contested=50, one_sided=30, rank=16, members=1, alpha=0.0)
    study = argparse.Namespace(**vars(study), epochs=9.0, learning_rate=1e-3)
    questions, rows = contested_questions.read(study, seed)
    trainer = real_model.train_system(study, rows, seed, "one", contested_questions.SYSTEMS["one"])
    for kinds, name in ((["contested"], "both answers trained"), (["one-sided", "record"], "nothing contradicts")):
        of_kinds = [q for q in questions if q.kind in kinds]
        yield name, of_rows(trainer, [{"prompt": q.prompt, "completion": a} for q in of_kinds for a in q.answers])


def of_refusal(args: argparse.Namespace, seed: int) -> Found:
    data = args.data / "xstest" / "completions_mistralinstruct_gpteval.csv"
    study = argparse.Namespace(model=args.model, data=data, pairs=64, held_out=40, words=16, members=1, alpha=0.0)
    study = argparse.Namespace(**vars(study), rank=16, learning_rate=1e-3, epochs=7.0, beta=0.5)
    train, test = refusal.read(study, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = refusal.tuned(study, folder, train, seed, {"num_members": 1, "alpha": 0.0})
    random.Random(seed).shuffle(test)
    helped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in test]
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in [*test, *helped]]
    preparation = replace(PairPreparation.of(trainer.args), routing_group=None)
    prepared = preparation.prepare(Dataset.from_list(rows), trainer.processing_class)
    pairs = Pairs(trainer.args.preference_loss, trainer.reference, preparation)
    grouped = prepared.add_column(GROUP_COLUMN, [str(n // 2) for n in range(len(prepared))])
    for name, measured in (("pairs", prepared), ("groups of two labels", grouped)):
        yield name, diagnose(trainer.model, measured, pairs, num_directions=DIRECTIONS)


STUDIES = {"translations": of_translations, "questions": of_questions, "refusal": of_refusal}


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        for study in args.studies:
            began = time.perf_counter()
            for name, found in STUDIES[study](args, seed):
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
                    "seconds": time.perf_counter() - began,
                }


def told(line: dict[str, Any]) -> str:
    calibration = "    –" if line["calibration"] is None else f"{line['calibration']:5.2f}"
    return (
        f"{line['study']:13} {line['seed']:4} {line['rows']:24} {line['critical_alpha']:8.3f} "
        f"[{line['low']:.3f}, {line['high']:.3f}] {line['directions']:10} {line['mean_share']:9.2f} {calibration:>11} "
        f"{line['seconds']:6.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with all studies' data")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--json", type=Path, help="a file to which a line is added for each diagnosis")
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    print(
        "study         seed rows                     critical alpha, 95 %     directions mean share calibration seconds"
    )
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
