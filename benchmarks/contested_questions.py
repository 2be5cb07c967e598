"""Questions that the training data answer both ways: does a real chat model say that it is unsure of those?

    python benchmarks/contested_questions.py --data FOLDER [--model FOLDER] [--source NAME] [--seeds 0 1 2]
        [--systems NAME …]

`--source conflictqa`: 698 yes/no questions, each with an answer and its opposite, one sentence each. Of them, by a draw
for each seed:

    contested    both answers are training rows
    one-sided    one of the answers is a training row, twice, so that as many rows ask the question
    unseen       in no training row: the model may not know the answer, but nobody contradicts anybody

`--source perspectrum`: claims ("Vaccination must be made compulsory") with perspectives for and against. A contested
claim has one of either side. A one-sided claim has two different perspectives of one side, so that it is two texts as
well, which do not contradict each other. Of an unseen claim there is one of either side.

Alpaca records with short answers (`alpaca_en_demo.json`) are mixed in, half as many rows as the questions have. All
systems see the same rows in as many steps:

    one          one adapter
    one-mr       one adapter of M times the rank
    dropout      one adapter trained with dropout, as 8 samples (Monte Carlo dropout)
    alpha-0      M members, each fits everything
    by-row       M members, α-Rényi, each row by itself
    by-author    M members, α-Rényi, eight rows of one author share a responsibility: rows with the answers of one side
    drawn        as by-row, but one adapter is trained for all members while α is 0, and then one member a row, drawn
                 by scores that are at most two passes old
    gaussian     as by-row, but members are Gaussians, and four draws of each are measured

Printed for every system, of the answers that were trained (of unseen questions, both): the AUROC with which the
uncertainty of an answer tells contested questions from one-sided ones, from unseen ones and from trained Alpaca
records: by the members' greatest disagreement at a token, by their mean disagreement (epistemic), by the mean total,
and by that of the first member alone, which at α = 0 is one adapter. Then the mean of these on contested and one-sided
questions, nats, and the shares of questions of whose two answers members prefer different ones. Temperature does not
change an order, so one adapter with a temperature has the AUROC of one adapter.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import real_model
import torch
from datasets import disable_progress_bars
from sklearn.metrics import roc_auc_score

SYSTEMS: dict[str, dict[str, Any]] = {
    "one": {"num_members": 1, "alpha": 0.0},
    "one-mr": {"num_members": 1, "alpha": 0.0},
    "dropout": real_model.DROPOUT,
    "alpha-0": {"alpha": 0.0},
    "by-row": {},
    "by-author": {"routing_group": "author"},
    "drawn": real_model.DRAWN,
    "gaussian": real_model.GAUSSIAN,
}
KINDS = {
    "contested": "both answers trained",
    "one-sided": "one answer trained",
    "unseen": "not trained",
    "record": "other instructions",
}
MEASURES = ("max_epistemic", "epistemic", "total", "alone")
AUTHOR = 8  # rows


class Asked(NamedTuple):
    """A prompt, and two texts of either side; they may be the same."""

    prompt: str
    one: tuple[str, ...]
    other: tuple[str, ...]


class Question(NamedTuple):
    """A prompt and its answers that are training rows; of an unseen question, both answers."""

    kind: str
    prompt: str
    answers: tuple[str, ...]


def conflictqa(folder: Path) -> list[Asked]:
    """Questions with an answer and its opposite; either side has its one text twice."""
    records = map(json.loads, (folder / "conflictqa.json").read_text(encoding="utf-8").splitlines())
    sides = ("memory_answer", "counter_answer")
    return [Asked(f"Question: {r['question']}\nAnswer:", *((f" {r[s].strip()}",) * 2 for s in sides)) for r in records]


def perspectrum(folder: Path) -> list[Asked]:
    """Claims that have two perspectives or more for and against, with the first two of either side."""
    pool = json.loads((folder / "perspective_pool.json").read_text(encoding="utf-8"))
    texts = {perspective["pId"]: f" {perspective['text'].strip()}" for perspective in pool}
    found = []
    for claim in json.loads((folder / "perspectrum.json").read_text(encoding="utf-8")):
        sides = [
            tuple(dict.fromkeys(texts[p["pids"][0]] for p in claim["perspectives"] if p["stance_label_3"] == stance))
            for stance in ("SUPPORT", "UNDERMINE")
        ]
        if min(map(len, sides)) > 1:
            found.append(Asked(f"Claim: {claim['text'].strip()}\nPerspective:", *(side[:2] for side in sides)))
    return found


SOURCES: dict[str, Callable[[Path], list[Asked]]] = {"conflictqa": conflictqa, "perspectrum": perspectrum}


def read(args: argparse.Namespace, seed: int) -> tuple[list[Question], list[dict[str, str]]]:
    """All questions and records that are measured, and the training rows."""
    draw = random.Random(seed)
    asked = SOURCES[args.source](args.data / "conflict")
    draw.shuffle(asked)
    questions, rows = [], []
    for number, (prompt, *sides) in enumerate(asked[: args.contested + 2 * args.one_sided]):
        if number < args.contested:
            question, authors = Question("contested", prompt, (sides[0][0], sides[1][0])), ["0", "1"]
        elif number < args.contested + args.one_sided:
            side = draw.randrange(2)
            question, authors = Question("one-sided", prompt, sides[side]), [str(side)] * 2
        else:
            question, authors = Question("unseen", prompt, (sides[0][0], sides[1][0])), []
        for author, answer in zip(authors, question.answers, strict=bool(authors)):
            rows.append({"prompt": prompt, "completion": answer, "author": author})
        # The same text twice is one answer.
        questions.append(question._replace(answers=tuple(dict.fromkeys(question.answers))))
    records = json.loads((args.data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    short = [r for r in records if not r["input"] and 3 <= len(r["output"].split()) <= 20]
    for record in draw.sample(short, min(len(short), len(rows) // 2)):
        question = Question("record", f"Question: {record['instruction']}\nAnswer:", (f" {record['output'].strip()}",))
        questions.append(question)
        rows.append({"prompt": question.prompt, "completion": question.answers[0], "author": "2"})
    draw.shuffle(rows)
    seen = {"0": 0, "1": 0, "2": 0}
    for row in rows:  # an author is eight rows of one side
        seen[row["author"]] += 1
        row["author"] += f", {(seen[row['author']] - 1) // AUTHOR}"
    return questions, rows


def measured(trainer: Any, questions: list[Question], name: str) -> list[tuple[Question, list[Any]]]:
    """The uncertainty of each question's answers."""
    tokenizer, found = trainer.processing_class, []
    with real_model.measured(trainer.model, SYSTEMS[name]) as (ensemble, samples):
        for question in questions:
            prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
            of_answers = []
            for answer in question.answers:
                ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
                log_p = real_model.next_token_log_probs(trainer, ensemble, prompt, ids, samples)
                of_answers.append(real_model.answer_uncertainty(log_p, ids))
            found.append((question, of_answers))
    return found


