"""What a mixture makes of text that is there already, from what each member makes of it by itself.

A server that scores a prompt under one model names, for each token, the log-probabilities of this token and of the 20
or so likeliest. That gives exactly how likely the mixture finds the token, the members' running weights, and their
votes. Entropies need the whole vocabulary, so here they are bounds: all tokens that some member did not name count as
one, and the entropy and the mutual information of the coarser choice are never more than those of the finer.

It knows numbers alone. Read next: `vllm.py`, whose engine asks the members.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from renyi.measures import token_uncertainty
from renyi.objectives import running_log_weights
from renyi.serve.engine import Alternative, EngineToken


def rescored(
    named: Sequence[Sequence[Mapping[int, float]]],
    tokens: Sequence[int],
    weights: Sequence[float],
    by_token: bool = False,
    alternatives: int = 0,
    members: bool = False,
) -> list[EngineToken]:
    """The tokens of a text of N tokens, as K members see them.

    Args:
        named: [K][N], log-probabilities by token, nats: each member's likeliest tokens, and the text's token.
        tokens: of the text, [N].
        weights: mixture weights π, [K].
        by_token: whether the weights stay π.
        alternatives: how many of the mixture's likeliest tokens to name. Fewer come if members named different ones.
        members: whether to name as many of each member.

    Returns:
        A token each. `log_prob`, `weights`, `member_log_probs` and `variation_ratio` are exact; `total`, `aleatoric`
        and `epistemic` are lower bounds. `finish` is None.
    """
    log_w_K = torch.tensor(weights, dtype=torch.float64).log().log_softmax(0)
    found = []
    for position, token in enumerate(tokens):
        of_members = [own[position] for own in named]
        log_p_K = torch.tensor([each[token] for each in of_members], dtype=torch.float64)
        weights_K = log_w_K.exp().tolist()
        by_all = sorted(set.intersection(*map(set, of_members)))
        log_p_KS = torch.tensor([[each[other] for other in by_all] for each in of_members], dtype=torch.float64)
        of = token_uncertainty(_with_rest(log_p_KS), log_w_K)
        log_prob = float((log_w_K + log_p_K).logsumexp(0))
        mixed = dict(zip(by_all, (log_w_K[:, None] + log_p_KS).logsumexp(0).tolist(), strict=True)) | {token: log_prob}
        votes: dict[int, float] = defaultdict(float)
        for each, weight in zip(of_members, weights_K, strict=True):
            votes[_likeliest(each, 1)[0].token] += weight
        found.append(
            EngineToken(
                token=token,
                log_prob=log_prob,
                weights=weights_K,
                member_log_probs=log_p_K.tolist(),
                total=float(of.total),
                aleatoric=float(of.aleatoric),
                epistemic=float(of.epistemic),
                variation_ratio=max(0.0, 1.0 - max(votes.values())),
                alternatives=_likeliest(mixed, alternatives),
                member_alternatives=[_likeliest(each, alternatives) for each in of_members] if members else (),
            )
        )
        if not by_token:
            log_w_K = running_log_weights(log_w_K, log_p_K)
    return found


def _with_rest(log_p_KS: Tensor) -> Tensor:
    """[K, S + 1], with all that is left of each member's probability in the last place."""
    rest_K1 = (1.0 - log_p_KS.exp().sum(-1, keepdim=True)).clamp(min=0.0)
    return torch.cat([log_p_KS, rest_K1.log()], dim=-1)


def _likeliest(log_probs: Mapping[int, float], several: int) -> list[Alternative]:
    return [Alternative(*each) for each in sorted(log_probs.items(), key=lambda item: -item[1])[:several]]
