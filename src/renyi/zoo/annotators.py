"""Preferences of two groups of annotators, learned by one adapter or an ensemble, and what came of it.

It trains on a `PreferenceWorld` and measures on pairs about people who do not occur in training. Does the mixture
predict the labels? Do members become the groups? Does their disagreement separate contested pairs from agreed ones?
Read next: `preferences.py`, the world.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from transformers import PrinterCallback, ProgressCallback

from renyi.data import PairPreparation
from renyi.inference import PairScore, group_scores, score_pairs
from renyi.training import RenyiDPOConfig, RenyiDPOTrainer
from renyi.zoo.base import load_base
from renyi.zoo.preferences import Pair, PreferenceWorld

TRAIN_PAIRS, HELD_OUT_PAIRS = 16_000, 960


class Annotators(NamedTuple):
    """The measures of a run with M members, on held-out pairs.

    Attributes:
        mixture_nll: of the mixture's preference, nats per pair.
        agreed_accuracy: share of agreed pairs on which the mixture prefers the answer that everybody prefers.
        groups_found: adjusted Rand index of the member that explains a contested label best and the annotator's group.
        epistemic_contested: mean disagreement of the members on contested pairs, nats.
        epistemic_agreed: the same on agreed pairs.
        auroc_epistemic_share: how well the epistemic share of a pair's uncertainty separates contested from agreed.
        auroc_epistemic: the same for the disagreement in nats.
        auroc_total: the same for the total uncertainty, which a single adapter also has.
        member_load: mean responsibility of each member, [M].
        seconds: wall time of the training.
    """

    mixture_nll: float
    agreed_accuracy: float
    groups_found: float
    epistemic_contested: float
    epistemic_agreed: float
    auroc_epistemic_share: float
    auroc_epistemic: float
    auroc_total: float
    member_load: list[float]
    seconds: float


def train_annotators(
    world: PreferenceWorld,
    num_members: int,
    alpha: float,
    output_dir: Path,
    seed: int = 0,
    rows: Dataset | None = None,
    **overrides: Any,
) -> tuple[RenyiDPOTrainer, float]:
    """Train the zoo's base on the world's preferences, or on these rows; returns the trainer and its seconds."""
    base, tokenizer = load_base()
    settings: dict[str, Any] = {
        "num_members": num_members,
        "alpha": alpha,
        "beta": 0.05,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "max_steps": 700,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": seed,
        **overrides,
    }
    trainer = RenyiDPOTrainer(
        base,
        RenyiDPOConfig(str(output_dir), **settings),
        train_dataset=world.dataset(TRAIN_PAIRS, seed) if rows is None else rows,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        processing_class=tokenizer,
    )
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)
    started = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - started


def named_rows(pairs: Sequence[Pair], labels_each: int) -> tuple[Dataset, dict[str, int]]:
    """Pairs as rows with a column `annotator`, and the group of each annotator.

    An annotator is of one group and gives `labels_each` labels. Pairs that are left over are left out.
    """
    rows, group_of = [], dict[str, int]()
    for group in (0, 1):
        own = [pair for pair in pairs if pair.group == group]
        for i in range(len(own) // labels_each * labels_each):
            name = f"annotator {2 * (i // labels_each) + group}"
            group_of[name] = group
            pair = own[i]
            row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "annotator": name}
            rows.append(row)
    return Dataset.from_list(rows), group_of


def groups_of_annotators(trainer: RenyiDPOTrainer, world: PreferenceWorld, labels_each: int, number: int = 40) -> float:
    """Adjusted Rand index of the member that explains all labels of an annotator best, and the annotator's group.

    The annotators are new, and so are the people that their pairs are about.
    """
    pairs = world.pairs(number * labels_each, trainer.args.seed, held_out=True)
    rows, group_of = named_rows(pairs, labels_each)
    preparation = replace(PairPreparation.of(trainer.args), routing_group="annotator")
    tokenizer: Any = trainer.processing_class
    prepared = preparation.prepare(rows, tokenizer)
    scores = score_pairs(trainer.model, prepared, trainer.args.preference_loss, trainer.reference, preparation)
    found = group_scores(scores, [str(s.group) for s in scores], trainer.model)
    best = [int(np.argmax(np.array(g.log_likelihood))) for g in found]
    return float(adjusted_rand_score([group_of[g.group] for g in found], best))


def measure_annotators(trainer: RenyiDPOTrainer, world: PreferenceWorld, seconds: float = 0.0) -> Annotators:
    """Measure a trained ensemble on held-out pairs."""
    pairs = world.pairs(HELD_OUT_PAIRS, trainer.args.seed, held_out=True)
    preparation = PairPreparation.of(trainer.args)
    rows = world.dataset(HELD_OUT_PAIRS, trainer.args.seed, held_out=True)
    tokenizer: Any = trainer.processing_class
    prepared = preparation.prepare(rows, tokenizer)
    scores = score_pairs(trainer.model, prepared, trainer.args.preference_loss, trainer.reference, preparation)
    return _measured(scores, pairs, trainer.model.weights.tolist(), seconds)


def _measured(scores: list[PairScore], pairs: list[Pair], weights: list[float], seconds: float) -> Annotators:
    contested = np.array([pair.contested for pair in pairs])
    group = np.array([pair.group for pair in pairs])
    best = (np.array([s.log_likelihood for s in scores]) + np.log(weights)).argmax(axis=1)
    epistemic, total = np.array([s.epistemic for s in scores]), np.array([s.total for s in scores])
    return Annotators(
        mixture_nll=float(np.mean([s.mixture_nll for s in scores])),
        agreed_accuracy=float(np.mean([s.preference > 0.5 for s, c in zip(scores, contested, strict=True) if not c])),
        groups_found=float(adjusted_rand_score(group[contested], best[contested])),
        epistemic_contested=float(epistemic[contested].mean()),
        epistemic_agreed=float(epistemic[~contested].mean()),
        auroc_epistemic_share=float(roc_auc_score(contested, [s.epistemic_share for s in scores])),
        auroc_epistemic=float(roc_auc_score(contested, epistemic)),
        auroc_total=float(roc_auc_score(contested, total)),
        member_load=np.mean([s.responsibilities for s in scores], axis=0).tolist(),
        seconds=seconds,
    )
