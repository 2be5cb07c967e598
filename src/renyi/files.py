"""Writes a file completely or not at all. Read next: `layout.py`, which has the names of an ensemble's files."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from renyi.errors import SaveError


def write_whole(file: Path, content: bytes | Iterable[str]) -> None:
    """Write a file completely or not at all. Missing folders are created.

    Args:
        file: it is replaced when all of the content is on the disk.
        content: bytes, or texts that are written one after another in UTF-8.

    Raises:
        SaveError: it could not be written. The file is then as it was.
    """
    with opened_whole(file) as part:
        part.writelines([content] if isinstance(content, bytes) else (text.encode() for text in content))


@contextmanager
def opened_whole(file: Path) -> Iterator[BinaryIO]:
    """Open a file for bytes. It is replaced when all of them are on the disk. After an error it is as it was.

    Until the end the bytes are in a file beside it, whose name no other process uses. Missing folders are created.

    Raises:
        SaveError: it could not be written.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as part:
            yield part
            part.flush()
            os.fsync(part.fileno())
        partial.replace(file)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) or isinstance(error, SaveError):
            raise
        raise SaveError(f"could not be written ({error})", where=str(file), hint="Free some space.") from error
