"""What the studies on a real chat model share: training, and the uncertainty of given answers."""

import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback

from renyi import LoraEnsemble, RenyiSFTConfig, RenyiSFTTrainer
from renyi.inference import token_uncertainty
from renyi.objectives import running_log_weights


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


def quieten(trainer: Any) -> None:
    """Take the callbacks away that print."""
    for noisy in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(noisy)


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
