"""How good what an ensemble says is, and whether it knows where it is not: figures from scores, against labels.

Knows scores, weights and labels. Nothing here loads a model or a file.
"""

from renyi.evaluation.preference import (
    ContestedAUROC,
    GroupQuality,
    PreferenceEvaluation,
    PreferenceQuality,
    evaluate_preference,
)

__all__ = [
    "ContestedAUROC",
    "GroupQuality",
    "PreferenceEvaluation",
    "PreferenceQuality",
    "evaluate_preference",
]
