"""Members as PEFT adapters: which layers they adapt, how they are drawn, and how they are read and written.

This is the only file that uses PEFT's own layers. PEFT chooses the target layers and draws the weights. We take its
matrices, stack them over members, and replace its layer by our joint layer (`layer.py`).

Read next: `ensemble/ensemble.py`, which builds an ensemble with these functions.
"""

import copy
import difflib
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from renyi.errors import ConfigError, EnsembleFormatError
from renyi.layout import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, DISTRIBUTION_FILE
from renyi.members.head import HEAD_NAME, MemberHead
from renyi.members.kind import MemberLayer
from renyi.members.layer import JointLayer, MemberSelection

_KEY_PREFIX = "base_model.model."
_HEADS = {HEAD_NAME, "classifier"}  # what PEFT writes into `modules_to_save` of a reward model
_HEAD_KEY = f"{_KEY_PREFIX}{HEAD_NAME}.weight"

# Options of PEFT that an ensemble does not support, and why. A truthy value of the field is refused.
_REFUSED = {
    "use_dora": "a magnitude vector is not a low-rank update",
    "modules_to_save": "members may differ in their adapters only; the base is shared",
    "target_parameters": "adapters on bare parameters have no member-major rows",
    "layer_replication": "the base is shared and keeps its depth",
    "trainable_token_indices": "members may differ in their adapters only; the base is shared",
    "lora_bias": "a bias is not a low-rank update",
    "use_qalora": "pooled inputs are not plain LoRA",
    "alora_invocation_tokens": "an adapter that switches on mid-sequence is not plain LoRA",
}
_INITS = (True, False, "gaussian", "orthogonal")


def joint_layers(model: nn.Module) -> dict[str, JointLayer]:
    """The joint layers inside `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, JointLayer)}


def draw_members(
    model: PreTrainedModel,
    peft_config: PeftConfig,
    members: Sequence[int],
    seed: int,
    selection: MemberSelection,
    kind: type[MemberLayer],
) -> LoraConfig:
    """Replace the target layers of `model` by joint layers holding freshly drawn members.

    Member m is exactly what `peft.get_peft_model` draws after `torch.manual_seed(seed + m)`. The global random state
    is left as it was.

    Args:
        model: a causal language model; changed in place, its own parameters frozen.
        peft_config: rank, scaling, dropout and targets, as for PEFT.
        members: the indices of the members to draw, at least one.
        seed: the seed of member 0.
        selection: shared by all layers made here.
        kind: the kind of member.

    Returns:
        The config as PEFT resolved it (`"all-linear"` becomes a list of modules).

    Raises:
        ConfigError: the config asks for what an ensemble cannot do, or names no layer of this model.
    """
    if not members:
        raise ConfigError(f"num_members is {len(members)}", hint="An ensemble needs at least one member.")
    peft_config = check_config(peft_config)
    drawn: list[dict[str, tuple[Tensor, Tensor]]] = []
    resolved = peft_config
    with torch.random.fork_rng():
        for member in members:
            torch.manual_seed(seed + member)
            with _peft_layers(model, peft_config) as (layers, resolved):
                drawn.append(
                    {n: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for n, layer in layers}
                )
                plain = {n: (layer.get_base_layer(), layer.scaling["default"]) for n, layer in layers}
    for number, (name, (base_layer, scaling)) in enumerate(plain.items()):
        members_here = kind.drawn(*(torch.stack([member[name][i].detach() for member in drawn]) for i in (0, 1)))
        members_here.number = number
        joint = JointLayer(base_layer, members_here, scaling, peft_config.lora_dropout, selection)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, joint)
    model.requires_grad_(False)
    if has_head(resolved):
        own: Any = getattr(model, HEAD_NAME)
        head = own.weight.detach().to(torch.promote_types(own.weight.dtype, torch.float32))
        model.add_module(HEAD_NAME, MemberHead(head.repeat(len(members), 1, 1), selection))
        resolved.modules_to_save = [HEAD_NAME]
    for layer in joint_layers(model).values():
        layer.members.requires_grad_(True)
    return resolved


def check_config(config: PeftConfig, where: str | None = None) -> LoraConfig:
    """Return `config` if it describes plain LoRA that does not change the base's weights; else raise `ConfigError`."""
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"{type(config).__name__} is not LoRA",
            where=where,
            hint="Give a peft.LoraConfig: members are LoRA adapters.",
        )
    for name, why in _REFUSED.items():
        if name == "modules_to_save" and has_head(config) and set(config.modules_to_save or ()) <= _HEADS:
            continue
        if getattr(config, name, None):
            raise ConfigError(
                f"{name} is set, which an ensemble does not support", where=where, hint=f"Unset it: {why}."
            )
    if config.bias != "none":
        raise ConfigError(
            f"bias is {config.bias!r}", where=where, hint="Use 'none': the base is shared by all members."
        )
    if config.init_lora_weights not in _INITS:
        raise ConfigError(
            f"init_lora_weights is {config.init_lora_weights!r}",
            where=where,
            hint=f"Use one of {_INITS}: the others change the base weights or need data.",
        )
    if config.r < 1:
        raise ConfigError(f"lora_r is {config.r}", where=where, hint="The rank is a positive integer.")
    return config


