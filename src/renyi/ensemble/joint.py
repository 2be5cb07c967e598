"""The joint forward: one pass of the base over M·B member-major rows, and the log-likelihoods it gives.

Training and scoring both go through it: token ids go in, log-likelihoods come out. `ensemble.py` has what else can be
done with members, and `renyi.routing` wraps this forward where a training step leaves pairs out.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from renyi.ensemble.head import LOGITS_PER_CHUNK, LogitTransform, token_scores
from renyi.ensemble.member_rows import JointOutput, repeat_packed, repeat_rows
from renyi.ensemble.mesh import MemberMesh
from renyi.ensemble.modes import evaluating
from renyi.labels import IGNORED
from renyi.members.layer import MemberSelection


class JointModel(nn.Module):
    """A base model whose target layers hold M members, run for all of them at once.

    Attributes:
        base: the transformers model, with joint layers in the places of its target layers.
        weights: mixture weights [M] of all members, on whichever process.
        mesh: the processes that members are split over; None if all of them are here.
    """

    weights: Tensor

    def __init__(self, base: PreTrainedModel, selection: MemberSelection, num_members: int, mesh: MemberMesh | None):
        super().__init__()
        self.base, self.mesh = base, mesh
        self._selection = selection
        self._has_dropout = _has_dropout(base)
        self._takes_positions = "position_ids" in inspect.signature(base.base_model.forward).parameters
        self._logit_transform = LogitTransform.from_config(base.config)
        self.register_buffer("weights", torch.full((num_members,), 1 / num_members, device=base.device))

    @property
    def num_members(self) -> int:
        return self.weights.shape[0]

    @property
    def members(self) -> range:
        """The members that are in this process: all of them, but on a mesh."""
        return range(self.num_members) if self.mesh is None else self.mesh.share(self.num_members)

    def pairing(self, members: Sequence[int], examples: Tensor | None = None) -> AbstractContextManager[None]:
        """Run forwards whose row i sees the member at place members[i] of this process; M is then 1.

        `examples` [rows] says which example of the step's batch each row is, as members need it whose noise differs
        from example to example; `of_examples` says so of rows that all members see.
        """
        return self._selection.using(members, paired=True, examples=examples)

    def of_examples(self, examples: Tensor) -> AbstractContextManager[None]:
        """Run forwards over some examples of the step's batch, by their places in it, under every member."""
        return self._selection.of_examples(examples)

    def gathered(self, own: Tensor) -> Tensor:
        """Values [M, …] of all members from those of this process's; see `MemberMesh.gather`."""
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
            kwargs: what TRL's collators add for packed batches (`position_ids`, `cu_seq_lens_q`, …) and anything
                else that the backbone takes; tensors whose first dimension is B are repeated for every member.
        """
        if labels is None:
            labels = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)
        targets_BT = labels[:, 1:]
        if attention_mask is not None:
            # Nothing but padding precedes the first token of a left-padded row.
            targets_BT = targets_BT.masked_fill(attention_mask[:, :-1] == 0, IGNORED)
        return self.score_states(self.hidden_states(input_ids, attention_mask, kwargs)[:, :, :-1], targets_BT)

    def score_states(self, hidden_MBTD: Tensor, targets_BT: Tensor) -> JointOutput:
        """Score the tokens [B, T] that follow hidden states [M, B, T, D]; −100 where there is nothing to score."""
        targets_BT = targets_BT.to(hidden_MBTD.device)
        mask_BT = targets_BT != IGNORED
        # Supervised rows are gathered before the head: it is the largest matrix of a small model.
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
        """Last hidden states [M, B, T, D] of the backbone over member-major rows; arguments as for `forward`."""
        num_members = self._num_active()
        batch, length = input_ids.shape
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        inputs |= self._positions(attention_mask, length) | (kwargs or {})
        if "cu_seq_lens_q" in inputs and "flash" in str(self.base.config._attn_implementation):
            # Variable-length kernels see one long row: the members' copies of the packed row, one after another.
            inputs = repeat_packed(inputs, num_members)
        else:
            # Without them, boundaries follow from `position_ids`, row by row.
            inputs = {k: v for k, v in inputs.items() if not k.startswith(("cu_seq_lens", "max_length"))}
            inputs = {k: repeat_rows(v, num_members, batch) for k, v in inputs.items()}
        # Without a gradient nothing is trained, so nothing drops.
        mode = nullcontext() if torch.is_grad_enabled() else evaluating(self.base)
        with mode, self._selection.repeating() if self._keeps_rows_equal() else nullcontext():
            hidden = self.base.base_model(**inputs).last_hidden_state
        return hidden.view(num_members, batch, length, hidden.shape[-1])

    def _positions(self, attention_mask: Tensor | None, length: int) -> dict[str, Tensor]:
        """Position ids of the last tokens of left-padded rows, counted from the first real token.

        Empty for other rows, whose positions the model counts itself, and for models without position ids (those of
        ALiBi count along the mask).
        """
        if attention_mask is None or not self._takes_positions or not bool((attention_mask[:, 0] == 0).any()):
            return {}
        return {"position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]}

    def _keeps_rows_equal(self) -> bool:
        """Whether equal rows stay equal on their way to the first joint layer, so that one member's are enough.

        Dropout of the base's own and hooks on the embedding (NEFTune's noise) make them differ.
        """
        return not self._has_dropout and not self.base.get_input_embeddings()._forward_hooks

    def _num_active(self) -> int:
        selected = self._selection.members
        if self._selection.paired:
            return 1
        draws = 1 if self._selection.noise is None else self._selection.noise.draws
        return draws * len(self.members) if selected is None else max(1, len(selected))

    def token_log_likelihood(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Log-likelihood of every token under every member: float32 [M, B, T], nats.

        Entry t is log p_m(label_t | x_<t); it is zero at t = 0 and where the label is −100.
        """
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
        num_members = self._num_active()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs |= self._positions(attention_mask, input_ids.shape[1])
        rows = {name: repeat_rows(value, num_members, len(input_ids)) for name, value in inputs.items()}
        with nullcontext() if torch.is_grad_enabled() else evaluating(self.base):
            logits = self.base(**rows, use_cache=False).logits
        return logits.view(num_members, *input_ids.shape, logits.shape[-1])

    def next_token_log_probs(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Iterator[Tensor]:
        """Log-probabilities of whatever may follow some positions, in chunks that are small however long the rows are.

        Args:
            input_ids: [B, T], padded on the right.
            attention_mask: [B, T].
            positions: [B, T] bool.

        Yields:
            float32 [M, n, V], nats; along their second dimension all chunks together are the positions, row by row.
        """
        hidden_MND = self.hidden_states(input_ids, attention_mask)[:, positions]
        head: Any = self.base.get_output_embeddings()
        chunk = max(1, LOGITS_PER_CHUNK // (len(hidden_MND) * head.weight.shape[0]))
        for part_MnD in hidden_MND.split(chunk, dim=1):
            yield self._logit_transform(head(part_MnD).float()).log_softmax(-1)


def _has_dropout(base: PreTrainedModel) -> bool:
    """Whether the base drops anything of its own in training, so that equal rows do not stay equal."""
    declared = [value for name, value in base.config.get_text_config().to_dict().items() if "drop" in name]
    modules = [m.p for name, m in base.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" not in name]
    return any(isinstance(p, int | float) and p > 0 for p in (*declared, *modules))
