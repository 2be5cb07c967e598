"""How good an ensemble's answers are, and whether it knows where they are wrong.

`running` runs a task on rows and a model; `tasks` has one file for each task. Other modules compute figures from scores
and labels: `metrics` and `bootstrap` for probabilities, `…_quality` and `refusal_rates` for one kind of answers each.
Read next: `task.py`.
"""

from typing import TYPE_CHECKING

from renyi.lazy import lazy_names

if TYPE_CHECKING:
    from renyi.evaluation.choice_quality import ChoiceEvaluation, Opinion, calibration_split, evaluate_choice
    from renyi.evaluation.member_groups import Specialisation, specialisation
    from renyi.evaluation.preference_quality import (
        ContestedAUROC,
        GroupQuality,
        PreferenceEvaluation,
        PreferenceQuality,
        evaluate_preference,
    )
    from renyi.evaluation.refusal_classifier import is_refusal
    from renyi.evaluation.refusal_rates import (
        GroupRefusal,
        RefusalEvaluation,
        RefusalRates,
        evaluate_refusal,
    )
    from renyi.evaluation.running import evaluate, find_task, register, task_names
    from renyi.evaluation.sample_quality import (
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
    from renyi.evaluation.task import Evaluated, Models, Settings, Task, setting
    from renyi.evaluation.text_quality import PerplexityEvaluation, evaluate_perplexity

__all__ = [
    "ChoiceEvaluation",
    "ContestedAUROC",
    "Evaluated",
    "GroupQuality",
    "GroupRefusal",
    "Models",
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
    "Settings",
    "Specialisation",
    "Task",
    "calibration_split",
    "distinct_n",
    "evaluate",
    "evaluate_choice",
    "evaluate_perplexity",
    "evaluate_preference",
    "evaluate_refusal",
    "evaluate_sampling",
    "find_task",
    "is_refusal",
    "majority_accuracy",
    "pass_at_k",
    "register",
    "risk_threshold",
    "self_bleu",
    "setting",
    "specialisation",
    "task_names",
]

__getattr__ = lazy_names(
    __name__,
    {
        "renyi.evaluation.member_groups": ("Specialisation", "specialisation"),
        "renyi.evaluation.running": ("evaluate", "find_task", "register", "task_names"),
        "renyi.evaluation.task": ("Evaluated", "Models", "Settings", "Task", "setting"),
        "renyi.evaluation.choice_quality": ("ChoiceEvaluation", "Opinion", "calibration_split", "evaluate_choice"),
        "renyi.evaluation.text_quality": ("PerplexityEvaluation", "evaluate_perplexity"),
        "renyi.evaluation.preference_quality": (
            "ContestedAUROC",
            "GroupQuality",
            "PreferenceEvaluation",
            "PreferenceQuality",
            "evaluate_preference",
        ),
        "renyi.evaluation.refusal_rates": (
            "GroupRefusal",
            "RefusalEvaluation",
            "RefusalRates",
            "evaluate_refusal",
        ),
        "renyi.evaluation.refusal_classifier": ("is_refusal",),
        "renyi.evaluation.sample_quality": (
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
