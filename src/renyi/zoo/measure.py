"""What a trained ensemble knows about a world: likelihood, accuracy, disagreement, and which source a member follows.

Read next: `world.py` (facts and probes), `demo.py` (the training).
"""

from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from renyi.ensemble import LoraEnsemble
from renyi.inference import token_uncertainty
from renyi.objectives import renyi_loss, responsibilities
from renyi.training import RenyiSFTTrainer
from renyi.zoo.base import encode_probes
from renyi.zoo.world import Probe, World


class Measured(NamedTuple):
    """What the demo reports of one run; M members.

    Attributes:
        mixture_nll: of the mixture of sequences on held-out records, nats per answer.
        agreed_accuracy: share of agreed facts that the mixture answers as both schools do.
        mi_contested: mean mutual information between member and answer on contested facts, nats.
        mi_agreed: the same on agreed facts.
        aleatoric_contested: mean uncertainty that every member has by itself on contested facts, nats.
        aleatoric_agreed: the same on agreed facts.
        member_load: mean responsibility of each member over held-out records, [M].
        member_source: share of contested facts on which a member follows its better source, [M].
        source_followed: share of contested facts that member m answers as source s does, [M][S].
        seconds: wall time of the training.
    """

    mixture_nll: float
    agreed_accuracy: float
    mi_contested: float
    mi_agreed: float
    aleatoric_contested: float
    aleatoric_agreed: float
    member_load: list[float]
    member_source: list[float]
    source_followed: list[list[float]]
    seconds: float


def measure(trainer: RenyiSFTTrainer, world: World, seconds: float = 0.0) -> Measured:
    """Measure a trained ensemble on held-out records and on every fact of the world, in every form of question."""
    ensemble = trainer.model.eval()
    log_weights = ensemble.weights.log()
    ell_MN = held_out_log_likelihood(trainer)
    r_MN = responsibilities(ell_MN, ensemble.alpha, log_weights)

    probes = world.probes()
    contested_P = torch.tensor([probe.fact.contested for probe in probes])
    log_p_MPV, values_PS = answer_log_probs(ensemble, trainer.processing_class, probes)
    uncertainty = token_uncertainty(log_p_MPV, log_weights)
    mixture_answer_P = renyi_loss(log_p_MPV, 1.0, log_weights).argmin(dim=-1)
    followed_MS = (log_p_MPV.argmax(dim=-1)[:, contested_P, None] == values_PS[contested_P]).double().mean(dim=1)
    return Measured(
        mixture_nll=renyi_loss(ell_MN, 1.0, log_weights).mean().item() / world.statements,
        agreed_accuracy=(mixture_answer_P == values_PS[:, 0])[~contested_P].double().mean().item(),
        mi_contested=uncertainty.epistemic[contested_P].mean().item(),
        mi_agreed=uncertainty.epistemic[~contested_P].mean().item(),
        aleatoric_contested=uncertainty.aleatoric[contested_P].mean().item(),
        aleatoric_agreed=uncertainty.aleatoric[~contested_P].mean().item(),
        member_load=r_MN.mean(dim=1).tolist(),
        member_source=followed_MS.amax(dim=1).tolist(),
        source_followed=followed_MS.tolist(),
        seconds=seconds,
    )


@torch.no_grad()
def held_out_log_likelihood(trainer: RenyiSFTTrainer) -> Tensor:
    """Log-likelihoods [M, N] of the held-out records, in the order of the world's."""
    assert isinstance(trainer.eval_dataset, Dataset)
    rows = trainer.eval_dataset.select_columns(["input_ids", "labels"])
    batches = DataLoader(rows, batch_size=64, collate_fn=trainer.data_collator)
    return torch.cat([trainer.model.log_likelihood(**batch) for batch in batches], dim=1)


@torch.no_grad()
def answer_log_probs(ensemble: LoraEnsemble, tokenizer: Any, probes: list[Probe]) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M, P, V] of the word at each probe's value, and each source's value [P, S]."""
    encoded = encode_probes(tokenizer, probes)
    logits_MPTV = ensemble.logits(encoded.input_ids, encoded.attention_mask)
    at_value_MPV = logits_MPTV[:, torch.arange(len(probes)), encoded.last]
    return at_value_MPV.double().log_softmax(dim=-1), encoded.values
