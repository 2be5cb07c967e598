"""Settings of transformers that would fail only when training begins, checked as soon as they are known.

`config.py` calls this when a config is made, so that a dry run finds what a run would.
"""

import math
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from renyi.errors import ConfigError

_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")


def check_numbers(args: Any) -> None:
    """Raise `ConfigError` about a number that no run can use: not finite, negative, or a batch of nothing."""
    for name in (f.name for f in fields(TrainingArguments)):  # our own settings and TRL's are checked with their ranges
        value = getattr(args, name, None)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{value} is not allowed", where=name, hint="Give a finite number.")
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            value = getattr(args, name, None)
            if isinstance(value, int | float) and value < least:
                raise ConfigError(f"{value} is not allowed", where=name, hint=f"Give a number of at least {least}.")


def check_scheduler(args: Any) -> None:
    """Raise `ConfigError` unless the learning-rate scheduler takes its arguments."""
    given = dict(args.lr_scheduler_kwargs or {})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=given)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        shown = f"{given} does not fit" if given else "it needs arguments for"
        raise ConfigError(
            f"{shown} the scheduler {kind!r} ({error})",
            where="lr_scheduler_kwargs",
            hint="Give the arguments of that scheduler, or another lr_scheduler_type, such as linear or cosine.",
        ) from error


def check_packages(args: Any) -> None:
    """Raise `ConfigError` about a setting whose package is not installed."""
    asked = args.report_to if isinstance(args.report_to, list) else [args.report_to]
    available = get_available_reporting_integrations()
    for name in asked:
        if name and name not in ("none", "all", *available):
            raise ConfigError(
                f"{name} is not installed or not known",
                where="report_to",
                hint=f"Install it (pip install {name}), or write report_to: none; metrics.jsonl is written anyway.",
            )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "liger-kernel is not installed",
            where="use_liger_kernel",
            hint="Install it, or write use_liger_kernel: false.",
        )
    name = getattr(args.optim, "value", args.optim)
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):
        return  # they want the model, which is not known here
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be used ({error})",
            where="optim",
            hint="Install what it needs, or write optim: adamw_torch.",
        ) from error