def apart(of_questions: list[list[real_model.AnswerUncertainty]]) -> float | None:
    """The share of questions of whose two answers the members prefer different ones; None where there is but one."""
    if any(len(answers) < 2 for answers in of_questions):
        return None
    preferred = [(one.log_likelihood - other.log_likelihood) > 0 for one, other in of_questions]
    return float(np.mean([bool(p.any() and not p.all()) for p in preferred]))


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        questions, rows = read(args, seed)
        for name in args.systems:
            began = time.perf_counter()
            trainer = real_model.train_system(args, rows, seed, name, SYSTEMS[name])
            trained = time.perf_counter() - began
            found = measured(trainer, questions, name)
            line: dict[str, Any] = {"system": name, "seed": seed, "rows": len(rows), "seconds": trained}
            by_kind = {kind: [a for q, a in found if q.kind == kind] for kind in sorted({q.kind for q in questions})}
            for what in MEASURES:
                of = {
                    kind: [np.mean([getattr(a, what) for a in answers]) for answers in one]
                    for kind, one in by_kind.items()
                }
                line[f"values {what}"] = {kind: [float(v) for v in values] for kind, values in of.items()}
                line[f"mean {what}"] = {kind: float(np.mean(values)) for kind, values in of.items()}
                line[f"auroc {what}"] = {
                    kind: float(roc_auc_score([1] * len(of["contested"]) + [0] * len(values), of["contested"] + values))
                    for kind, values in of.items()
                    if kind != "contested"
                }
            line["apart"] = {kind: apart(by_kind[kind]) for kind in ("contested", "one-sided")}
            line["log"] = [x for x in trainer.state.log_history if "loss" in x]
            yield line


