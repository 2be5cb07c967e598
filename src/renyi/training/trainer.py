"""What any trainer over an ensemble changes in transformers' Trainer.

Mixed in before a TRL trainer, this decides how an ensemble is made, routed, clipped, saved, resumed and logged. It is
the one file that touches the private methods of transformers' Trainer, because it has no public hook for these. What
an example's log-likelihood is, a trainer says.
"""

import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from renyi import data
from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError, DataError, RenyiError, SaveError, TrainingDivergedError
from renyi.objectives import example_loss, example_responsibilities
from renyi.routing import AutoRouting, Sums, share_of
from renyi.training import card
from renyi.training.checkpoints import SEAL_FILE, find_checkpoints, seal
from renyi.training.config import AUTO
from renyi.training.machine import LEAST_PARAMETERS, bf16_pays, keep_freed_memory
from renyi.training.parallel import MemberAccelerator, gather_state, own_state
from renyi.training.report import FIGURE_FILE, MetricsFile, draw_training
from renyi.training.schedule import scheduled_alpha
from renyi.training.start import as_ensemble
from renyi.training.statistics import LearnMixtureWeights, RunningMeans
from renyi.training.steps import RoutedSteps

logger = logging.getLogger(__name__)

LOGGING_STATE_FILE = "logging_state.json"
# A member whose load stays below a tenth of its fair share over this many logs is called starved.
STARVED_LOGS = 3


@contextmanager
def _unmasked(args: Any) -> Iterator[None]:
    """Keep TRL from looking for messages to mask in its own way: rows of every form come to it with labels."""
    asked = getattr(args, "assistant_only_loss", False)
    if asked:
        args.assistant_only_loss = False
    try:
        yield
    finally:
        if asked:
            args.assistant_only_loss = True


