"""The model card of an ensemble: what it is, how it was made, how to load it.

Written beside the adapters as `README.md`. It knows nothing about training beyond what was logged.
"""

from pathlib import Path
from typing import Any

import yaml

from renyi import __version__
from renyi.ensemble import LoraEnsemble
from renyi.training.report import ACCURACY

_TEMPLATE = """\
---
{front_matter}---

# {title}

{members} LoRA adapters on [{base}]({base_link}), trained together with the α-Rényi loss
([Soft Specialists](https://arxiv.org/abs/2605.27747)) by renyi {version}. Examples were softly routed to the members
that explain them; where members disagree, the training data did.

| setting | value |
|---|---|
{settings}

| measure (nats per {unit}) | training | held out |
|---|---|---|
{measures}

## Use

```python
from renyi import LoraEnsemble

ensemble = LoraEnsemble.load("{folder}")
log_likelihood = ensemble.log_likelihood(input_ids, attention_mask, labels)  # [members, examples], nats
```

Each `member_*` folder is an ordinary PEFT adapter:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{folder}/member_0")
```
"""


def write_model_card(
    folder: Path,
    ensemble: LoraEnsemble,
    args: Any,
    log_history: list[dict[str, float]],
    dataset_name: str | None,
    settings_of_method: dict[str, str],
    unit: str,
    tags: list[str],
) -> None:
    """Write `README.md` into `folder` from an ensemble, its trainer's arguments and what was logged."""
    base = ensemble.base_model_name or "a base model made in memory"
    local = Path(base).is_dir()
    front = {"library_name": "peft", "tags": sorted(set(tags))}
    if not local and ensemble.base_model_name:
        front["base_model"] = base
    if dataset_name and not Path(dataset_name).exists():
        front["datasets"] = [dataset_name]
    config = ensemble.peft_config
    settings = {
        "alpha": f"{args.alpha}; held at 0 for {args.alpha_hold_ratio:.0%} of training, ramped for "
        f"{args.alpha_ramp_ratio:.0%}",
        "routed quantity": args.routing_quantity,
        "mixture weights": ", ".join(f"{w:.3f}" for w in ensemble.weights.tolist()),
        "LoRA": f"rank {config.r}, alpha {config.lora_alpha}, dropout {config.lora_dropout}",
        **settings_of_method,
        "learning rate": f"{args.learning_rate:g}",
        "batch": f"{args.train_batch_size * args.gradient_accumulation_steps * args.world_size} examples",
        "seed": args.seed,
    }
    trained = next((row for row in reversed(log_history) if "nll_mixture" in row), {})
    held_out = next((row for row in reversed(log_history) if "eval_nll_mixture" in row), {})
    measures = {
        "negative log-likelihood of the mixture": "nll_mixture",
        "mean of the members'": "nll_members",
        "Jensen gap": "jensen_gap",
        "accuracy of the mixture's preference": ACCURACY,
    }
    text = _TEMPLATE.format(
        front_matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True),
        title=folder.resolve().name,
        members=ensemble.num_members,
        base=base,
        base_link=base if local else f"https://huggingface.co/{base}",
        version=__version__,
        folder=folder.name,
        unit=unit,
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        measures="\n".join(
            f"| {name} | {_shown(trained.get(key))} | {_shown(held_out.get('eval_' + key))} |"
            for name, key in measures.items()
            if unit == "pair" or key != ACCURACY
        ),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
