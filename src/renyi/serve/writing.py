"""An answer as it is written: tokens become pieces of text, stop strings are found, and nothing is shown too early.

It knows nothing of OpenAI's forms. Read next: `answers.py`, which puts what is written into them.
"""

from collections.abc import Sequence
from math import nan
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from renyi.inference import Answer
from renyi.inference.pieces import Pieces
from renyi.objectives import effective_members, responsibilities
from renyi.serve.engine import Alternative, EngineToken


class Told(NamedTuple):
    """A token that could have come, with the text that it would have added, and its log-probability in nats."""

    text: str
    log_prob: float


class Written(NamedTuple):
    """A token of an answer with the piece of text that it added. All pieces of an answer join to its text.

    Attributes:
        text: the piece, "" within a character and for special tokens.
        token: what the engine says of it.
        alternatives: the mixture's.
        member_alternatives: each member's, where they were asked for.
    """

    text: str
    token: EngineToken
    alternatives: Sequence[Told] = ()
    member_alternatives: Sequence[Sequence[Told]] = ()


class Writing:
    """One answer in progress.

    Args:
        tokenizer: of the base.
        weights: mixture weights [K] of the members that answer.
        stops: the answer ends before the first of these that appears in its text.

    Attributes:
        tokens: the engine's tokens so far.
        text: the text so far that may be shown.
        finish: "stop", "length", or None while the answer goes on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, weights: Sequence[float], stops: Sequence[str] = ()):
        self.tokens: list[EngineToken] = []
        self.text = ""
        self.finish: str | None = None
        self._pieces = Pieces(tokenizer)
        self._weights, self._stops = weights, stops
        self._held: list[Written] = []  # what may yet turn out to belong to a stop string
        self._shown: list[Written] = []

    def add(self, token: EngineToken) -> list[Written]:
        """Take the next token, and return what may be shown now. A token that ends the answer adds no text."""
        alternatives = _told(self._pieces, token.alternatives)
        of_members = [_told(self._pieces, own) for own in token.member_alternatives]
        self.tokens.append(token)
        ends = token.finish == "stop"
        text = "" if ends else self._pieces.add(token.token)
        if token.finish is not None:
            text += self._pieces.finish()
        self.finish = token.finish
        self._held.append(Written(text, token, alternatives, of_members))
        return self._released()

    def answer(self) -> Answer:
        """All of it, with its uncertainty, as `renyi generate` gives it. There is at least one token."""
        count = len(self.tokens)
        ell_K = torch.tensor([token.member_log_probs for token in self.tokens], dtype=torch.float64).sum(0)
        posterior_K = self._posterior(ell_K)
        return Answer(
            text=self.text,
            token_ids=[token.token for token in self.tokens],
            tokens=[written.text for written in self._shown],
            log_prob=[token.log_prob for token in self.tokens],
            weights=[list(token.weights) for token in self.tokens],
            total=[token.total for token in self.tokens],
            aleatoric=[token.aleatoric for token in self.tokens],
            epistemic=[token.epistemic for token in self.tokens],
            member_log_likelihood=ell_K.tolist(),
            mixture_nll=-sum(token.log_prob for token in self.tokens),
            mean_epistemic=sum(token.epistemic for token in self.tokens) / count,
            max_epistemic=max(token.epistemic for token in self.tokens),
            disagreement=sum(token.variation_ratio for token in self.tokens) / count,
            effective_members=float(effective_members(posterior_K)),
        )

    def responsibilities(self) -> list[float]:
        """The posterior over members given the answer so far, [K]."""
        ell_K = torch.tensor([token.member_log_probs for token in self.tokens], dtype=torch.float64).sum(0)
        return self._posterior(ell_K).tolist()

    def _posterior(self, ell_K: torch.Tensor) -> torch.Tensor:
        return responsibilities(ell_K, 1.0, torch.tensor(self._weights, dtype=torch.float64).log())

    def _released(self) -> list[Written]:
        """What is held and belongs to no stop string. If there is a whole one, the answer ends before it."""
        held = "".join(written.text for written in self._held)
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            return self._show(self._cut(min(found)))
        if self.finish is not None:
            return self._show(len(self._held))
        free = len(held) - max((_overlap(held, stop) for stop in self._stops), default=0)
        count, length = 0, 0
        for written in self._held:
            length += len(written.text)
            if length > free:
                break
            count += 1
        return self._show(count)

    def _cut(self, length: int) -> int:
        """Cut the held text after `length` characters. Returns how many of the held tokens are left."""
        for place, written in enumerate(self._held):
            if len(written.text) >= length:
                self._held[place] = written._replace(text=written.text[:length])
                return place + (length > 0)
            length -= len(written.text)
        return len(self._held)

    def _show(self, count: int) -> list[Written]:
        shown, self._held = self._held[:count], self._held[count:]
        self._shown += shown
        self.text += "".join(written.text for written in shown)
        return shown


def echoed(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], tokens: Sequence[EngineToken]) -> list[Written]:
    """A prompt as if it had been written.

    Args:
        tokenizer: of the base.
        prompt: its tokens.
        tokens: what the engine says of them, from the second one on. Nothing is said of the first; its numbers are NaN.
    """
    pieces = Pieces(tokenizer)
    first = EngineToken(prompt[0], nan, (), (), nan, nan, nan, nan)
    written = []
    for token in (first, *tokens):
        alternatives = _told(pieces, token.alternatives)
        of_members = [_told(pieces, own) for own in token.member_alternatives]
        written.append(Written(pieces.add(token.token), token, alternatives, of_members))
    written[-1] = written[-1]._replace(text=written[-1].text + pieces.finish())
    return written


def _told(pieces: Pieces, alternatives: Sequence[Alternative]) -> list[Told]:
    return [Told(pieces.peek(token), log_prob) for token, log_prob in alternatives]


def _overlap(text: str, stop: str) -> int:
    """The longest end of the text with which the stop string may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
