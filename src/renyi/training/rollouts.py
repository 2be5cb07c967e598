"""Rollouts: what policies write in answer to prompts. TRL's GRPOTrainer does most of the work.

GRPOTrainer chooses and repeats prompts, generates (by transformers or vLLM), reuses rollouts over several updates, and
logs completions. This file changes how it generates: from every policy at once. It is the one file that touches
GRPOTrainer's private methods, which change between minor versions of TRL. A subclass scores the rollouts. Read next:
`powerflow.py`.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers.pytorch_utils import Conv1D
from trl import GRPOTrainer
from trl.trainer.utils import pad

from renyi.data import end_tokens, prompt_tokens
from renyi.ensemble import LoraEnsemble
from renyi.errors import ConfigError
from renyi.labels import IGNORED
from renyi.training.trainer import EnsembleTrainer

# The values of sampling settings that do not change the distribution that is sampled from.
UNTOUCHED = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}


class Rollouts(NamedTuple):
    """N completions, those of one prompt one after another, padded on the right.

    Attributes:
        input_ids: [N, T], prompt and completion.
        attention_mask: [N, T].
        labels: [N, T], −100 but on the completion.
        tokens: [N], of the completion, the end of text included.
        prompt_tokens: [N].
        is_truncated: [N] bool, whether it was cut at the longest length.
        prompts: as text; for messages, the text of the last one.
        completions: as text.
        sampled_log_prob: [N], log-likelihood under the engine that sampled, nats. None if transformers sampled: then
            the probabilities that we compute are the same.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    tokens: Tensor
    prompt_tokens: Tensor
    is_truncated: Tensor
    prompts: list[str]
    completions: list[str]
    sampled_log_prob: Tensor | None


