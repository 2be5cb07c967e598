"""Makes text safe to show, and writes counts for people to read.

Text from users' files, from settings or from a model may hold control characters. Code that shows such text on a
terminal, in a report or in a log passes it through `printable`. Files that programs read back (JSON lines, chat
templates, generated text on request) keep the text as it is.
"""

import re

# These characters are escaped:
# - C0 and C1 controls and DEL;
# - the marks, embeddings, overrides and isolates of the bidirectional algorithm (Unicode Standard Annex 9), because
#   they can show a line in another order than it has;
# - line and paragraph separators;
# - lone halves of surrogate pairs, because no encoding can write them.
# Joiners are not escaped, because Persian and emoji need them.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


def printable(text: object, keep: str = "\n\t") -> str:
    r"""Replace every control character by a visible escape, such as `\x1b[31m` instead of red letters.

    Args:
        text: what to show. It is converted by `str` first.
        keep: control characters that stay as they are; `""` if the text must fit on one line of a table.

    Returns:
        The text. It is unchanged if it holds no control character, so calling this twice does no harm.
    """
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def number_text(number: float) -> str:
    """A count in the form that people read: 812, 20,480, 1.24 M."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """A count with its noun: 1 row, 20,480 rows."""
    return f"{number_text(number)} {noun}{'' if number == 1 else 's'}"
