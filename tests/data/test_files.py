"""Local files give back what was written in them: every value, every row, under any name."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from renyi import data
from renyi.data import files
from renyi.errors import DataError

MIXED: dict[str, list[Any]] = {
    "text beside a number": ["02134", 90210, None],
    "texts that look like numbers": ["007", "1", "12.0"],
    "texts that look like constants": ["true", "null", "NaN"],
    "numbers of two kinds": [1, 1.5, 2],
    "truth beside a number": [True, 1, 0],
    "nested": [{"zip": "02134"}, {"zip": 90210, "more": None}, {"zip": "Oslo"}],
    "lists": [["a"], [], None],
    "lists of lists": [[["a"]], [1], "a"],
    "nothing": [None, None, None],
    "whole numbers beyond 64 bits as text": [str(10**30), "1", "2"],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("name", MIXED)
def test_a_value_stays_what_it_is(name: str, kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = [{"x": value, "i": i} for i, value in enumerate(MIXED[name])]
    file = tmp_path / f"rows.{kind}"
    file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    loaded = list(data.load_splits(str(file), streaming=streaming)["train"])
    assert loaded == rows
    assert [type(row["x"]) for row in loaded] == [type(row["x"]) for row in rows]


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("abc"), values), min_size=1, max_size=4))
def test_any_json_is_read_as_json_has_it(rows: list[dict[str, Any]]) -> None:
    columns = {c for row in rows for c in row}
    loaded = list(data.exact_dataset(rows)) if columns else []
    assert loaded == ([{c: row.get(c) for c in loaded[0]} for row in rows] if columns else [])


def test_a_large_file_goes_through_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"x": value, "i": str(i)} for i, value in enumerate(MIXED["nested"] * 1000)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setattr(files, "_LARGE", 10)
    monkeypatch.setattr(files.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    loaded = data.load_splits(str(file))["train"]
    assert list(loaded) == rows
    assert loaded.cache_files
    file.write_text('{"x": "another"}\n', encoding="utf-8")
    assert list(data.load_splits(str(file))["train"]) == [{"x": "another"}]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    cells = ["12", "007", "1", "true", "NA", "None", "1e5", "a, b", 'a "quoted" one', "two\nlines", ""]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["x", "y"], *([cell, "1"] for cell in cells)])
    for streaming in (False, True):
        loaded = list(data.load_splits(str(tmp_path / "rows.csv"), streaming=streaming)["train"])
        assert loaded == [{"x": cell or None, "y": "1"} for cell in cells]


INSIDE = ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1e", "\ufeff", "\x7f", "\r"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("escaped", [True, False])
def test_only_a_line_feed_ends_a_row(end: str, escaped: bool, tmp_path: Path) -> None:
    rows = [{"text": f"a{inside}b{i}"} for i, inside in enumerate(INSIDE)]
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    if not escaped:  # as some tools write them
        lines = [line.replace("\\f", "\x0c") for line in lines]
    (tmp_path / "rows.jsonl").write_bytes(("\ufeff" + end.join(lines) + end).encode())
    assert list(data.load_splits(str(tmp_path / "rows.jsonl"))["train"]) == rows
    assert [row["prompt"] for row in data.prompts_of(Dataset.from_dict({"prompt": [r["text"] for r in rows]}))] == [
        row["text"] for row in rows
    ]


BAD: dict[str, tuple[str, bytes, list[str]]] = {
    "latin-1": ("a.jsonl", '{"text": "é"}\n'.encode("latin-1"), ["line 1", "not UTF-8: byte 0xe9 at place 11"]),
    "latin-1 later": ("a.csv", "text\nfine\ncafé\n".encode("latin-1"), ["line 3", "byte 0xe9 at place 4"]),
    "utf-16": ("a.json", '[{"text": "a"}]'.encode("utf-16"), ["UTF-16"]),
    "half a character": ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', ["line 2", "half a character"]),
    "no object": ("a.jsonl", b'{"text": "a"}\n3\n', ["line 2", "is 3, and not an object"]),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
    "no JSON in a list": ("a.json", b'[{"text": "a"},\n {"text" 3}]', ["line 2", "not JSON"]),
    "nested too deep": ("a.jsonl", b'{"text": ' + b"[" * 100_000, ["line 1", "nested too deep"]),
    "a number of too many digits": ("a.jsonl", b'{"x": {"y": 12345678901234567890123}}', ["too many digits"]),
    "more cells than names": ("a.csv", b"a,b\n1,2\n1,2,3\n", ["line 3", "has 3 cells, and the header has 2"]),
    "an open quotation": ("a.csv", b'a,b\n1,"2\n', ["not csv"]),
    "a name twice": ("a.csv", b"a,a\n1,2\n", ["line 1", "two columns 'a'"]),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_named_with_its_place(bad: str, streaming: bool, tmp_path: Path) -> None:
    name, content, parts = BAD[bad]
    (tmp_path / name).write_bytes(content)
    if streaming and bad == "a number of too many digits":
        return  # which a stream can hand on
    with pytest.raises(DataError) as caught:
        list(data.load_splits(str(tmp_path / name), streaming=streaming)["train"])
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("name", ["set[1]", "a*b", "{x,y}", "what?", "a b", "#1", "é", "x:y"])
def test_a_file_may_have_any_name(name: str, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "in [brackets]" / f"{name}.{kind}"
    file.parent.mkdir()
    rows = Dataset.from_list([{"text": "a row"}])
    getattr(rows, f"to_{'json' if 'json' in kind else kind}")(str(file), **({"index": False} if kind == "csv" else {}))
    for streaming in (False, True):
        assert list(data.load_splits(str(file), streaming=streaming)["train"]) == [{"text": "a row"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_save_to_disk_wrote_is_read(streaming: bool, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(tmp_path / "two"))
    one, two = (data.load_splits(str(tmp_path / n), streaming=streaming) for n in ("one", "two"))
    assert list(one["train"]) == list(two["train"]) == list(rows)
    assert list(two["test"]) == [{"text": "b"}]


def test_a_row_of_several_files_is_named_by_its_own(tmp_path: Path) -> None:
    for name, texts in {"a": ["x", "y"], "b": ["z", " ", "w"]}.items():
        lines = "".join(json.dumps({"text": text, "zip": "007"}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    streamed = data.load_splits(str(tmp_path), streaming=True)["train"]
    rows = data.load_splits(str(tmp_path))["train"]
    assert [row["zip"] for row in rows] == [row["zip"] for row in streamed] == ["007"] * 5
    named = r"here, b\.jsonl, row 2, column text: is empty"
    with pytest.raises(DataError, match=named):
        data.Preparation().check(rows, "here")
    with pytest.raises(DataError, match=named):
        list(data.prepare(streamed, tiny_tokenizer(), data.Preparation(), "here"))
    shuffled = data.load_splits(str(tmp_path))["train"].train_test_split(test_size=2, seed=0)
    [of_bad] = [part for part in shuffled.values() if " " in part["text"]]
    with pytest.raises(DataError, match=r"b\.jsonl, row 2, column text"):
        data.Preparation().check(of_bad)
