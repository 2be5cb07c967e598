"""A file is written completely or not at all."""

import os

import pytest

from renyi.errors import SaveError
from renyi.files import opened_whole, write_whole


@pytest.mark.parametrize(
    "content", ["fünf\nsechs\n".encode(), ["fünf\n", "sechs\n"], (t for t in ("fünf\n", "sechs\n"))]
)
def test_bytes_and_texts_are_written_into_new_folders(tmp_path, content):
    write_whole(tmp_path / "a" / "b" / "file.txt", content)
    assert (tmp_path / "a" / "b" / "file.txt").read_bytes() == "fünf\nsechs\n".encode()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("a row is wrong"), KeyboardInterrupt()]
)
def test_what_fails_on_the_way_leaves_the_file_as_it_was(tmp_path, error):
    def texts():
        yield "first\n"
        raise error

    file = tmp_path / "file.txt"
    write_whole(file, b"earlier")
    with pytest.raises(SaveError if isinstance(error, OSError) else type(error)) as caught:
        write_whole(file, texts())
    assert file.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    if isinstance(error, OSError):
        assert "could not be written" in str(caught.value)
        assert "No space left on device" in str(caught.value)
        assert caught.value.where == str(file)
        assert caught.value.hint == "Free some space."


def test_an_error_of_ours_is_passed_on(tmp_path):
    def texts():
        yield "first\n"
        raise SaveError("of the source", where="there")

    with pytest.raises(SaveError) as caught:
        write_whole(tmp_path / "file.txt", texts())
    assert caught.value.where == "there"
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError) as caught:
        write_whole(tmp_path / "file" / "inside", b"new")
    assert caught.value.where == str(tmp_path / "file" / "inside")


def test_content_is_on_the_disk_before_it_takes_the_place(tmp_path, monkeypatch):
    file, seen = tmp_path / "file.txt", []
    monkeypatch.setattr(os, "fsync", lambda number: seen.append((os.fstat(number).st_size, file.exists())))
    write_whole(file, b"content")
    assert seen == [(7, False)]


def test_two_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """Two processes may fill the same cache. The last to end wins, whole."""
    file = tmp_path / "file.txt"
    with opened_whole(file) as first:
        first.write(b"first")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with opened_whole(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
        monkeypatch.undo()
    assert file.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
