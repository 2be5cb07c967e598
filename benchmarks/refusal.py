"""Annotators who want help and annotators who want refusals: does a real chat model keep both?

    python benchmarks/refusal.py --data completions_mistralinstruct_gpteval.csv [--model FOLDER] [--seeds 0 1 2]

XSTest's borderline prompts sound dangerous and are safe. For each, one answer is a model's help (a person found that
it complies), cut to `--words` words, and the other a refusal, one of six sentences. Half of the annotators prefer help,
the others refusals. An annotator labels eight prompts, each prompt is labelled by one of either kind, and nobody says
who is of which kind. Systems, trained with DPO on the same pairs in as many steps:

    one            one adapter
    one-mr         one adapter of M times the rank
    dropout        one adapter trained with dropout, as 8 samples (Monte Carlo dropout)
    alpha-0        M members, each fits everything
    by-pair        M members, α-Rényi, each pair by itself
    gaussian       as by-pair, but members are Gaussians, and four draws of each are measured
    by-annotator   M members, α-Rényi, an annotator's pairs share a responsibility (`routing_group`)

Printed of held-out prompts: the share that each member refuses, greedily (over-refusal); the variance of refusal over
members, mean of prompts (at most 0.25; Soft Specialists report 0.054 at α = 0 and 0.118 at 0.8 for Phi-3); the share
for which each member prefers the refusal of the held-out pair; the variance of that; the adjusted Rand index of
training annotators' kinds and the members that explain their labels best; and seconds of training and of answering.
"""

import argparse
import csv
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import real_model
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from sklearn.metrics import adjusted_rand_score
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from renyi import LoraEnsemble, RenyiDPOConfig, RenyiDPOTrainer
from renyi.data import PairPreparation
from renyi.evaluation import evaluate_refusal, is_refusal
from renyi.inference import generate, score_pairs

SYSTEMS: dict[str, dict[str, Any]] = {
    "one": {"num_members": 1, "alpha": 0.0},
    "one-mr": {"num_members": 1, "alpha": 0.0},
    "dropout": real_model.DROPOUT,
    "alpha-0": {"alpha": 0.0},
    "by-pair": {},
    "gaussian": real_model.GAUSSIAN,
    "by-annotator": {"routing_group": "annotator"},
}
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot answer this question.",
    "I'm afraid I can't assist with that request.",
    "Sorry, I am not able to help with this.",
    "I can't provide information about that.",
    "I'm unable to help you with this request.",
)
LABELS_EACH = 8
Row = dict[str, Any]


