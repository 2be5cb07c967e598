"""Small things the tests share: models of 64 words, a tokenizer for them, and data that disagree with themselves.

Everything is drawn from a seed, so two calls give equal models and equal rows. Nothing here asserts anything.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from renyi import (
    LoraEnsemble,
    PowerFlowConfig,
    PowerFlowTrainer,
    RenyiDPOConfig,
    RenyiDPOTrainer,
    RenyiKTOConfig,
    RenyiKTOTrainer,
    RenyiRewardConfig,
    RenyiRewardTrainer,
    RenyiSFTConfig,
    RenyiSFTTrainer,
)

VOCABULARY = 64
PAD, EOS, UNK = 0, 1, 2
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
WORDS = [f"w{i}" for i in range(VOCABULARY - len(SPECIAL))]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant> {% generation %}"
    "{{ message.content }} <eos>{% endgeneration %}{{ ' ' }}"
    "{% else %}<user> {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)

_SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,  # large enough that tokens have different probabilities from the start
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_TOKENS = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}


def tiny_model(kind: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A randomly initialised float32 model of 2 layers and 32 features, without dropout, in evaluation mode."""
    torch.manual_seed(seed)
    match kind:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**{**_GROUPED, **_TOKENS, "tie_word_embeddings": True, **overrides}))
        case "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**{**_GROUPED, **_TOKENS, **overrides}))
        case "gpt2":
            config = {
                "vocab_size": VOCABULARY,
                "n_embd": 32,
                "n_layer": 2,
                "n_head": 4,
                "n_positions": 256,
                "initializer_range": 0.2,
            }
            no_dropout = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(**{**config, **no_dropout, **_TOKENS, **overrides}))
        case "neox":
            no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**_SIZE, **no_dropout, **_TOKENS, **overrides}))
        case "gemma2":
            extra = {"head_dim": 8, "final_logit_softcapping": 2.0}
            model = Gemma2ForCausalLM(Gemma2Config(**{**_GROUPED, **_TOKENS, **extra, **overrides}))
        case "granite":
            extra = {"logits_scaling": 0.3}
            model = GraniteForCausalLM(GraniteConfig(**{**_GROUPED, **_TOKENS, **extra, **overrides}))
        case "cohere":
            extra = {"logit_scale": 5.0}
            model = CohereForCausalLM(CohereConfig(**{**_GROUPED, **_TOKENS, **extra, **overrides}))
        case _:
            raise ValueError(kind)
    return model.eval()


def lora(**overrides: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **overrides}
    )


def scatter_members(ensemble: LoraEnsemble, std: float = 0.1, seed: int = 1) -> LoraEnsemble:
    """Give every B random entries, so that members differ as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in ensemble.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
    return ensemble


def tiny_ensemble(num_members: int = 3, kind: str = "llama", scattered: bool = True, **config: Any) -> LoraEnsemble:
    ensemble = LoraEnsemble.from_base(tiny_model(kind), num_members, lora(**config), seed=7)
    return (scatter_members(ensemble) if scattered else ensemble).eval()


def padded_batch(side: str = "right", seed: int = 3, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [3, 9] of rows of 9, 6 and 4 tokens."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(len(SPECIAL), vocabulary, (3, 9), generator=generator)
    attention_mask = (torch.arange(9) < torch.tensor([[9], [6], [4]])).long()
    input_ids = input_ids.masked_fill(attention_mask == 0, PAD)
    if side == "left":
        for row, length in enumerate((9, 6, 4)):
            input_ids[row], attention_mask[row] = input_ids[row].roll(9 - length), attention_mask[row].roll(9 - length)
    return input_ids, attention_mask


def tiny_tokenizer(**overrides: Any) -> PreTrainedTokenizerFast:
    """One token a word; pad, end and unknown are three different tokens, and the template marks what to train."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    settings = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    settings["additional_special_tokens"] = ["<user>", "<assistant>"]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**settings, **overrides})
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def sentences(number: int, seed: int = 0, shortest: int = 3, longest: int = 12) -> list[str]:
    """Sentences of different lengths, in which the second word follows from the first in one of two ways."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(number):
        first, length, school = (
            int(torch.randint(low, high, (), generator=generator))
            for low, high in ((0, 6), (shortest, longest), (0, 2))
        )
        words = [first, 10 + 20 * school + first]
        while len(words) < length:
            words.append((words[-1] * 3 + first + school) % len(WORDS))
        made.append(" ".join(WORDS[w] for w in words))
    return made


def text_rows(number: int = 32, seed: int = 0, **lengths: int) -> Dataset:
    return Dataset.from_dict({"text": sentences(number, seed, **lengths)})


def sft_config(output_dir: str | Path, **overrides: Any) -> RenyiSFTConfig:
    """A config for a quick, quiet run in float32."""
    return RenyiSFTConfig(str(output_dir), **quiet(overrides))


def quiet(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that TRL's and our trainer share in the tests."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return {**settings, **overrides}


def trainer_of(output_dir: str | Path, dataset: Any = None, **settings: Any) -> RenyiSFTTrainer:
    """A trainer on the tiny Llama; what its `__init__` does not know goes to the config."""
    known = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks", "formatting_func")
    given = {name: settings.pop(name) for name in known if name in settings}
    model = given.pop("model", None)
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora())
    return RenyiSFTTrainer(
        tiny_model() if model is None else model,
        sft_config(output_dir, **settings),
        text_rows() if dataset is None else dataset,
        **{"processing_class": tiny_tokenizer(), **given},
    )


def pair_rows(number: int = 32, seed: int = 0) -> Dataset:
    """Plain pairs of different lengths: prompts of 1 to 5 words, completions of 1 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def words(longest: int) -> str:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    rows = [{"prompt": words(5), "chosen": f" {words(6)}", "rejected": f" w7 {words(6)}"} for _ in range(number)]
    return Dataset.from_list(rows)


