"""Knowing what one does not know: multiple choice by the answers' text, on a real chat model.

    python benchmarks/knowing.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--systems NAME …]

Trained on questions of OpenBookQA and ARC-Easy with their right answer, tested on others of both, and beside them on
questions of MMLU (`--data` has `choice/` and `mmlu/`), which were not trained. Options are scored by their text: by its
likelihood ("text"), and by its likelihood a token ("a token"). The systems see the same rows in as many steps:

    alpha-0        M members, each fits everything; its first member is one adapter, the run of its own
    renyi          M members, α-Rényi
    one-mr         one adapter of M times the rank
    dropout        one adapter trained with dropout, as 8 samples (Monte Carlo dropout)
    gaussian       as renyi, but members are Gaussians, and four draws of each are measured

Temperatures, of one member and of the mixture, are fitted on half of the test questions for the other half, and the
other way round. Printed: accuracy, NLL (nats a question), Brier score, ECE (15 bins), AURC by total uncertainty; the
AUROC of MMLU's questions by total uncertainty and by disagreement; seconds of training and of all.
"""

import argparse
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import real_model
import torch
from datasets import disable_progress_bars

from renyi.data import Question, load_splits, read_questions
from renyi.evaluation import Opinion, evaluate_choice
from renyi.inference import choice_log_probs, score_choices

SYSTEMS: dict[str, dict[str, Any]] = {
    "alpha-0": {"alpha": 0.0},
    "renyi": {},
    "one-mr": {"num_members": 1, "alpha": 0.0},
    "dropout": real_model.DROPOUT,
    "gaussian": real_model.GAUSSIAN,
}
LONGEST = 60  # words of a question with its options
_QUESTION = re.compile(r"question: (.*)\n\nAnswer1: (.*)\n\nAnswer format", re.DOTALL)


def questions_of(file: Path) -> list[Question]:
    """Questions of a file of instruction records, those with at most `LONGEST` words."""
    found = []
    for record in json.loads(file.read_text(encoding="utf-8")):
        match = _QUESTION.search(record["instruction"])
        if match is None or len(record["instruction"].split()) > LONGEST:
            continue
        choices = [text.strip() for text in re.split(r"\s*Answer\d: ", match[2])]
        answer = int(record["answer"].removeprefix("answer")) - 1
        if all(choices) and answer < len(choices) and len(set(choices)) == len(choices):
            found.append(Question(match[1].strip(), choices, answer))
    return found


def read(args: argparse.Namespace, seed: int) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions to train on, to test on, and of MMLU."""
    draw, train, test, elsewhere = random.Random(seed), list[Question](), list[Question](), list[Question]()
    for name in ("openbookqa", "arc-easy"):
        train += draw.sample(questions_of(args.data / "choice" / f"{name}_train.json"), args.rows // 2)
        test += draw.sample(questions_of(args.data / "choice" / f"{name}_test.json"), args.questions // 2)
    for file in sorted((args.data / "mmlu").glob("*_test.csv")):
        read = read_questions(load_splits(str(file))["train"], file.name)
        elsewhere += [q for q in read if len(" ".join([q.question, *q.choices]).split()) <= LONGEST]
    draw.shuffle(train)
    return train, test, draw.sample(elsewhere, args.questions // 2)


def opinions(trainer: Any, questions: list[Question], name: str) -> dict[str, Opinion]:
    """What the members, their draws, or passes with dropout, think of the options, by each kind of score."""
    passes = []
    with real_model.measured(trainer.model, SYSTEMS[name]) as (ensemble, samples), trainer.accelerator.autocast():
        for number in range(samples):
            torch.manual_seed(number)
            passes.append(score_choices(ensemble, questions, trainer.processing_class, "text"))
    kinds: dict[str, Any] = {"text": "text", "a token": "text_normalised"}
    log_probs = {name: torch.cat([choice_log_probs(scores, by) for scores in passes]) for name, by in kinds.items()}
    return {name: Opinion(p, torch.full((len(p),), 1 / len(p))) for name, p in log_probs.items()}


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        train, test, elsewhere = read(args, seed)
        rows = [{"prompt": f"{q.question}\nAnswer:", "completion": f" {q.choices[q.answer]}"} for q in train]
        for name in args.systems:
            began = time.perf_counter()
            trainer = real_model.train_system(args, rows, seed, name, SYSTEMS[name])
            trained = time.perf_counter() - began
            here, there = (opinions(trainer, questions, name) for questions in (test, elsewhere))
            for by in here:
                found = evaluate_choice(
                    here[by],
                    [q.answer for q in test],
                    out_of_distribution={"mixture": there[by]},
                    cross_fitted=True,
                )
                for system in found.systems:
                    shown = system.name == "mixture" or "temperature" in system.name
                    if shown or (name == "alpha-0" and system.name == "member 0"):
                        aurocs = {kind: x.auroc.value for kind, x in system.out_of_distribution.items()}
                        yield {
                            "by": by,
                            "system": f"{name}, {system.name}",
                            "seed": seed,
                            **{k: list(getattr(system, k)) for k in ("accuracy", "nll", "brier", "ece")},
                            "aurc": list(system.detection["total"].aurc),
                            "elsewhere": [aurocs["total"], aurocs.get("epistemic")],
                            "temperature": system.temperature,
                            "train": trained,
                            "seconds": time.perf_counter() - began,
                        }


def told(line: dict[str, Any]) -> str:
    values = "  ".join(
        f"{line[k][0]:.3f} [{line[k][1]:.3f}, {line[k][2]:.3f}]" for k in ("accuracy", "nll", "brier", "ece", "aurc")
    )
    total, epistemic = line["elsewhere"]
    apart = "    –" if epistemic is None else f"{epistemic:.3f}"
    return (
        f"{line['by']:8} {line['system']:32} {line['seed']:4} | {values} | {total:.3f} {apart} | {line['train']:5.0f} "
        f"{line['seconds']:6.0f}"
    )


def main() -> None:
    data, defaults = "the folder with choice/ and mmlu/", {"members": 4, "rank": 8}
    parser = real_model.study_parser(__doc__, data, SYSTEMS, epochs=2.0, learning_rate=4e-4, **defaults)
    parser.add_argument("--rows", type=int, default=800, help="trained questions")
    parser.add_argument("--questions", type=int, default=300, help="tested ones; half as many of MMLU")
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.members} members, alpha {args.alpha:g}")
    figures = "".join(f"{name:23}" for name in ("accuracy", "NLL", "Brier", "ECE", "AURC"))
    print(f"{'score':8} {'system':32} seed | {figures} | MMLU: total, apart | train, all s")
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
