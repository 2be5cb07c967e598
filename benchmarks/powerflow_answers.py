"""Does a power of a half-knowing model make it more right, or more varied, than every temperature? No labels are used.

    OMP_NUM_THREADS=1 python benchmarks/powerflow_answers.py [--seeds 0 1 2] [--worlds plain garden]

The zoo's base is trained on statements about facts. About half of them are right, the others have one of several wrong
values (`renyi.zoo.half_known`). PowerFlow then sees only the questions: 300 steps of 128 rollouts, LoRA of rank 32.
Each policy is compared with the base at the temperature at which its answers have the policy's entropy, or the nearest
to it; with the base at the temperature 1/power; and for powers above 1 with the target, which needs no training because
all answers can be enumerated. Figures are exact, from the probabilities of all answers to 180 questions. Only the
majority of 16 is sampled.

"plain": the first uncertain word decides. "garden": the likeliest first word leads to guesses (a garden path).

    accuracy   that one sample is right; majority: that the vote of 16 is; likeliest: that the likeliest value is
    entropy    of the answer, nats; distinct: different answers among 16; other: share that are no answer at all
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback

from renyi import PowerFlowConfig, PowerFlowTrainer
from renyi.evaluation.sample_quality import majority_accuracy
from renyi.objectives import power_target
from renyi.zoo.half_known import (
    Answers,
    HalfKnown,
    Question,
    answer_quality,
    read_answers,
    temperature_at,
    train_half_known,
)

WORLDS = {"plain": {"right": 0.5, "guesses": 4}, "garden": {"right": 0.43, "guesses": 6, "garden_path": True}}
VOTERS, VOTES = 16, 20


def sharpen(model, tokenizer, questions: Sequence[Question], power: float, seed: int, args) -> PowerFlowTrainer:
    with tempfile.TemporaryDirectory() as folder:
        config = PowerFlowConfig(
            folder, power=power, seed=seed, max_steps=args.steps, learning_rate=args.learning_rate,
            lr_scheduler_type="linear", per_device_train_batch_size=128, num_generations=16, max_completion_length=8,
            bf16=False, use_cpu=True, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            logging_steps=max(1, args.steps // 10), report_to="none",
        )  # fmt: skip
        trainer = PowerFlowTrainer(
            model,
            config,
            Dataset.from_list([{"prompt": question.prompt} for question in questions]),
            LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    return trainer


def majority(probabilities: Tensor, questions: Sequence[Question], seed: int) -> float:
    """Accuracy of the majority of `VOTERS` samples for each question. Text that is not an answer does not vote."""
    rng, of_vote = np.random.default_rng(seed), []
    for p, question in zip(probabilities.numpy(), questions, strict=True):
        for votes in rng.choice(len(p), size=(VOTES, VOTERS), p=p / p.sum()):
            answers = [None if v == len(p) - 1 else int(v) for v in votes]
            of_vote.append(majority_accuracy(answers, [v == question.right for v in answers]))
    return float(np.mean(of_vote))


def fixed_point(base: Answers, power: float) -> Tensor:
    """Probabilities [Q, 11] of the target, from the answers alone: above power 1 other text has almost none."""
    log_base, tokens = base.log_likelihood(), (base.tokens >= 0).sum(dim=-1)
    target = power_target(log_base.flatten(1), tokens.flatten(1), power).log_probs.exp()
    return torch.cat([target.view_as(log_base).sum(dim=1), target.new_zeros(len(target), 1)], dim=1)


def runs(world: HalfKnown, folder: Path, seed: int, args: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and figures of everything that is compared in one world. Other results are printed."""
    questions = world.questions()

    def measured(probabilities: Tensor) -> dict[str, float]:
        quality = answer_quality(probabilities, questions, VOTERS)._asdict()
        del quality["right"]
        return {**quality, "majority": majority(probabilities, questions, seed)}

    started = time.process_time()
    half, tokenizer = train_half_known(world, folder / "run", seed)
    half.save_pretrained(folder / "half")
    print(f"       the base was made in {time.process_time() - started:.0f} s of processor")
    for number, power in enumerate(args.powers):
        wall, cpu = time.perf_counter(), time.process_time()
        trainer = sharpen(str(folder / "half"), tokenizer, questions, power, seed, args)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        with trainer.model.using(()):
            base = read_answers(trainer.model, tokenizer, questions)
        if number == 0:
            right = answer_quality(base.probabilities(), questions).right
            cuts = " ".join(f"{cut:.2f}" for cut in np.quantile(right, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
            inside = np.mean([0.3 <= p <= 0.7 for p in right])
            print(f"       right with probability {cuts} (0, 5, 25, 50, 75, 95, 100 %); 0.3 to 0.7: {inside:.3f}")
            yield "base", measured(base.probabilities())
        policy = measured(read_answers(trainer.model, tokenizer, questions).probabilities())
        yield f"power {power:g}", policy
        temperature = temperature_at(policy["entropy"], base.probabilities)
        yield f"base, power {power:g}'s entropy", measured(base.probabilities(temperature))
        yield f"base, T = {1 / power:g}", measured(base.probabilities(1 / power))
        if power > 1:
            yield f"target of power {power:g}", measured(fixed_point(base, power))
        last = [entry for entry in trainer.state.log_history if "slope/r2" in entry][-1]
        print(
            f"       nearest to that entropy is T = {temperature:.3f}; slopes {last['slope/log_base']:.2f}, "
            f"{last['slope/length']:.2f}, R² {last['slope/r2']:.2f}; {wall:.0f} s ({cpu:.0f} s of processor)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--worlds", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--powers", type=float, nargs="+", default=[4.0, 0.5])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("world    seed run                          accuracy majority likeliest  entropy distinct   other")
    found: dict[tuple[str, str], list[dict[str, float]]] = {}

    def show(world: str, seed: object, name: str, row: dict[str, float]) -> None:
        print(
            f"{world:6} {seed:>6} {name:28} {row['accuracy']:8.3f} {row['majority']:8.3f} {row['likeliest']:9.3f}"
            f" {row['entropy']:8.3f} {row['distinct']:8.2f} {row['other']:7.4f}",
            flush=True,
        )

    for name in args.worlds:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                for run, row in runs(HalfKnown(seed=seed, **WORLDS[name]), Path(folder), seed, args):
                    show(name, seed, run, row)
                    found.setdefault((name, run), []).append(row)
    medians = {
        run: {key: round(float(np.median([row[key] for row in rows])), 4) for key in rows[0]}
        for run, rows in found.items()
    }
    if len(args.seeds) > 1:
        for (name, run), row in medians.items():
            show(name, "median", run, row)
    named = {f"{name}: {run}": row for (name, run), row in medians.items()}
    print(json.dumps({"seeds": args.seeds, "steps": args.steps, "medians": named}))


if __name__ == "__main__":
    main()
