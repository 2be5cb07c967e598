"""Votes of three annotators on a real chat model: what do coupled members add to one adapter?

    python benchmarks/pandalm.py [--model FOLDER] [--data pandalm.json] [--folds 5] [--pairs 300] [--tokens 160]

PandaLM's test set: 999 pairs of answers, each with three labels (answer one, answer two, tie); 120 pairs split the
annotators. Five folds by instruction, so that no instruction is in both halves. Each fold trains one adapter, an
ensemble at α = 0 and one at α = 0.8, all on the votes (`votes_chosen`, `votes_rejected`, `votes_tie`), and a
mean–variance reward (arXiv 2410.14632) and a Bradley–Terry reward, both linear heads on the frozen base's last hidden
states. Of the pairs that are not cut at `--tokens`, all split ones and some others, `--pairs` in all, are taken. No
setting was chosen on these data.

Published AUROC for pairs that annotators split on, on other data (arXiv 2410.14632): Bradley–Terry 0.458 (MultiPref)
and 0.482 (HelpSteer2), mean–variance 0.615 and 0.582, a classifier 0.648.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback

from renyi import RenyiDPOConfig, RenyiDPOTrainer
from renyi.data import PairPreparation
from renyi.evaluation.vote_quality import VoteQuality, evaluate_votes
from renyi.inference import PairScore, score_pairs

RUNS = {"one adapter": (1, 0.0), "three, α = 0": (3, 0.0), "three, α = 0.8": (3, 0.8)}
HEADS = ("mean–variance heads", "Bradley–Terry heads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="PandaLM's testset-v1.json")
    parser.add_argument("--folds", type=int, default=5, help="how many of the five folds to run")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=160, help="most tokens of a prompt with its answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    disable_progress_bars()
    rows = read_pairs(args)
    split = sum(sum(v > 0 for v in votes_of(row)) > 1 for row in rows)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}")
    print(f"{len(rows)} pairs, {split} split, at most {args.tokens} tokens, {args.folds} of five folds by instruction")
    scores: dict[str, list[PairScore]] = {name: [] for name in (*RUNS, *HEADS)}
    uncertainty: dict[str, list[float]] = {name: [] for name in HEADS}
    seconds = dict.fromkeys(scores, 0.0)
    ties = 0.0
    for fold in range(args.folds):
        test = [row for row in rows if row["fold"] == fold]
        train = [row for row in rows if row["fold"] != fold]
        for name, (members, alpha) in RUNS.items():
            started = time.perf_counter()
            found, ties = tuned(args, train, test, members, alpha)
            scores[name] += found
            seconds[name] += time.perf_counter() - started
        started = time.perf_counter()
        features = [hidden_states(args, part) for part in (train, test)]
        took = time.perf_counter() - started
        for name in HEADS:
            started = time.perf_counter()
            found, doubts = heads(features, train, test, name == HEADS[0])
            scores[name] += found
            uncertainty[name] += doubts
            seconds[name] += took + time.perf_counter() - started
        print(f"fold {fold} done: {', '.join(f'{name} {s:.0f} s' for name, s in seconds.items())}", flush=True)
    print(f"{'':22}majority  NLL/label  held out  calibration   of P   split: epistemic  total  seconds")
    for name, found in scores.items():
        members = len(found[0].margin)
        strength = ties if name in RUNS else 0.0
        quality = evaluate_votes(found, torch.full((members,), 1 / members), strength, name)
        print(line(quality, uncertainty.get(name), found, seconds[name]))


def line(q: VoteQuality, doubts: list[float] | None, scores: list[PairScore], seconds: float) -> str:
    epistemic = q.split_auroc
    if doubts is not None:
        is_split = [sum(v > 0 for v in s.votes or ()) > 1 for s in scores]
        epistemic = float(roc_auc_score(is_split, doubts))
    shown = "    –" if epistemic is None else f"{epistemic:.3f}"
    total = "–" if q.split_auroc_total is None else f"{q.split_auroc_total:.3f}"
    return (
        f"{q.name:20}  {q.accuracy:8.3f}  {q.nll:9.4f}  {q.nll_held_out or float('nan'):8.4f}  {q.calibration:11.4f}  "
        f"{q.probability_calibration:.4f}  {shown:>16}  {total:>5}  {seconds:7.0f}"
    )


def read_pairs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs as rows with votes and folds by instruction, of those that are not cut: all split ones, some others."""
    rng, rows = random.Random(args.seed), []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = json.loads(Path(args.data).read_text(encoding="utf-8"))
    questions = sorted({f"{row['instruction']}\n{row['input']}" for row in asked})
    rng.shuffle(questions)
    folds = {question: i % 5 for i, question in enumerate(questions)}
    for row in asked:
        texts = row["response1"], row["response2"]
        if not all(isinstance(text, str) and text.strip() for text in texts) or texts[0] == texts[1]:
            continue
        question = f"{row['instruction']}\n{row['input']}"
        labels = [row[f"annotator{i}"] for i in (1, 2, 3)]
        prompt = [{"role": "user", "content": question.strip()}]
        chats = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
        if (
            max(len(tokenizer(tokenizer.apply_chat_template(c, tokenize=False))["input_ids"]) for c in chats)
            > args.tokens
        ):
            continue
        rows.append(
            {
                "prompt": prompt,
                "chosen": [{"role": "assistant", "content": texts[0]}],
                "rejected": [{"role": "assistant", "content": texts[1]}],
                "votes_chosen": labels.count(1),
                "votes_rejected": labels.count(2),
                "votes_tie": labels.count(0),
                "fold": folds[question],
            }
        )
    rng.shuffle(rows)
    split = [row for row in rows if sum(v > 0 for v in votes_of(row)) > 1]
    agreed = [row for row in rows if sum(v > 0 for v in votes_of(row)) == 1]
    return split[: args.pairs] + agreed[: max(0, args.pairs - len(split))]


