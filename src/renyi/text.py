"""Text that came from users' files, settings or a model, made safe to show on a terminal, in a report or in a log.

Whatever writes such text for a person passes it through `printable`. Files that machines read back (JSON lines, chat
templates, generated text on request) keep it as it is. Counts are written for a person here, too.
"""

import re

# C0 and C1 controls and DEL; the marks, embeddings, overrides and isolates of the bidirectional algorithm (Unicode
# Standard Annex 9), with which a line can be shown in another order than it has; line and paragraph separators; lone
# halves of surrogate pairs, which no encoding can write. Joiners stay: Persian and emoji are spelled with them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def printable(text: object, keep: str = "\n\t") -> str:
    r"""Text with every control character as a visible escape: `\x1b[31m` instead of red letters.

    Args:
        text: what is to be shown; anything but text is converted by `str`.
        keep: control characters that stay as they are; `""` for one line of a table.

    Returns:
        The text. It is unchanged if it holds no control character, so calling this twice does no harm.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def number_text(number: float) -> str:
    """A count as a person reads it: 812, 20,480, 1.24 M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """A count and what is counted: 1 row, 20,480 rows."""
    return f"{number_text(number)} {noun}{'' if number == 1 else 's'}"
