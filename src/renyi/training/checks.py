"""Early checks of settings that transformers would refuse only when training begins.

`config.py` calls this when a config is made, so that a dry run finds what a run would.
"""

import math
import os
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available, is_torch_tf32_available

from renyi.errors import ConfigError
from renyi.keys import install_line

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


def check_precision(args: Any) -> None:
    """Raise `ConfigError` about a precision that this machine does not have, before transformers looks at it."""
    half = [name for name in ("bf16", "bf16_full_eval") if getattr(args, name)]
    if half and not args.use_cpu and not is_torch_bf16_gpu_available():
        raise ConfigError(
            "True is not allowed: there is no GPU that computes in bfloat16",
            where=half[0],
            hint=f"Write {half[0]}: false, or use_cpu: true, which computes in bfloat16 on the CPU.",
        )
    for first, second in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if getattr(args, first) and getattr(args, second):
            raise ConfigError(
                f"True is not allowed beside {first}: true",
                where=second,
                hint=f"Write {second}: false, or {first}: false.",
            )
    half = [name for name in ("fp16", "fp16_full_eval") if getattr(args, name)]
    if half and (args.use_cpu or not torch.accelerator.is_available()):
        raise ConfigError(
            "True is not allowed: float16 needs a GPU, and this run has none",
            where=half[0],
            hint=f"Write {half[0]}: false; on a CPU, bf16: true with use_cpu: true is the half precision.",
        )
    if args.tf32 and not is_torch_tf32_available():
        raise ConfigError(
            "True is not allowed: TF32 needs an NVIDIA GPU of the Ampere generation or later",
            where="tf32",
            hint="Leave tf32 out.",
        )


def check_rollouts(args: Any) -> None:
    """Raise `ConfigError` unless whole groups of rollouts fill a batch, in words of PowerFlow and not of GRPO."""
    rows, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    group = args.num_generations or 0
    if min(rows, parts, group) < 1:
        return  # refused as sizes
    if group < 2:
        raise ConfigError(
            f"{group} is not allowed: a prompt needs several rollouts to be compared",
            where="num_generations",
            hint="Give at least 2.",
        )
    if args.auto_find_batch_size:
        raise ConfigError(
            "True is not allowed: a smaller batch would no longer hold all rollouts of its prompts",
            where="auto_find_batch_size",
            hint="Leave it out, and lower per_device_train_batch_size where memory is short.",
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.generation_batch_size is not None and args.steps_per_generation is not None:
        raise ConfigError(
            "both it and generation_batch_size are given, and each decides the other",
            where="steps_per_generation",
            hint="Leave one of them out.",
        )
    if args.generation_batch_size is not None:
        _whole_groups(args.generation_batch_size, "generation_batch_size", rows * processes, "rows of one pass")
        _whole_groups(args.generation_batch_size, "generation_batch_size", group, "num_generations")
    else:
        steps = args.steps_per_generation if args.steps_per_generation is not None else parts
        how = "steps_per_generation" if args.steps_per_generation is not None else "gradient_accumulation_steps"
        if (rows * processes * steps) % group:
            across = f" × {processes} processes" if processes > 1 else ""
            raise ConfigError(
                f"{group} is not allowed: per_device_train_batch_size {rows}{across} × {how} {steps} makes "
                f"{rows * processes * steps} rollouts at a time, which are no whole groups of {group}",
                where="num_generations",
                hint=f"Give a divisor of {rows * processes * steps}, or another per_device_train_batch_size.",
            )
    evaluates = getattr(args.eval_strategy, "value", args.eval_strategy) != "no"
    held_out, evaluated = args.num_generations_eval or group, args.per_device_eval_batch_size * processes
    if evaluates and evaluated % held_out:
        raise ConfigError(
            f"{args.per_device_eval_batch_size} is not allowed: {evaluated} rollouts at a time are no whole groups of "
            f"{held_out}",
            where="per_device_eval_batch_size",
            hint=f"Give a multiple of num_generations_eval ({held_out}), or another num_generations_eval.",
        )


def _whole_groups(size: int, key: str, group: int, what: str) -> None:
    if size < 1 or size % group:
        raise ConfigError(
            f"{size} is not allowed: it is no multiple of {group}, the {what}",
            where=key,
            hint=f"Give a multiple of {group}, or leave it out.",
        )


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
                hint=f"Write report_to: none (metrics.jsonl is written anyway), or install it: {install_line(name)}",
            )
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError(
            "liger-kernel is not installed",
            where="use_liger_kernel",
            hint="Install it, or write use_liger_kernel: false.",
        )
    name = getattr(args.optim, "value", args.optim)
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):
        return  # these schedulers need the model, which is not known here
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"{name} cannot be used ({error})",
            where="optim",
            hint="Install what it needs, or write optim: adamw_torch.",
        ) from error
