"""What does a power of a real language model write, and how near does training come to it?

    OMP_NUM_THREADS=1 python benchmarks/powerflow_stories.py [--seeds 0 1 2] [--powers 4 2 0.5] [--shared ../shared]

TinyStories-656K goes on from the first ten words of stories: 90 steps of 64 rollouts (4 prompts × 16) of at most 48
tokens, LoRA of rank 32. Then the base, each policy, and the base at the temperature 1/power go on from 32 openings of
other stories, 16 times each:

    base, own     mean log-probability of a token under the base, and under what it was drawn from
    entropy       of what a token is drawn from
    bound         power · base + entropy. The target π* maximises it, where it is λ, and what a policy lacks is
                  KL(π | π*) a token; so of two rows with one power, the higher is nearer to the target
    distinct      1-, 2- and 3-grams of words that differ among the samples of a prompt; unique: samples that do
    n, cut        mean length in tokens, and the share that was cut at 48
    slopes        of log π on log p_base and on the length, without intercept, and R²: (power, −λ) and 1 at the target

Then the slopes that training logs in its first, middle and last tenth, and how long it took. Needs the model and the
stories beside the project.
"""

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback

from renyi import PowerFlowConfig, PowerFlowTrainer
from renyi.evaluation.sample_quality import Sample, evaluate_sampling
from renyi.inference.draws import base_log_likelihood, draw_samples
from renyi.inference.generate import prompt_ids

WORDS, TOKENS, SAMPLES, HELD_OUT = 10, 48, 16, 32
SLOPES = ("slope/log_base", "slope/length", "slope/r2")


def openings(data: Path) -> list[str]:
    """The first words of stories, each once; none ends with a sentence, where the model may end the story, too."""
    text = (data / "tinystories.txt").read_text(encoding="utf-8")
    stories = re.split(r"(?<!\n)\n(?!\n)", text)  # an empty line stands between paragraphs, none between stories
    found = {" ".join(s.split()[:WORDS]) for s in stories if s.startswith(("once upon a time", "one day"))}
    whole = sorted(opening for opening in found if opening[-1].isalpha())
    random.Random(0).shuffle(whole)
    return whole


