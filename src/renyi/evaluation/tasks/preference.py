"""Pairs: which completion the mixture and every member prefer, and the pairs on which members contradict each other.

Pairs are prepared, cut and compared with the reference as in the ensemble's training. Read next:
`renyi.evaluation.pair_task`, which evaluates the margins, and `renyi.evaluation.preference_quality`, the figures.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from renyi.evaluation.pair_task import Asked, PairSettings, PairTask, Read
from renyi.evaluation.task import Model, is_positive, setting


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PairSettings):
    """Settings of the preference task."""

    reference: Literal["kept", "base"] = setting(
        "kept", "what margins are measured against: kept, as in training, or base"
    )
    beta: float | None = setting(None, "temperature of the margins; by default as in training", "FLOAT")

    def validate(self) -> None:
        super().validate()
        self.require(self.beta is None or is_positive(self.beta), "beta", "Give a number above 0.")


class Preference(PairTask):
    """Preferences."""

    name = "preference"
    title = "Preferences"
    Settings = PreferenceSettings

    def scores(
        self, model: Model, data: Read, settings: PreferenceSettings, progress: Callable[[int], object]
    ) -> Asked:
        from renyi.data import Limits, PairPreparation
        from renyi.ensemble import Reference, read_preference
        from renyi.inference import score_pairs
        from renyi.objectives import PreferenceLoss

        ensemble, tokenizer, folder = model.ensemble, model.tokenizer, model.folder
        if folder is None:
            preparation, loss, reference = PairPreparation(), PreferenceLoss(), Reference(ensemble)
        else:
            preparation = replace(PairPreparation.read(folder), routing_group=None)  # a score for each row
            loss, reference = read_preference(folder, ensemble)
        loss = loss if settings.beta is None else replace(loss, beta=settings.beta)
        reference = reference if settings.reference == "kept" else Reference(ensemble)
        pairs = preparation.prepare(data.file.rows, tokenizer, data.file.name, Limits.of(ensemble.base))
        scores = score_pairs(ensemble, pairs, loss, reference, preparation, progress=progress)
        made_with = {"loss_type": loss.loss_type, "beta": loss.beta}
        made_with["reference"] = "base" if reference.start is None else "start"
        against = "the base" if reference.start is None else "each member as its training began"
        told = f"{' + '.join(loss.loss_type)}, beta {loss.beta:g} · margins against {against}"
        return Asked(
            scores, ensemble.weights, loss.tie_strength, made_with, told, pairs, tokenizer, {}, ensemble.num_draws
        )


TASK = Preference()
