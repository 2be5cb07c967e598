"""The command that trains on audited data as they are: how many members, and at which alpha.

An audit that fitted an adapter knows both from the curvature. Without a model the number of members is the number of
answers that compete, and alpha is left to `alpha: auto`.
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from renyi.audit.findings import CONTESTED, Audit

MOST_MEMBERS = 4  # that reading alone recommends


def next_command(found: Audit, row: Mapping[str, Any], data: Sequence[str]) -> str | None:
    """A command line of `renyi sft` or `renyi dpo`; None if neither reads such rows, or there are several files.

    Args:
        found: what was found.
        row: one of the rows, which shows their form.
        data: files or hub ids that were audited.
    """
    has = {name for name, value in row.items() if value is not None}
    if len(data) != 1 or not ({"chosen", "rejected"} <= has or {"prompt", "completion"} <= has or has & _READ):
        return None
    method = "dpo" if {"chosen", "rejected"} <= has else "sft"
    members, alpha = recommended(found)
    words = ["renyi", method, "--model_name_or_path", str(found.settings.get("model") or "BASE")]
    words += [
        "--dataset_name",
        data[0],
        "--num_members",
        str(members),
        "--alpha",
        alpha,
        "--output_dir",
        "runs/audited",
    ]
    return shlex.join(words)


_READ = {"messages", "conversations", "text"}


def recommended(found: Audit) -> tuple[int, str]:
    """The number of members, and alpha.

    With a diagnosis they are what it recommends if the data contradict the model, and one member at alpha 0 if not.
    Without one: as many members as the most sides of a contested conflict, at most four, and alpha "auto".
    """
    variation = max((len(g.sides) for g in found.groups if g.kind == "systematic_variation"), default=1)
    if found.stability is not None:
        if found.stability["contradicted"]:
            return max(found.stability["members"], variation), f"{found.stability['alpha']:g}"
        return (variation, "auto") if variation > 1 else (1, "0")
    contested = [len(g.sides) for g in found.groups if "conflict" in g.kind and g.score < CONTESTED]
    members = max(variation, min(MOST_MEMBERS, max(contested, default=1)))
    return members, "auto" if members > 1 else "0"
