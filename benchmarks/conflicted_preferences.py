"""Real preferences with a hidden conflict: is the conflicted half found without being told?

    python benchmarks/conflicted_preferences.py [--shared ../shared] [--seeds 0] [--only "two, α = 0.8"]

300 real pairs on a real small model. Every pair is given twice: as it is, and as a second annotator labels it. The
second annotator swaps chosen and rejected if the prompt has an even number of letters; training is not told that rule.
It prints the AUROC of finding the swapped pairs among those trained on: by the epistemic share of a pair's uncertainty,
by its disagreement in nats, and by its total uncertainty, which one adapter also has. Then the first on held-out pairs.

Isolated contradictions are one bit each, and α-Rényi members part over them only above α = 1 (docs/preferences.md).
A label that counts four times (`loss_weights: [4]`) lowers that to 1/4; for the squared loss of IPO it is 2 β².

Prompts are cut to their last 64 tokens and completions to their first 48. The model knows only children's stories, and
memorises these labels.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback

from renyi import RenyiDPOConfig, RenyiDPOTrainer
from renyi.data import PairPreparation
from renyi.inference import score_pairs

PROMPT, COMPLETION, HELD_OUT = 64, 48, 60
# name: members, alpha, loss, how often a label counts, beta
RUNS = {
    "one adapter": (1, 0.0, "sigmoid", 1.0, 0.1),
    "two, α = 0": (2, 0.0, "sigmoid", 1.0, 0.1),
    "two, α = 0.8": (2, 0.8, "sigmoid", 1.0, 0.1),
    "one adapter, label × 4": (1, 0.0, "sigmoid", 4.0, 0.1),
    "two, α = 0.8, label × 4": (2, 0.8, "sigmoid", 4.0, 0.1),
    "two, α = 0.8, ipo": (2, 0.8, "ipo", 1.0, 0.25),
}


def real_pairs(shared: Path, tokenizer) -> list[dict[str, str]]:
    """The demo's pairs as plain text, short enough for the model; those that the cut makes equal are left out."""
    rows = json.loads((shared / "data" / "dpo_en_demo.json").read_text(encoding="utf-8"))

    def cut(text: str, part: slice) -> str:
        return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids[part], skip_special_tokens=True)

    pairs = []
    for row in rows:
        prompt = "\n".join(turn["value"] for turn in row["conversations"])
        chosen, rejected = (" " + cut(row[side]["value"], slice(COMPLETION)).strip() for side in ("chosen", "rejected"))
        if chosen != rejected and chosen.strip() and rejected.strip() and prompt:
            pairs.append({"prompt": cut(prompt, slice(-PROMPT, None)).strip(), "chosen": chosen, "rejected": rejected})
    return pairs


def second_annotator_swaps(pair: dict[str, str]) -> bool:
    return sum(letter.isalpha() for letter in pair["prompt"]) % 2 == 0


def swapped(pair: dict[str, str]) -> dict[str, str]:
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def run(
    shared: Path, members: int, alpha: float, loss: str, times: float, beta: float, seed: int, steps: int
) -> tuple[float, ...]:
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "tinystories-656k", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "tinystories-656k")
    pairs = real_pairs(shared, tokenizer)
    order = np.random.default_rng(seed).permutation(len(pairs))
    held_out, known = ([pairs[i] for i in part] for part in (order[:HELD_OUT], order[HELD_OUT:]))
    rows = known + [swapped(pair) if second_annotator_swaps(pair) else pair for pair in known]
    with tempfile.TemporaryDirectory() as folder:
        args = RenyiDPOConfig(
            folder, num_members=members, alpha=alpha, loss_type=loss, loss_weights=[times], beta=beta, seed=seed,
            max_steps=steps, learning_rate=3e-3, lr_scheduler_type="linear", per_device_train_batch_size=16,
            precompute_ref_log_probs=True, bf16=False, use_cpu=True, gradient_checkpointing=False,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = RenyiDPOTrainer(model, args, Dataset.from_list(rows), lora, processing_class=tokenizer)
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        seconds = trainer.train().metrics["train_runtime"]
        preparation = PairPreparation.of(args)

        def scored(some: list[dict[str, str]]) -> tuple[np.ndarray, ...]:
            prepared = preparation.prepare(Dataset.from_list(some), tokenizer)
            scores = score_pairs(trainer.model, prepared, args.preference_loss, trainer.reference, preparation)
            fields = [(s.epistemic_share, s.epistemic, s.total, s.preference) for s in scores]
            return tuple(np.array(column) for column in zip(*fields, strict=True))

        conflicted = np.array([second_annotator_swaps(pair) for pair in known])
        share, nats, total, preference = scored(known)
        finds = [roc_auc_score(conflicted, x) for x in (share, nats, total)]
        unseen = roc_auc_score([second_annotator_swaps(pair) for pair in held_out], scored(held_out)[0])
        agreed = float((preference[~conflicted] > 0.5).mean())
        return conflicted.mean(), agreed, float(nats[conflicted].mean()), *finds, unseen, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("                              swapped  agreed  epistemic  AUROC of                held out")
    print("seed run                        share     acc  contested  share   nats  total        share")
    for seed in args.seeds:
        for name in args.only:
            found = run(args.shared, *RUNS[name], seed, args.steps)
            share, agreed, nats, *finds, unseen, seconds = found
            print(
                f"{seed:4} {name:23} {share:8.3f}  {agreed:.4f}  {nats:9.4f}  "
                f"{'  '.join(f'{x:.3f}' for x in finds)}        {unseen:.3f}   {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
