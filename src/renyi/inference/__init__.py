"""What a trained ensemble says, and how sure it is."""

from renyi.inference.members import MemberSummary, summarise_members
from renyi.inference.preference import PairScore, score_pairs
from renyi.inference.score import Score, score
from renyi.inference.uncertainty import TokenUncertainty, token_uncertainty

__all__ = [
    "MemberSummary",
    "PairScore",
    "Score",
    "TokenUncertainty",
    "score",
    "score_pairs",
    "summarise_members",
    "token_uncertainty",
]
