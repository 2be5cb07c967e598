"""What the audit says of four real datasets, by reading alone and with a model.

    python benchmarks/audit_real.py --shared ../shared/data [--model BASE] [--only conflictqa alpaca …] [--rows 240]

conflictqa     questions with a model's own answer and an opposite one: the share whose two sides form one group
alpaca         instructions as they are: the first ten groups, to be read by a person
translations   verses in three translations (`--model` only): whether they are a systematic variation, and no errors
pandalm        pairs of answers with three annotators each (`--model` only): AUROC of the pairs on which annotators
               split among all pairs, by the doubt about the majority's preference
"""

import argparse
import csv
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import disable_progress_bars
from sklearn.metrics import roc_auc_score

from renyi.audit import audit
from renyi.runs.audited import audit_with_adapter

TRANSLATIONS = ("anderson", "haweis", "twenty")


def conflictqa(shared: Path, args: argparse.Namespace) -> None:
    lines = (shared / "conflict" / "conflictqa.json").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    rows = [
        {"prompt": record["question"], "completion": f"{record[f'{side}_answer']} {record[reasons]}"}
        for side, reasons in (("memory", "parametric_memory"), ("counter", "counter_memory"))
        for record in records
    ]
    order = random.Random(0).sample(range(len(rows)), len(rows))
    place = {old: new for new, old in enumerate(order)}
    result = audit([rows[i] for i in order])
    groups = [g for g in result.groups if "conflict" in g.kind]
    of_row = {row: number for number, group in enumerate(groups) for side in group.sides for row in side.rows}
    sides = {row: (number, k) for number, g in enumerate(groups) for k, s in enumerate(g.sides) for row in s.rows}
    n = len(records)
    together = [
        place[i] in of_row
        and of_row[place[i]] == of_row.get(place[n + i])
        and sides[place[i]][1] != sides[place[n + i]][1]
        for i in range(n)
    ]
    scores = Counter(g.score for g in groups)
    contested = sum(v.is_contested for v in result.verdicts)
    print(f"conflictqa: of {sum(together)} of {n} questions both sides are in one group, on two sides")
    print(f"  {len(groups)} groups, by score {dict(scores)}; {contested} of {len(rows)} rows are contested")


def alpaca(shared: Path, args: argparse.Namespace) -> None:
    rows = json.loads((shared / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    result = audit(rows)
    print(f"alpaca: {len(rows)} rows; {result.counts()}; {result.share_contested:.2%} contested")
    if args.model:
        with tempfile.TemporaryDirectory() as folder:
            result = audit_with_adapter(
                result, rows, args.model, folder=folder, max_examples=args.rows, seed=args.seed, max_length=160
            )
        print(f"  with a model on {len(result.measures)} rows: {result.counts()}; {result.stability}")
    for number, group in enumerate(result.groups[:10]):
        where = ", ".join(place for side in group.where for place in side[:2])
        print(f"  {number}: {group.kind}, score {group.score:g}; {where}; {group.prompts[:1]}")
        print(f"     {' | '.join(side.answer[:100] for side in group.sides[:3])}")


def translations(shared: Path, args: argparse.Namespace) -> None:
    texts = []
    for name in TRANSLATIONS:
        with (shared / "translations" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            texts.append(list(csv.DictReader(file)))
    short = [i for i in range(len(texts[0])) if all(40 <= len(t[i]["text"]) <= 150 for t in texts)]
    rng = random.Random(args.seed)
    verses = rng.sample(short, args.rows // len(TRANSLATIONS))
    rows, source = [], []
    for i in verses:
        for number, of_verse in enumerate(t[i] for t in texts):
            prompt = f"{of_verse['book']} {of_verse['chapter']}:{of_verse['verse']}\n"
            rows.append({"prompt": prompt, "completion": of_verse["text"]})
            source.append(number)
    found = audit(rows)
    conflicts = [g for g in found.groups if g.kind == "duplicate_conflict"]
    print(
        f"translations: {len(rows)} rows of {len(verses)} verses; {len(conflicts)} groups by reading, {found.counts()}"
    )
    if not args.model:
        return
    with tempfile.TemporaryDirectory() as folder:
        result = audit_with_adapter(found, rows, args.model, folder=folder, max_examples=len(rows), seed=args.seed)
    errors = [g for g in result.groups if g.kind == "probable_error"]
    print(f"  with a model: {len(errors)} of {len(rows)} rows are called errors; {result.stability}")
    loadings = np.array([result.measures[i]["loadings"] for i in range(len(rows))])
    for number, name in enumerate(TRANSLATIONS):
        is_one = np.array(source) == number
        best = max(abs(roc_auc_score(is_one, column) - 0.5) + 0.5 for column in loadings.T)
        print(f"  {name} against the others: AUROC {best:.3f} along the best of {loadings.shape[1]} directions")
    for group in result.groups:
        if group.kind == "systematic_variation":
            print(f"  {group.sentence} {[dict(Counter(source[row] for row in side.rows)) for side in group.sides]}")


def pandalm(shared: Path, args: argparse.Namespace) -> None:
    records = json.loads((shared / "votes" / "pandalm.json").read_text(encoding="utf-8"))
    rows, split = [], []
    for record in records:
        votes = [str(record[f"annotator{k}"]) for k in (1, 2, 3)]
        answers = record["response1"], record["response2"]
        (winner, count), *_ = Counter(votes).most_common()
        usable = all(isinstance(a, str) and a.strip() for a in answers) and answers[0] != answers[1]
        if winner == "0" or count == 1 or not usable or len(f"{record['instruction']} {record['input']}".split()) > 60:
            continue
        chosen, rejected = answers if winner == "1" else answers[::-1]
        prompt = "\n".join(filter(None, (record["instruction"], record["input"])))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        split.append(count < 3)
    rng = random.Random(args.seed)
    chosen_rows = sorted(rng.sample(range(len(rows)), min(args.rows, len(rows))))
    rows, is_split = [rows[i] for i in chosen_rows], np.array([split[i] for i in chosen_rows])
    print(f"pandalm: {len(rows)} pairs with a majority, {is_split.sum()} of them split")
    found = audit(rows)
    print(f"  by reading: {found.counts()}")
    if not args.model:
        return
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"learning_rate": 1e-4, "max_length": 256}
        result = audit_with_adapter(
            found, rows, args.model, folder=folder, max_examples=len(rows), seed=args.seed, **settings
        )
    fit = np.array([result.measures[i]["fit"] for i in range(len(rows))])
    loading = np.array([abs(result.measures[i]["loadings"][0]) for i in range(len(rows))])
    for name, values in {
        "low probability of the label": -fit,
        "probability near one half": -np.abs(fit - 0.5),
        "loading on the leading direction": loading,
    }.items():
        print(f"  split pairs by {name}: AUROC {roc_auc_score(is_split, values):.3f}")
    print(f"  {result.stability}")


PARTS = {"conflictqa": conflictqa, "alpaca": alpaca, "translations": translations, "pandalm": pandalm}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="the folder with the four datasets")
    parser.add_argument("--model", help="base model; without it only reading is done")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--rows", type=int, default=240, help="the most rows that a model reads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    disable_progress_bars()
    for name in args.only:
        started = time.perf_counter()
        PARTS[name](args.shared, args)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
