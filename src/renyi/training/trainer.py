"""What any trainer over an ensemble changes in transformers' Trainer.

Mixed in before a TRL trainer, this decides how an ensemble is clipped, saved, resumed and logged. It is the one file
that touches the private methods of transformers' Trainer, because it has no public hook for these. It knows nothing
about objectives.
"""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from renyi.ensemble import LoraEnsemble
from renyi.errors import RenyiError, SaveError
from renyi.objectives import effective_members, renyi_loss
from renyi.training import card
from renyi.training.checkpoints import SEAL_FILE, find_checkpoints, seal

logger = logging.getLogger(__name__)

LOGGING_STATE_FILE = "logging_state.json"
# A member whose load stays below a tenth of its fair share over this many logs is called starved.
STARVED_LOGS = 3


class RoutingSums:
    """Running sums of what the log reports, over examples and tokens of this process since the last log.

    Everything is a plain sum, so processes, micro-batches and log intervals add up exactly.
    """

    names = ("tokens", "examples", "nll_members", "nll_mixture", "effective_members", "entropy", "correct")

    def __init__(self, num_members: int, device: torch.device):
        self.num_members = num_members
        self.sums = torch.zeros(len(self.names) + num_members, dtype=torch.float64, device=device)

    def add(self, ell_ME: Tensor, r_ME: Tensor, tokens_E: Tensor, log_weights: Tensor, **token_sums: Tensor) -> None:
        """Add a batch: log-likelihoods and responsibilities [M, E], trained tokens [E], mixture log-weights [M]."""
        batch = {
            "tokens": tokens_E.sum(),
            "examples": ell_ME.new_tensor(ell_ME.shape[1]),
            "nll_members": renyi_loss(ell_ME, 0.0, log_weights).sum(),
            "nll_mixture": renyi_loss(ell_ME, 1.0, log_weights).sum(),
            "effective_members": effective_members(r_ME).sum(),
            **token_sums,
        }
        self.sums += torch.cat([torch.stack([batch[n].double() for n in self.names]), r_ME.sum(dim=1).double()])

    def metrics(self, sums: Tensor) -> dict[str, float]:
        """Names as they are logged: nats per trained token, shares of examples."""
        totals = dict(zip(self.names, sums.tolist(), strict=False))
        tokens, examples = max(totals["tokens"], 1), max(totals["examples"], 1)
        metrics = {
            "nll_members": totals["nll_members"] / tokens,
            "nll_mixture": totals["nll_mixture"] / tokens,
            "jensen_gap": (totals["nll_members"] - totals["nll_mixture"]) / tokens,
            "effective_members": totals["effective_members"] / examples,
            "entropy": totals["entropy"] / tokens / self.num_members,
            "mean_token_accuracy": totals["correct"] / tokens / self.num_members,
        }
        loads = sums[len(self.names) :].tolist()
        return metrics | {f"member_load/{m}": load / examples for m, load in enumerate(loads)}


