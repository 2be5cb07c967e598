"""What every trainer of an ensemble changes in transformers' Trainer: hooks of a few lines each.

`EnsembleTrainer` is mixed in before a TRL trainer. The work behind the hooks is in files that can be read alone:
`start.py` (where the ensemble comes from), `objective.py` (what is minimised), `row_groups.py` (rows that share a
responsibility), `clipping.py`, `checkpoints.py`, `log.py`, `parallel.py` (members split over processes), `steps.py`
(parts of a batch, and the router). Each trainer says what an example's log-likelihood is; `sft.py` is the shortest.

Transformers' Trainer has no public hook for much of this, so this file and `steps.py` override and read its private
methods and counters. Trainers add to what is prepared and saved (`_prepare_dataset`, `_save`).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from renyi import data
from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError, TrainingDivergedError
from renyi.routing import ROUTED_ROW, AutoRouting, Sums, share_of
from renyi.training import card
from renyi.training.checkpoints import find_checkpoints, saved, state_at_end, written_whole
from renyi.training.clipping import clip_by_member
from renyi.training.group_batches import WithColumns
from renyi.training.hub import push_checkpoint, pushed, refused_by_the_hub, without_token
from renyi.training.langevin import KeepSnapshots, LangevinNoise, check_noise
from renyi.training.log import AfterLoopBegan, TrainingLog
from renyi.training.memorising import WarnOfMemory
from renyi.training.objective import Objective
from renyi.training.optimizer import give_spreads_a_rate
from renyi.training.parallel import MemberAccelerator, load_optimizer, save_optimizer
from renyi.training.report import FIGURE_FILE, MetricsFile, draw_training
from renyi.training.row_groups import RowGroups, grouped
from renyi.training.start import as_ensemble, check_asked, check_batch, check_kind, make_equal, make_ready, unmasked
from renyi.training.steps import RoutedSteps

LOGGING_STATE_FILE = "logging_state.json"
SCORES_FILE = "routing_scores.safetensors"  # of a checkpoint: what routes rows until they are scored again


class EnsembleTrainer(RoutedSteps):
    """Mixin for a TRL trainer whose `model` is a `LoraEnsemble`. The subclass computes log-probabilities, not TRL."""

    model: LoraEnsemble
    objective: Objective
    logged: TrainingLog
    args: Any  # an EnsembleConfig and the config of the TRL trainer that this is mixed into
    unit: str  # what losses are per, such as "trained token"
    routes_tokens = False  # whether one α-loss a token is built
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
        check_asked(args, train_dataset, kwargs, None if self.routes_tokens else self.unit)
        self.preparation = self.preparation_class.of(args)
        if kwargs.get("formatting_func") is None:  # such a function reads columns of its own
            train_dataset = self.preparation.readable(train_dataset, "train dataset")
            kwargs["eval_dataset"] = _each(kwargs.get("eval_dataset"), self.preparation.readable)
        callbacks = [MetricsFile(), *(callbacks or [])]
        if args.early_stopping_patience is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(args.early_stopping_patience)]
        ensemble = as_ensemble(model, args, peft_config, quantization_config)
        check_kind(ensemble, args, are_policies=not self.splits_batches)
        if args.alpha_hold_shared:
            make_equal(ensemble)
        make_ready(ensemble, args)
        self.limits = data.Limits.of(ensemble.base)
        if (given := kwargs.get("processing_class")) is not None:
            data.check_fits(getattr(given, "tokenizer", given), self.limits.vocabulary)
        self.cut_rows: dict[str, int] = {}  # how many rows of each dataset are cut
        with unmasked(args):
            super().__init__(model=ensemble, args=args, train_dataset=train_dataset, callbacks=callbacks, **kwargs)
        # Count the tokens that are trained. For models whose class names no loss (GPT-2), transformers counts the
        # first token of each row, too, which nothing predicts.
        self._loss_shifts_labels = True
        # TRL wraps the model's forward to add a head of its own. The ensemble has its own head.
        self.model.__dict__.pop("forward", None)
        if self.splits_batches:
            check_batch(args, self.train_dataset)
        self.data_collator = WithColumns(self.data_collator, [ROUTED_ROW, *data.VOTE_COLUMNS])
        self.groups: RowGroups | None = None
        if args.routing_group is not None:
            self.train_dataset = grouped(self.train_dataset, "train dataset")
            self.eval_dataset = _each(self.eval_dataset, grouped)
            self.groups = RowGroups(self.train_dataset, self.model.num_members)
        self.logged = TrainingLog(args.device, self.model.num_members, self.accelerator.reduce)
        self._restored_logging: dict[str, Any] | None = None
        self._step_of_first_loss = 0  # the step from which the total loss is summed
        self.add_callback(AfterLoopBegan(self.restore_logging_state))
        self.add_callback(WarnOfMemory(self.model.num_members, args.alpha, self.unit))
        self.start_routing()
        self.objective = Objective.of(self.model, args, self.loss_units, self.accelerator.reduce)
        if self.objective.learned_weights is not None:
            self.add_callback(self.objective.learned_weights)
        self._snapshots = KeepSnapshots(self.model, args.keep_snapshots) if args.keep_snapshots else None
        if args.member_kind == "langevin":
            units = self.loss_units()
            check_noise(args, units)
            self.add_callback(LangevinNoise(self.model, units, args.langevin_temperature))
        if self._snapshots is not None:
            self.add_callback(self._snapshots)

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
        if self.args.shard_base:  # split it before the whole base moves to one device
            self.model.shard_base()

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    # ---- The objective -----------------------------------------------------------------------------------------

    @property
    def current_alpha(self) -> float:
        """The order of this batch: the schedule's in training, the final one in evaluation.

        Read it once a batch, at the start of `compute_loss`, and pass it on as a number. It depends on the model's
        training mode, which code in between may turn off for a while.
        """
        return self.scheduled_alpha if self.model.training else self.args.alpha

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def scheduled_alpha(self) -> float:  # type: ignore[override]
        """The order of the next training step."""
        return self.objective.alpha(self._progress)

    def minimised(
        self, loss: Tensor, ell_ME: Tensor, r_ME: Tensor, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """What `compute_loss` returns: the loss of a micro-batch with the prior, and with M times its gradient.

        Raises:
            TrainingDivergedError: the loss is not a finite number.
        """
        share = None
        if self.model.training:
            parts = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            share = share_of(inputs) / parts
        loss = self.objective.of_batch(loss, r_ME, share, self._progress)
        if not math.isfinite(loss.item()):
            raise self._diverged(inputs, ell_ME)
        return loss

    def routed_loss(
        self, ell_ME: Tensor, tokens_E: Tensor, alpha: float, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The α-Rényi loss of a batch's examples [E], or of its groups [G], and the examples' responsibilities [M, E].

        Args:
            ell_ME: log-likelihoods of the examples, nats.
            tokens_E: their trained tokens.
            alpha: the order.
            inputs: the batch; with `routing_group` it has the numbers of its rows.
        """
        if self.groups is None or ROUTED_ROW not in inputs:
            return self.objective.of_examples(ell_ME, tokens_E, alpha)
        return self.groups.loss(self.objective, ell_ME, inputs[ROUTED_ROW], alpha, self.model.training)

    def loss_units(self) -> int:
        """How many units (tokens, or pairs) of the training data the reported loss is a mean over."""
        raise NotImplementedError

    def _diverged(self, inputs: dict[str, Any], ell_ME: Tensor) -> TrainingDivergedError:
        bad_M = (~ell_ME.isfinite()).any(dim=1).view(-1, self.model.draws).any(dim=1).nonzero().flatten().tolist()
        tokenizer: Any = self.processing_class
        text = tokenizer.decode(inputs["input_ids"][0][:24].tolist())
        return TrainingDivergedError(
            f"the loss is not a finite number (members {bad_M or 'none by themselves'})",
            where=f"step {self.state.global_step + 1}, batch of {len(inputs['input_ids'])} starting {text!r}",
            hint="Lower learning_rate, or set max_grad_norm; earlier checkpoints are untouched.",
        )

    # ---- Batches -----------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept = (data.GROUP_COLUMN, ROUTED_ROW, *data.VOTE_COLUMNS)
        columns: Any = self._signature_columns
        self._signature_columns: Any = list(dict.fromkeys((*(columns or []), *kept)))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in transformers; with `routing_group` its batches keep the rows of a group together."""
        if self.groups is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(self.groups.loader(self.train_dataset, self.args, self.data_collator))

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A group's loss is exact, in whatever batches its rows are."""
        if self.groups is not None:
            self.groups.begin_evaluation(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    # ---- Gradients ---------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in transformers; the members' spreads are a group of their own, with their own rate and no decay."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new:
            give_spreads_a_rate(optimizer, self.model, self.args.std_learning_rate)
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each member's gradient by itself, as an independent run would. Returns the mean of their norms."""
        self.accelerator.unscale_gradients()
        norms_M = clip_by_member(self.model.parameters(), self.args.max_grad_norm)
        return self.model.gathered(norms_M).mean()

    # ---- Checkpoints -------------------------------------------------------------------------------------------

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """As in transformers, but `resume_from_checkpoint=True` takes the newest *complete* checkpoint, if any.

        A run that had already ended is not trained further. Transformers would take one more step.
        """
        if resume_from_checkpoint is True:
            newest = find_checkpoints(self.output_dir).newest
            resume_from_checkpoint = str(newest) if newest else None
        if resume_from_checkpoint and (ended := self._ended(Path(resume_from_checkpoint))):
            return ended
        with self.as_trained():
            output = super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _ended(self, checkpoint: Path) -> TrainOutput | None:
        """If the run ended at `checkpoint`: load its members, and return what training returned. Else None."""
        state = state_at_end(checkpoint, self.num_steps)
        if state is None:
            return None
        self._load_from_checkpoint(str(checkpoint))
        logging_state, self._restored_logging = self._restored_logging or {"total_loss": 0.0, "loss": 0.0}, None
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        loss = (logging_state["total_loss"] + logging_state["loss"]) / max(state.global_step, 1)
        return TrainOutput(state.global_step, loss, {"train_loss": loss})

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, as the training loop will count them."""
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        return max_steps

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        # Older checkpoints may go only when this one is sealed.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with written_whole(checkpoint, self.args.should_save, self.accelerator.wait_for_everyone):
                super()._save_checkpoint(model, trial)
                self._write_logging_state(checkpoint)
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
        """As in transformers; it also writes the model card and the curves of training beside the ensemble.

        Raises:
            SaveError: a file could not be written; checkpoints are untouched.
        """
        if _internal_call:  # a checkpoint is an internal call
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or self.output_dir)
        with saved(folder):
            super().save_model(output_dir, True)  # it would push before the card is written
            if self._snapshots is not None and self.args.should_save:
                with self.model.acting_as(self._snapshots.with_snapshots(self.output_dir, self.state.max_steps)):
                    self.model.save(folder)
            self.create_model_card(folder=output_dir)
            self.draw(folder / FIGURE_FILE)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.output_dir)
        if self.args.should_save or self.model.mesh:
            self.model.save(folder)
        if not self.args.should_save:  # another process writes
            return
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        torch.save(without_token(self.args), folder / "training_args.bin")

    # ---- The hub -----------------------------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in transformers, before anything is trained.

        Raises:
            ConfigError: there is no token, or it may not write there.
        """
        with refused_by_the_hub():
            super().init_hf_repo(token, private)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            SaveError: it could not be pushed; the output folder is complete.
        """
        with pushed(self.args.hub_model_id or self.output_dir.name, self.output_dir):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the ensemble of a checkpoint. transformers would push the one adapter that it expects there."""
        if self.is_world_process_zero():
            push_checkpoint(self.args, self.hub_model_id, Path(checkpoint_folder))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.model.mesh is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler, self.model.mesh, self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.model.mesh is None or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        load_optimizer(Path(checkpoint), self.optimizer, self.lr_scheduler, self.model.members)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore_members(resume_from_checkpoint)
        state_file = Path(resume_from_checkpoint) / LOGGING_STATE_FILE
        self._restored_logging = json.loads(state_file.read_text(encoding="utf-8")) if state_file.exists() else None
        if self.groups is not None:
            self.groups.restore(Path(resume_from_checkpoint))
        scores_file = Path(resume_from_checkpoint) / SCORES_FILE
        if self.router.kept is not None and scores_file.exists():
            self.router.kept.restore(scores_file)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._restore_members(self.state.best_model_checkpoint)

    def _restore_members(self, checkpoint: str) -> None:
        """Load members and weights of a checkpoint. Alpha stays this run's, which may differ from the checkpoint's."""
        order = self.model.alpha, self.model.routing_quantity
        self.model.restore(checkpoint)
        self.model.alpha, self.model.routing_quantity = order

    # ---- Logging -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # transformers divides by the steps of this process alone
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._step_of_first_loss, 1)
        # The names tell what is logged. The model's mode does not: it stays in evaluation mode after an evaluation.
        prefix = next((n.removesuffix("loss") for n in logs if n.endswith("_loss") and n != "train_loss"), "")
        mode = "eval" if prefix else "train"
        if "loss" in logs or "train_loss" in logs:
            logs["alpha"] = self.scheduled_alpha
            logs["num_tokens"] = self._total_train_tokens
            if self.objective.learned_weights is not None:
                logs.update({f"mixture_weight/{m}": w for m, w in enumerate(self.model.weights.tolist())})
        if means := self.logged.take(mode):
            logs.update({prefix + name: value for name, value in self.derived(means).items()})
            if mode == "train":
                loads = [logs[f"member_load/{m}"] for m in range(self.model.num_members)]
                self.logged.starved.see(loads, is_settled=logs.get("alpha", 0.0) >= self.args.alpha > 0)
        super().log(logs, start_time)

    def derived(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, from the means of what was watched."""
        return means

    def draw(self, file: Path | None = None) -> None:
        """Draw the curves of the run so far into a file; `training.png` in the output folder if None."""
        if self.is_world_process_zero():
            file = file or self.output_dir / FIGURE_FILE
            draw_training(self.state.log_history, self.output_dir.name, file, self.unit)

    def watch(self, batch: Sums, inputs: dict[str, Any]) -> None:
        """Add what is logged about a batch, and in training also the tokens of its inputs."""
        self.logged.add(batch, "train" if self.model.training else "eval")
        if self.model.training:
            self.logged.add_tokens(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._total_train_tokens += self.logged.take_tokens()
        return loss

    def _write_logging_state(self, checkpoint: Path) -> None:
        """Write what was added up since the last log, so that a resumed run logs what an uninterrupted one does."""
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        state = {
            **self.logged.state(),
            "loss": loss.item(),
            "total_loss": self._total_loss_scalar,
            "step_last_logged": self._globalstep_last_logged,
            "num_tokens": self._total_train_tokens,
            "routing": self.router.auto.state(),
        }
        if not self.args.should_save:
            return
        if self.groups is not None:
            self.groups.save(checkpoint)
        if self.router.kept is not None:
            self.router.kept.save(checkpoint / SCORES_FILE)
        (checkpoint / LOGGING_STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def restore_logging_state(self) -> None:
        """Take back what `_write_logging_state` wrote; the training loop has just set it to zero."""
        state, self._restored_logging = self._restored_logging, None
        self._step_of_first_loss = self.state.global_step
        if state is None:
            return
        self._tr_loss += state["loss"]
        self._total_loss_scalar, self._step_of_first_loss = state["total_loss"], 0
        self._globalstep_last_logged = state["step_last_logged"]
        self._total_train_tokens = state["num_tokens"]
        self.router.auto = AutoRouting(**state["routing"])
        self.logged.restore(state, holds_sums=self.accelerator.process_index == 0)

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
                hub_id=self.hub_model_id,
            )


def _each(held_out: Any, work: Callable[[Any, str], Any]) -> Any:
    """The evaluation rows, or each of several evaluation datasets, after some work that takes rows and their name."""
    if isinstance(held_out, dict):
        return {name: work(rows, f"{name} dataset") for name, rows in held_out.items()}
    return None if held_out is None else work(held_out, "eval dataset")
