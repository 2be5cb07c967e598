"""Do eight members share MMLU's subjects among themselves, on a real chat model, as in "Soft Specialists"?

    python benchmarks/subjects.py --data FOLDER [--model FOLDER] [--seeds 0 1 2] [--systems NAME …]

Questions of all 18 subjects in `mmlu/*_test.csv` with at most 70 words. Of every subject some are trained, with the
text of the right answer, and others are tested. No row says its subject, and every row is routed by itself.

    renyi      M members, α-Rényi
    alpha-0    M members, each fits everything
    one        one adapter
    one-mr     one adapter of M times the rank
    dropout    one adapter trained with dropout, as 8 samples (Monte Carlo dropout)
    drawn      M members that begin as one adapter, trained for all of them while α is 0; then one member a row, drawn
               by scores that are at most two passes old
    by chance  as drawn, but α is so small that chance alone draws the members
    gaussian   as drawn, but members are Gaussians from the first step on, and four draws of each are measured
    by author  as drawn by new scores in each step; five questions of one subject, as one author's, share a
               responsibility

Printed of tested questions: the adjusted mutual information (AMI) of the member that explains a right answer best and
the subject, and the same on trained questions: 1 if they determine each other, 0 by chance; the mean responsibility
of a subject's member, the one that takes most of the subject's trained questions; effective members; accuracy by text
of the base, of the mixture and of the subjects' members; and of the questions that the base got wrong the share that
the mixture, the subjects' members and any member get right. `--draw FILE.png` draws the members' responsibilities for
each subject from what `--json` keeps, and runs nothing.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import real_model
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi import LoraEnsemble
from renyi.data import Question, load_splits, read_questions
from renyi.inference import choice_log_probs, score, score_choices
from renyi.objectives import effective_members, responsibilities

SYSTEMS: dict[str, dict[str, Any]] = {
    "renyi": {},
    "alpha-0": {"alpha": 0.0},
    "one": {"num_members": 1, "alpha": 0.0},
    "one-mr": {"num_members": 1, "alpha": 0.0},
    "dropout": real_model.DROPOUT,
    "drawn": real_model.DRAWN,
    "by chance": {**real_model.DRAWN, "alpha": 1e-6},
    "gaussian": {**real_model.GAUSSIAN, **real_model.DRAWN, "alpha_hold_shared": False},
    "by author": {**real_model.DRAWN, "routing_refresh": 1, "routing_group": "author"},
}
AUTHOR = 5  # questions of one subject
LONGEST = 70  # words of a question with its options
FIGURES = {
    "ami": "AMI",
    "ami_trained": "trained",
    "own": "r own",
    "effective": "eff.",
    "base": "base",
    "mixture": "mixture",
    "subjects": "own m.",
    "rescued_mixture": "mixture",
    "rescued_subjects": "own m.",
    "rescued_any": "any m.",
}


def read(args: argparse.Namespace, seed: int) -> tuple[list[str], list[list[Question]], list[list[Question]]]:
    """Subjects, and of each the questions to train on and to test on."""
    draw, subjects, trained, tested = random.Random(seed), list[str](), list[list[Question]](), list[list[Question]]()
    for file in sorted((args.data / "mmlu").glob("*_test.csv")):
        questions = read_questions(load_splits(str(file))["train"], file.name)
        short = [q for q in questions if len(" ".join([q.question, *q.choices]).split()) <= LONGEST]
        draw.shuffle(short)
        half = len(short) // 2
        subjects.append(file.stem.removesuffix("_test"))
        trained.append(short[:half][: args.trained])
        tested.append(short[half:][: args.tested])
    return subjects, trained, tested


def row(question: Question) -> dict[str, str]:
    return {"prompt": f"{question.question.strip()}\nAnswer:", "completion": f" {question.choices[question.answer]}"}


def flat(of_subjects: Sequence[Sequence[Question]]) -> tuple[list[Question], list[int]]:
    """All questions, and the number of each one's subject."""
    return [q for of in of_subjects for q in of], [s for s, of in enumerate(of_subjects) for _ in of]


def log_likelihood(trainer: Any, ensemble: LoraEnsemble, questions: Sequence[Question], passes: int) -> Tensor:
    """ℓ of the right answers under every member [M, N], nats."""
    found, preparation = [], replace(trainer.preparation, routing_group=None)
    for _ in range(passes):
        scores = score(ensemble, Dataset.from_list([row(q) for q in questions]), trainer.processing_class, preparation)
        found.append(torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T)
    return real_model.of_members(found, ensemble.num_draws)


def log_choices(trainer: Any, ensemble: LoraEnsemble, questions: Sequence[Question], passes: int) -> Tensor:
    """Log-probabilities of all options under every member [M, N, C]."""
    found = [
        choice_log_probs(score_choices(ensemble, questions, trainer.processing_class, "text"), "text")
        for _ in range(passes)
    ]
    return real_model.of_members(found, ensemble.num_draws)


