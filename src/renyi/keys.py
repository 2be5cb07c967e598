"""Settings by key: converts the values of flat keys to the types of dataclass fields, and fills the dataclasses.

Keys come from a YAML file, from flags or from a Python caller. The same rules hold for all three: which field a key
means, which type its value must have, and what the message says if it does not fit.

Nothing heavy is imported here, so that `renyi --help` is fast. Read next: `runs/settings.py`, which says which
dataclasses a run has.
"""

import dataclasses
import difflib
import json
import os
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from renyi.errors import ConfigError

Where = Callable[[str], str]  # from a key to the place that set it, for messages

# Keys of other tools and of other versions of TRL and transformers, and what to write instead.
RENAMED: Mapping[str, str] = {
    "warmup_ratio": "warmup_steps: a number below 1 is a share of the steps",
    "torch_dtype": "dtype",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "reward_funcs": "power: PowerFlow has no reward, its target is a power of the base's own distribution",
    "reward_weights": "power: PowerFlow has no reward, its target is a power of the base's own distribution",
    "evaluation_strategy": "eval_strategy",
    "max_seq_length": "max_length",
    "max_new_tokens": "max_completion_length",
    "no_cuda": "use_cpu",
    "device": "use_cpu: true trains on the CPU; without it a GPU is used where there is one",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "tokenizer": "model_name_or_path: the tokenizer is the model's own",
    "tokenizer_name": "model_name_or_path: the tokenizer is the model's own",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
    "overwrite_output_dir": "output_dir: another folder, to start anew",
    "neftune_alpha": "neftune_noise_alpha",
    "dataset_path": "dataset_name",
    "train_file": "dataset_name",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "base_model": "model_name_or_path",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "rank": "lora_r",
    "target_modules": "lora_target_modules",
    "renyi_alpha": "alpha",
    "members": "num_members",
}
# Optional packages, and the settings that need each of them.
_NEEDS = {
    "bitsandbytes": ("load_in_4bit", "load_in_8bit", "optim"),
    "flash_attn": ("attn_implementation",),
    "kernels": ("attn_implementation", "use_liger_kernel"),
    "wandb": ("report_to",),
    "tensorboard": ("report_to",),
    "trackio": ("report_to",),
    "mlflow": ("report_to",),
    "comet_ml": ("report_to",),
    "liger_kernel": ("use_liger_kernel",),
    "deepspeed": ("deepspeed",),
    "vllm": ("use_vllm",),
}
# The extra of this package that brings an optional package, in a version that fits.
EXTRAS: Mapping[str, str] = {
    "bitsandbytes": "quantization",
    "lm_eval": "lm-eval",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "wandb": "wandb",
}


def install_line(package: str) -> str:
    """The command that installs an optional package."""
    return (
        f"pip install 'renyi[{EXTRAS[package]}]'" if package in EXTRAS else f"pip install {package.replace('_', '-')}"
    )


def filled(dataclass_types: Sequence[type], values: Mapping[str, Any], where: Where = str) -> tuple[Any, ...]:
    """Make one new object of each dataclass from the given keys.

    Args:
        dataclass_types: the dataclasses; no two of them have a field with the same name.
        values: values for some of their fields, by key. Text is converted to the field's type.
        where: from a key to the place that set it, such as `lr (run.yaml, line 3)`.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type, or a dataclass refuses its values.
    """
    converted_values = checked(dataclass_types, values, where)
    objects = []
    for cls in dataclass_types:
        own = {f.name: converted_values[f.name] for f in dataclasses.fields(cls) if f.name in converted_values}
        try:
            objects.append(cls(**own))
        except ConfigError as error:
            place = where(error.where) if error.where else None
            raise ConfigError(error.what, where=place, hint=error.hint) from error
        except (ValueError, TypeError, ImportError, OSError, RuntimeError, AttributeError, KeyError) as error:
            raise explained(error, {f.name for f in dataclasses.fields(cls)}, own, where, cls) from error
    return tuple(objects)


def checked(dataclass_types: Sequence[type], values: Mapping[str, Any], where: Where = str) -> dict[str, Any]:
    """Convert each value to the type of its field.

    Raises:
        ConfigError: a key is unknown, or a value has the wrong type.
    """
    hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
    fields = {f.name: f for cls in dataclass_types for f in dataclasses.fields(cls) if f.init}
    for key in values:
        if key not in fields:
            raise unknown_key(key, fields, where(key))
    return {
        key: converted(value, hints[key], fields[key].metadata.get("choices"), where(key))
        for key, value in values.items()
    }


