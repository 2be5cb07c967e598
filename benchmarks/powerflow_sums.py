"""Does a power of a real chat model do sums better, or answer in more ways, than a temperature? No labels are used.

    OMP_NUM_THREADS=1 python benchmarks/powerflow_sums.py [--model FOLDER] [--seeds 0 1 2] [--powers 4 0.5]

A prompt shows two sums with their results and asks for a third, a number from 10 to 39 and one from 2 to 9. The model
half knows such sums. PowerFlow sees only questions and what it writes itself. No result is given, and the questions
that are measured are not trained on. Each policy is compared with the base, with the base at the temperature at which
its answers have the policy's entropy (or come nearest to it), with the base at the temperature 1/power, and with the
target. The target needs no training here, because all answers can be enumerated. Figures are exact, from the
probabilities of the answers 0 to 99. Only the majority of 16 is sampled.

Below 1 a power flattens not only the answers, but also all other text, and the model would stop answering. So these
powers have a format penalty on whatever is no number of one or two digits. For a fair comparison they are also compared
with the base's numbers alone, divided by their sum, at the temperature at which they have the policy's entropy.

    accuracy   that one sample is right; majority: that the vote of 16 is; likeliest: that the likeliest answer is
    entropy    of the answer, nats; distinct: different answers among 16; other: share that is no number up to 99
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import real_model
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from powerflow_answers import VOTERS, fixed_point, majority
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi import PowerFlowConfig, PowerFlowTrainer
from renyi.zoo.half_known import Question, answer_quality, temperature_at

SHOWN = "3 + 4 = 7\n23 + 5 = 28\n"
END = "\n"  # ends an answer
NUMBERS = tuple(f" {n}" for n in range(100))
FORMAT = r"^\s*\d{1,2}\s*$"
FIGURES = ("accuracy", "majority", "likeliest", "entropy", "distinct", "other")


def sums(seed: int, measured: int) -> tuple[list[Question], list[Question]]:
    """Sums to train on, and others to measure. The value of an answer is the number itself."""
    every = [(a, b) for a in range(10, 40) for b in range(2, 10) if f"{a} + {b} =" not in SHOWN]
    random.Random(seed).shuffle(every)
    asked = [Question([{"role": "user", "content": f"{SHOWN}{a} + {b} ="}], (NUMBERS,), a + b, ()) for a, b in every]
    return asked[measured:], asked[:measured]


def prompt(question: Question) -> str:
    return str(question.prompt[0]["content"])


class NumberAnswers(NamedTuple):
    """A model's logits for every answer to Q questions, of A numbers with at most L tokens each.

    Attributes:
        logits: [Q, C, V], after each of C beginnings of answers.
        beginning: [A, L], which of them comes before each token of an answer.
        tokens: [Q, 1, A, L], these tokens, the end included; −1 as padding.
    """

    logits: Tensor
    beginning: Tensor
    tokens: Tensor

    def log_likelihood(self, temperature: float = 1.0) -> Tensor:
        """log p of whole answers, each token at a temperature: [Q, 1, A], float64, nats."""
        found = []
        for logits_CV, tokens_AL in zip(self.logits, self.tokens[:, 0], strict=True):
            scaled_CV = logits_CV / temperature
            picked_AL = scaled_CV[self.beginning, tokens_AL.clamp(min=0)]
            of_token_AL = (picked_AL - scaled_CV.logsumexp(-1)[self.beginning]).double()
            found.append((of_token_AL * (tokens_AL >= 0)).sum(-1))
        return torch.stack(found)[:, None]

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Probability of each number and of everything else together: [Q, A + 1], float64."""
        of_number = self.log_likelihood(temperature)[:, 0].exp()
        return torch.cat([of_number, (1 - of_number.sum(1, keepdim=True)).clamp(min=0)], 1)

    def of_numbers(self, temperature: float = 1.0) -> Tensor:
        """The same of numbers alone: everything else has probability 0."""
        return numbers_alone(self.probabilities(temperature))


def numbers_alone(probabilities: Tensor) -> Tensor:
    """Probabilities [Q, A + 1] of numbers alone, divided by their sum."""
    numbers = probabilities[:, :-1] / probabilities[:, :-1].sum(1, keepdim=True)
    return torch.cat([numbers, torch.zeros_like(probabilities[:, -1:])], 1)