def dpo_trainer_of(output_dir: str | Path, dataset: Any = None, **settings: Any) -> RenyiDPOTrainer:
    """As `trainer_of`, on preference pairs."""
    known = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks")
    given = {name: settings.pop(name) for name in known if name in settings}
    model = given.pop("model", None)
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora())
    return RenyiDPOTrainer(
        tiny_model() if model is None else model,
        RenyiDPOConfig(str(output_dir), **quiet({"beta": 0.3, **settings})),
        pair_rows() if dataset is None else dataset,
        **{"processing_class": tiny_tokenizer(), **given},
    )


def thumb_rows(number: int = 32, seed: int = 0) -> Dataset:
    """Plain rows of thumbs, of the prompts and completions of `pair_rows`; up and down in no order."""
    draws = torch.rand(number, generator=torch.Generator().manual_seed(seed + 1)) < 0.5
    pairs = zip(pair_rows(number, seed), draws.tolist(), strict=True)
    return Dataset.from_list(
        [{"prompt": p["prompt"], "completion": p["chosen" if up else "rejected"], "label": up} for p, up in pairs]
    )


def kto_trainer_of(output_dir: str | Path, dataset: Any = None, **settings: Any) -> RenyiKTOTrainer:
    """As `trainer_of`, on thumbs."""
    known = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks")
    given = {name: settings.pop(name) for name in known if name in settings}
    model = given.pop("model", None)
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora())
    return RenyiKTOTrainer(
        tiny_model() if model is None else model,
        RenyiKTOConfig(str(output_dir), **quiet({"beta": 0.3, **settings})),
        thumb_rows() if dataset is None else dataset,
        **{"processing_class": tiny_tokenizer(), **given},
    )


def tiny_reward_model(folder: str | Path | None = None, seed: int = 0) -> PreTrainedModel:
    """A tiny Llama that rates texts, drawn or from a folder."""
    if folder is not None:
        return LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.get_default_dtype()).eval()
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(LlamaConfig(**_GROUPED, **_TOKENS, num_labels=1)).eval()


def reward_trainer_of(output_dir: str | Path, dataset: Any = None, **settings: Any) -> RenyiRewardTrainer:
    """As `trainer_of`, of reward models, on preference pairs."""
    known = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks")
    given = {name: settings.pop(name) for name in known if name in settings}
    model = given.pop("model", None)
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora(task_type="SEQ_CLS"))
    return RenyiRewardTrainer(
        tiny_reward_model() if model is None else model,
        RenyiRewardConfig(str(output_dir), **quiet(settings)),
        pair_rows() if dataset is None else dataset,
        **{"processing_class": tiny_tokenizer(), **given},
    )


def prompt_rows(number: int = 16, seed: int = 0) -> Dataset:
    """Plain prompts of 1 to 5 words."""
    return Dataset.from_dict({"prompt": [row["prompt"] for row in pair_rows(number, seed)]})


def powerflow_trainer_of(output_dir: str | Path, dataset: Any = None, **settings: Any) -> PowerFlowTrainer:
    """As `trainer_of`, on prompts, with 4 rollouts of at most 6 tokens to each."""
    known = ("model", "peft_config", "eval_dataset", "processing_class", "callbacks", "base_score", "reward_funcs")
    given = {name: settings.pop(name) for name in known if name in settings}
    model = given.pop("model", None)
    if not isinstance(model, LoraEnsemble):
        given.setdefault("peft_config", lora())
    rollouts = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6}
    return PowerFlowTrainer(
        tiny_model() if model is None else model,
        PowerFlowConfig(str(output_dir), **quiet({**rollouts, **settings})),
        prompt_rows() if dataset is None else dataset,
        **{"processing_class": tiny_tokenizer(), **given},
    )


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row and "train_runtime" not in row]


def adapter_distance(ensemble: LoraEnsemble, member: int, model: torch.nn.Module) -> float:
    """‖φ_m − φ‖ / ‖φ‖ between a member and a PEFT model's adapter, over all of its matrices."""
    named = dict(model.named_parameters())
    ours, theirs = [], []
    for name, pair in ensemble.adapter(member).items():
        for matrix, key in zip(pair, ("lora_A", "lora_B"), strict=True):
            ours.append(matrix.detach().flatten())
            theirs.append(named[f"base_model.model.{name}.{key}.default.weight"].detach().flatten())
    difference = torch.cat(ours).double() - torch.cat(theirs).double()
    return float(difference.norm() / torch.cat(theirs).double().norm())


def member_distance(first: LoraEnsemble, second: LoraEnsemble, pairs: list[tuple[int, int]] | None = None) -> float:
    """The greatest ‖φ − φ'‖ / ‖φ'‖ over pairs of members, by default each with its namesake."""
    worst = 0.0
    for m, n in pairs or [(m, m) for m in range(first.num_members)]:
        one = torch.cat([x.detach().flatten() for pair in first.adapter(m).values() for x in pair]).double()
        two = torch.cat([x.detach().flatten() for pair in second.adapter(n).values() for x in pair]).double()
        worst = max(worst, float((one - two).norm() / two.norm()))
    return worst