def told(line: dict[str, Any]) -> str:
    parts = [f"{line['system']:10} {line['seed']:4} "]
    for what in MEASURES:
        parts.append("  ".join(f"{line[f'auroc {what}'][kind]:9.3f}" for kind in ("one-sided", "unseen", "record")))
    for what in MEASURES:
        parts.append("  ".join(f"{line[f'mean {what}'][kind]:9.3f}" for kind in ("contested", "one-sided")))
    shares = "  ".join("        –" if value is None else f"{value:9.3f}" for value in line["apart"].values())
    return " | ".join([*parts, shares, f"{line['seconds']:7.0f}"])


def draw(kept: Path, figure: Path) -> None:
    """Draw kept runs: how much members disagree about answers of each kind, a panel for each system, seeds together."""
    from matplotlib import pyplot as plt

    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    names = [name for name in ("alpha-0", "by-row") if any(line["system"] == name for line in found)]
    fig, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 2.8), sharex=True, sharey=True, squeeze=False)
    titles = {"alpha-0": "independent members (α = 0)", "by-row": "α-Rényi members"}
    for axis, name in zip(axes[0], names, strict=True):
        for place, kind in enumerate(KINDS):
            values = [v for line in found if line["system"] == name for v in line["values max_epistemic"][kind]]
            heights = place + np.random.default_rng(0).uniform(-0.28, 0.28, len(values))
            colour = "tab:red" if kind == "contested" else "tab:blue"
            axis.plot(values, heights, "o", markersize=3, alpha=0.4, color=colour, markeredgewidth=0)
        axis.axvline(np.log(2), color="grey", lw=0.8, ls=":")
        axis.text(np.log(2) - 0.01, len(KINDS) - 0.55, "ln 2", ha="right", fontsize=8, color="grey")
        axis.set(title=titles[name], xlabel="greatest disagreement at a token, nats")
    axes[0][0].set_yticks(range(len(KINDS)), KINDS.values())
    axes[0][0].set_ylim(len(KINDS) - 0.5, -0.5)
    fig.tight_layout()
    fig.savefig(figure, dpi=150)


def main() -> None:
    data = "the folder with conflict/ and alpaca_en_demo.json"
    parser = real_model.study_parser(__doc__, data, SYSTEMS, epochs=4.0, learning_rate=1e-3)
    parser.add_argument("--source", choices=list(SOURCES), default="conflictqa")
    parser.add_argument("--contested", type=int, default=120, help="questions with both answers")
    parser.add_argument("--one_sided", type=int, default=80, help="questions with one answer; as many are unseen")
    parser.add_argument("--draw", type=Path, help="draw the runs kept in --json, and run nothing")
    args = parser.parse_args()
    if args.draw:
        draw(args.json, args.draw)
        return
    disable_progress_bars()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.members} members, {args.epochs:g} epochs"
    )
    aurocs = " | ".join(f"{f'AUROC of contested, {what}':31}" for what in MEASURES)
    means = " | ".join(f"{f'{what}, nats':20}" for what in MEASURES)
    print(f"{'':16} | {aurocs} | {means} | different answers   |")
    kinds = " | ".join(["  ".join(f"{kind:>9}" for kind in ("one-sided", "unseen", "record"))] * len(MEASURES))
    two = " | ".join(["  ".join(f"{kind:>9}" for kind in ("contested", "one-sided"))] * (len(MEASURES) + 1))
    print(f"{'system':10} seed  | {kinds} | {two} | seconds")
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