class EnsembleTrainer(RoutedSteps):
    """Mixin for a TRL trainer whose `model` is a `LoraEnsemble`. The TRL trainer must leave log-probabilities to us."""

    model: LoraEnsemble
    args: Any  # an EnsembleConfig and the config of the TRL trainer that this is mixed into
    unit: str  # what losses are per, such as "trained token"
    _tag_names: list[str]
    preparation_class: type[data.RowPreparation]

    def __init__(
        self,
        model: str | PreTrainedModel | LoraEnsemble,
        args: Any,
        train_dataset: Dataset | IterableDataset,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        **kwargs: Any,
    ):
        if args.alpha == AUTO:
            raise ConfigError(
                "auto is decided ahead of training, by `renyi.runs.run`, `renyi sft` and `renyi dpo`",
                where="alpha",
                hint="Give a number here; `renyi.inference.diagnose` recommends one.",
            )
        for unsupported in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(unsupported) is not None:
                raise ConfigError(f"{unsupported} needs logits, which are never built", hint="Leave it out.")
        if isinstance(train_dataset, Dataset) and len(train_dataset) == 0:
            raise DataError("the dataset is empty", where="train dataset", hint="A dataset needs at least one row.")
        self.preparation = self.preparation_class.of(args)
        if kwargs.get("formatting_func") is None:  # which reads columns of its own
            readable, held_out = self.preparation.readable, kwargs.get("eval_dataset")
            train_dataset = readable(train_dataset, "train dataset")
            if isinstance(held_out, dict):
                kwargs["eval_dataset"] = {k: readable(v, f"{k} dataset") for k, v in held_out.items()}
            elif held_out is not None:
                kwargs["eval_dataset"] = readable(held_out, "eval dataset")
        callbacks = [MetricsFile(), *(callbacks or [])]
        if args.early_stopping_patience is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(args.early_stopping_patience)]
        ensemble = as_ensemble(model, args, peft_config, quantization_config)
        ensemble.alpha, ensemble.routing_quantity = args.alpha, args.routing_quantity
        if args.compile_blocks is not None:
            # Scoring and training are graphs of their own; with lengths as variables they stay within torch's limit.
            ensemble.compile(dynamic=None if args.routing == "dense" else True, **args.compile_blocks)
        if args.device.type == "cpu":
            keep_freed_memory()
            large = ensemble.base.num_parameters() >= LEAST_PARAMETERS
            if args.bf16_if_it_pays and large and bf16_pays():
                args.bf16, args.mixed_precision = True, "bf16"
        self.limits = data.Limits.of(ensemble.base)
        self.cut_rows: dict[str, int] = {}  # how many rows of each dataset are cut
        with _unmasked(args):
            super().__init__(model=ensemble, args=args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        # Count the tokens that are trained. For models whose class names no loss (GPT-2), transformers counts the
        # first token of each row, too, which nothing predicts.
        self._loss_shifts_labels = True
        # TRL wraps the model's forward to add its own head, which ours makes needless.
        self.model.__dict__.pop("forward", None)
        self._watched = {mode: RunningMeans(args.device) for mode in ("train", "eval")}
        self._seen_tokens: Tensor | int = 0  # of the step at hand, in this process
        self._starved_logs = [0] * self.model.num_members
        self._warned_starved = False
        self._restored_logging: dict[str, Any] | None = None
        self._step_of_first_loss = 0  # what the total loss is summed from
        self.add_callback(_RestoreLogging(self))
        self.start_routing()
        self._learned_weights: LearnMixtureWeights | None = None
        if args.mixture_weights == "learned":
            rate = args.mixture_weights_rate
            self._learned_weights = LearnMixtureWeights(self.model, self.accelerator.reduce, rate)
            self.add_callback(self._learned_weights)
        if args.prior_std is not None:
            self._prior_units = self._loss_units()
            self._divergence = self.model.stack.prior(args.prior_std)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.model.mesh is None:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "FSDP or DeepSpeed would split each member, too",
                where="member_parallel" if self.args.member_parallel > 1 else "shard_base",
                hint="Launch without them; shard_base splits the base, and only adapters have optimizer states.",
            )
        MemberAccelerator.take_over(self.accelerator, self.model.mesh)
        if self.args.shard_base:  # before the whole of it goes to one device
            self.model.shard_base()

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    # ---- The objective -----------------------------------------------------------------------------------------

    @property
    def current_alpha(self) -> float:
        """The order of the batch at hand: the schedule's while training, the final one in evaluation.

        Read it once a batch, at the start of `compute_loss`, and pass it on as a number: whoever turns the model's
        training mode off for a while would read another one.
        """
        return self._scheduled_alpha if self.model.training else self.args.alpha

    @property
    def _scheduled_alpha(self) -> float:
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return scheduled_alpha(progress, self.args.alpha, self.args.alpha_hold_ratio, self.args.alpha_ramp_ratio)

    def routed(self, ell_ME: Tensor, tokens_E: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        """The α-Rényi loss [E] of examples, and their responsibilities [M, E].

        Args:
            ell_ME: log-likelihoods, nats.
            tokens_E: trained tokens, which length-normalised routing divides by.
            alpha: the order.
        """
        given = tokens_E, alpha, self.model.weights.log(), self.args.routing_quantity
        return example_loss(ell_ME, *given), example_responsibilities(ell_ME.detach(), *given)

    def to_minimise(
        self, loss: Tensor, ell_ME: Tensor, r_ME: Tensor, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch with the prior, checked, and with M times its gradient.

        Raises:
            TrainingDivergedError: it is no finite number.
        """
        loss = scale_gradient(loss, self.model.num_members)
        if self.model.training:
            if self.args.prior_std is not None:
                loss = loss + scale_gradient(self._prior(share_of(inputs), num_items_in_batch), len(self.model.members))
            if self._learned_weights is not None:
                self._learned_weights.add(r_ME)
        if not math.isfinite(loss.item()):
            raise self._diverged(inputs, ell_ME)
        return loss

    def _loss_units(self) -> int:
        """How many units (tokens, or pairs) of the training data the reported loss is a mean over."""
        raise NotImplementedError

    def _prior(self, share: float, num_items_in_batch: Tensor | int | None) -> Tensor:
        """The prior's part of a micro-batch: (1/M) Σ_m KL(member m, its prior), spread over the dataset's units.

        On a mesh it is the mean over this process's members; the loss that is logged is the mean over processes.
        """
        divergence = share * self._divergence().mean()
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return divergence / (self._prior_units * steps)

    def _diverged(self, inputs: dict[str, Any], ell_ME: Tensor) -> TrainingDivergedError:
        bad_M = (~ell_ME.isfinite()).any(dim=1).nonzero().flatten().tolist()
        tokenizer: Any = self.processing_class
        text = tokenizer.decode(inputs["input_ids"][0][:24].tolist())
        return TrainingDivergedError(
            f"the loss is not a finite number (members {bad_M or 'none by themselves'})",
            where=f"step {self.state.global_step + 1}, batch of {len(inputs['input_ids'])} starting {text!r}",
            hint="Lower learning_rate, or set max_grad_norm; earlier checkpoints are untouched.",
        )

    # ---- Gradients ---------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every member's gradient by itself, as an independent run would; return the mean of their norms."""
        self.accelerator.unscale_gradients()
        stacked = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms_M = torch.stack([_at_least_float32(g).flatten(1).norm(dim=1) for g in stacked]).norm(dim=0)
        factor_M = (self.args.max_grad_norm / (norms_M + 1e-6)).clamp(max=1.0)
        for grad in stacked:
            grad.mul_(factor_M.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
        return self.model.gathered(norms_M).mean()

    # ---- Checkpoints -------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As in transformers, but `resume_from_checkpoint=True` takes the newest *complete* checkpoint, if any.

        A run that had already ended is not trained further, where transformers would take one step more.
        """
        if resume_from_checkpoint is True:
            newest = find_checkpoints(self.output_dir).newest
            resume_from_checkpoint = str(newest) if newest else None
        if resume_from_checkpoint and (ended := self._ended(Path(resume_from_checkpoint))):
            return ended
        output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _ended(self, checkpoint: Path) -> TrainOutput | None:
        """What training to the end returned, with the members as they were then, if `checkpoint` is that end."""
        state = self.state_at_end(checkpoint)
        if state is None:
            return None
        self._load_from_checkpoint(str(checkpoint))
        logging_state, self._restored_logging = self._restored_logging or {"total_loss": 0.0, "loss": 0.0}, None
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        loss = (logging_state["total_loss"] + logging_state["loss"]) / max(state.global_step, 1)
        return TrainOutput(state.global_step, loss, {"train_loss": loss})

    def state_at_end(self, checkpoint: Path) -> TrainerState | None:
        """The state in `checkpoint` if the run ended there: it took all of its steps, or it stopped early."""
        state_file = checkpoint / TRAINER_STATE_NAME
        if not state_file.is_file():
            return None
        state = TrainerState.load_from_json(str(state_file))
        control = state.stateful_callbacks.get("TrainerControl", {})
        stopped = control.get("args", {}).get("should_training_stop", False)
        ended = state.global_step >= self.num_steps or (stopped and state.global_step < state.max_steps)
        return state if ended else None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, as the training loop will count them."""
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return max_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # A half-written folder of an earlier run; sealed ones are never written twice.
            shutil.rmtree(checkpoint, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # before another process writes its own random state there
        # Older checkpoints may go only when this one is sealed.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            self._write_logging_state(checkpoint)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(checkpoint)
        except (RuntimeError, OSError, SafetensorError) as error:
            if isinstance(error, RenyiError) and not isinstance(error, SaveError):
                raise
            (checkpoint / SEAL_FILE).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
            survivor = find_checkpoints(self.output_dir).newest
            raise SaveError(
                f"the checkpoint could not be written ({_first_line(error)})",
                where=str(checkpoint),
                hint=(f"{survivor} is untouched. " if survivor else "")
                + "Free some space and run the same command: it goes on from there.",
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=self._get_output_dir(trial),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, and beside the ensemble its model card and the curves of its training."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call:  # which a checkpoint is
            self.create_model_card(folder=output_dir)
            self.draw(Path(output_dir or self.output_dir) / FIGURE_FILE)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.output_dir)
        if self.args.should_save or self.model.mesh:
            self.model.save(folder)
        if not self.args.should_save:  # another process writes
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.model.mesh is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = gather_state(self.optimizer.state_dict(), self.model.mesh)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.model.mesh is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(own_state(state, self.model.members))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore_members(resume_from_checkpoint)
        state_file = Path(resume_from_checkpoint) / LOGGING_STATE_FILE
        self._restored_logging = json.loads(state_file.read_text(encoding="utf-8")) if state_file.exists() else None

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore_members(self.state.best_model_checkpoint)

    def _restore_members(self, checkpoint: str) -> None:
        """Members and weights of a checkpoint; the order is this run's, which may have been given another."""
        order = self.model.alpha, self.model.routing_quantity
        self.model.restore(checkpoint)
        self.model.alpha, self.model.routing_quantity = order

    # ---- Logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # transformers divides by the steps of this process alone
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._step_of_first_loss, 1)
        # What is logged shows in the names, not in the model's mode: after an evaluation it stays in evaluation mode.
        prefix = next((n.removesuffix("loss") for n in logs if n.endswith("_loss") and n != "train_loss"), "")
        mode = "eval" if prefix else "train"
        if "loss" in logs or "train_loss" in logs:
            logs["alpha"] = self._scheduled_alpha
            logs["num_tokens"] = self._total_train_tokens
            if self._learned_weights is not None:
                logs.update({f"mixture_weight/{m}": w for m, w in enumerate(self.model.weights.tolist())})
        if self._watched[mode].names:
            sums = self.accelerator.reduce(self._watched[mode].sums)
            means = self.derived(self._watched[mode].means(sums))
            logs.update({prefix + k: v for k, v in means.items()})
            if mode == "train":
                self._watch_starvation(logs)
            self._watched[mode] = RunningMeans(self.args.device)
        super().log(logs, start_time)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means of what was watched."""
        return means

    def draw(self, file: Path | None = None) -> None:
        """Draw the curves of the run, as far as it is logged, into a file; that of the output folder if None."""
        if self.is_world_process_zero():
            file = file or self.output_dir / FIGURE_FILE
            draw_training(self.state.log_history, self.output_dir.name, file, self.unit)

    def watch(self, batch: Sums, inputs: dict[str, Any]) -> None:
        """Add what is logged of a batch, and in training the tokens of its inputs."""
        self._watched["train" if self.model.training else "eval"].add(batch)
        if self.model.training:
            seen = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self._seen_tokens = self._seen_tokens + seen

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        # Once a step: processes may take it in different numbers of parts.
        seen = torch.as_tensor(self._seen_tokens, device=self.args.device)
        self._total_train_tokens += int(self.accelerator.reduce(seen))
        self._seen_tokens = 0
        return loss

    def _watch_starvation(self, logs: dict[str, float]) -> None:
        """Warn, once a run, of a member whose load stays far below its share after the ramp."""
        threshold = 1 / (10 * self.model.num_members)
        settled = logs.get("alpha", 0.0) >= self.args.alpha > 0
        for m in range(self.model.num_members):
            low = settled and logs[f"member_load/{m}"] < threshold
            self._starved_logs[m] = self._starved_logs[m] + 1 if low else 0
            if self._starved_logs[m] == STARVED_LOGS and not self._warned_starved:
                self._warned_starved = True
                logger.warning(
                    "Member %d starves: it explains %.1f%% of the examples (a fair share is %.1f%%), so it learns next "
                    "to nothing and its answers pollute every uncertainty. Hold alpha at 0 for longer "
                    "(alpha_hold_ratio), train fewer members (num_members), or drop it afterwards with "
                    "LoraEnsemble.drop_member(%d).",
                    m, 100 * logs[f"member_load/{m}"], 100 / self.model.num_members, m,
                )  # fmt: skip

    def _write_logging_state(self, checkpoint: Path) -> None:
        """What lies between two logs, so that a resumed run logs what an uninterrupted one does."""
        watched = self._watched["train"]
        sums = self.accelerator.reduce(watched.sums)
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        if self.args.should_save:
            state = {
                "watched": watched.state(sums),
                "loss": loss.item(),
                "total_loss": self._total_loss_scalar,
                "step_last_logged": self._globalstep_last_logged,
                "num_tokens": self._total_train_tokens,
                "routing": self.router.auto.state(),
                "starved_logs": self._starved_logs,
                "warned_starved": self._warned_starved,
            }
            (checkpoint / LOGGING_STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _restore_logging_state(self) -> None:
        state, self._restored_logging = self._restored_logging, None
        self._step_of_first_loss = self.state.global_step
        if state is None:
            return
        self._tr_loss += state["loss"]
        self._total_loss_scalar, self._step_of_first_loss = state["total_loss"], 0
        self._globalstep_last_logged = state["step_last_logged"]
        self._total_train_tokens = state["num_tokens"]
        self.router.auto = AutoRouting(**state["routing"])
        self._starved_logs, self._warned_starved = state["starved_logs"], state["warned_starved"]
        watched = self._watched["train"]
        watched.restore(state["watched"])
        if self.accelerator.process_index != 0:  # the sums of all processes are held by one
            watched.sums = torch.zeros_like(watched.sums)

    # ---- Model card --------------------------------------------------------------------------------------------

    def method_card(self) -> card.Method:
        """What the model card says of the method."""
        return card.routed(self.unit)

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        folder: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `README.md` into a folder; the output folder if None."""
        if self.is_world_process_zero():
            card.write_model_card(
                Path(folder) if folder else self.output_dir,
                ensemble=self.model,
                args=self.args,
                log_history=self.state.log_history,
                dataset_name=dataset_name,
                method=self.method_card(),
                tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            )


class _RestoreLogging(TrainerCallback):
    """The training loop resets its sums when it starts; this puts the checkpoint's back just after."""

    def __init__(self, trainer: EnsembleTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._restore_logging_state()
        follow_schedule(kwargs.get("lr_scheduler"))


def follow_schedule(scheduler: Any) -> None:
    """Give the optimizer the learning rates of its schedule at the step where it stands.

    A checkpoint brings the rates of the schedule that it was written under. A run that goes on for longer has another
    one, and would take its first step at the old rate, which is 0 at the end of a linear schedule.
    """
    if isinstance(scheduler, LambdaLR):
        step = scheduler.last_epoch
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler.load_state_dict({**scheduler.state_dict(), "_last_lr": rates})  # which is what is logged


def scale_gradient(loss: Tensor, factor: float) -> Tensor:
    """`loss`, unchanged in value, with `factor` times its gradient."""
    return loss.detach() + factor * (loss - loss.detach())


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
