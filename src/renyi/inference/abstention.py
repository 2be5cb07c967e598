"""The threshold above which answers are marked or withheld: `abstention.json` in an ensemble's folder.

`renyi evaluate --task choice --target_risk …` finds the threshold and writes the file. Generation reads it. Read next:
`renyi.evaluation.selective`, how the threshold is found and what it promises.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError, EnsembleFormatError, SaveError
from renyi.files import write_whole
from renyi.layout import ABSTENTION_FILE

if TYPE_CHECKING:
    from renyi.inference.generate import Answer

FIND_ONE = "To find one: renyi evaluate ENSEMBLE QUESTIONS.jsonl --task choice --target_risk 0.05"
OF_ANSWERS = ("mean_epistemic", "max_epistemic", "disagreement", "mixture_nll", "effective_members")
OF_TOKENS = ("total", "aleatoric", "epistemic")


class Abstention(NamedTuple):
    """The threshold in an ensemble's folder.

    Attributes:
        score: the uncertainty that it bounds. If that is a score of tokens, the answer's most uncertain token counts.
        threshold: an answer above it is not trusted.
        risk: the promised share of wrong answers among those that remain; None if the file does not say.
    """

    score: str
    threshold: float
    risk: float | None

    def check(self) -> None:
        """Raise `ConfigError` if generated answers have no such score."""
        if self.score not in OF_ANSWERS + OF_TOKENS:
            raise ConfigError(
                f"answers are not scored by {self.score}, as {ABSTENTION_FILE} has it",
                hint=f"Let `renyi evaluate` abstain by one of {', '.join(OF_TOKENS)}.",
            )

    def value(self, answer: "Answer") -> float:
        """The answer's uncertainty."""
        value = getattr(answer, self.score)
        return float(max(value) if isinstance(value, list) else value)

    def is_above(self, answer: "Answer") -> bool:
        """Whether the answer is less certain than the threshold allows."""
        return self.value(answer) > self.threshold


def read_abstention(folder: Path) -> Abstention | None:
    """The threshold that a folder keeps, or None.

    Raises:
        EnsembleFormatError: there is a file, and it cannot be read.
    """
    file = folder / ABSTENTION_FILE
    if not file.is_file():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Abstention(str(kept["score"]), float(kept["threshold"]), kept.get("risk", kept.get("target_risk")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnsembleFormatError(f"cannot be read ({error!r})", where=str(file), hint=FIND_ONE) from error


def write_abstention(folder: Path, kept: Mapping[str, Any]) -> Path:
    """Write a threshold to a folder: `score`, `threshold`, and any other figures. Returns the file.

    Raises:
        SaveError: it could not be written; the file is then as it was.
    """
    file = folder / ABSTENTION_FILE
    write_whole(file, (json.dumps(kept) + "\n").encode())
    return file


def remove_abstention(folder: Path) -> bool:
    """Remove a threshold that no longer holds. Returns whether there was one."""
    file = folder / ABSTENTION_FILE
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SaveError(f"could not be removed ({error})", where=str(file), hint="Remove it by hand.") from error
    return True
