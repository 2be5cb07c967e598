"""Whatever a row looks like: it trains exactly what it says, in every mode, and the panel shows that; or one error.

Each row is prepared alone, from a stream; then all rows of a kind together, from one file. Both are compared with what
the row was made to say, letter by letter.
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
from bytewise import byte_tokenizer
from row_cases import TEXTS, Case, draw_case, write_file

from renyi import data
from renyi.cli.tokens import spans
from renyi.data.files import RowsOf
from renyi.data.rows import FOR_TEMPLATES
from renyi.errors import RenyiError

TOKENIZER = byte_tokenizer()
BATCH = 250
LIMITS = data.Limits(positions=None, vocabulary=len(TOKENIZER))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def preparation(case: Case) -> data.RowPreparation:
    if case.kind == "sft":
        return data.Preparation(max_length=None, assistant_only_loss=case.assistant_only)
    return data.PairPreparation(max_length=None) if case.kind == "pairs" else data.PromptPreparation()


def said(made: dict[str, Any], kind: str) -> tuple[str, tuple[str, ...]]:
    """The whole text and the trained parts of a prepared row, decoded."""
    if kind == "prompts":
        return TOKENIZER.decode(made["input_ids"]), ()
    if kind == "pairs":
        return TOKENIZER.decode(made["prompt_ids"] + made["chosen_ids"]), tuple(
            TOKENIZER.decode(made[c]) for c in ("chosen_ids", "rejected_ids")
        )
    is_trained = [label != data.IGNORED for label in made["labels"]]
    assert all(
        label in (token, data.IGNORED) for token, label in zip(*(made[c] for c in ("input_ids", "labels")), strict=True)
    )
    is_trained[0] = False
    pieces = spans(TOKENIZER, made["input_ids"], is_trained)  # what the panel shows
    return "".join(text for text, _ in pieces), tuple(text for text, trained in pieces if trained)


def attempt(case: Case, rows: Any) -> list[Any]:
    """What comes of rows, or the error's text."""
    try:
        return list(preparation(case).prepare(rows, TOKENIZER, "here", LIMITS))
    except RenyiError as error:
        return [str(error)] if error.hint else [error]


def check(case: Case, made: Any) -> None:
    if case.whole is None:
        assert isinstance(made, str), f"was trained: {case.row} as {made and said(made, case.kind)}"
        assert "row " in made or "columns are" in made, made
        return
    assert not isinstance(made, str), f"{made}: {case.row}"
    whole, trained = said(made, case.kind)
    assert whole == case.whole, case.row
    assert trained == case.trained, case.row


class Stream:
    """Stands for a streamed dataset, for a hundredth of its cost: rows of a file as they come."""

    column_names = features = None

    def __init__(self, rows: Iterable[dict[str, Any]]):
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def map(self, function: Any, with_indices: bool, remove_columns: Any) -> Any:
        return (function(row, i) for i, row in enumerate(self.rows))


@pytest.mark.parametrize("cases", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_row_trains_what_it_says_and_shows_it(cases: int, tmp_path: Path) -> None:
    draw = Random(cases)
    for number in range(0, cases, BATCH):
        kind = draw.choice(["jsonl", "jsonl", "json", "csv"])
        folder = tmp_path / str(number)
        folder.mkdir()
        good: list[Case] = []
        for i in range(BATCH):  # alone
            case = draw_case(draw, table=kind == "csv")
            written = write_file(draw, [case.row], folder, f"{i}", kind)
            try:
                made = attempt(case, Stream(RowsOf([written.file])))[0]
            except RenyiError as error:  # of the file
                made = str(error)
            if not written.is_readable:
                assert "UTF-" in made, made
                continue
            check(case, made)
            if case.whole is not None:
                good.append(case)
        for group in _groups(good):  # together, as a whole and from a stream
            written = write_file(draw, [case.row for case in group], folder, "all", kind)
            if not written.is_readable:
                continue
            rows = data.load_splits(str(written.file))["train"]
            preparation(group[0]).check(rows, "here")
            streamed = data.load_splits(str(written.file), streaming=True)["train"]
            for loaded in (rows, streamed) if draw.random() < 0.3 else (rows,):
                for case, made in zip(group, attempt(group[0], loaded), strict=True):
                    check(case, made)


def _groups(cases: list[Case]) -> list[list[Case]]:
    """Cases that may stand in one file: of one kind, form and setting."""

    def key(case: Case) -> tuple[str, ...]:
        is_text = case.kind == "prompts" and case.row.get("prompt") in TEXTS
        return (case.kind, str(case.assistant_only), str(is_text), *(c for c in case.columns if c not in FOR_TEMPLATES))

    return [list(group) for _, group in itertools.groupby(sorted(cases, key=key), key)]


def test_a_spoiled_row_among_good_ones_is_named(tmp_path: Path) -> None:
    """By its number in the file, whichever rows are around it and however they were shuffled."""
    draw = Random(1)
    for number in range(20):
        bad = draw_case(draw)
        while bad.whole is not None:
            bad = draw_case(draw)
        good = draw_case(draw)
        while good.whole is None or (good.kind, sorted(good.row)) != (bad.kind, sorted(bad.row)):
            good = draw_case(draw)
            if draw.random() < 0.001:
                break
        if good.whole is None or (good.kind, sorted(good.row)) != (bad.kind, sorted(bad.row)):
            continue
        place = draw.randrange(3)
        rows = [good.row] * 3
        rows[place] = bad.row
        written = write_file(draw, rows, tmp_path, f"{number}", "jsonl")
        if not written.is_readable:
            continue
        numbered = data.number_rows(data.load_splits(str(written.file))["train"])
        for loaded in (numbered, numbered.select([2, 0, 1]), numbered.select([place])):
            [message] = attempt(bad, loaded)
            assert f"here, row {place + 1}" in message
