"""What a trained ensemble says, and how sure it is."""

from renyi.inference.members import MemberSummary, summarise_members
from renyi.inference.score import Score, score
from renyi.inference.uncertainty import TokenUncertainty, token_uncertainty

__all__ = ["MemberSummary", "Score", "TokenUncertainty", "score", "summarise_members", "token_uncertainty"]