def has_head(config: PeftConfig) -> bool:
    """Whether adapters of this config are reward models, each with a head of its own."""
    return config.task_type == "SEQ_CLS"


@contextmanager
def _peft_layers(model: PreTrainedModel, config: LoraConfig) -> Iterator[tuple[list[tuple[str, Any]], Any]]:
    """Let PEFT adapt `model`, yield PEFT's layers and resolved config, and remove the layers again."""
    config = copy.deepcopy(config)
    config.task_type = config.task_type or "CAUSAL_LM"
    with warnings.catch_warnings():
        # PEFT warns that the model has the name or config of another adapter: of the member that was drawn before.
        warnings.simplefilter("ignore")
        try:
            peft_model: Any = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"lora_target_modules {_shown(config.target_modules)} fit no layer of {type(model).__name__} ({error})",
                hint=f"Linear layers of this model: {', '.join(_linear_names(model))}. Or use 'all-linear'.",
            ) from error
    try:
        layers = [(n, m) for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)]
        for name, layer in layers:
            _check_layer(name, layer, model)
        yield layers, peft_model.peft_config["default"]
    finally:
        peft_model.unload()
        model.__dict__.pop("peft_config", None)


def _check_layer(name: str, layer: LoraLayer, model: PreTrainedModel) -> None:
    if ".experts." in f".{name}.":
        linear = [n for n, m in model.named_modules() if "attn" in n and _is_linear(m) and ".lora_" not in n]
        attention = sorted({n.removesuffix(".base_layer").rpartition(".")[2] for n in linear})
        raise ConfigError(
            f"{name} is inside a mixture of experts, whose tokens are not in member-major order",
            where="lora_target_modules",
            hint=f"Adapt attention: {', '.join(attention) or 'its projections'}.",
        )
    base: Any = layer.get_base_layer()
    if (
        "default" not in layer.lora_A
        or getattr(base, "weight", None) is None
        or (base.weight.dim() > 2 and not _quantised(base.weight))
    ):
        raise ConfigError(
            f"{name} is a {type(base).__name__}",
            where="lora_target_modules",
            hint="Only linear layers can be adapted.",
        )
    if layer is model.get_output_embeddings():
        raise ConfigError(
            f"{name} is the language-model head",
            where="lora_target_modules",
            hint="Leave it out: the head is frozen so that log-likelihoods need no logits in memory.",
        )


