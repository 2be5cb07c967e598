"""What a trainer starts from: its arguments, checked, and an ensemble that is given, loaded, or drawn on a base.

Read next: `renyi.ensemble.facade`, `LoraEnsemble`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed
from trl.trainer.reward_trainer import suppress_seqcls_warning
from trl.trainer.utils import create_model_from_path

from renyi.ensemble import LoraEnsemble
from renyi.ensemble.mesh import MemberMesh
from renyi.ensemble.storage import is_adapter, read_ensemble
from renyi.errors import ConfigError, DataError
from renyi.layout import MANIFEST_FILE
from renyi.machine import LEAST_PARAMETERS, bf16_pays, keep_freed_memory
from renyi.members import kind_of
from renyi.training.config import AUTO


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


def check_asked(args: Any, train_dataset: Any, given: Mapping[str, Any], whole: str | None) -> None:
    """Raise an error about what a trainer was given, before anything is loaded.

    Args:
        args: its config.
        train_dataset: its rows.
        given: its further arguments.
        whole: what it scores as a whole, such as "pair"; None if it can also route tokens.

    Raises:
        ConfigError: a setting or an argument cannot be used.
        DataError: there are no rows.
    """
    if args.alpha == AUTO:
        raise ConfigError(
            "auto is decided ahead of training, by `renyi.runs.run`, `renyi sft` and `renyi dpo`",
            where="alpha",
            hint="Give a number here; `renyi.inference.diagnose` recommends one.",
        )
    for unsupported in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        if given.get(unsupported) is not None:
            raise ConfigError(f"{unsupported} needs logits, which are never built", hint="Leave it out.")
    if args.routing_quantity == "token" and whole is not None:
        raise ConfigError(
            f"'token' is not built here: a {whole} is scored as a whole",
            where="routing_quantity",
            hint="Give sequence or length_normalised.",
        )
    if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
        raise DataError("the dataset is empty", where="train dataset", hint="A dataset needs at least one row.")


def check_batch(args: Any, rows: Any) -> None:
    """Raise `ConfigError` if the prepared rows do not fill one batch, and batches that are not full are dropped."""
    batch = args.train_batch_size * args.data_processes
    if args.dataloader_drop_last and isinstance(rows, Dataset) and len(rows) < batch:
        raise ConfigError(
            f"{len(rows)} rows are less than a batch of {batch}, and the last batch is dropped: none is left",
            where="dataloader_drop_last",
            hint=f"Write dataloader_drop_last: false, or a batch of at most {len(rows)}.",
        )


def make_ready(ensemble: LoraEnsemble, args: Any) -> None:
    """Give an ensemble the order of the training, and settle what depends on the machine."""
    ensemble.alpha, ensemble.routing_quantity = args.alpha, args.routing_quantity
    if args.device.type == "cpu":
        keep_freed_memory()
        large = ensemble.base.num_parameters() >= LEAST_PARAMETERS
        if args.bf16_if_it_pays and large and bf16_pays():
            args.bf16, args.mixed_precision = True, "bf16"


def make_equal(ensemble: LoraEnsemble) -> None:
    """Give all members the values of the first, for `alpha_hold_shared`.

    Raises:
        ConfigError: members were trained already, and differ.
    """
    trained = [p for name, p in ensemble.named_parameters() if p.requires_grad and not name.endswith("lora_A")]
    if any((p != p[:1]).any() for p in trained):
        raise ConfigError(
            "the members of the given ensemble differ, and one cannot be trained for all",
            where="alpha_hold_shared",
            hint="Leave it out, or begin with the base model.",
        )
    with torch.no_grad():
        for parameter in ensemble.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter[:1].expand_as(parameter))


def check_kind(ensemble: LoraEnsemble, args: Any, are_policies: bool) -> None:
    """Raise `ConfigError` for a setting that does not go with the kind of the members.

    Args:
        ensemble: the members.
        args: the trainer's config.
        are_policies: whether members write what they are trained on.
    """
    kind = kind_of(ensemble.stack.kind)
    if are_policies and kind.kind != "point":
        raise ConfigError(
            f"the members of the given ensemble are {kind.kind}, and a policy is one adapter",
            where="member_kind",
            hint="Save its means first: ensemble.mean().save(folder).",
        )
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


@contextmanager
def unmasked(args: Any) -> Iterator[None]:
    """Keep TRL from masking messages in its own way. Rows of every form already have labels."""
    asked = getattr(args, "assistant_only_loss", False)
    if asked:
        args.assistant_only_loss = False
    try:
        yield
    finally:
        if asked:
            args.assistant_only_loss = True
