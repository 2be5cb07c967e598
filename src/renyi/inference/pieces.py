"""The piece of text that each token of an answer adds, found as the tokens come.

Used by `generate.py`, which is the file to read next.
"""

from transformers import PreTrainedTokenizerBase

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no whole character
# How many tokens may wait for the rest of a character. A character has at most four bytes, so more is no text.
_LONGEST_WAIT = 32


class Pieces:
    """Decodes an answer token by token, in time proportional to its length.

    What a token looks like depends on the tokens before it (whether a space comes first, the rest of a character), but
    on the nearest ones only. So each call decodes a short window: the tokens that were shown last, and those that are
    not shown yet.

    Attributes:
        text: the pieces so far, joined. After `finish` it is the whole answer without special tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.text = ""
        self._tokenizer = tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {*getattr(tokenizer, "all_special_ids", ()), *(i for i, t in added.items() if t.special)}
        self._shown: list[int] = []
        self._shown_text = ""
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """The piece of the next token.

        It is "" for a special token, and for a part of a character: the token that completes a character brings it.
        """
        if token in self._special:
            return ""
        self._waiting.append(token)
        piece = self._unseen()
        is_part = not piece or piece.endswith(_HALF)
        return "" if is_part and len(self._waiting) < _LONGEST_WAIT else self._show(piece)

    def peek(self, token: int) -> str:
        """The text that the next token would show if it were this one. It may end with half a character."""
        return self._unseen(token)

    def finish(self) -> str:
        """What still waits when the answer has ended: a character that was begun and never completed."""
        return self._show(self._unseen()) if self._waiting else ""

    def _unseen(self, *more: int) -> str:
        """The text of the waiting tokens, and of `more` after them."""
        whole = self._decoded([*self._shown, *self._waiting, *more])
        if whole.startswith(self._shown_text):
            return whole[len(self._shown_text) :]
        return self._decoded(
            [*self._waiting, *more]
        )  # bytes that are no text can change how those before them are decoded

    def _show(self, piece: str) -> str:
        self._shown, self._waiting = self._waiting, []
        self._shown_text = self._decoded(self._shown)
        self.text += piece
        return piece

    def _decoded(self, ids: list[int]) -> str:
        # A clean-up of spaces, where a tokenizer has one, would change text that was shown already.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
