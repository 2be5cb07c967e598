"""How good what an ensemble says is, and whether it knows where it is not: figures from scores, against labels.

Knows scores, weights and labels. Nothing here loads a model or a file.
"""

from typing import TYPE_CHECKING

from renyi.evaluation.specialisation import Specialisation, specialisation  # a module of the same name: not lazy
from renyi.lazy import lazy_names

if TYPE_CHECKING:
    from renyi.evaluation.choice import ChoiceEvaluation, Opinion, calibration_split, evaluate_choice
    from renyi.evaluation.perplexity import PerplexityEvaluation, evaluate_perplexity
    from renyi.evaluation.preference import (
        ContestedAUROC,
        GroupQuality,
        PreferenceEvaluation,
        PreferenceQuality,
        evaluate_preference,
    )
    from renyi.evaluation.refusal import (
        GroupRefusal,
        RefusalEvaluation,
        RefusalRates,
        evaluate_refusal,
        is_refusal,
    )
    from renyi.evaluation.sampling import (
        Sample,
        SamplingEvaluation,
        SamplingQuality,
        distinct_n,
        evaluate_sampling,
        majority_accuracy,
        pass_at_k,
        self_bleu,
    )
    from renyi.evaluation.selective import RiskThreshold, risk_threshold

__all__ = [
    "ChoiceEvaluation",
    "ContestedAUROC",
    "GroupQuality",
    "GroupRefusal",
    "Opinion",
    "PerplexityEvaluation",
    "PreferenceEvaluation",
    "PreferenceQuality",
    "RefusalEvaluation",
    "RefusalRates",
    "RiskThreshold",
    "Sample",
    "SamplingEvaluation",
    "SamplingQuality",
    "Specialisation",
    "calibration_split",
    "distinct_n",
    "evaluate_choice",
    "evaluate_perplexity",
    "evaluate_preference",
    "evaluate_refusal",
    "evaluate_sampling",
    "is_refusal",
    "majority_accuracy",
    "pass_at_k",
    "risk_threshold",
    "self_bleu",
    "specialisation",
]

__getattr__ = lazy_names(
    __name__,
    {
        "renyi.evaluation.choice": ("ChoiceEvaluation", "Opinion", "calibration_split", "evaluate_choice"),
        "renyi.evaluation.perplexity": ("PerplexityEvaluation", "evaluate_perplexity"),
        "renyi.evaluation.preference": (
            "ContestedAUROC",
            "GroupQuality",
            "PreferenceEvaluation",
            "PreferenceQuality",
            "evaluate_preference",
        ),
        "renyi.evaluation.refusal": (
            "GroupRefusal",
            "RefusalEvaluation",
            "RefusalRates",
            "evaluate_refusal",
            "is_refusal",
        ),
        "renyi.evaluation.sampling": (
            "Sample",
            "SamplingEvaluation",
            "SamplingQuality",
            "distinct_n",
            "evaluate_sampling",
            "majority_accuracy",
            "pass_at_k",
            "self_bleu",
        ),
        "renyi.evaluation.selective": ("RiskThreshold", "risk_threshold"),
    },
)