def explained(
    error: BaseException,
    known: Collection[str],
    given: Mapping[str, Any],
    where: Where = str,
    cls: Callable[..., object] | None = None,
) -> ConfigError:
    """Turn an error of a library about its settings into a `ConfigError` that names the key.

    The key is found in one of these ways. The message mentions it, or its value. Or a package is missing that the key
    needs. Or `cls` accepts the other values when this key is left out, or refuses this key alone. If none of them finds
    it, the error names all keys that were given.

    Args:
        error: the exception that was raised.
        known: keys that the message may be about.
        given: the keys that were set, and their values.
        where: from a key to the place that set it.
        cls: the class that refused the values; None if it cannot be called again.
    """
    message = " ".join(str(error).split()) or type(error).__name__
    package = next((name for name in _NEEDS if isinstance(error, ImportError | RuntimeError) and name in message), None)
    for_package = [key for key in _NEEDS.get(package or "", ()) if key in known]
    words = re.findall(r"\w+", message)
    mentioned = [key for key in words if key in known and "_" in key]
    keys = [*(k for k in for_package if k in given), *(k for k in mentioned if k in given)]
    if not keys and cls is not None:
        keys = [key for key in given if _is_taken(cls, {k: v for k, v in given.items() if k != key})]
        keys = keys or [key for key, value in given.items() if not _is_taken(cls, {key: value})]
    keys = keys or [key for key in mentioned if key in known] or [k for k in words if k in given]
    keys = keys or [key for key, value in given.items() if _is_quoted(value, message)]
    key = keys[0] if keys else None
    if key is None:
        return ConfigError(
            message,
            where=", ".join(map(where, given)) or "settings",
            hint="A library refuses these keys together and does not say which: leave them out one after another.",
        )
    hint = f"Install it: {install_line(package)}" if package and "install" not in message else None
    if key in given and hint is None:
        hint = f"{given[key]!r} was given: change it, or leave {key} out."
    return ConfigError(message, where=where(key), hint=hint)


def _is_quoted(value: object, message: str) -> bool:
    """Whether a message holds a value that was given as text, long enough not to be there by chance."""
    return (
        isinstance(value, str)
        and len(value) > 2
        and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", message) is not None
    )


def _is_taken(cls: Callable[..., object], values: Mapping[str, Any]) -> bool:
    try:
        cls(**values)
    except Exception:
        return False
    return True


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for an unknown key. It names what the key is called here, or else the nearest known key."""
    known = list(known)
    instead = RENAMED.get(key, "")
    if instead.partition(":")[0] in known:
        return ConfigError("there is no such key", where=where, hint=f"Write {instead}.")
    alike = [k for k in known if key and (k.startswith(key) or key.startswith(k))]
    (nearest,) = difflib.get_close_matches(key, alike or known, n=1, cutoff=0.0)
    return ConfigError("there is no such key", where=where, hint=f"The nearest known one is {nearest}.")


# ---- Types -----------------------------------------------------------------------------------------------------------


def converted(value: Any, hint: Any, choices: Sequence[Any] | None, where: str) -> Any:
    """Convert a value from YAML (any type) or from a flag (text) to the type of a dataclass field.

    Args:
        value: the value as it was given.
        hint: the field's type.
        choices: the values that the field allows; None for no list of its own.
        where: the place that set the value, for the message.

    Raises:
        ConfigError: the value does not fit the type.
    """
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    literals = [arg for option in options if get_origin(option) is Literal for arg in get_args(option)]
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    choices = choices or literals or [member.value for enum in enums for member in enum]
    if type(None) in options and (value is None or _is_null_text(value, options)):
        return None
    if choices:
        value = next((choice for choice in choices if value == choice or str(value) == str(choice)), value)
        if value not in choices:
            near = difflib.get_close_matches(str(value), map(str, choices), n=1)
            raise ConfigError(
                f"{_shown(value)} is none of {', '.join(map(str, choices))}",
                where=where,
                hint=f"Did you mean {near[0]}?" if near else None,
            )
        return value
    for option in sorted(options, key=_narrowest_first):
        fits, result = _as_type(value, option)
        if fits:
            return result
    expected = " or ".join(dict.fromkeys(_described(o) for o in options if o is not type(None)))
    nothing = ", or null" if type(None) in options else ""
    raise ConfigError(f"{_shown(value)} is not {expected}", where=where, hint=f"Give {expected}{nothing}.")


def _is_null_text(value: Any, options: Sequence[Any]) -> bool:
    return str not in options and isinstance(value, str) and value.lower() in ("none", "null")


_ORDER = (bool, int, float, dict, str, list)
_DESCRIBED = {bool: "true or false", int: "an integer", float: "a number", dict: "a mapping", str: "text"}
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _narrowest_first(option: Any) -> int:
    kind = get_origin(option) or option
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _described(option: Any) -> str:
    kind = get_origin(option) or option
    if kind is list:
        (item,) = get_args(option) or (str,)
        return {str: "a list of names", int: "a list of integers", float: "a list of numbers"}.get(item, "a list")
    return _DESCRIBED.get(kind, str(getattr(kind, "__name__", kind)))


def _as_type(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether a value fits a type, and the value in that type."""
    kind = get_origin(option) or option
    if kind is bool:
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).lower()) if _is_plain(value) else None
        return truth is not None, truth
    if kind in (int, float) and _is_plain(value) and not isinstance(value, bool):
        try:
            if kind is float:
                return True, float(value)
            if re.fullmatch(r"[-+]?\d+", str(value)):
                return True, int(value)
            return float(value).is_integer(), int(float(value))  # 1e3 is an integer, too
        except (ValueError, OverflowError):
            return False, None
    if kind is dict:
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                value = json.loads(value)
            except ValueError:
                return False, None
        return isinstance(value, dict), value
    if kind is list:
        (item,) = get_args(option) or (Any,)
        items = value if isinstance(value, list) else [value]
        results = [(True, i) if item is Any else _as_type(i, item) for i in items]
        return all(fits for fits, _ in results) and not isinstance(value, dict), [result for _, result in results]
    if kind is str:
        return _is_plain(value) and not isinstance(value, bool), str(value)
    return kind is Any, value


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)