class RolloutTrainer(EnsembleTrainer, GRPOTrainer):
    """GRPOTrainer over an ensemble whose members are policies. Each policy writes its share of a prompt's rollouts."""

    loss_is_scaled_for_ga = False  # unlike GRPOTrainer's, our losses leave it to transformers

    @abstractmethod
    def score_rollouts(self, rollouts: Rollouts, group_size: int) -> dict[str, Tensor]:
        """What `compute_loss` needs to know about rollouts, computed once for all updates: tensors [N, …].

        It includes `advantage` [N], by how much each rollout is better than its group. That is shown by
        `log_completions` and not used otherwise.
        """

    # ---- Generation --------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, completion_ids, _, completions, sampled, *_ = self._generate(prompts)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].pop("num_tokens", None)  # our own count is of the tokens that are trained on
        device = self.accelerator.device

        def padded(rows: list[list[int]] | list[list[float]], value: Any) -> Tensor:
            return pad([torch.tensor(row) for row in rows], padding_value=value, padding_side="right").to(device)

        both = list(zip(prompt_ids, completion_ids, strict=True))
        texts = [c if isinstance(c, str) else str(c[-1].get("content") or "") for c in completions]
        rollouts = Rollouts(
            input_ids=padded([p + c for p, c in both], self._tokenizer.pad_token_id),
            attention_mask=padded([[1] * (len(p) + len(c)) for p, c in both], 0),
            labels=padded([[IGNORED] * len(p) + c for p, c in both], IGNORED),
            tokens=torch.tensor([len(c) for c in completion_ids], device=device),
            is_truncated=torch.tensor([c[-1] not in self.eos_token_ids for c in completion_ids], device=device),
            prompt_tokens=torch.tensor([len(p) for p in prompt_ids], device=device),
            prompts=[p if isinstance(p, str) else str(p[-1].get("content") or "") for p in prompts],
            completions=texts,
            sampled_log_prob=None if sampled is None else padded(sampled, 0.0).nan_to_num().sum(dim=1),
        )
        logs: dict[str, Any] = self._logs
        logs["prompt"].extend(gather_object(prompts))
        logs["completion"].extend(gather_object(completions))
        group_size: Any = self.num_generations if mode == "train" else self.num_generations_eval
        scored = self.score_rollouts(rollouts, group_size)
        logs["advantages"].extend(self.accelerator.gather(scored.pop("advantage")).tolist())
        return scored

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The tokens that scoring and display use too, with a single beginning-of-text token."""
        row = {"tools": self.tools or None, "chat_template_kwargs": self.chat_template_kwargs}
        return [prompt_tokens(prompt, self._tokenizer, "prompt", row) for prompt in prompts], None, {}

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *args: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *args)
        order = by_member(len(prompt_ids), self.model.num_members)
        written = self._write([prompt_ids[i] for i in order])
        back = {row: i for i, row in enumerate(order)}
        return [written[back[row]] for row in range(len(order))], None

    @torch.no_grad()
    def _write(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Continue prompts in one pass. The rows are M equal blocks, and block m is continued by member m."""
        base: Any = self.model.base
        device = self.accelerator.device
        rows = [torch.tensor(ids) for ids in prompt_ids]
        pad_token_id: Any = self._tokenizer.pad_token_id
        inputs = {
            "input_ids": pad(rows, padding_value=pad_token_id, padding_side="left").to(device),
            "attention_mask": pad([torch.ones_like(r) for r in rows], padding_side="left").to(device),
        }
        training, config = self.model.training, base.generation_config
        self.model.eval()
        base.generation_config = self.generation_config  # otherwise `generate` would merge the model's own config in
        try:
            with self.accelerator.autocast():  # the precision of training, so that rollouts come from what is scored
                written = base.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
        finally:
            base.generation_config = config
            self.model.train(training)
        ends = set(self.eos_token_ids)
        return [ids[: next((t + 1 for t, token in enumerate(ids) if token in ends), len(ids))] for ids in written]

    def stop_at_ends_of_turns(self) -> None:
        """End rollouts as answers end elsewhere: also where the chat template closes a turn."""
        self.eos_token_ids = list(dict.fromkeys([*self.eos_token_ids, *end_tokens(self._tokenizer)]))
        if self.use_vllm:
            engine: Any = self.vllm_generation
            engine.generation_kwargs = {**(engine.generation_kwargs or {}), "stop_token_ids": self.eos_token_ids}
        else:
            self.generation_config.eos_token_id = self.eos_token_ids

    def send_members_to_vllm(self) -> None:
        """Make TRL's vLLM engine take the policy's merged weights. TRL can send only those of PEFT's models."""
        engine: Any = self.vllm_generation
        engine._iter_named_params = lambda: merged_parameters(self.model, engine._fix_param_name_to_vllm)

    # ---- Checkpoints -------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        sampler: Any = super()._get_train_sampler(dataset)
        if self.shuffle_dataset:
            # TRL's sampler draws one order after another, so a resumed run would begin with the first epoch's order.
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(self.args.seed + epoch)
        return sampler

    def _write_logging_state(self, checkpoint: Path) -> None:
        super()._write_logging_state(checkpoint)
        at_boundary = self._step % (self.args.steps_per_generation * self.num_iterations) == 0
        state = {
            "step": self._step,
            "metrics": dict(self._metrics["train"]),
            "buffered": None if at_boundary else self._buffered_inputs,
        }
        torch.save(state, self._rollout_file(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._rollout_file(Path(resume_from_checkpoint))
        if file.is_file():  # if not, another number of processes wrote the checkpoint: new rollouts are drawn
            state = torch.load(file, map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["buffered"]
            self._metrics["train"].update(state["metrics"])

    def _rollout_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"rollouts_{self.args.process_index}.pt"


def no_reward(**kwargs: Any) -> list[float]:
    """GRPOTrainer requires a reward function. It is never called: `score_rollouts` scores rollouts."""
    raise AssertionError("PowerFlow has no rewards")


def by_member(rows: int, num_members: int) -> list[int]:
    """Row numbers in member-major order. Member i mod M writes row i, so that every member writes for every prompt.

    Raises:
        ConfigError: the number of rows is not a multiple of the number of members.
    """
    if rows % num_members:
        raise ConfigError(
            f"{rows} rollouts at a time do not divide among {num_members} policies",
            where="num_generations",
            hint=f"Choose num_generations and the batch sizes as multiples of num_members ({num_members}).",
        )
    return [row for member in range(num_members) for row in range(member, rows, num_members)]


def merged_parameters(ensemble: LoraEnsemble, renamed: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the base with the first member merged in, under the names of the plain model."""
    own, update_of = ensemble.stack.names(), ensemble.adapter(0)
    for name, parameter in ensemble.base.named_parameters():
        if name in own:
            continue
        path, _, kind = name.replace(".base_layer", "").rpartition(".")
        merged = parameter.data
        if kind == "weight" and path in update_of:
            layer, (A, B) = ensemble.stack.layers[path], update_of[path]
            update = layer.scaling * B.float() @ A.float()
            if isinstance(layer.base_layer, Conv1D):  # GPT-2 keeps its weights transposed
                update = update.T
            merged = (merged.float() + update).to(merged.dtype)
        yield renamed(f"{path}.{kind}"), merged
