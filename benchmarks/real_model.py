"""What the studies on a real chat model share: training, and the uncertainty of given answers."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from renyi import LoraEnsemble, RenyiSFTConfig, RenyiSFTTrainer
from renyi.inference import token_uncertainty
from renyi.objectives import running_log_weights

# Without a prior: that of some million entries would outweigh some hundred rows. A's entries begin at about 0.024.
GAUSSIAN: dict[str, Any] = {"member_kind": "gaussian", "initial_std": 0.005}
# One adapter is trained for all members while α is 0; then one member a row, by scores at most two passes old.
DRAWN: dict[str, Any] = {"routing": "sampled", "routing_refresh": 2, "alpha_hold_shared": True}
DROPOUT: dict[str, Any] = {"num_members": 1, "alpha": 0.0, "dropout": 0.1}
SAMPLES, DRAWS = 8, 4  # of Monte Carlo dropout, and of each Gaussian member


def train(
    model: str,
    rows: Sequence[dict[str, Any]],
    seed: int,
    *,
    rank: int = 16,
    lora_alpha: int = 2,
    dropout: float = 0.0,
    attention: str = "sdpa",
    start: LoraEnsemble | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> RenyiSFTTrainer:
    """Train an ensemble on rows and return its trainer. `settings` are the config's; `lora_alpha` is over the rank."""
    settings = {
        "max_length": 160,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": seed,
        **settings,
    }
    lora = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha * rank,
        lora_dropout=dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = RenyiSFTTrainer(
            start or AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=attention),
            RenyiSFTConfig(folder, **settings),
            Dataset.from_list(list(rows)),
            peft_config=None if start else lora,
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=list(callbacks),
        )
        quieten(trainer)
        trainer.train()
    trainer.model.eval()
    return trainer


def keep(lines: Iterable[dict[str, Any]], told: Callable[[dict[str, Any]], str], file: Path | None) -> None:
    """Print each line as it comes, and add it to a file of JSON lines if there is one."""
    for line in lines:
        print(told(line), flush=True)
        if file:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line, default=str) + "\n")


def quieten(trainer: Any) -> None:
    """Take the callbacks away that print."""
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)


def study_parser(doc: str | None, data: str, systems: Iterable[str], **defaults: Any) -> argparse.ArgumentParser:
    """The arguments that the studies share. `data` says what --data is; `defaults` are those of the study."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=data)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--systems", nargs="+", choices=list(systems), default=list(systems))
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--json", type=Path, help="a file to which a line is added for each run")
    parser.set_defaults(**defaults)
    return parser


def train_system(
    args: argparse.Namespace, rows: Sequence[dict[str, Any]], seed: int, name: str, settings: dict[str, Any]
) -> RenyiSFTTrainer:
    """Train one system of a study with the study's arguments; "one-mr" has M times the rank."""
    torch.manual_seed(seed)
    return train(
        args.model,
        rows,
        seed,
        rank=args.rank * (args.members if name == "one-mr" else 1),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=16,
        learning_rate=args.learning_rate,
        warmup_steps=0.05,
        lr_scheduler_type="linear",
        **{"num_members": args.members, "alpha": args.alpha, **settings},
    )


@contextmanager
def measured(model: LoraEnsemble, settings: dict[str, Any]) -> Iterator[tuple[LoraEnsemble, int]]:
    """The points that are measured of a system that was trained with `settings`, and how many passes of each.

    Of an adapter with dropout there are `SAMPLES` passes in which it drops, of a Gaussian member `DRAWS` points.
    """
    if settings.get("dropout"):
        with model.dropping(settings["dropout"]):
            yield model, SAMPLES
    else:
        yield (model.draw(DRAWS, seed=0) if model.stack.is_random else model), 1


def of_members(passes: Sequence[Tensor], draws: int) -> Tensor:
    """Log-probabilities of members [M, …], nats, from passes of all their draws [M·D, …]: each a mixture of its own."""
    found = torch.stack(list(passes)).unflatten(1, (-1, draws))
    return found.logsumexp((0, 2)) - math.log(len(found) * draws)


class AnswerUncertainty(NamedTuple):
    """Of one given answer, nats: means over its tokens, the greatest disagreement at a token, and ℓ of each member.

    `alone` is the mean entropy of the first member, which at α = 0 is the run of one adapter.
    """

    total: float
    epistemic: float
    max_epistemic: float
    alone: float
    log_likelihood: Tensor


def next_token_log_probs(
    trainer: RenyiSFTTrainer, ensemble: LoraEnsemble, prompt: list[int], answer: list[int], passes: int = 1
) -> Tensor:
    """Log-probabilities of every next token along an answer [M·passes, T, V], nats, in the precision of training."""
    whole = torch.tensor([prompt + answer])
    at = torch.zeros_like(whole, dtype=torch.bool)
    at[0, len(prompt) - 1 : -1] = True
    with trainer.accelerator.autocast(), torch.inference_mode(), ensemble.inference():
        found = [
            torch.cat(list(ensemble.next_token_log_probs(whole, torch.ones_like(whole), at)), 1) for _ in range(passes)
        ]
    return torch.cat(found)


def running_weights(log_p_MTV: Tensor, answer: list[int]) -> Tensor:
    """Log-weights of members before each token of an answer [M, T], in a mixture of sequences with equal weights."""
    said_MT = log_p_MTV[:, range(len(answer)), answer].double()
    w = [torch.full((len(log_p_MTV),), 1 / len(log_p_MTV), dtype=torch.float64).log()]
    for t in range(len(answer) - 1):
        w.append(running_log_weights(w[-1], said_MT[:, t]))
    return torch.stack(w, 1)


def answer_uncertainty(log_p_MTV: Tensor, answer: list[int]) -> AnswerUncertainty:
    """What the mixture says along an answer, from `next_token_log_probs`."""
    of_tokens = token_uncertainty(log_p_MTV, running_weights(log_p_MTV, answer))
    total, epistemic = of_tokens.total, of_tokens.epistemic
    ell_M = log_p_MTV[:, range(len(answer)), answer].double().sum(1)
    alone = token_uncertainty(log_p_MTV[:1]).total
    return AnswerUncertainty(
        float(total.mean()), float(epistemic.mean()), float(epistemic.max()), float(alone.mean()), ell_M
    )
