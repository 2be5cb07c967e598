"""PowerFlow in a language of which every sequence is known: train on it, and compare with the target in closed form.

Nothing here asserts anything. The benchmark of exactness uses it, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from enumerable import EOS, enumerate_sequences, tiny_llama
from peft import LoraConfig
from tiny import quiet
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
)

from renyi import LoraEnsemble, PowerFlowConfig, PowerFlowTrainer
from renyi.objectives import PowerTarget, power_target

PROMPT = "a b"


class Language(NamedTuple):
    """Every answer to a prompt, as rows that a model reads, S of them.

    Attributes:
        sequences: [S, L], −1 after the end.
        tokens: [S].
        input_ids, attention_mask, labels: [S, P + L], padded on the right.
    """

    sequences: Tensor
    tokens: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Comparison(NamedTuple):
    """One trained policy π against its target π*; nats.

    Attributes:
        total_variation: ½ Σ |π − π*|.
        forward_kl: KL(π*‖π), which sees what the policy has lost.
        reverse_kl: KL(π‖π*).
        log_partition: log Z' as logged, a mean over the last tenth of the logs (of all policies).
        expected: λ, that of the target.
        slopes: of log π on (log p_base, |y|), as logged, likewise; to approach (power, −λ).
        r2: of that regression.
        distance: ½ Σ |π* − π at the start|, what there was to learn.
        length, length_expected: mean lengths under π and π*.
    """

    total_variation: float
    forward_kl: float
    reverse_kl: float
    log_partition: float
    expected: float
    slopes: tuple[float, float]
    r2: float
    distance: float
    length: float
    length_expected: float


def letters(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token 0 ends a text and pads it; a, b, c … are the words."""
    vocabulary = {"<eos>": EOS, **{chr(ord("a") + i): i + 1 for i in range(vocab_size - 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")


def language(vocab_size: int = 4, max_length: int = 4, prompt: Sequence[int] = (1, 2)) -> Language:
    sequences, tokens = enumerate_sequences(vocab_size, max_length)
    real = sequences >= 0
    before = torch.tensor(prompt).expand(len(tokens), -1)
    return Language(
        sequences,
        tokens,
        torch.cat([before, sequences.masked_fill(~real, EOS)], dim=1),
        torch.cat([torch.ones_like(before), real.long()], dim=1),
        torch.cat([torch.full_like(before, -100), sequences.masked_fill(~real, -100)], dim=1),
    )


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer_in(
    output_dir: str | Path, model: PreTrainedModel | LoraEnsemble, max_length: int = 4, **settings: Any
) -> PowerFlowTrainer:
    """A quiet trainer on one prompt; what its `__init__` does not know goes to the config."""
    known = ("base_score", "callbacks", "peft_config", "train_dataset")
    given = {name: settings.pop(name) for name in known if name in settings}
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora())
    rollouts = settings.get("num_generations", 128)
    args = PowerFlowConfig(
        str(output_dir),
        **quiet(
            {
                "max_steps": -1,
                "num_generations": rollouts,
                "per_device_train_batch_size": rollouts,
                "max_completion_length": max_length,
                "learning_rate": 5e-3,
                "lr_scheduler_type": "cosine",
                "adam_beta1": 0.5,  # rollouts are many and the gradient hardly noisy: with 0.9 the policy swings around
                "adam_beta2": 0.99,
                **settings,
            }
        ),
    )
    given.setdefault("train_dataset", Dataset.from_dict({"prompt": [PROMPT] * 8}))
    trainer = PowerFlowTrainer(model, args, processing_class=letters(model.config.vocab_size), **given)
    for noisy in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(noisy)
    return trainer


def wide_llama(vocab_size: int = 4, seed: int = 0, initializer_range: float = 0.12) -> LlamaForCausalLM:
    """A random model like `tiny_llama`, with 64 features and next tokens that are not far from uniform.

    The head is frozen, and a policy only as sharp as it lets it be. What a random base makes of it grows as the root of
    the features, what an adapter can as their number: 32 are too few for the 4th power of some bases.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = tiny_llama(vocab_size).config
        config.update({"hidden_size": 64, "head_dim": 16, "initializer_range": initializer_range})
        model = LlamaForCausalLM(config)
    model.generation_config.pad_token_id = EOS
    return model.eval()


def memoryless_llama(probs: Sequence[float], seed: int = 0) -> LlamaForCausalLM:
    """A model whose next token has these probabilities whatever was before, of which adapters can make any other.

    All embeddings agree in the one feature that the head reads, and no layer writes: log-probabilities are constant.
    The head reads features 16 and on, too, where embeddings are zero and layers may learn to write.
    """
    model = tiny_llama(len(probs), seed)
    with torch.no_grad():
        words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        words[:, 0], words[:, 1:16], words[:, 16:] = 1.0, words[:, 1:16].sign(), 0.0
        scale = words[0].square().mean().rsqrt()  # of the last norm
        head[:, 0], head[:, 1:16] = torch.tensor(probs).log() / scale, 0.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
def policies(ensemble: LoraEnsemble, known: Language) -> Tensor:
    """log π_m of every sequence [M, S], float64."""
    return ensemble(known.input_ids, known.attention_mask, known.labels).log_probs.sum(-1).double()


def target_of(trainer: PowerFlowTrainer, known: Language, penalty: Tensor | None = None) -> PowerTarget:
    """The power of whatever the trainer's base score says, in closed form: [K] and [K, S] of a score [K, S]."""
    log_base_KS = trainer.base_score(known.input_ids, known.attention_mask, known.labels).double()
    return power_target(log_base_KS, known.tokens, trainer.args.power, penalty, trainer.args.balance)


def train_and_compare(
    trainer: PowerFlowTrainer, known: Language, penalty: Tensor | None = None
) -> tuple[Comparison, ...]:
    """Train, and compare each policy with its target.

    Args:
        penalty: ψ [S] of every sequence, nats a token, where the trainer has one.
    """
    target, start_MS = target_of(trainer, known, penalty), policies(trainer.model, known)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "log_partition" in row]
    rows = rows[-max(1, len(rows) // 10) :]

    def logged(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    found_MS = policies(trainer.model, known)
    compared = []
    for m, (found, start) in enumerate(zip(found_MS, start_MS, strict=True)):
        k = m if len(target.log_probs) > 1 else 0
        expected = target.log_probs[k]
        p, q, n = expected.exp(), found.exp(), known.tokens
        compared.append(
            Comparison(
                total_variation=0.5 * (p - q).abs().sum().item(),
                forward_kl=(p * (expected - found)).sum().item(),
                reverse_kl=(q * (found - expected)).sum().item(),
                log_partition=logged("log_partition"),
                expected=target.log_partition[k].item(),
                slopes=(logged("slope/log_base"), logged("slope/length")),
                r2=logged("slope/r2"),
                distance=0.5 * (p - start.exp()).abs().sum().item(),
                length=(q * n).sum().item(),
                length_expected=(p * n).sum().item(),
            )
        )
    return tuple(compared)