@torch.no_grad()
def read_answers(model: Any, tokenizer: Any, questions: Sequence[Question]) -> NumberAnswers:
    """A plain model's logits. The prompt is read once for all answers, and a beginning once for all that share it."""
    answers = tokenizer([f"{number}{END}" for number in NUMBERS], add_special_tokens=False)["input_ids"]
    beginnings = sorted({tuple(ids[:n]) for ids in answers for n in range(1, len(ids))})
    place = {(): 0} | {ids: number for number, ids in enumerate(beginnings, start=1)}
    longest = max(map(len, answers))
    beginning = torch.tensor([[place.get(tuple(ids[:n]), 0) for n in range(longest)] for ids in answers])
    tokens = torch.tensor([ids + [-1] * (longest - len(ids)) for ids in answers])
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in beginnings], batch_first=True)
    last = torch.tensor([len(ids) - 1 for ids in beginnings])
    logits = []
    for question in questions:
        ids = tokenizer([prompt(question)], add_special_tokens=False, return_tensors="pt")["input_ids"]
        read = model(ids, use_cache=True, logits_to_keep=1)
        read.past_key_values.batch_repeat_interleave(len(rows))
        after = model.base_model(rows, past_key_values=read.past_key_values).last_hidden_state
        after = model.get_output_embeddings()(after[torch.arange(len(rows)), last])
        logits.append(torch.cat([read.logits[0], after]))
    return NumberAnswers(torch.stack(logits), beginning, tokens.expand(len(questions), 1, -1, -1))


def train(tokenizer: Any, questions: Sequence[Question], power: float, seed: int, args: Any) -> PowerFlowTrainer:
    with tempfile.TemporaryDirectory() as folder:
        config = PowerFlowConfig(
            folder, power=power, seed=seed, max_steps=args.steps, learning_rate=args.learning_rate,
            lr_scheduler_type="linear", per_device_train_batch_size=args.rollouts, num_generations=args.generations,
            max_completion_length=6, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
            logging_steps=max(1, args.steps // 10), report_to="none",
            **({"format_penalty": FORMAT, "format_penalty_size": args.penalty} if power < 1 else {}),
        )  # fmt: skip
        trainer = PowerFlowTrainer(
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            config,
            Dataset.from_list([{"prompt": prompt(question)} for question in questions]),
            LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
            processing_class=tokenizer,
        )
        real_model.quieten(trainer)
        trainer.train()
    return trainer


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.eos_token, tokenizer.tokenize(END)[0]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for seed in args.seeds:
        trained, measured = sums(seed, args.questions)

        def line(name: str, probabilities: Tensor, measured=measured, seed=seed, **more: Any) -> dict[str, Any]:
            quality = answer_quality(probabilities, measured, VOTERS)._asdict()
            return {"run": name, "seed": seed, "majority": majority(probabilities, measured, seed), **quality, **more}

        base = read_answers(model, tokenizer, measured)
        yield line("base", base.probabilities())
        for power in args.powers:
            began = time.perf_counter()
            trainer = train(tokenizer, trained, power, seed, args)
            seconds = time.perf_counter() - began
            log = [entry for entry in trainer.state.log_history if "slope/r2" in entry]
            policy = read_answers(trainer.model.merged(0).eval(), tokenizer, measured).probabilities()
            yield line(f"power {power:g}", policy, seconds=seconds, log=log)
            entropy = answer_quality(policy, measured).entropy
            temperature = temperature_at(entropy, base.probabilities)
            yield line(f"base, power {power:g}'s entropy", base.probabilities(temperature), temperature=temperature)
            yield line(f"base, T = {1 / power:g}", base.probabilities(1 / power))
            if power > 1:
                yield line(f"target of power {power:g}", fixed_point(base, power))
                continue
            temperature = temperature_at(entropy, base.of_numbers)
            yield line(f"numbers, power {power:g}'s entropy", base.of_numbers(temperature), temperature=temperature)
            yield line(f"numbers, target of power {power:g}", numbers_alone(fixed_point(base, power)))


def told(line: dict[str, Any]) -> str:
    more = ""
    if "log" in line:
        last = line["log"][-1]
        slopes = ", ".join(f"{last[f'slope/{name}']:.2f}" for name in ("log_base", "length", "r2"))
        more = f"   slopes and R² {slopes}; {line['seconds']:.0f} s"
    if "temperature" in line:
        more = f"   T = {line['temperature']:.3f}"
    return f"{line['seed']:4} {line['run']:30}" + "".join(f"{line[name]:10.3f}" for name in FIGURES) + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--powers", type=float, nargs="+", default=[4.0, 0.5])
    parser.add_argument("--questions", type=int, default=40, help="that are measured")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--penalty", type=float, default=5.0, help="of a wrong format, nats a token; below power 1")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=32, help="of a step")
    parser.add_argument("--generations", type=int, default=8, help="rollouts of a prompt")
    parser.add_argument("--json", type=Path, help="a file to which a line is added for each run")
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.steps} steps")
    print(f"seed {'run':30}" + "".join(f"{name:>10}" for name in FIGURES))
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
