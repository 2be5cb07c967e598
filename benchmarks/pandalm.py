"""Votes of three annotators on a real chat model: what do coupled members add to one adapter?

    python benchmarks/pandalm.py --model SMOLLM2_FOLDER --data pandalm.json [--pairs 120] [--tokens 96] [--folds 5]

PandaLM's test set: 999 pairs of answers, each with three labels (answer one, answer two, tie); 120 pairs split the
annotators. Pairs that would be cut at `--tokens` are left out. Of the others, all that split annotators and a random
draw of the rest make `--pairs`. Five folds by instruction: no instruction is both trained on and tested on. All figures
are of test pairs, all five folds together, with 95 % intervals from resampling pairs.

The systems see the same training pairs and the same labels, all three of a pair, ties included:

- Three LoRA members by `renyi dpo` at α = 0, a deep ensemble, and three at α = 0.8. One adapter is member 0 at α = 0,
  which is a run of its own; also with its temperature, each half of the test pairs at one fitted on the other half.
- The mean and variance of the members' rewards at α = 0.8, as one Gaussian reward.
- Rewards on the frozen base: a linear head on the last hidden state at the end of each answer, Bradley–Terry; or two
  heads, mean and variance, P = Φ((μ₁ − μ₂) / √(σ₁² + σ₂²)), the mean–variance reward of arXiv 2410.14632 without its
  tuning of the base. Their L2 penalty is chosen on the training pairs, in four inner folds. Three Bradley–Terry heads
  are also trained together, at α = 0 and at 0.8, with the penalty of the single one.

Ties have the same Davidson term in all systems, its strength from the labels of the training pairs. No setting of
`renyi dpo` was chosen on these data: the order, its hold and its ramp are the defaults, rank and learning rate those of
the study of translations on this model, and training is one pass.

Published AUROC for pairs that annotators split on, on other data (arXiv 2410.14632): Bradley–Terry 0.458 (MultiPref)
and 0.482 (HelpSteer2), mean–variance 0.615 and 0.582, a classifier 0.648.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback
from transformers.utils import logging

from renyi import RenyiDPOConfig, RenyiDPOTrainer
from renyi.data import PairPreparation
from renyi.evaluation import bootstrap, metrics
from renyi.evaluation.estimate import Estimate
from renyi.evaluation.preference_quality import is_turned
from renyi.evaluation.vote_quality import PairVotes, pair_votes
from renyi.inference import PairScore, score_pairs
from renyi.objectives import Votes, outcome_log_probs, renyi_loss, tie_strength_of

MEMBERS = 3
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--data", required=True, help="PandaLM's testset-v1.json")
    parser.add_argument("--folds", type=int, default=5, help="how many of the five folds to run")
    parser.add_argument("--pairs", type=int, default=120)
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of a prompt with its answer")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--heads_only", action="store_true", help="only the rewards on the frozen base, in minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    rows = read_pairs(args)
    split = sum(is_split(row) for row in rows)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.model}, seed {args.seed}")
    print(f"{len(rows)} pairs, {split} split, at most {args.tokens} tokens, {args.folds} of five folds by instruction")
    found: dict[str, list[PairVotes]] = {}

    def add(name: str, scores: list[PairScore], ties: float, doubt: list[float] | None = None) -> None:
        votes = pair_votes(scores, torch.full((len(scores[0].margin),), 1 / len(scores[0].margin)), ties)
        found.setdefault(name, []).append(votes if doubt is None else votes._replace(epistemic=torch.tensor(doubt)))

    states_2ND = hidden_states(args, rows)
    for fold in range(args.folds):
        started = time.perf_counter()
        test, train = ([row for row in rows if (row["fold"] == fold) is here] for here in (True, False))
        ties = tie_strength_of(Votes(*torch.tensor([votes_of(row) for row in train]).T))
        if not args.heads_only:
            apart, together = (tuned(args, train, test, alpha) for alpha in (0.0, 0.8))
            alone = [s._replace(margin=s.margin[:1]) for s in apart]
            add("one adapter", alone, ties)
            add("one adapter, temperature", with_temperature(alone), ties)
            add("three, α = 0", apart, ties)
            add("three, α = 0.8", together, ties)
            add("  as mean and variance", *moments(together, ties))
        is_test = torch.tensor([row["fold"] == fold for row in rows])
        states = [states_2ND[:, ~is_test], states_2ND[:, is_test]]
        for name, has_variance in (("Bradley–Terry heads", False), ("mean–variance heads", True)):
            *of_heads, penalty = heads(states, train, test, ties, has_variance)
            add(name, *of_heads)
            if not has_variance:
                for alpha in (0.0, 0.8):
                    scores = coupled_heads(states, train, test, ties, penalty, alpha, args.seed)
                    add(f"three such heads, α = {alpha:g}", scores, ties)
        print(f"fold {fold}: {len(test)} test pairs, {time.perf_counter() - started:.0f} s", flush=True)
    systems = {name: PairVotes(*map(torch.cat, zip(*parts, strict=True))) for name, parts in found.items()}
    show(systems)


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def read_pairs(args: argparse.Namespace) -> list[Row]:
    """Pairs as rows with votes and folds by instruction, of those that are not cut: all split ones, some others."""
    rng, rows = random.Random(args.seed), []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = json.loads(Path(args.data).read_text(encoding="utf-8"))
    for row in asked:
        texts = row["response1"], row["response2"]
        if not all(isinstance(text, str) and text.strip() for text in texts) or texts[0] == texts[1]:
            continue
        question = f"{row['instruction']}\n{row['input']}".strip()
        labels = [row[f"annotator{i}"] for i in (1, 2, 3)]
        prompt = [{"role": "user", "content": question}]
        sides = [[{"role": "assistant", "content": text}] for text in texts]
        if max(len(ids_of(tokenizer, [*prompt, *side])) for side in sides) > args.tokens:
            continue
        votes = {"votes_chosen": labels.count(1), "votes_rejected": labels.count(2), "votes_tie": labels.count(0)}
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1], **votes})
    rng.shuffle(rows)
    split, agreed = ([row for row in rows if is_split(row) is here] for here in (True, False))
    taken = split[: args.pairs] + agreed[: max(0, args.pairs - len(split))]
    pairs_of = Counter(row["prompt"][0]["content"] for row in taken)
    fold_of, sizes = dict[str, int](), [0] * 5
    for question, pairs in pairs_of.most_common():  # the instructions with most pairs first, so that folds are even
        fold_of[question] = sizes.index(min(sizes))
        sizes[fold_of[question]] += pairs
    return [{**row, "fold": fold_of[row["prompt"][0]["content"]]} for row in taken]


def ids_of(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    ids: list[int] = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    return ids


def votes_of(row: Row) -> tuple[int, int, int]:
    return row["votes_chosen"], row["votes_rejected"], row["votes_tie"]


def is_split(row: Row) -> bool:
    return sum(votes > 0 for votes in votes_of(row)) > 1


# ---- Members ---------------------------------------------------------------------------------------------------------


def tuned(args: argparse.Namespace, train: list[Row], test: list[Row], alpha: float) -> list[PairScore]:
    """Scores of the test pairs under three members that were tuned on the others."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # Eager attention is the fastest kernel for short rows on a CPU.
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    with tempfile.TemporaryDirectory() as folder:
        config = RenyiDPOConfig(
            folder,
            num_members=MEMBERS,
            alpha=alpha,
            learning_rate=4e-4,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=4,
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
            base,
            config,
            Dataset.from_list(train),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
        preparation, loss = PairPreparation.of(config), config.preference_loss
        prepared = preparation.prepare(Dataset.from_list(test), tokenizer)
        with torch.autocast(trainer.model.device.type, torch.bfloat16):
            return score_pairs(trainer.model, prepared, loss, trainer.reference, preparation)


def with_temperature(scores: list[PairScore]) -> list[PairScore]:
    """A single member's margins over a temperature, each half of the pairs at one fitted on the other half."""
    margin_N = np.array([s.margin[0] for s in scores])
    logits = np.stack([margin_N, np.zeros_like(margin_N)], axis=1)
    temperatures = metrics.cross_fitted_temperatures(logits, [int(is_turned(s)) for s in scores])
    return [s._replace(margin=[s.margin[0] / t]) for s, t in zip(scores, temperatures.tolist(), strict=True)]


def moments(scores: list[PairScore], ties: float) -> tuple[list[PairScore], float, list[float]]:
    """The members' margins as one Gaussian: σ(mean / √(1 + π variance / 8)); the doubt is its standard deviation."""
    margin_NM = torch.tensor([s.margin for s in scores], dtype=torch.float64)
    mean_N, variance_N = margin_NM.mean(dim=1), margin_NM.var(dim=1, correction=0)
    margin_N = mean_N / (1 + math.pi / 8 * variance_N).sqrt()
    as_one = [s._replace(margin=[m]) for s, m in zip(scores, margin_N.tolist(), strict=True)]
    return as_one, ties, variance_N.sqrt().tolist()


# ---- Heads on the frozen base ----------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(args: argparse.Namespace, rows: list[Row]) -> Tensor:
    """The base's last hidden state [2, N, D] at the end of both answers of each pair, float64."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    found = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids = torch.tensor([ids_of(tokenizer, [*row["prompt"], *row[side]])])
            found.append(model.base_model(ids).last_hidden_state[0, -1].double())
    return torch.stack(found).view(2, len(rows), -1)


def standardised(states: list[Tensor]) -> list[Tensor]:
    """Both parts with the mean and the spread of the training pairs taken out."""
    centre, scale = states[0].mean(dim=(0, 1)), states[0].std(dim=(0, 1)) + 1e-3
    return [(x - centre) / scale / x.shape[-1] ** 0.5 for x in states]


def minimise(loss_of: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    weights = start.requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(weights)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach()


def scores_of(margin_NM: Tensor, rows: list[Row]) -> list[PairScore]:
    nan = math.nan
    return [
        PairScore(i, 0, margins, nan, [], [], nan, nan, nan, nan, votes=votes_of(row))
        for i, (margins, row) in enumerate(zip(margin_NM.tolist(), rows, strict=True))
    ]


def coupled_heads(
    states: list[Tensor], train: list[Row], test: list[Row], ties: float, penalty: float, alpha: float, seed: int
) -> list[PairScore]:
    """Scores under three Bradley–Terry heads with the α-Rényi loss of a pair's labels, from random weights."""
    x_train, x_test = (x[0] - x[1] for x in standardised(states))
    votes_N3 = torch.tensor([votes_of(row) for row in train], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(MEMBERS, x_train.shape[-1], generator=generator, dtype=torch.float64)

    def loss_of(heads_MD: Tensor) -> Tensor:
        ell_MN = (outcome_log_probs(heads_MD @ x_train.T, ties) * votes_N3).sum(-1)
        return renyi_loss(ell_MN, alpha).sum() / votes_N3.sum() + penalty * heads_MD.square().sum() / MEMBERS

    return scores_of(x_test @ minimise(loss_of, start).T, test)


def heads(
    states: list[Tensor], train: list[Row], test: list[Row], ties: float, has_variance: bool
) -> tuple[list[PairScore], float, list[float] | None, float]:
    """Scores of test pairs under linear heads, ties, their doubt √(σ₁² + σ₂²) if it has variances, the penalty."""
    x_train, x_test = standardised(states)
    votes_N3 = torch.tensor([votes_of(row) for row in train], dtype=torch.float64)

    def margin_of(head: Tensor, x_2ND: Tensor) -> tuple[Tensor, Tensor]:
        """Margins [N] and standard deviations [N] from weights [2, D + 1] of the mean and of the spread."""
        mean_2N, raw_2N = (x_2ND @ head[:, :-1].T + head[:, -1]).unbind(dim=-1)
        std_N = torch.nn.functional.softplus(raw_2N).square().sum(dim=0).sqrt()
        difference_N = mean_2N[0] - mean_2N[1]
        if not has_variance:
            return difference_N, std_N
        return torch.special.ndtr(difference_N / std_N).clamp(1e-6, 1 - 1e-6).logit(), std_N

    def nll(head: Tensor, x_2ND: Tensor, votes: Tensor) -> Tensor:
        """Mean −log probability of a label, nats."""
        return -(outcome_log_probs(margin_of(head, x_2ND)[0], ties) * votes).sum() / votes.sum()

    def fitted(rows: Tensor, penalty: float) -> Tensor:
        return minimise(
            lambda head: nll(head, x_train[:, rows], votes_N3[rows]) + penalty * head.square().sum(),
            torch.zeros(2, x_train.shape[-1] + 1, dtype=torch.float64),
        )

    part_N = torch.arange(len(train)) % 4
    inner = [
        sum(
            nll(fitted(torch.where(part_N != k)[0], penalty), x_train[:, part_N == k], votes_N3[part_N == k]).item()
            for k in range(4)
        )
        for penalty in PENALTIES
    ]
    penalty = PENALTIES[int(np.argmin(inner))]
    margin_N, std_N = margin_of(fitted(torch.arange(len(train)), penalty), x_test)
    return scores_of(margin_N[:, None], test), ties, std_N.tolist() if has_variance else None, penalty


# ---- Figures ---------------------------------------------------------------------------------------------------------

Figure = tuple[Callable[[PairVotes], float], Callable[[PairVotes], bootstrap.Statistic]]


def ratio(above: Callable[[PairVotes], Tensor], below: Callable[[PairVotes], Tensor]) -> Figure:
    return (
        lambda v: float(above(v).sum() / below(v).sum()),
        lambda v: bootstrap.ratio(above(v).double().numpy(), below(v).double().numpy()),
    )


def split_auroc(by: Callable[[PairVotes], Tensor]) -> Figure:
    return (
        lambda v: metrics.auroc(by(v).numpy(), v.is_split.numpy()),
        lambda v: bootstrap.auroc(by(v).numpy(), v.is_split.numpy()),
    )


FIGURES: dict[str, Figure] = {
    "majority": ratio(lambda v: v.is_right & v.has_majority, lambda v: v.has_majority),
    "NLL a label": ratio(lambda v: v.nll, lambda v: v.labels),
    "held out": ratio(lambda v: v.nll_held_out, lambda v: v.known),
    "calibration": ratio(lambda v: (v.preferring - v.annotators).square(), lambda v: torch.ones_like(v.labels)),
    "of P": ratio(lambda v: (v.probability - v.annotators).square(), lambda v: torch.ones_like(v.labels)),
    "split: disagreement": split_auroc(lambda v: v.epistemic),
    "split: total": split_auroc(lambda v: v.total),
}


def show(systems: dict[str, PairVotes]) -> None:
    """Every figure of every system with its interval, and differences on the same draws of pairs."""
    print(f"{'':36}" + "".join(f"{name:>24}" for name in FIGURES))
    for name, votes in systems.items():
        values = {figure: value(votes) for figure, (value, _) in FIGURES.items()}
        statistics = {figure: statistic(votes) for figure, (_, statistic) in FIGURES.items()}
        found = bootstrap.intervals(values, statistics, len(votes.labels))
        if not votes.epistemic.any():  # a single member disagrees with nobody
            found["split: disagreement"] = Estimate(*[math.nan] * 3)
        print(f"{name:36}" + "".join(f"{text(x):>24}" for x in found.values()))
    if "three, α = 0.8" not in systems:
        return
    ours = systems["three, α = 0.8"]
    for name in ("one adapter, temperature", "three, α = 0"):
        values, statistics = {}, {}
        for figure, (value, statistic) in FIGURES.items():
            values[figure] = value(ours) - value(systems[name])
            one, other = statistic(ours), statistic(systems[name])
            statistics[figure] = lambda counts, one=one, other=other: one(counts) - other(counts)
        found = bootstrap.intervals(values, statistics, len(ours.labels))
        if not systems[name].epistemic.any():
            found["split: disagreement"] = Estimate(*[math.nan] * 3)
        print(f"{'three, α = 0.8 − ' + name:36.36}" + "".join(f"{text(x, '+'):>24}" for x in found.values()))


def text(x: Estimate, sign: str = "") -> str:
    if math.isnan(x.value):
        return "–"
    return f"{x.value:{sign}.3f} [{x.low:{sign}.3f}, {x.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