def check_targets(model: nn.Module, config: PeftConfig) -> None:
    """Raise `ConfigError` if a name among `target_modules` fits no module. PEFT ignores such a name."""
    targets = getattr(config, "target_modules", None)
    if targets is None or isinstance(targets, str):
        return
    names = [name for name, _ in model.named_modules()]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in names):
            linear = _linear_names(model)
            near = difflib.get_close_matches(target.rpartition(".")[2], linear, n=1)
            raise ConfigError(
                f"{target} fits no layer of {type(model).__name__}",
                where="lora_target_modules",
                hint=(f"Did you mean {near[0]}? " if near else "")
                + f"Its linear layers: {', '.join(linear)}. Or use 'all-linear'.",
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _quantised(weight: Tensor) -> bool:
    return not weight.dtype.is_floating_point


def _linear_names(model: nn.Module) -> list[str]:
    """The distinct last names of the model's linear layers, such as q_proj."""
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    return sorted({name.rpartition(".")[2] for name in linear})


def _shown(targets: object) -> str:
    return str(sorted(targets)) if isinstance(targets, set) else repr(targets)


class Adapter(NamedTuple):
    """One member in the form in which it is saved.

    Attributes:
        config: PEFT's config.
        weights: (A [R, I], B [O, R]) by layer name.
        kept: the member's tensors beside its mean, by layer name and tensor name; empty for a point.
        head: the weights [1, D] of its reward head; None if it has none.
    """

    config: LoraConfig
    weights: dict[str, tuple[Tensor, Tensor]]
    kept: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})
    head: Tensor | None = None


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write one member as an ordinary PEFT adapter folder. Its tensors beside the mean go to a file of their own."""
    config, weights, kept, head = adapter
    folder.mkdir(parents=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs from run to run, and the file should not
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (lora_A, lora_B) in weights.items():
        tensors[f"{_KEY_PREFIX}{name}.lora_A.weight"] = lora_A.detach().cpu().contiguous()
        tensors[f"{_KEY_PREFIX}{name}.lora_B.weight"] = lora_B.detach().cpu().contiguous()
    if head is not None:
        tensors[_HEAD_KEY] = head.detach().cpu().contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS_FILE, metadata={"format": "pt"})
    beside = {f"{layer}.{name}": x.detach().cpu().contiguous() for layer, of in kept.items() for name, x in of.items()}
    if beside:
        save_file(beside, folder / DISTRIBUTION_FILE, metadata={"format": "pt"})


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA adapter folder, from this library or from any other tool.

    Raises:
        EnsembleFormatError: a file is missing or damaged.
        ConfigError: the adapter is not plain LoRA.
    """
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise EnsembleFormatError(
                f"there is no {name}",
                where=str(folder),
                hint="A member is a PEFT adapter folder with both files.",
            )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError) as error:
        raise EnsembleFormatError(f"cannot be read ({error})", where=str(folder / ADAPTER_CONFIG_FILE)) from error
    config = check_config(config, where=str(folder / ADAPTER_CONFIG_FILE))
    tensors = _tensors(folder / ADAPTER_WEIGHTS_FILE)
    weights = {}
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        key_B = key.replace(".lora_A.", ".lora_B.")
        if key_B not in tensors:
            raise EnsembleFormatError(f"has {key} without its lora_B", where=str(folder / ADAPTER_WEIGHTS_FILE))
        name = key.removeprefix(_KEY_PREFIX).removesuffix(".lora_A.weight")
        weights[name] = (tensors.pop(key), tensors.pop(key_B))
    head = tensors.pop(_HEAD_KEY, None) if has_head(config) else None
    if tensors:
        raise EnsembleFormatError(f"holds {min(tensors)}, which is not LoRA", where=str(folder / ADAPTER_WEIGHTS_FILE))
    kept: dict[str, dict[str, Tensor]] = {}
    if (folder / DISTRIBUTION_FILE).is_file():
        for key, tensor in _tensors(folder / DISTRIBUTION_FILE).items():
            layer, _, name = key.rpartition(".")
            kept.setdefault(layer, {})[name] = tensor
    return Adapter(config, weights, kept, head)


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise EnsembleFormatError(
            f"is damaged or cut short ({error})",
            where=str(file),
            hint="Copy it again, or load the ensemble from an earlier checkpoint.",
        ) from error


def layer_scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """The factor on BA in one layer of the given rank, as PEFT computes it from a member's config."""
    patterns = config.alpha_pattern or {}
    lora_alpha = patterns.get(get_pattern_key(list(patterns), layer), config.lora_alpha)
    return lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)


def check_same_config(first: LoraConfig, other: LoraConfig, first_where: str, other_where: str) -> None:
    """Raise `EnsembleFormatError` unless two adapters have the same settings of scaling and shapes."""
    for name in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
        if getattr(first, name) != getattr(other, name):
            raise EnsembleFormatError(
                f"{name} is {getattr(other, name)}, but {getattr(first, name)} in {first_where}",
                where=other_where,
                hint="Members of one ensemble share rank, scaling and targets.",
            )


def check_same_base(first: LoraConfig, other: LoraConfig, first_where: str, other_where: str) -> None:
    """Raise `EnsembleFormatError` if two adapters name different base models."""
    names = [config.base_model_name_or_path or "" for config in (first, other)]
    resolved = [str(Path(name).resolve()) if Path(name).is_dir() else name for name in names]
    if all(names) and resolved[0] != resolved[1]:
        raise EnsembleFormatError(
            f"is an adapter of {names[1]}, but {first_where} is one of {names[0]}",
            where=f"{other_where}/{ADAPTER_CONFIG_FILE}",
            hint="Members of one ensemble share their base. If both names mean one model, give it one name.",
        )


def merged(base: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A copy of `base` without its joint layers, into which PEFT has merged one adapter."""
    plain = copy.deepcopy(base)
    if adapter.head is not None:
        head = nn.Linear(adapter.head.shape[1], 1, bias=False, device=adapter.head.device, dtype=adapter.head.dtype)
        plain.add_module(HEAD_NAME, head)
    for name, layer in joint_layers(plain).items():
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.base_layer)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder) / "member", adapter)
        return PeftModel.from_pretrained(plain, str(Path(folder) / "member")).merge_and_unload()