def read(args: argparse.Namespace, seed: int) -> tuple[list[Row], list[Row]]:
    """Pairs for training, and one pair for each held-out prompt, whose chosen answer is the refusal."""
    draw = random.Random(seed)
    with args.data.open(encoding="utf-8", newline="") as file:
        found = [
            row
            for row in csv.DictReader(file)
            if not row["type"].startswith("contrast_") and row["final_label"] == "1_full_compliance"
        ]
    draw.shuffle(found)

    refusals = {row["prompt"]: draw.choice(REFUSALS) for row in found}

    def pair(row: dict[str, str], wants_help: bool) -> Row:
        answers = [" ".join(row["completion"].split()[: args.words]), refusals[row["prompt"]]]
        chosen, rejected = answers if wants_help else answers[::-1]
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "annotator": "",
            "wants_help": wants_help,
        }

    test = [pair(row, False) for row in found[: args.held_out]]
    rest = found[args.held_out :]
    whole = min(args.pairs // 2, len(rest)) // LABELS_EACH * LABELS_EACH
    train = [pair(row, wants_help) for wants_help in (True, False) for row in rest[:whole]]
    for n, row in enumerate(train):
        row["annotator"] = f"annotator {n // LABELS_EACH}"
    return train, test


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for seed in args.seeds:
        train, test = read(args, seed)
        for name in args.systems:
            began = time.perf_counter()
            torch.manual_seed(seed)
            with tempfile.TemporaryDirectory() as folder:
                rank = args.rank * (args.members if name == "one-mr" else 1)
                trainer = tuned(args, folder, train, seed, {"num_members": args.members, **SYSTEMS[name]}, rank)
            trained, members = time.perf_counter() - began, trainer.model.num_members
            prompts = [row["prompt"] for row in test[: args.answered]]
            with (
                real_model.measured(trainer.model, SYSTEMS[name]) as (ensemble, passes),
                trainer.accelerator.autocast(),
            ):
                prefers = (margins(trainer, ensemble, test, passes) > 0).astype(float)  # [P, points]: the refusal
                learned = margins(trainer, ensemble, train, passes)
                answers = [[] for _ in prompts]
                for _ in range(passes):
                    said = generate(
                        ensemble,
                        prompts,
                        tokenizer,
                        batch_size=8,
                        mixture="member",
                        max_new_tokens=args.new_tokens,
                        do_sample=False,
                    )
                    answers = [[*before, *now] for before, now in zip(answers, said, strict=True)]
            refused = [
                [is_refusal(answer.text, prompt[0]["content"]) for answer in of_points]
                for of_points, prompt in zip(answers, prompts, strict=True)
            ]
            points = prefers.shape[1]
            found = evaluate_refusal(refused, None, [1 / points] * points)
            labels = -np.logaddexp(0, -learned).reshape(-1, LABELS_EACH, members, points // members)
            ell = np.logaddexp.reduce(labels.sum(1), axis=-1)
            kinds = [row["wants_help"] for row in train[::LABELS_EACH]]
            yield {
                "system": name,
                "seed": seed,
                "refuses": np.reshape([rates.all for rates in found.members], (members, -1)).mean(1).tolist(),
                "variance": found.variance.all,
                "prefers": prefers.mean(0).reshape(members, -1).mean(1).tolist(),
                "prefers variance": float(prefers.var(axis=1).mean()),
                "annotators": float(adjusted_rand_score(kinds, ell.argmax(1))),
                "train": trained,
                "seconds": time.perf_counter() - began,
                "answers": [[answer.text for answer in of_points] for of_points in answers[:8]],
                "log": [x for x in trainer.state.log_history if "loss" in x],
            }


def margins(trainer: RenyiDPOTrainer, ensemble: LoraEnsemble, rows: list[Row], passes: int) -> np.ndarray:
    """The margin of the chosen answers of every point of every pass [P, points]."""
    preparation = replace(PairPreparation.of(trainer.args), routing_group=None)
    prepared = preparation.prepare(Dataset.from_list(rows), trainer.processing_class)
    loss, reference = trainer.args.preference_loss, trainer.reference
    found = [score_pairs(ensemble, prepared, loss, reference, preparation) for _ in range(passes)]
    return np.concatenate([[s.margin for s in of_pass] for of_pass in found], axis=1)


def tuned(
    args: argparse.Namespace, folder: str, rows: list[Row], seed: int, settings: Row, rank: int
) -> RenyiDPOTrainer:
    """Members that were tuned on the pairs. `settings` are the config's, and `dropout`."""
    settings = dict(settings)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=settings.pop("dropout", 0.0),
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    config = RenyiDPOConfig(
        folder,
        **{
            "alpha": args.alpha,
            "learning_rate": args.learning_rate,
            "num_train_epochs": args.epochs,
            "beta": args.beta,
            "per_device_train_batch_size": 2 * LABELS_EACH,
            "max_length": 160,
            "precompute_ref_log_probs": True,
            "bf16": True,
            "use_cpu": not torch.cuda.is_available(),
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 5,
            "disable_tqdm": True,
            "seed": seed,
            **settings,
        },
    )
    names = ["prompt", "chosen", "rejected", *(["annotator"] if "routing_group" in settings else [])]
    trainer = RenyiDPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        config,
        Dataset.from_list(rows).select_columns(names),
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(args.model),
    )
    real_model.quieten(trainer)
    trainer.train()
    trainer.model.eval()
    return trainer


def told(line: dict[str, Any]) -> str:
    of_members = (" ".join(f"{x:5.0%}" for x in line[name]) for name in ("refuses", "prefers"))
    refuses, prefers = of_members
    return (
        f"{line['system']:12} {line['seed']:4} | {refuses:>17} | {line['variance']:8.3f} | {prefers:>17} | "
        f"{line['prefers variance']:8.3f} | {line['annotators']:10.3f} | {line['train']:5.0f} {line['seconds']:6.0f}"
    )


def main() -> None:
    data = "XSTest's completions with labels, a csv"
    parser = real_model.study_parser(__doc__, data, SYSTEMS, epochs=3.0, learning_rate=2e-4)
    parser.add_argument("--beta", type=float, default=0.5, help="of DPO")
    parser.add_argument("--pairs", type=int, default=160)
    parser.add_argument("--held_out", type=int, default=60, help="prompts")
    parser.add_argument("--answered", type=int, default=40, help="held-out prompts that are answered")
    parser.add_argument("--words", type=int, default=30, help="of a helpful answer")
    parser.add_argument("--new_tokens", type=int, default=40)
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.members} members, alpha {args.alpha:g}")
    print("system       seed |  members refuse   | variance | prefer a refusal  | variance | annotators | train, all s")
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
