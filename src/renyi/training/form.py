"""PowerFlow's format penalty ψ: what a completion of the wrong form loses per token.

Read next: `powerflow.py`, which adds ψ to the loss.
"""

import math
import re
from collections.abc import Callable
from typing import TypeAlias

from renyi.errors import ConfigError
from renyi.named import named_function

# From (prompt, completion) to ψ in nats a token: 0 for the wanted form, below 0 for a fault.
Form: TypeAlias = Callable[[str, str], float]

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_CALLED_WITH = "a prompt and a completion, both text, and returns nats a token"


def form_of(format_penalty: str | None, size: float) -> Form | None:
    """The function that a setting stands for: one given by name, or one that takes `size` if a pattern is not found.

    Raises:
        ConfigError: there is no such function, or the pattern is no regular expression.
    """
    if format_penalty is None:
        return None
    if _FUNCTION.fullmatch(format_penalty):
        return _Checked(named_function(format_penalty, "format_penalty", _CALLED_WITH), format_penalty)
    try:
        pattern = re.compile(format_penalty, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"{format_penalty!r} is no regular expression ({error})",
            where="format_penalty",
            hint="Give one that a well-formed completion contains, or a function as package.module:function.",
        ) from error
    return lambda prompt, completion: 0.0 if pattern.search(completion) else -size


class _Checked:
    """A user's function. An error in it is reported together with the completion that caused it."""

    def __init__(self, function: Callable[..., object], name: str):
        self.function, self.name = function, name

    def __call__(self, prompt: str, completion: str) -> float:
        where = f"format_penalty, of the completion {completion[:60]!r}"
        try:
            given = self.function(prompt, completion)
            penalty = float(given)  # type: ignore[arg-type]
        except Exception as error:
            raise ConfigError(
                f"{self.name} raised {type(error).__name__} ({error})",
                where=where,
                hint=f"It is called with {_CALLED_WITH}.",
            ) from error
        if not math.isfinite(penalty):
            raise ConfigError(
                f"{self.name} gave {given!r}", where=where, hint="Return a finite number: 0 for no fault."
            )
        return penalty
