"""The ensemble that a trainer starts from: given, loaded, or newly drawn on a base. It may be split over processes.

Read next: `renyi.ensemble.facade`, `LoraEnsemble`.
"""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from renyi.ensemble import LoraEnsemble
from renyi.ensemble.mesh import MemberMesh
from renyi.ensemble.storage import is_adapter, read_ensemble
from renyi.errors import ConfigError
from renyi.layout import MANIFEST_FILE
from renyi.members import kind_of


def as_ensemble(
    model: str | PreTrainedModel | LoraEnsemble,
    args: Any,
    peft_config: PeftConfig | None,
    quantization_config: Any = None,
    rates: bool = False,
) -> LoraEnsemble:
    """The ensemble that a trainer's `model` stands for: itself, a saved one, or fresh members on a base model.

    Args:
        model: as for the trainer.
        args: its config.
        peft_config: of fresh members.
        quantization_config: how to quantise a base that is named.
        rates: whether members are reward models: a base that is named is then loaded with a head, drawn if it has none.

    Raises:
        ConfigError: an ensemble comes with another number of members or a LoRA config of its own.
    """
    saved = isinstance(model, str) and ((Path(model) / MANIFEST_FILE).is_file() or is_adapter(Path(model)))
    init: dict[str, Any] = {}
    if isinstance(model, str):
        assert not isinstance(args.model_init_kwargs, str)  # parsed by TrainingArguments
        init = dict(args.model_init_kwargs or {})
        if quantization_config is not None:
            init["quantization_config"] = quantization_config
        if args.distributed_state is not None and args.distributed_state.distributed_type == "MULTI_GPU":
            init["device_map"] = None
        init.setdefault("trust_remote_code", args.trust_remote_code)
    set_seed(args.seed)
    mesh = model.mesh if isinstance(model, LoraEnsemble) else None
    if mesh is None and (args.member_parallel > 1 or args.shard_base):
        mesh = MemberMesh(args.member_parallel, args.device.type)
        mesh.share(args.num_members)
    if saved:
        assert isinstance(model, str)
        base = _base(read_ensemble(Path(model)).base_model, init, rates)
        model = LoraEnsemble.load(model, base=base, mesh=mesh)
    if isinstance(model, LoraEnsemble):
        if peft_config is not None or model.num_members != args.num_members:
            raise ConfigError(
                f"the ensemble has {model.num_members} members of its own config",
                where="model",
                hint=f"Leave out peft_config and set num_members={model.num_members}.",
            )
        if (mesh.size if mesh else 1) != args.member_parallel:
            raise ConfigError(
                "the ensemble is split over another number of processes",
                where="member_parallel",
                hint="Save it, and load it again.",
            )
        if args.member_kind not in ("point", model.stack.kind):
            raise ConfigError(
                f"the members of the given ensemble are {model.stack.kind}, not {args.member_kind}",
                where="member_kind",
                hint="Leave it out, or begin with the base model.",
            )
        args.member_kind = model.stack.kind
        if mesh is not None and model.mesh is None:
            model.split(mesh)
        return model
    if isinstance(model, str):
        model = _base(model, init, rates)
    if peft_config is None:
        task = "SEQ_CLS" if rates else "CAUSAL_LM"
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)
    ensemble = LoraEnsemble.from_base(
        model, args.num_members, peft_config, seed=args.seed, mesh=mesh, member_kind=args.member_kind
    )
    if args.initial_std is not None:
        ensemble.stack.set_std(args.initial_std)
    return ensemble


def _base(name: str, init: dict[str, Any], rates: bool) -> PreTrainedModel:
    if not rates:
        return create_model_from_path(name, **init)
    with suppress_seqcls_warning():
        kind: Any = AutoModelForSequenceClassification
        return create_model_from_path(name, kind, **{**init, "num_labels": 1})


def check_kind(ensemble: LoraEnsemble, args: Any) -> None:
    """Raise `ConfigError` for a setting that does not go with the kind of the members."""
    kind = kind_of(ensemble.stack.kind)
    if not kind.is_random and args.num_draws > 1:
        raise ConfigError(
            f"{args.num_draws} draws of a {kind.kind} member are {args.num_draws} times the same",
            where="num_draws",
            hint="Leave it out, or write member_kind: gaussian.",
        )
    if args.routing_group is not None and (kind.is_random or args.routing_quantity == "token"):
        what = f"{kind.kind} members" if kind.is_random else "routing_quantity: token"
        raise ConfigError(
            f"the rows of a group share one responsibility, which {what} cannot have",
            where="routing_group",
            hint="Leave it out, or train points on whole examples.",
        )
    if kind.is_random and args.compile_blocks is not None:
        raise ConfigError(
            "compiled blocks cannot draw noise that changes with every step",
            where="torch_compile",
            hint=f"Leave it out with member_kind: {kind.kind}.",
        )
    if kind.spreads and args.prior_std is not None and ensemble.stack.has_zero_std:
        raise ConfigError(
            "a member without spread is infinitely far from a prior",
            where="initial_std",
            hint="Give a number above 0, or no prior_std.",
        )
