"""`--report DIR` of the preference task: a pair is a question whose right answer is the chosen completion.

It turns margins into such choices. What the page holds, `choice_report` knows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from renyi.cli.tasks.choice_report import write_choice_report

if TYPE_CHECKING:
    from torch import Tensor

    from renyi.inference import PairScore


def write_preference_report(
    folder: Path,
    subtitle: str,
    result: Mapping[str, Any],
    scores: "Sequence[PairScore]",
    weights: "Tensor",
    texts: Sequence[tuple[str, str, str]],
    groups: Sequence[str] | None,
    group_name: str | None,
) -> None:
    """Write the page of scored pairs, whose texts are prompt, chosen and rejected completion."""
    import torch
    from torch.nn.functional import logsigmoid

    from renyi.data import Question
    from renyi.evaluation import Opinion, evaluate_choice

    margin_MN = torch.tensor([s.margin for s in scores], dtype=torch.float64).T
    opinion = Opinion(logsigmoid(torch.stack([margin_MN, -margin_MN], dim=-1)), weights.cpu())
    evaluation = evaluate_choice(opinion, [0] * len(scores), groups=groups)
    pairs = [Question(prompt, [chosen, rejected], 0) for prompt, chosen, rejected in texts]
    title = "Preferences"
    write_choice_report(folder, subtitle, result, evaluation, opinion, pairs, group_name, None, None, title)
