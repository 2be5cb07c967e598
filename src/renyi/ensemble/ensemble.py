"""`LoraEnsemble`, M LoRA adapters on one frozen base model: create, load, save and change it, and generate with it.

Read next: `joint.py`, which runs all members in one forward.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from renyi import __version__
from renyi.ensemble import storage
from renyi.ensemble.base_model import check_base, is_rating, load_base, outside_language_model
from renyi.ensemble.decode import Generation, OnToken, decode
from renyi.ensemble.facade import TrainableModel
from renyi.ensemble.joint import JointModel
from renyi.ensemble.mesh import MemberMesh
from renyi.ensemble.modes import evaluate, evaluating
from renyi.errors import ConfigError, EnsembleFormatError
from renyi.layout import member_name
from renyi.members import MemberLayer, MemberSelection, MemberStack, Noise, adapters, kind_of


class Snapshot(NamedTuple):
    """A frozen copy of K members: their weights [K], and every layer's A [K, R, I] and B [K, O, R]."""

    weights: Tensor
    layers: list[tuple[Tensor, Tensor]]


class _AlwaysDropout(nn.Dropout):
    """Dropout that evaluation mode does not turn off."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=True)


class LoraEnsemble(TrainableModel, JointModel):
    """A distribution over LoRA adapters: M members with mixture weights on one frozen base.

    Create one with `from_base` or `load`.

    Attributes:
        base: the transformers model, in which joint layers replace the target layers. Only the members are trainable.
        stack: the members' tensors, layer by layer.
        peft_config: the LoRA config shared by all members.
        weights: mixture weights [M], float32, summing to one.
        alpha: Rényi order of the training.
        routing_quantity: what responsibilities were computed from, "sequence", "length_normalised" or "token".
        num_draws: how many members, one after another, are draws of one member; 1 unless `draw` made this ensemble.
        prior: the members' divergence from their prior, nats [M]; a trainer sets it, and `save` records its value.
        folder: the folder that the ensemble was loaded from. It also says how training prepared its rows. None for an
            ensemble from `from_base`, or from a list of adapters.
        mesh: the processes that members are split over; None if this process holds all members. On a mesh, a forward
            runs this process's own members only. Methods about all members (`log_likelihood`, `save`) must be called
            by all processes together.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        peft_config: LoraConfig,
        selection: MemberSelection,
        num_members: int,
        mesh: MemberMesh | None = None,
    ):
        super().__init__(base, selection, num_members, mesh)
        self.stack = MemberStack(base, selection)
        self.peft_config = peft_config
        self.alpha = 1.0
        self.routing_quantity = "sequence"
        self.num_draws = 1
        self.prior: Callable[[], Tensor] | None = None
        self.folder: Path | None = None

    @classmethod
    def from_base(
        cls,
        model: PreTrainedModel | str | Path,
        num_members: int,
        peft_config: PeftConfig,
        seed: int = 0,
        mesh: MemberMesh | None = None,
        member_kind: str = "point",
    ) -> "LoraEnsemble":
        """Draw M fresh members on a base model. The ensemble is in evaluation mode.

        Member m is what PEFT draws after `torch.manual_seed(seed + m)`. Its A is random and its B is zero, so all
        members are equal to the base until training changes B.

        Args:
            model: a loaded causal language model (changed in place and frozen), a local folder or a hub id.
            num_members: M ≥ 1.
            peft_config: rank, alpha, rsLoRA, dropout and targets of every member, as for PEFT.
            seed: the seed of member 0.
            mesh: the processes to split members over; each draws its own members.
            member_kind: what a member is: "point", or another kind that is registered in `renyi.members`.

        Raises:
            ConfigError: `peft_config`, `num_members` or `member_kind` cannot make an ensemble on this model.
        """
        base = cls._checked(model, adapters.has_head(peft_config))
        if is_rating(base) and not adapters.has_head(peft_config):
            peft_config = copy.copy(peft_config)
            peft_config.task_type = "SEQ_CLS"
        adapters.check_targets(base, peft_config)
        unused = outside_language_model(base)
        if unused and getattr(peft_config, "exclude_modules", ()) is None:
            narrowed: Any = copy.copy(peft_config)
            narrowed.exclude_modules = unused
            peft_config = narrowed
        return cls._drawn(base, num_members, peft_config, seed, mesh, member_kind)

    @staticmethod
    def _checked(model: PreTrainedModel | str | Path, rates: bool = False) -> PreTrainedModel:
        """The base, loaded if it is named: one that `rates` texts for adapters with heads."""
        base = load_base(model, rates) if isinstance(model, str | Path) else model
        if rates and not is_rating(base):
            raise ConfigError(
                f"{type(base).__name__} does not rate texts, and these adapters are reward models",
                where="model",
                hint="Load it by AutoModelForSequenceClassification with num_labels=1, or give its name.",
            )
        if adapters.joint_layers(base):
            raise ConfigError("the model already carries an ensemble", hint="Load the base model again.")
        check_base(base)
        return base

    @classmethod
    def _drawn(
        cls,
        base: PreTrainedModel,
        num_members: int,
        peft_config: PeftConfig,
        seed: int,
        mesh: MemberMesh | None,
        member_kind: str,
    ) -> "LoraEnsemble":
        selection = MemberSelection()
        drawn = mesh.share(num_members) if mesh else range(num_members)
        resolved = adapters.draw_members(base, peft_config, drawn, seed, selection, kind_of(member_kind))
        ensemble = cls(base, resolved, selection, num_members, mesh)
        evaluate(ensemble)
        return ensemble

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoraEnsemble":
        """As in `nn.Module` (`to`, `half`, …), but mixture weights stay in float32 or better, so they sum to one."""
        weights = self.weights
        super()._apply(fn, recurse)
        if self.weights.dtype not in (torch.float32, torch.float64):
            self.weights = weights.to(self.weights.device)
        return self

    def train(self, mode: bool = True) -> "LoraEnsemble":
        """As in `nn.Module`, but layers that evaluation mode would change permanently keep their mode (`modes.py`)."""
        super().train(mode)
        if not mode:
            evaluate(self)
        return self

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        base: PreTrainedModel | str | Path | None = None,
        mesh: MemberMesh | None = None,
    ) -> "LoraEnsemble":
        """Load an ensemble from a folder or a hub id, or from existing PEFT adapters. It is in evaluation mode.

        Args:
            path: a folder that `save` or a trainer wrote; a hub id; the folder of one PEFT LoRA adapter, which makes
                an ensemble of one member; or a list of such folders with the same base, rank and targets, which get
                uniform weights.
            base: the base model, loaded or by name; by default the model that the ensemble names.
            mesh: the processes to split members over.

        Raises:
            EnsembleFormatError: a file is missing or damaged, or the members do not fit each other or the base.
        """
        if isinstance(path, str | Path):
            folder = storage.resolve_folder(path)
            manifest = None if storage.is_adapter(folder) else storage.read_manifest(folder)
            folders = [folder / name for name in manifest.members] if manifest else [folder]
        else:
            folders = [storage.resolve_folder(p) for p in path]
            manifest = None
        if not folders:
            raise EnsembleFormatError("the list of adapters is empty", hint="Give at least one PEFT adapter folder.")
        read = [adapters.read_adapter(f) for f in folders]
        for adapter, where in zip(read[1:], folders[1:], strict=True):
            adapters.check_same_config(read[0].config, adapter.config, str(folders[0]), str(where))
            adapters.check_same_base(read[0].config, adapter.config, str(folders[0]), str(where))
        named = manifest.base_model if manifest else read[0].config.base_model_name_or_path
        if base is None:
            if not named:
                raise EnsembleFormatError("the base model is not named", where=str(folders[0]), hint="Give `base`.")
            base = named
        kind = manifest.member_kind if manifest else "point"
        checked = cls._checked(base, adapters.has_head(read[0].config))
        ensemble = cls._drawn(checked, len(folders), read[0].config, 0, mesh, kind)
        for place, member in enumerate(ensemble.members):
            ensemble.stack.read(place, read[member], str(folders[member]))
        if manifest:
            ensemble.weights.copy_(torch.tensor(manifest.weights))
            ensemble.alpha, ensemble.routing_quantity = manifest.alpha, manifest.routing_quantity
            ensemble.num_draws, ensemble.folder = manifest.num_draws, folder
        return ensemble

    def save(self, path: str | Path) -> None:
        """Write the ensemble folder: `ensemble.json` and one ordinary PEFT adapter per member.

        Raises:
            SaveError: a file could not be written. The earlier content of the folder is not changed.
        """
        written = self.stack.adapters(self.peft_config, self._whole)
        with torch.no_grad():
            divergence = None if self.prior is None or self.stack.is_acting else self._whole(self.prior()).tolist()
        if self.mesh is not None and not self.mesh.is_first:
            return
        manifest = storage.Manifest(
            base_model=self.base_model_name,
            members=[member_name(m) for m in range(self.num_members)],
            weights=self.weights.tolist(),
            alpha=self.alpha,
            routing_quantity=self.routing_quantity,
            member_kind=self.stack.kind,
            num_draws=self.num_draws,
            divergence=divergence,
            renyi_version=__version__,
        )
        storage.write_folder(Path(path), manifest, lambda m, folder: adapters.write_adapter(folder, written(m)))

    def restore(self, path: str | Path) -> None:
        """Read members, weights and alpha back from a folder that this ensemble was saved to.

        Raises:
            EnsembleFormatError: the folder is damaged, or holds another number, kind or shape of members.
        """
        folder, manifest = Path(path), storage.read_manifest(Path(path))
        for what, there, here in (
            ("members", len(manifest.members), self.num_members),
            ("kind of member", manifest.member_kind, self.stack.kind),
        ):
            if there != here:
                raise EnsembleFormatError(
                    f"holds {there} {what}, not {here}",
                    where=str(folder),
                    hint="Resume with the same settings, or choose another output_dir.",
                )
        for place, member in enumerate(self.members):
            name = manifest.members[member]
            self.stack.read(place, self._fitting(folder / name), str(folder / name))
        self.weights.copy_(torch.tensor(manifest.weights))
        self.alpha, self.routing_quantity = manifest.alpha, manifest.routing_quantity

    def _fitting(self, folder: Path) -> adapters.Adapter:
        """Read the adapter in a folder, and check that it has this ensemble's config."""
        adapter = adapters.read_adapter(folder)
        adapters.check_same_config(self.peft_config, adapter.config, "this ensemble", str(folder))
        return adapter

    # ---- Members -----------------------------------------------------------------------------------------------

    def adapter(self, member: int) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [R, I], B [O, R]) of one member by layer name; of a distribution, the mean.

        Args:
            member: the member's index; this process must hold it (see `members`).
        """
        place = self.members.index(member)
        return {name: (A[place], B[place]) for name, (A, B) in self.stack.matrices().items()}

    def using(self, members: Sequence[int]) -> AbstractContextManager[None]:
        """Run forwards with these members only; M is then `len(members)`. With `()` the base runs alone."""
        return self._selection.using([self.members.index(member) for member in members])

    def split(self, mesh: MemberMesh) -> None:
        """Keep only this process's share of the members."""
        self.stack.keep(list(mesh.share(self.num_members)))
        self.mesh = mesh

    def shard_base(self) -> None:
        """Split the base's blocks over the processes of the mesh that hold the same members, by FSDP2.

        Raises:
            ConfigError: the base does not declare its blocks, or it is quantised.
        """
        assert self.mesh is not None
        if any(isinstance(p, DTensor) for p in self.base.parameters()):
            return
        names = self.base._no_split_modules or ()
        blocks = [module for module in self.base.modules() if type(module).__name__ in names]
        if not blocks or not all(p.is_floating_point() for block in blocks for p in block.parameters()):
            what = "is quantised" if blocks else "does not name the blocks that it is made of"
            raise ConfigError(f"{type(self.base).__name__} {what}", where="shard_base", hint="Keep the base whole.")
        self.mesh.shard(self.base.base_model, blocks, set(self.stack.parameters()))

    def _whole(self, own: Tensor) -> Tensor:
        """A stacked matrix of all members in the process that writes files; in others, of their own members."""
        everyones = own if self.mesh is None else self.mesh.gather_to_first(own)
        return own if everyones is None else everyones

    def snapshot(self) -> Snapshot:
        """A frozen copy of all members as they are now, for `acting_as`. Of distributions it holds the means."""
        layers = [(A.detach().clone(), B.detach().clone()) for A, B in self.stack.matrices().values()]
        return Snapshot(self.weights.clone(), layers)

    def read_snapshot(self, path: str | Path) -> Snapshot:
        """Read the members in an ensemble's folder as a snapshot. This ensemble does not change.

        The folder may hold any number of members. They must have the shapes of this ensemble's members.

        Raises:
            EnsembleFormatError: the folder is damaged, or its members have other layers, ranks or scaling.
        """
        folder = storage.resolve_folder(path)
        manifest = storage.read_ensemble(folder, self.base_model_name or None)
        many = len(manifest.members)
        read = []
        for member in self.mesh.share(many) if self.mesh else range(many):
            where = folder / manifest.members[member]
            read.append(self._fitting(where).weights)
            self.stack.check(read[-1], str(where))
        layers = [
            (torch.stack([of[name][0] for of in read]).to(A), torch.stack([of[name][1] for of in read]).to(B))
            for name, (A, B) in self.stack.matrices().items()
        ]
        return Snapshot(self.weights.new_tensor(manifest.weights), layers)

    @contextmanager
    def acting_as(self, snapshot: Snapshot) -> Iterator[None]:
        """Run forwards with the members of a snapshot, without gradients and without the dropout of `dropping`."""
        weights = self.weights
        drops = any(isinstance(layer.lora_dropout, _AlwaysDropout) for layer in self.stack.layers.values())
        self.weights = snapshot.weights.to(weights)
        like = self.stack.matrices().values()
        layers = [(A.to(now_A), B.to(now_B)) for (A, B), (now_A, now_B) in zip(snapshot.layers, like, strict=True)]
        try:
            with torch.no_grad(), self.stack.acting_as(layers), self.dropping(0.0) if drops else nullcontext():
                yield
        finally:
            self.weights = weights

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluation mode, in which the adapters on a half-precision base have its precision, too.

        The members themselves stay as they are. Training keeps them in float32 because their steps are small. In a
        forward it gains nothing: the base's layers round their outputs anyway, and float32 products take longer than
        the layers. Training in `bf16` rounds adapters in the same way, so its log-likelihoods and scores agree. On a
        CPU the products of few rows, as in decoding, are faster in float32, and stay so (`layer.FEW_ROWS`).
        """
        dtype = self.base.dtype
        is_half = dtype in (torch.float16, torch.bfloat16)
        own = [(A.detach(), B.detach()) for A, B in self.stack.matrices().values()] if is_half else []
        with evaluating(self), self.stack.acting_as(own, dtype) if is_half else nullcontext():
            yield

    @property
    def is_fresh(self) -> bool:
        """Whether no member has been trained, so that all of them are equal to the base."""
        return self.stack.is_fresh

    def redraw(self, seed: int | None, draws: int = 1) -> None:
        """Draw the random parts of members anew; see `MemberStack.redraw`."""
        self.stack.redraw(seed, draws)

    @contextmanager
    def dropping(self, rate: float) -> Iterator[None]:
        """Drop inputs of the members' updates with this probability in every forward inside, in evaluation mode, too.

        This is Monte Carlo dropout (Gal and Ghahramani 2016, arXiv 1506.02142): forwards with different random states
        are samples. Rows that are equal are dropped differently.
        """
        layers = list(self.stack.layers.values())
        before = [layer.lora_dropout for layer in layers]
        for layer in layers:
            layer.lora_dropout = _AlwaysDropout(rate)
        try:
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                layer.lora_dropout = own

    def turn_dropout_off(self) -> None:
        """Train members without dropout from now on."""
        self.peft_config.lora_dropout = 0.0
        for layer in self.stack.layers.values():
            layer.lora_dropout = nn.Identity()

    def add_member(self, path: str | Path) -> None:
        """Append a PEFT adapter of the same rank and targets as a member.

        Its weight is 1/(M + 1). The weights of the other members are multiplied by M/(M + 1).

        Raises:
            EnsembleFormatError: the adapter does not fit.
        """
        adapter = self._fitting(Path(path))
        self.stack.check(adapter.weights, str(path))
        many = self.num_members
        self.stack.keep([*range(many), 0])
        try:
            self.stack.read(many, adapter, str(path))
        except EnsembleFormatError:
            self.stack.keep(list(range(many)))
            raise
        self.num_draws = 1
        self.weights = torch.cat([self.weights * many / (many + 1), self.weights.new_tensor([1 / (many + 1)])])

    def drop_member(self, member: int) -> None:
        """Remove a member; the weights of the others keep their ratios."""
        if not 0 <= member < self.num_members or self.num_members == 1:
            raise ConfigError(f"cannot drop member {member} of {self.num_members}")
        kept = [m for m in range(self.num_members) if m != member]
        self.stack.keep(kept)
        self.num_draws = 1
        self.weights = self.weights[kept] / self.weights[kept].sum()

    def draw(self, num_draws: int, seed: int = 0) -> "LoraEnsemble":
        """An ordinary ensemble of points: S draws of each member, one member after another, with weights π_m/S.

        It shares the frozen tensors of the base with this ensemble, and nothing else. Its uncertainty has three parts;
        see `renyi.measures.draw_uncertainty`.

        Args:
            num_draws: S ≥ 1.
            seed: the seed of the draws. The same seed gives the same draws.

        Raises:
            ConfigError: the members are points, or they are split over processes.
        """
        if not self.stack.is_random:
            what = f"the members are {self.stack.kind}: there is nothing to draw"
            raise ConfigError(what, where="draws", hint="Leave it out; other kinds are distributions.")
        if num_draws < 1:
            raise ConfigError(f"is {num_draws}", where="draws", hint="Give at least 1.")
        drawn = self._of_points(lambda layer: layer.matrices(Noise(seed, num_draws)), num_draws)
        drawn.num_draws = num_draws
        return drawn

    def mean(self) -> "LoraEnsemble":
        """An ordinary ensemble of M points: the means of the members. Like `draw`, it shares the frozen base."""
        return self._of_points(lambda layer: layer.mean(), 1)

    def _of_points(
        self, matrices: Callable[[MemberLayer], tuple[Tensor, Tensor]], points_per_member: int
    ) -> "LoraEnsemble":
        if self.mesh is not None:
            raise ConfigError("needs all members in one process", where="draws", hint="Save the ensemble and load it.")
        shared = {id(t): t for t in (*self.base.parameters(), *self.base.buffers())}
        for layer in self.stack.layers.values():  # what stands for what in the copy
            with torch.no_grad():
                point = kind_of("point").drawn(*(x.detach().clone() for x in matrices(layer.members)))
            point.number = layer.members.number
            shared[id(layer.members)] = point  # type: ignore[assignment]
        selection = MemberSelection()
        shared[id(self._selection)] = selection  # type: ignore[assignment]
        base = copy.deepcopy(self.base, shared)
        points = LoraEnsemble(base, copy.copy(self.peft_config), selection, self.num_members * points_per_member)
        points.weights = self.weights.repeat_interleave(points_per_member) / points_per_member
        if points.stack.head is not None and self.stack.head is not None:
            heads = self.stack.head.weight.detach().repeat_interleave(points_per_member, dim=0)
            points.stack.head.weight = nn.Parameter(heads)
        points.alpha, points.routing_quantity, points.folder = self.alpha, self.routing_quantity, self.folder
        evaluate(points)
        return points

    def merged(self, member: int) -> PreTrainedModel:
        """One member as a plain transformers model. PEFT merges the member's update into a copy of the base."""
        head = None if self.stack.head is None else self.stack.head.weight[self.members.index(member)]
        return adapters.merged(self.base, adapters.Adapter(self.peft_config, self.adapter(member), head=head))

    # ---- Decoding ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        mixture: str = "sequence",
        member: int | None = None,
        seed: int | None = None,
        streamer: BaseStreamer | None = None,
        on_token: OnToken | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Generation:
        """Continue prompts. One forward of the base per token serves all members.

        The predictive distribution is the mixture of sequences Σ_m π_m p_m(y | x). Token by token it is Σ_m w_m p_m
        with running weights log w_m += log p_m(y_t). So members that explained the text so far count more.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 1 where there is a token; either side may be padded. None means 1 everywhere.
            mixture: "sequence", as described above; "token", where the weights stay π; or "member", where every member
                gives an answer of its own.
            member: with mixture="member", the only member that answers.
            seed: the seed of sampling; None uses torch's global generator. A single member with a seed samples exactly
                what transformers' `generate` samples after `torch.manual_seed(seed)`.
            streamer: a transformers streamer, for one prompt.
            on_token: called after each step with the step's tokens [B] and their `TokenUncertainty` [B].
            tokenizer: needed for `stop_strings` only.
            generation_config: by default the base's own.
            settings: those of transformers' `GenerationConfig`: max_new_tokens, do_sample, temperature, top_k, top_p,
                min_p, repetition_penalty, eos_token_id, stop_strings, …; also your own `logits_processor` or
                `stopping_criteria` list. Processors act on the mixture. Giving temperature, top_k, top_p or min_p turns
                sampling on. A temperature of 0 means the most likely token.

        Raises:
            ConfigError: a setting is unknown, out of range, impossible for a mixture (beams, contrastive search, …), or
                refused by transformers; or a prompt is empty.
            EnsembleFormatError: a member's logits are NaN.
        """
        how: dict[str, Any] = {"seed": seed, "streamer": streamer, "on_token": on_token, "tokenizer": tokenizer}
        how |= {"generation_config": generation_config, **settings}
        self.check_writes()
        if member is not None:
            if mixture != "member":
                raise ConfigError(f'goes with mixture="member", not {mixture!r}', where="member")
            if not 0 <= member < self.num_members:
                raise ConfigError(f"there is no member {member} of {self.num_members}", where="member")
            with self.using([member]):  # a mixture of one member is that member
                return self.generate(input_ids, attention_mask, **how)
        how["num_draws"] = self.num_draws if self._selection.members is None else 1
        with self.inference():
            return decode(self.base, self._active_weights(), input_ids, attention_mask, mixture=mixture, **how)

    def _active_weights(self) -> Tensor:
        """Weights of the members that forwards run with, summing to one; [1.0] if the base runs alone."""
        selected = self._selection.members
        if not selected:
            return self.weights if selected is None else self.weights.new_ones(1)
        return self.weights[list(selected)] / self.weights[list(selected)].sum()
