"""Control characters of users' files and of models are shown, not obeyed."""

import sys
import unicodedata

import pytest

from renyi.errors import DataError
from renyi.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jgone", r"\x1b[2Jgone"),
        ("\x9b31mred", r"\x9b31mred"),  # C1: the same in one character
        ("a\rb", r"a\rb"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("half \ud83d", r"half \ud83d"),
        ("one\u2028two", r"one\u2028two"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("naïve 日本 👩‍🔬 می‌خواهم [bold]", "naïve 日本 👩‍🔬 می‌خواهم [bold]"),
        ("C:\\x1b", "C:\\x1b"),
        (12, "12"),
    ],
)
def test_control_characters_become_visible(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(printable(text)) == shown


def test_no_character_of_unicode_is_forgotten() -> None:
    """Controls (Cc), ends of lines (Zl, Zp) and surrogates (Cs) by category, bidirectional ones by their class."""
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    marks = {"\u061c", "\u200e", "\u200f"}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        unsafe = (
            unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")
            or unicodedata.bidirectional(character) in bidirectional
            or character in marks
        )
        assert (printable(character, keep="") == character) is not unsafe, hex(code)


def test_errors_are_printable() -> None:
    error = DataError("role '\x1b]0;owned\x07' is unknown", where="rows\x1b[1m.jsonl, row 1", hint="Write \u202euser.")
    assert str(error).isascii()
    assert not {"\x1b", "\x07", "\u202e"} & set(error.what + (error.where or "") + (error.hint or ""))
