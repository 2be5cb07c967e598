"""What is written, in OpenAI's forms: choices, log-probabilities, usage, chunks of a stream; and our fields in them.

Ours are `choices[].uncertainty` and extra keys of each entry of `logprobs.content`. Everything is in nats. Read next:
`answers.py`, which calls these functions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from renyi.inference import Answer
from renyi.inference.abstention import Abstention
from renyi.serve.engine import Sampled
from renyi.serve.writing import Told, Writing, Written

_FLOOR = -9999.0  # OpenAI's log-probability of what is all but impossible


class Chosen(NamedTuple):
    """One of the answers to a request, complete.

    Attributes:
        index: of the choice.
        writing: the answer.
        names: of the members that answer under the model's name, [K].
        mixture: how they were mixed, "sequence" or "token"; None for a member by itself.
        sampled: that one of them answered alone for the mixture; None if they answered together.
        tells_members: whether the client wants to know what each member made of it.
        abstention: the folder's threshold, if it has one that fits answers.
        withhold: whether an answer above it is to be left unsaid.
    """

    index: int  # type: ignore[assignment]
    writing: Writing
    names: Sequence[str]
    mixture: str | None
    sampled: Sampled | None
    tells_members: bool
    abstention: Abstention | None
    withhold: bool

    @property
    def is_withheld(self) -> bool:
        """Whether the answer is left unsaid."""
        return bool(self.withhold and self.abstention and self.abstention.is_above(self.writing.answer()))

    def refusal(self) -> str:
        """What is said in place of a withheld answer."""
        assert self.abstention is not None
        value, threshold = self.abstention.value(self.writing.answer()), self.abstention.threshold
        return f"I do not know: {self.abstention.score} is {value:.3f}, above the threshold of {threshold:.3f}."


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def uncertainty(chosen: Chosen) -> dict[str, Any]:
    """How sure the mixture was of an answer: `choices[].uncertainty`."""
    answer = chosen.writing.answer()
    found: dict[str, Any] = {name: _spread(getattr(answer, name)) for name in ("total", "aleatoric", "epistemic")}
    found |= {
        "effective_members": answer.effective_members,
        "disagreement": answer.disagreement,
        "mixture_nll": _finite(answer.mixture_nll),
        "withheld": chosen.is_withheld,
        "threshold": _threshold(chosen.abstention, answer),
    }
    found["mixture"] = "sampled" if chosen.sampled else chosen.mixture
    if chosen.sampled:
        found["sampled"] = {"model": chosen.names[chosen.sampled.member], "why": chosen.sampled.why}
    if chosen.tells_members:
        shares = chosen.writing.responsibilities()
        found["members"] = [
            {"model": name, "log_likelihood": max(ell, _FLOOR), "responsibility": share}
            for name, ell, share in zip(chosen.names, answer.member_log_likelihood, shares, strict=True)
        ]
    return found


def _spread(values: Sequence[float]) -> dict[str, float | int]:
    """The mean over tokens, the worst token's value, and which it is."""
    worst = max(range(len(values)), key=values.__getitem__)
    return {"mean": sum(values) / len(values), "max": values[worst], "max_token": worst}


def _threshold(abstention: Abstention | None, answer: Answer) -> dict[str, Any] | None:
    if abstention is None:
        return None
    return {
        "score": abstention.score,
        "value": _finite(abstention.value(answer)),
        "threshold": abstention.threshold,
        "is_above": abstention.is_above(answer),
    }


# ---- Log-probabilities -----------------------------------------------------------------------------------------------


def chat_logprobs(shown: Sequence[Written], names: Sequence[str], tells_members: bool) -> dict[str, Any]:
    """`logprobs` of a chat's choice: an entry for each token, whose bytes join to the text."""
    return {"content": [_entry(w, names, tells_members) for w in shown if w.token.finish != "stop"], "refusal": None}


def _entry(written: Written, names: Sequence[str], tells_members: bool) -> dict[str, Any]:
    token = written.token
    entry = {
        **_logprob(Told(written.text, token.log_prob), is_shown=True),
        "top_logprobs": [_logprob(told) for told in written.alternatives],
        "total": token.total,
        "aleatoric": token.aleatoric,
        "epistemic": token.epistemic,
        "disagreement": token.variation_ratio,
    }
    if tells_members:
        entry["members"] = _of_members(written, names)
    return entry


def _of_members(written: Written, names: Sequence[str]) -> list[dict[str, Any]]:
    """What each member makes of a token."""
    token = written.token
    each = list(written.member_alternatives) or [[]] * len(token.weights)
    return [
        {
            "model": name,
            "weight": weight,
            "logprob": max(log_prob, _FLOOR),
            "top_logprobs": [_logprob(told) for told in own],
        }
        for name, weight, log_prob, own in zip(names, token.weights, token.member_log_probs, each, strict=False)
    ]


def _logprob(told: Told, is_shown: bool = False) -> dict[str, Any]:
    """A token's text, log-probability and bytes; no bytes where the text ends with half a character."""
    is_half = not is_shown and "\N{REPLACEMENT CHARACTER}" in told.text
    return {
        "token": told.text,
        "logprob": max(told.log_prob, _FLOOR),
        "bytes": None if is_half else list(told.text.encode("utf-8")),
    }


def completion_logprobs(
    shown: Sequence[Written], offset: int, names: Sequence[str], tells_members: bool, is_echo: bool = False
) -> dict[str, Any]:
    """`logprobs` of a completion's choice: a list for each quantity, whose tokens join to the text.

    Nothing is known of the first token of an echo: it has null everywhere.

    Args:
        shown: the tokens.
        offset: characters of the choice's text before them.
        names: of the members.
        tells_members: whether to name what each member makes of a token.
        is_echo: whether the prompt is among them. The end token then has an entry, too, because clients that score a
            prompt leave the last entry out.
    """
    shown = [written for written in shown if is_echo or written.token.finish != "stop"]
    offsets = []
    for written in shown:
        offsets.append(offset)
        offset += len(written.text)
    found: dict[str, Any] = {
        "tokens": [w.text for w in shown],
        "token_logprobs": [max(w.token.log_prob, _FLOOR) for w in shown],
        "top_logprobs": [_by_text(w.alternatives) for w in shown],
        "text_offset": offsets,
        "total": [w.token.total for w in shown],
        "aleatoric": [w.token.aleatoric for w in shown],
        "epistemic": [w.token.epistemic for w in shown],
        "disagreement": [w.token.variation_ratio for w in shown],
    }
    if tells_members:
        found["members"] = [_of_members(w, names) for w in shown]
    for at, written in enumerate(shown):
        if math.isnan(written.token.log_prob):
            for name in found.keys() - {"tokens", "text_offset"}:
                found[name][at] = None
    return found


def _by_text(alternatives: Sequence[Told]) -> dict[str, float]:
    """Log-probabilities by text. Of tokens with one text, the likeliest counts."""
    found: dict[str, float] = {}
    for text, log_prob in alternatives:
        found.setdefault(text, max(log_prob, _FLOOR))
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
