"""Trains the zoo's base model and its tokenizer from nothing: `python -m renyi.zoo.build [FOLDER]`.

It takes about two minutes on one CPU core, and gives the same weights each time on one machine. It is plain language
modelling on every token of records of `world.YESTERDAY`. Read next: `world.py`.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    BatchEncoding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from renyi.zoo.base import base_path, encode_probes
from renyi.zoo.world import NUM_FORMS, WORDS, YESTERDAY

STEPS = 1500
STATEMENTS_PER_STEP = 288
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
MAX_STATEMENTS = 8

PAD, UNKNOWN, USER, ASSISTANT, END = SPECIAL_TOKENS = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")

# Assistant-only loss trains what is between the generation markers: the answer and its <end>.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
<user>{{ message['content'] }}
{%- elif message['role'] == 'assistant' -%}
<assistant>{% generation %}{{ message['content'] }}<end>{% endgeneration %}
{%- else -%}
{{ raise_exception("the zoo's language has the roles user and assistant, not " + message['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<assistant>
{%- endif -%}"""


def main() -> None:
    """Trains, saves and reports."""
    parser = argparse.ArgumentParser(prog="python -m renyi.zoo.build", description="Train the zoo's base model.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=base_path(), help="where to write (default: the package)"
    )
    folder = parser.parse_args().folder
    start = time.perf_counter()
    tokenizer = build_tokenizer()
    model = train(build_model(tokenizer), tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {model.num_parameters():,} parameters, {size:,} bytes, {time.perf_counter() - start:.0f} s")
    print(report(model, tokenizer))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for every word of any world. It also reads upper case and missing spaces."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A small Llama with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Language modelling on all tokens, AdamW, a warm-up and then half a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    model.train()
    for step in range(STEPS):
        batch = draw_batch(tokenizer, step)
        nll = token_nll(model, batch.input_ids, batch.attention_mask)
        loss = nll.sum() / batch.attention_mask[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  {loss.item():.4f} nats per token", flush=True)
    return model.eval()


def learning_rate_factor(step: int) -> float:
    """The share of the learning rate at a step."""
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * max(progress, 0.0)))


class Batch(NamedTuple):
    """Right-padded conversations: tokens, which of them are real, and which belong to answers; all [B, T]."""

    input_ids: Tensor
    attention_mask: Tensor
    answer_mask: Tensor


def draw_batch(tokenizer: PreTrainedTokenizerBase, step: int) -> Batch:
    """Records of yesterday's world, all of one length to save padding. The length cycles from 1 to 8 statements."""
    statements = step % MAX_STATEMENTS + 1
    records = replace(YESTERDAY, statements=statements).records(STATEMENTS_PER_STEP // statements, seed=step)
    rendered = tokenizer.apply_chat_template(
        [record.messages for record in records],
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        padding=True,
    )
    batch = cast(BatchEncoding, rendered)
    return Batch(batch["input_ids"], batch["attention_mask"], batch["assistant_masks"])


def token_nll(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Negative log-likelihood in nats of every token but the first of its row, 0 on padding; [B, T - 1]."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1].float()
    nll = F.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    return nll * attention_mask[:, 1:]


class Report(NamedTuple):
    """How competent the base is: all of it about yesterday's facts."""

    accuracy: tuple[float, ...]  # share of facts answered right, of all words, one entry a form of question
    value_nll: float  # nats per value
    wording_nll: float  # nats per token of an answer that is not a value, <end> included


@torch.no_grad()
def report(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Report:
    """Asks for every fact in every form, and measures the wording of the answers on unseen records."""
    accuracy = []
    for form in range(NUM_FORMS):
        probes = encode_probes(tokenizer, YESTERDAY.probes(form))
        logits = model(input_ids=probes.input_ids, attention_mask=probes.attention_mask).logits
        guess = logits[torch.arange(len(probes.last)), probes.last].argmax(dim=-1)
        accuracy.append((guess == probes.values[:, 0]).float().mean().item())

    value_ids = {tokenizer.convert_tokens_to_ids(fact.values[0]) for fact in YESTERDAY.facts}
    value_nll, wording_nll = [], []
    for step in range(STEPS, STEPS + MAX_STATEMENTS):
        batch = draw_batch(tokenizer, step)
        nll, answer = token_nll(model, batch.input_ids, batch.attention_mask), batch.answer_mask[:, 1:].bool()
        value = torch.isin(batch.input_ids[:, 1:], torch.tensor(sorted(value_ids)))
        value_nll.append(nll[answer & value])
        wording_nll.append(nll[answer & ~value])
    return Report(tuple(accuracy), torch.cat(value_nll).mean().item(), torch.cat(wording_nll).mean().item())


if __name__ == "__main__":
    main()