def train(shared: Path, power: float, seed: int, prompts: list[str], args: argparse.Namespace) -> PowerFlowTrainer:
    folder = shared / "models" / "tinystories-656k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The stories that it learned from held end marks as text, so it also ends stories by spelling "<|end_story|>".
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|")]
    with tempfile.TemporaryDirectory() as output:
        config = PowerFlowConfig(
            output, power=power, seed=seed, max_steps=args.steps, learning_rate=args.learning_rate,
            lr_scheduler_type="linear", per_device_train_batch_size=64, num_generations=SAMPLES,
            max_completion_length=TOKENS, bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no",
            logging_steps=max(1, args.steps // 10), disable_tqdm=True, report_to="none",
        )  # fmt: skip
        trainer = PowerFlowTrainer(
            model,
            config,
            Dataset.from_dict({"prompt": prompts}),
            LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    return trainer


def written(
    trainer: PowerFlowTrainer, prompts: list[str], members: list[int], temperature: float
) -> list[list[Sample]]:
    """Samples of the policy ([0]) or, without members, of the base."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    with model.using(members):
        draws = draw_samples(
            model, prompts, tokenizer, SAMPLES, max_new_tokens=TOKENS, temperature=temperature, seed=trainer.args.seed
        )
    contexts = [prompt_ids(prompt, tokenizer) for prompt in prompts for _ in range(SAMPLES)]
    every = [draw for of_prompt in draws for draw in of_prompt]
    log_base = base_log_likelihood(model, contexts, [draw.token_ids for draw in every])
    samples = [
        Sample(d.text, len(d.token_ids), ell, d.log_prob, d.entropy, d.truncated, answer=d.text)
        for d, ell in zip(every, log_base, strict=True)
    ]
    return [samples[i : i + SAMPLES] for i in range(0, len(samples), SAMPLES)]


def slopes(samples: list[list[Sample]]) -> tuple[float, float, float]:
    every = [sample for of_prompt in samples for sample in of_prompt]
    x = np.array([[s.base_log_prob, s.tokens] for s in every])
    y = np.array([s.log_prob for s in every])
    found, *_ = np.linalg.lstsq(x, y, rcond=None)
    return (*found, 1 - ((y - x @ found) ** 2).mean() / y.var())


def measure(name: str, samples: list[list[Sample]], power: float) -> dict[str, float]:
    quality = evaluate_sampling({name: samples}, resamples=1).systems[0]
    base, entropy = quality.base_log_prob_per_token.value, quality.entropy_per_token.value
    return {
        "base": base,
        "own": quality.log_prob_per_token.value,
        "entropy": entropy,
        "bound": power * base + entropy,
        **{f"distinct_{n}": value.value for n, value in quality.distinct.items()},
        "unique": quality.unique.value,
        "self_bleu": quality.self_bleu.value,
        "tokens": quality.lengths.mean,
        "cut": float(quality.lengths.truncated or 0),
        **dict(zip(SLOPES, slopes(samples), strict=True)),
    }


def show(seed: object, name: str, row: dict[str, Any]) -> None:
    print(
        f"{seed:>6} {name:15} {row['base']:7.3f} {row['own']:7.3f} {row['entropy']:8.3f} {row['bound']:7.3f}"
        f"   {row['distinct_1']:.3f} {row['distinct_2']:.3f} {row['distinct_3']:.3f}  {row['unique']:.3f}"
        f"  {row['self_bleu']:.3f}  {row['tokens']:4.1f} {row['cut']:.2f}"
        f"  {row['slope/log_base']:6.2f} {row['slope/length']:6.2f} {row['slope/r2']:5.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--powers", type=float, nargs="+", default=[4.0, 2.0, 0.5])
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--rank", type=int, default=32)
    args = parser.parse_args()
    if not args.shared.is_dir():
        raise SystemExit(f"The real model and stories are not at {args.shared}; say where they are with --shared.")
    disable_progress_bars()
    prompts = openings(args.shared / "data")
    held_out, known = prompts[:HELD_OUT], prompts[HELD_OUT:]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {len(known)} openings to train on")
    print(
        "                           nats a token                    distinct                  self-            slopes"
    )
    print("  seed run                base     own  entropy   bound       1     2     3   unique   BLEU     n  cut"
          "    base length    R²")  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {}
    for seed in args.seeds:
        for power in args.powers:
            wall, cpu = time.perf_counter(), time.process_time()
            trainer = train(args.shared, power, seed, known, args)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            kinds = {f"power {power:g}": ([0], 1.0), f"T = {1 / power:g}": ([], 1 / power)}
            if power == args.powers[0]:
                kinds = {"base": ([], 1.0), **kinds}
            for name, (members, temperature) in kinds.items():
                samples = written(trainer, held_out, members, temperature)
                row = measure(name, samples, 1.0 if name == "base" else power)
                show(seed, name, row)
                found.setdefault(name, []).append(row)
            logged = [entry for entry in trainer.state.log_history if "slope/r2" in entry]
            during = [logged[i] for i in (0, len(logged) // 2, -1)]
            text = "; ".join(
                f"step {entry['step']}: {', '.join(f'{entry[name]:.2f}' for name in SLOPES)}, "
                f"log Z' {entry['log_partition']:.2f} ± {entry['log_partition/std']:.2f}"
                for entry in during
            )
            print(
                f"       in training (slopes, R², log Z'): {text}; {wall:.0f} s ({cpu:.0f} s of processor)", flush=True
            )
    medians = {
        name: {key: round(float(np.median([row[key] for row in rows])), 4) for key in rows[0]}
        for name, rows in found.items()
    }
    if len(args.seeds) > 1:
        for name, row in medians.items():
            show("median", name, row)
    print(json.dumps({"seeds": args.seeds, "steps": args.steps, "samples": SAMPLES, "medians": medians}))


if __name__ == "__main__":
    main()