def votes_of(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["votes_chosen"], row["votes_rejected"], row["votes_tie"]


def tuned(
    args: argparse.Namespace, train: list[dict[str, Any]], test: list[dict[str, Any]], members: int, alpha: float
) -> tuple[list[PairScore], float]:
    """Scores of the test pairs under an ensemble that was tuned on the others, and its tie strength."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        config = RenyiDPOConfig(
            folder,
            num_members=members,
            alpha=alpha,
            beta=0.1,
            learning_rate=2e-4,
            num_train_epochs=1,
            per_device_train_batch_size=8,
            max_length=args.tokens,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=args.seed,
        )
        trainer = RenyiDPOTrainer(
            args.model,
            config,
            Dataset.from_list(train),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
        preparation, loss = PairPreparation.of(config), config.preference_loss
        prepared = preparation.prepare(Dataset.from_list(test), tokenizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=not torch.cuda.is_available()):
            scores = score_pairs(trainer.model, prepared, loss, trainer.reference, preparation)
    return scores, loss.tie_strength


# ---- Heads on the frozen base ----------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Tensor:
    """The base's last hidden state [2, N, D] at the end of both answers of each pair."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            text = tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.tokens)["input_ids"]
            found.append(model.base_model(ids).last_hidden_state[0, -1].float())
    return torch.stack(found).view(2, len(rows), -1)


def heads(
    features: list[Tensor], train: list[dict[str, Any]], test: list[dict[str, Any]], has_variance: bool
) -> tuple[list[PairScore], list[float]]:
    """Scores and doubts of the test pairs under linear heads: a reward's mean, and its variance if asked for.

    P(one is preferred) = Φ((μ₁ − μ₂) / √(σ₁² + σ₂²)); without variances σ((μ₁ − μ₂)). A tie is half a label each.
    The doubt is the standard deviation √(σ₁² + σ₂²), and −|μ₁ − μ₂| without variances.
    """
    torch.manual_seed(0)
    centre, scale = features[0].mean(dim=(0, 1)), features[0].std(dim=(0, 1)) + 1e-3
    x_train, x_test = ((x - centre) / scale / x.shape[-1] ** 0.5 for x in features)
    share_N = torch.tensor([(v[0] + v[2] / 2) / sum(v) for v in map(votes_of, train)])
    head = torch.nn.Linear(x_train.shape[-1], 2)
    torch.nn.init.zeros_(head.weight)

    def margin_of(x_2ND: Tensor) -> tuple[Tensor, Tensor]:
        mean_2N, raw_2N = head(x_2ND).unbind(dim=-1)
        std_N = torch.nn.functional.softplus(raw_2N).square().sum(dim=0).sqrt() if has_variance else None
        difference = mean_2N[0] - mean_2N[1]
        if std_N is None:
            return difference, -difference.abs()
        p_N = torch.special.ndtr(difference / std_N).clamp(1e-6, 1 - 1e-6)
        return p_N.logit(), std_N

    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-1)
    for _ in range(200):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(margin_of(x_train)[0], share_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        margin_N, doubt_N = margin_of(x_test)
    nan = float(np.nan)
    scores = [
        PairScore(i, 0, [m], nan, [], [], nan, nan, nan, votes_of(row))
        for i, (m, row) in enumerate(zip(margin_N.tolist(), test, strict=True))
    ]
    return scores, doubt_N.tolist()


if __name__ == "__main__":
    main()
