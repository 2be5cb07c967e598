"""What a trained ensemble answers, and how sure it is. Read next: `score.py`, `generate.py`."""

from renyi.inference.choices import ChoiceScores, choice_log_probs, choice_prompt, score_choices
from renyi.inference.continuation import ContinuationScore, score_continuations
from renyi.inference.diagnose import Diagnosis, diagnose
from renyi.inference.generate import Answer, Prompt, generate
from renyi.inference.group_scores import GroupScore, group_scores
from renyi.inference.members import MemberSummary, MemberTable, members_table, summarise_members
from renyi.inference.pair_scores import PairScore, score_pairs
from renyi.inference.reward_scores import RewardFunction, RewardScore, rated_rows, score_rated_pairs, score_rewards
from renyi.inference.score import Score, score
from renyi.inference.thumb_scores import ThumbScore, score_thumbs
from renyi.measures import TokenUncertainty, token_uncertainty

__all__ = [
    "Answer",
    "ChoiceScores",
    "ContinuationScore",
    "Diagnosis",
    "GroupScore",
    "MemberSummary",
    "MemberTable",
    "PairScore",
    "Prompt",
    "RewardFunction",
    "RewardScore",
    "Score",
    "ThumbScore",
    "TokenUncertainty",
    "choice_log_probs",
    "choice_prompt",
    "diagnose",
    "generate",
    "group_scores",
    "members_table",
    "rated_rows",
    "score",
    "score_choices",
    "score_continuations",
    "score_pairs",
    "score_rated_pairs",
    "score_rewards",
    "score_thumbs",
    "summarise_members",
    "token_uncertainty",
]
