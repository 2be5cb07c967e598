"""The joint forward: one pass of the base over M·B member-major rows, from token ids to log-likelihoods.

Both training and scoring use it. Read next: `head.py`, which turns hidden states into log-probabilities, and
`routing/router.py`, which wraps this forward when a training step leaves pairs out.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from renyi.ensemble.attention import choose_by_length
from renyi.ensemble.head import LOGITS_PER_CHUNK, LogitTransform, token_scores
from renyi.ensemble.member_rows import JointOutput, repeat_packed, repeat_rows
from renyi.ensemble.mesh import MemberMesh
from renyi.ensemble.modes import evaluating
from renyi.errors import ConfigError
from renyi.labels import IGNORED
from renyi.members.head import HEAD_NAME, MemberHead
from renyi.members.layer import MemberSelection


class JointModel(nn.Module):
    """A base model whose target layers hold M members, run for all of them at once.

    Attributes:
        base: the transformers model, in which joint layers replace the target layers.
        weights: mixture weights [M] of all members, the same in every process.
        mesh: the processes that members are split over; None if this process holds all members.
        cache_name: the argument of the base's forward that takes a cache. Transformers 5.24 has renamed it.
    """

    weights: Tensor

    def __init__(self, base: PreTrainedModel, selection: MemberSelection, num_members: int, mesh: MemberMesh | None):
        super().__init__()
        choose_by_length(base)
        self.base, self.mesh = base, mesh
        self._selection = selection
        self._has_dropout = _has_dropout(base)
        takes = inspect.signature(base.base_model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self.cache_name = "cache" if "cache" in takes else "past_key_values"
        self._logit_transform = LogitTransform.from_config(base.config)
        self.register_buffer("weights", torch.full((num_members,), 1 / num_members, device=base.device))

    @property
    def num_members(self) -> int:
        return self.weights.shape[0]

    @property
    def members(self) -> range:
        """The members that this process holds: all of them, or its share on a mesh."""
        return range(self.num_members) if self.mesh is None else self.mesh.share(self.num_members)

    @property
    def draws(self) -> int:
        """S, the number of draws of each member that a forward runs now; see `MemberStack.redraw`."""
        return 1 if self._selection.noise is None else self._selection.noise.draws

    @property
    def drawn_weights(self) -> Tensor:
        """The weights [M·S] of all members' draws, member by member; they sum to one."""
        return self.weights.repeat_interleave(self.draws) / self.draws

    def pairing(self, members: Sequence[int], examples: Tensor | None = None) -> AbstractContextManager[None]:
        """Run forwards in which row i sees member members[i] of this process; M is then 1.

        Args:
            members: for each row, the place of its member among the members of this process; with S draws, m·S + s.
            examples: for each row, the place of its example in the optimizer step, [rows]; by default the row's number.
                Only members with different noise for each example need it. See `of_examples` for rows that all members
                see.
        """
        return self._selection.using(members, paired=True, examples=examples)

    def of_examples(self, examples: Tensor) -> AbstractContextManager[None]:
        """Run forwards over rows whose examples have these places in the optimizer step, [rows]."""
        return self._selection.of_examples(examples)

    def places(self, rows: int, rows_per_example: int = 1) -> Tensor:
        """The places of the rows' examples in the optimizer step [rows]: as `of_examples` says, or counted from 0."""
        if self._selection.examples is not None:
            return self._selection.examples
        return torch.arange(rows, device=self.base.device) % (rows // rows_per_example)

    def gathered(self, own: Tensor) -> Tensor:
        """Gather the values [M, …] of all members from those of each process; see `MemberMesh.gather`."""
        return own if self.mesh is None else self.mesh.gather(own)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> JointOutput:
        """Log-probabilities of the labels under every member, in one pass of the base over M·B rows.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 where there is a token; either side may be padded.
            labels: [B, T], −100 where not trained; by default every attended token is.
            kwargs: the keys that TRL's collators add for packed batches (`position_ids`, `cu_seq_lens_q`, …), and any
                other argument of the backbone. Tensors whose first dimension is B are repeated for every member.

        Returns:
            Log-probabilities; if members have reward heads, one reward for each row in their place.
        """
        if self.gives_rewards:
            return self._rate(input_ids, attention_mask, kwargs)
        if labels is None:
            labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
        targets_BT = labels[:, 1:]
        if attention_mask is not None:
            # Do not train the first token of a left-padded row: only padding comes before it.
            targets_BT = targets_BT.masked_fill(attention_mask[:, :-1] == 0, IGNORED)
        return self.score_states(self.hidden_states(input_ids, attention_mask, kwargs)[:, :, :-1], targets_BT)

    @property
    def gives_rewards(self) -> bool:
        """Whether members have reward heads, so that they rate texts instead of writing them."""
        return isinstance(getattr(self.base, HEAD_NAME, None), MemberHead)

    def check_writes(self) -> None:
        """Raise `ConfigError` if members have reward heads: they rate texts and cannot write or predict them."""
        if self.gives_rewards:
            raise ConfigError(
                "is a reward model: it rates texts and cannot write or predict them",
                where="the ensemble",
                hint="Ask it for rewards: `renyi score`, `renyi evaluate --task reward`, or `LoraEnsemble.rewards`.",
            )

    def rewards(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The reward of every row under every member, [M, B]: the head's output at the last token that is no padding.

        Args:
            input_ids: [B, T]; padding is known by the `pad_token_id` of the base's config, as in transformers.
            attention_mask: [B, T]; either side may be padded.

        Raises:
            ConfigError: the members have no reward heads.
        """
        if not self.gives_rewards:
            what, hint = "has no reward heads", "Train them by `renyi reward`."
            raise ConfigError(what, where="the ensemble", hint=hint)
        reward_MB = self._rate(input_ids, attention_mask, {}).log_probs[..., 0]
        return self.gathered(reward_MB) if self._selection.members is None else reward_MB

    def _rate(self, input_ids: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> JointOutput:
        """Rewards [M, B, 1] in the place of log-probabilities, with nothing else."""
        num_members, (batch, length) = self._num_active(), input_ids.shape
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs |= self._positions(attention_mask, length) | kwargs
        inputs = {k: repeat_rows(v, num_members, batch) for k, v in inputs.items()}
        mode = nullcontext() if torch.is_grad_enabled() else evaluating(self.base)
        with mode, self._selection.one_forward(repeats=self._keeps_rows_equal()):
            reward_MB1 = self.base(**inputs).logits.view(num_members, batch, 1)
        reward_MB1 = reward_MB1.to(torch.promote_types(reward_MB1.dtype, torch.float32))
        nothing = torch.zeros_like(reward_MB1, requires_grad=False)
        return JointOutput(reward_MB1, torch.ones_like(nothing[0], dtype=torch.bool), nothing, nothing.bool())

    def score_states(self, hidden_MBTD: Tensor, targets_BT: Tensor) -> JointOutput:
        """Score the tokens [B, T] that follow hidden states [M, B, T, D]; −100 where there is nothing to score."""
        self.check_writes()
        targets_BT = targets_BT.to(hidden_MBTD.device)
        mask_BT = targets_BT != IGNORED
        # Only rows with a target go through the head, because the head is the largest matrix of a small model.
        hidden_MND = hidden_MBTD[:, mask_BT]
        num_members, num_targets, _ = hidden_MND.shape
        scores = token_scores(
            hidden_MND.flatten(0, 1),
            self.base.get_output_embeddings(),
            targets_BT[mask_BT].repeat(num_members),
            self._logit_transform,
        )
        shape = (num_members, *mask_BT.shape)
        where = mask_BT.expand(shape)

        def scattered(values: Tensor) -> Tensor:
            return values.new_zeros(shape).masked_scatter(where, values.view(num_members, num_targets))

        return JointOutput(scattered(scores.log_probs), mask_BT, scattered(scores.entropy), scattered(scores.is_top1))

    def hidden_states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, kwargs: dict[str, Any] | None = None
    ) -> Tensor:
        """Last hidden states [M, B, T, D] of the backbone over member-major rows; arguments as in `forward`."""
        num_members = self._num_active()
        batch, length = input_ids.shape
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs |= self._positions(attention_mask, length) | (kwargs or {})
        if "cu_seq_lens_q" in inputs and "flash" in str(self.base.config._attn_implementation):
            # Kernels for variable lengths take one long row: a copy of the packed row per member, one after another.
            inputs = repeat_packed(inputs, num_members)
        else:
            # Other kernels find the boundaries of examples in each row from `position_ids`.
            inputs = {k: v for k, v in inputs.items() if not k.startswith(("cu_seq_lens", "max_length"))}
            inputs = {k: repeat_rows(v, num_members, batch) for k, v in inputs.items()}
        # Without gradients nothing is trained, so dropout is turned off.
        mode = nullcontext() if torch.is_grad_enabled() else evaluating(self.base)
        numbered = nullcontext() if self._selection.noise is None else self.of_examples(self.places(batch))
        with mode, numbered, self._selection.one_forward(repeats=self._keeps_rows_equal()):
            hidden = self.base.base_model(**inputs).last_hidden_state
        return hidden.view(num_members, batch, length, hidden.shape[-1])

    def _positions(self, attention_mask: Tensor | None, length: int) -> dict[str, Tensor]:
        """Position ids of the last `length` tokens of left-padded rows, counted from each row's first real token.

        Empty for other rows, because the model counts their positions itself. Also empty for models that take no
        position ids (models with ALiBi count along the mask).
        """
        if attention_mask is None or not self._takes_positions or not bool((attention_mask[:, 0] == 0).any()):
            return {}
        return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]}

    def _keeps_rows_equal(self) -> bool:
        """Whether the rows of all members are equal until the first joint layer, so that they are computed only once.

        The base's own dropout and hooks on the embedding (NEFTune's noise) make them different.
        """
        return not self._has_dropout and not self.base.get_input_embeddings()._forward_hooks

    def _num_active(self) -> int:
        selected = self._selection.members
        if self._selection.paired:
            return 1
        return self.draws * len(self.members) if selected is None else max(1, len(selected))

    def token_log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood of every token under every member: float32 [M, B, T], nats.

        Entry t is log p_m(label_t | x_<t); it is zero at t = 0 and where the label is −100.
        """
        self.check_writes()
        log_probs = self(input_ids, attention_mask, labels).log_probs
        return torch.cat([log_probs.new_zeros(*log_probs.shape[:2], 1), log_probs], dim=-1)

    def log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """log p_m(y | x) of every example under every member: float32 [M, B], nats, summed over trained tokens.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T]; either side may be padded.
            labels: [B, T], −100 where not trained; by default every attended token is.
        """
        ell_MB = self.token_log_likelihood(input_ids, attention_mask, labels).sum(dim=-1)
        return self.gathered(ell_MB) if self._selection.members is None else ell_MB

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Next-token logits [M, B, T, V] as the model's own forward computes them; for small inputs only."""
        self.check_writes()
        num_members = self._num_active()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= self._positions(attention_mask, input_ids.shape[1])
        rows = {name: repeat_rows(value, num_members, len(input_ids)) for name, value in inputs.items()}
        with nullcontext() if torch.is_grad_enabled() else evaluating(self.base):
            logits = self.base(**rows, use_cache=False).logits
        return logits.view(num_members, *input_ids.shape, logits.shape[-1])

    def next_token_log_probs(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Log-probabilities of all possible next tokens at some positions, in chunks of bounded size.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T].
            positions: [B, T] bool.

        Yields:
            float32 [M, n, V], nats. All chunks concatenated on their second dimension are the positions, row by row.
        """
        self.check_writes()
        hidden_MND = self.hidden_states(input_ids, attention_mask)[:, positions]
        head: Any = self.base.get_output_embeddings()
        chunk = max(1, LOGITS_PER_CHUNK // (len(hidden_MND) * head.weight.shape[0]))
        for part_MnD in hidden_MND.split(chunk, dim=1):
            # Contiguous, because a CPU is a hundred times slower with a slice in half precision.
            yield self._logit_transform(head(part_MnD.contiguous()).float()).log_softmax(-1)


def _has_dropout(base: PreTrainedModel) -> bool:
    """Whether the base has dropout of its own in training, which makes equal rows different."""
    declared = [value for name, value in base.config.get_text_config().to_dict().items() if "drop" in name]
    modules = [m.p for name, m in base.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" not in name]
    return any(isinstance(p, int | float) and p > 0 for p in (*declared, *modules))