def base_choices(model: str, questions: Sequence[Question]) -> Tensor:
    """ℓ of all options under the base [N, C], nats: a fresh adapter changes nothing."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    fresh = LoraEnsemble.from_base(base, 1, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.autocast("cpu", torch.bfloat16):
        return score_choices(fresh, questions, AutoTokenizer.from_pretrained(model), "text").log_likelihood[0]


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for seed in args.seeds:
        subjects, trained, tested = read(args, seed)
        (learned, of_learned), (asked, of_asked) = flat(trained), flat(tested)
        rows = [{**row(q), "author": f"{s}, {n // AUTHOR}"} for s, of in enumerate(trained) for n, q in enumerate(of)]
        random.Random(seed).shuffle(rows)
        right_N = torch.tensor([q.answer for q in asked])
        base_N = base_choices(args.model, asked).argmax(-1) == right_N
        for name in args.systems:
            began = time.perf_counter()
            trainer = real_model.train_system(args, rows, seed, name, SYSTEMS[name])
            seconds = time.perf_counter() - began
            alpha = args.alpha
            with (
                real_model.measured(trainer.model, SYSTEMS[name]) as (ensemble, passes),
                trainer.accelerator.autocast(),
            ):
                choices = log_choices(trainer, ensemble, asked, passes)
                learned_MN, asked_MN = (log_likelihood(trainer, ensemble, of, passes) for of in (learned, asked))
            r_learned_MN, r_MN = responsibilities(learned_MN, alpha), responsibilities(asked_MN, alpha)
            of_subject = torch.tensor(of_asked)
            matrix_MS = torch.stack([r_MN[:, of_subject == s].mean(1) for s in range(len(subjects))], 1)
            own_S = torch.stack(
                [r_learned_MN[:, torch.tensor(of_learned) == s].mean(1) for s in range(len(subjects))], 1
            ).argmax(0)
            own_N = own_S[of_subject]
            right_MN = choices.argmax(-1) == right_N
            mixture_N = choices.logsumexp(0).argmax(-1) == right_N
            subjects_N = right_MN[own_N, torch.arange(len(asked))]

            def share(of_N: Tensor, wrong: bool = False, base: Tensor = base_N) -> float:
                return float((of_N[~base] if wrong else of_N).double().mean())

            yield {
                "system": name,
                "seed": seed,
                "rows": len(rows),
                "questions": len(asked),
                "ami": adjusted_mutual_info_score(of_asked, asked_MN.argmax(0).tolist()),
                "ami_trained": adjusted_mutual_info_score(of_learned, learned_MN.argmax(0).tolist()),
                "own": float(r_MN[own_N, torch.arange(len(asked))].mean()),
                "effective": float(effective_members(r_MN).mean()),
                "base": share(base_N),
                "mixture": share(mixture_N),
                "subjects": share(subjects_N),
                "rescued_mixture": share(mixture_N, wrong=True),
                "rescued_subjects": share(subjects_N, wrong=True),
                "rescued_any": share(right_MN.any(0), wrong=True),
                "matrix": matrix_MS.tolist(),
                "names": subjects,
                "log": [entry for entry in trainer.state.log_history if "jensen_gap" in entry],
                "seconds": seconds,
                "all": time.perf_counter() - began,
            }


def told(line: dict[str, Any]) -> str:
    values = " ".join(f"{line[name]:7.3f}" for name in FIGURES)
    return f"{line['system']:9} {line['seed']:4} {values}  {line['seconds']:5.0f} {line['all']:6.0f}"


def draw(kept: Path, figure: Path) -> None:
    from matplotlib import pyplot as plt

    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    found = [line for line in found if len(line["matrix"]) > 1]
    fig, axes = plt.subplots(
        len(found), 1, figsize=(7, 1.1 + 1.5 * len(found)), sharex=True, squeeze=False, layout="constrained"
    )
    top = max(np.max(line["matrix"]) for line in found)
    for axis, line in zip(axes[:, 0], found, strict=True):
        image = axis.imshow(line["matrix"], vmin=0, vmax=top, aspect="auto", cmap="Blues")
        axis.set(title=f"{line['system']}, seed {line['seed']}", ylabel="member")
    axes[-1, 0].set_xticks(range(len(found[0]["names"])), found[0]["names"], rotation=60, ha="right", fontsize=7)
    fig.colorbar(image, ax=axes, label="mean responsibility")
    fig.savefig(figure, dpi=150)


def main() -> None:
    defaults = {"members": 8, "rank": 8, "epochs": 3.0, "learning_rate": 1e-3}
    parser = real_model.study_parser(__doc__, "the folder with mmlu/", SYSTEMS, **defaults)
    parser.add_argument("--trained", type=int, default=20, help="questions of a subject, at most")
    parser.add_argument("--tested", type=int, default=10, help="others")
    parser.add_argument("--draw", type=Path, help="draw what --json keeps, and run nothing")
    args = parser.parse_args()
    if args.draw:
        draw(args.json, args.draw)
        return
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.members} members, alpha {args.alpha:g}")
    print(f"{'':15}{'':32}{'accuracy':24}{'of those the base got wrong':28}")
    print(f"{'system':9} seed {' '.join(f'{name:>7}' for name in FIGURES.values())}  train  all s")
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