class EnsembleTrainer(Trainer):
    """Mixin for a TRL trainer whose `model` is a `LoraEnsemble`."""

    model: LoraEnsemble
    args: Any  # the config of the TRL trainer that this is mixed into
    _tag_names: list[str]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # TRL wraps the model's forward to add its own head, which ours makes needless.
        self.model.__dict__.pop("forward", None)
        self._routing = {mode: self._new_sums() for mode in ("train", "eval")}
        self._starved_logs = [0] * self.model.num_members
        self._warned_starved = False
        self._restored_logging: dict[str, Any] | None = None
        self._step_of_first_loss = 0  # what the total loss is summed from
        self.add_callback(_RestoreLogging(self))

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    def _new_sums(self) -> RoutingSums:
        return RoutingSums(self.model.num_members, self.args.device)

    # ---- Gradients ---------------------------------------------------------------------------------------------

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip every member's gradient by itself, as an independent run would; return the mean of their norms."""
        self.accelerator.unscale_gradients()
        stacked = [p.grad for p in self.model.parameters() if p.grad is not None]
        norms_M = torch.stack([g.float().flatten(1).norm(dim=1) for g in stacked]).norm(dim=0)
        factor_M = (self.args.max_grad_norm / (norms_M + 1e-6)).clamp(max=1.0)
        for grad in stacked:
            grad.mul_(factor_M.to(grad.dtype).view(-1, *[1] * (grad.dim() - 1)))
        return norms_M.mean()

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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # another process writes
            return
        folder = Path(output_dir or self.output_dir)
        self.model.save(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(str(folder))
        torch.save(self.args, folder / "training_args.bin")

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
        sums = self.accelerator.reduce(self._routing[mode].sums)
        if sums[1] > 0:
            logs.update({prefix + k: v for k, v in self._routing[mode].metrics(sums).items()})
            if mode == "train":
                self._watch_starvation(logs)
            self._routing[mode] = self._new_sums()
        super().log(logs, start_time)

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
        sums = self.accelerator.reduce(self._routing["train"].sums)
        loss = self.accelerator.reduce(self._tr_loss.detach().clone(), reduction="mean")
        if self.args.should_save:
            state = {
                "routing_sums": sums.tolist(),
                "loss": loss.item(),
                "total_loss": self._total_loss_scalar,
                "step_last_logged": self._globalstep_last_logged,
                "num_tokens": self._total_train_tokens,
                "starved_logs": self._starved_logs,
                "warned_starved": self._warned_starved,
            }
            (checkpoint / LOGGING_STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

    def _restore_logging_state(self) -> None:
        state, self._restored_logging = self._restored_logging, None
        self._step_of_first_loss = self.state.global_step
        if state is None or len(state["routing_sums"]) != self._routing["train"].sums.numel():
            return
        self._tr_loss += state["loss"]
        self._total_loss_scalar, self._step_of_first_loss = state["total_loss"], 0
        self._globalstep_last_logged = state["step_last_logged"]
        self._total_train_tokens = state["num_tokens"]
        self._starved_logs, self._warned_starved = state["starved_logs"], state["warned_starved"]
        if self.is_world_process_zero():  # the sums of all processes, held by one
            self._routing["train"].sums += torch.tensor(state["routing_sums"], dtype=torch.float64)

    # ---- Model card --------------------------------------------------------------------------------------------

    def create_model_card(  # type: ignore[override]
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write `README.md` into the output folder."""
        if self.is_world_process_zero():
            card.write_model_card(
                self.output_dir,
                ensemble=self.model,
                args=self.args,
                log_history=self.state.log_history,
                dataset_name=dataset_name,
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


class LearnMixtureWeights(TrainerCallback):
    """Online expectation–maximisation of the mixture weights.

    At a stationary point of the objective a member's weight equals its load, the mean of its responsibilities
    (the M-step of a mixture). After every optimizer step the weights move a little towards the loads of that step's
    examples; while alpha is 0 responsibilities equal the weights and nothing moves.
    """

    def __init__(self, trainer: EnsembleTrainer, rate: float):
        self.trainer, self.rate = trainer, rate
        self._loads_M: Tensor | float = 0.0

    def add(self, r_ME: Tensor) -> None:
        """Add the responsibilities [M, E] of one micro-batch."""
        self._loads_M = self._loads_M + r_ME.sum(dim=1)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loads_M = self.trainer.accelerator.reduce(self._loads_M)
        self._loads_M = 0.0
        weights = self.trainer.model.weights
        weights.lerp_(loads_M / loads_M.sum(), self.rate)
        weights /= weights.sum()


def scale_gradient(loss: Tensor, factor: float) -> Tensor:
    """`loss`, unchanged in value, with `factor` times its gradient."""
    return loss.detach() + factor * (loss - loss.detach())


def squared_distance(parameters: Iterable[Tensor], origins: Iterable[Tensor]) -> Tensor:
    """Σ ‖φ − φ⁰‖² over parameters and where they began."""
    return torch.stack([(p - o).square().sum() for p, o in zip(parameters, origins, strict=True)]).sum()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
