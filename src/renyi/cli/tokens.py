"""How tokens look on the screen: those that are trained in colour, or between « » where there are no colours.

The plans of training commands show their first example with these. Read next: `watch.py`.
"""

from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

LONGEST_SPAN = 300  # characters shown of either end of a long piece


def spans(tokenizer: PreTrainedTokenizerBase, ids: list[int], is_trained: list[bool]) -> list[tuple[str, bool]]:
    """The text of tokens, cut into pieces that are trained or not: each piece, and whether it is trained.

    A character of several tokens is not cut; all of it is shown as its first token is.
    """
    found: list[tuple[str, bool]] = []
    is_trained = list(is_trained)
    before, start = "", 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_trained[end] != is_trained[start]:
            # Decoded from the beginning each time, because some tokenizers drop the space that a piece begins with.
            whole = str(tokenizer.decode(ids[:end]))
            if end < len(ids) and whole.endswith("\ufffd"):
                is_trained[end] = is_trained[start]
                continue
            piece = whole[len(before) :] if whole.startswith(before) else str(tokenizer.decode(ids[start:end]))
            found.append((piece, is_trained[start]))
            before, start = whole, end
    return found


def shown(piece: str, colour: str | None, coloured: bool) -> Text:
    """A piece in the colour of what is trained on it, dim if nothing is (None); a long one without its middle."""
    if len(piece) > 2 * LONGEST_SPAN + 50:
        piece = f"{piece[:LONGEST_SPAN]} … {piece[-LONGEST_SPAN:]}"
    if colour is None:
        return Text(piece, "dim")
    if coloured:
        return Text(piece, colour)
    inside = piece.strip()
    left, right = piece[: piece.find(inside)], piece[piece.find(inside) + len(inside) :]
    return Text(f"{left}«{inside}»{right}")


def example_panel(text: Text, name: str, what_is_trained: str) -> Panel:
    """An example in a frame, with its name and a line that says what is trained."""
    title = Text.assemble((name, "bold"), (f" · {what_is_trained}", "dim"))
    return Panel(text, title=title, title_align="left", border_style="dim", padding=(0, 1))
