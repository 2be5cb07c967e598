"""The model card of an ensemble: what it is, how it was made, how to load it.

It is written beside the adapters as `README.md`. Each trainer says what is particular to its method (`method_card`);
the figures come from the trainer's log history.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from renyi import __version__
from renyi.ensemble import LoraEnsemble

_TEMPLATE = """\
---
{front_matter}---

# {title}

{members} on [{base}]({base_link}), {introduction}

| setting | value |
|---|---|
{settings}

| {measured} | training | held out |
|---|---|---|
{measures}

## Use

```python
{ours}
```

Each `member_*` folder is an ordinary PEFT adapter:

```python
{theirs}
```
"""


_WRITES = (
    """\
from renyi import LoraEnsemble

ensemble = LoraEnsemble.load("{folder}")
log_likelihood = ensemble.log_likelihood(input_ids, attention_mask, labels)  # [members, examples], nats""",
    """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), {first_member})""",
)
_RATES = (
    """\
import renyi

reward = renyi.load("{folder}").reward_function("lcb")  # a reward function of TRL's GRPOTrainer
rewards = reward(prompts=["…"], completions=["…"])""",
    """\
from peft import AutoPeftModelForSequenceClassification

model = AutoPeftModelForSequenceClassification.from_pretrained({first_member}, num_labels=1)""",
)


class Method(NamedTuple):
    """What a trainer says about its method.

    Attributes:
        introduction: how members were made and what they are. It continues the sentence "… LoRA adapters on BASE, ".
        settings: the settings that matter, by name.
        measured: heading of the measures, with their unit.
        measures: the logged metric, by name. On held-out data the metric's name begins with `eval_`.
        is_reward: whether members rate texts instead of writing them.
    """

    introduction: str
    settings: Mapping[str, str]
    measured: str
    measures: Mapping[str, str]
    is_reward: bool = False


def routed(unit: str) -> Method:
    """The method of the α-Rényi loss, with log-likelihoods per `unit`."""
    return Method(
        introduction="trained together with the α-Rényi loss\n([Soft Specialists](https://arxiv.org/abs/2605.27747)). "
        "Examples were softly routed to the members that explain\nthem; where members disagree, the training data did.",
        settings={},
        measured=f"measure (nats per {unit})",
        measures={
            "negative log-likelihood of the mixture": "nll_mixture",
            "mean of the members'": "nll_members",
            "Jensen gap": "jensen_gap",
        },
    )


def write_model_card(
    folder: Path,
    ensemble: LoraEnsemble,
    args: Any,
    log_history: list[dict[str, float]],
    dataset_name: str | None,
    method: Method,
    tags: list[str],
    hub_id: str | None = None,
) -> None:
    """Write `README.md` into `folder` from an ensemble, its trainer's arguments and what was logged.

    `hub_id` is the repository that the folder is pushed to, if it is: then the card says how to load it from there.
    """
    base = ensemble.base_model_name or "a base model made in memory"
    local = Path(base).is_dir()
    front = {"library_name": "peft", "tags": sorted(set(tags))}
    if not local and ensemble.base_model_name:
        front["base_model"] = base
    if dataset_name and not Path(dataset_name).exists():
        front["datasets"] = [dataset_name]
    config = ensemble.peft_config
    hold, ramp = args.alpha_hold_ratio, args.alpha_ramp_ratio
    routing = {
        "alpha": f"{args.alpha}; held at 0 for {hold:.0%} of training, ramped for {ramp:.0%}" if args.alpha else "0",
        "routed quantity": args.routing_quantity,
        "mixture weights": ", ".join(f"{w:.3f}" for w in ensemble.weights.tolist()),
    }
    settings = {
        **(routing if ensemble.num_members > 1 else {}),
        "LoRA": f"rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}",
        **method.settings,
        "learning rate": f"{args.learning_rate:g}",
        "batch size": args.train_batch_size * args.gradient_accumulation_steps * args.data_processes,
        "seed": args.seed,
        "renyi": __version__,
    }
    logged = next(iter(method.measures.values()))
    trained = next((row for row in reversed(log_history) if logged in row), {})
    held_out = next((row for row in reversed(log_history) if f"eval_{logged}" in row), {})
    ours, theirs = _RATES if method.is_reward else _WRITES
    folder_name = hub_id or folder.name
    first_member = f'"{hub_id}", subfolder="member_0"' if hub_id else f'"{folder.name}/member_0"'
    text = _TEMPLATE.format(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=folder.resolve().name,
        members=f"{ensemble.num_members} LoRA adapters" if ensemble.num_members > 1 else "A LoRA adapter",
        base=base,
        base_link=base if local else f"https://huggingface.co/{base}",
        introduction=method.introduction,
        ours=ours.format(folder=folder_name),
        theirs=theirs.format(base=base, first_member=first_member),
        measured=method.measured,
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        measures="\n".join(
            f"| {name} | {_shown(trained.get(key))} | {_shown(held_out.get('eval_' + key))} |"
            for name, key in method.measures.items()
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
