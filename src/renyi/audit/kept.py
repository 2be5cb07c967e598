"""Results of an audit's long work, kept in a file as they come, so that a killed audit goes on where it was.

The first line says what the results are of. Each further line has one result under its key.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from renyi.errors import SaveError

Value = TypeVar("Value")


class Kept:
    """Results by key.

    Args:
        file: to read, and to add to. Without one nothing is kept after the process.
        of: what the results depend on. A file of something else is begun anew.
    """

    def __init__(self, file: Path | None, of: Mapping[str, Any]):
        self._file, self._known = file, dict[str, Any]()
        head = json.dumps({"of": hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()})
        if file is None:
            return
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last line may have been cut
        if whole and whole[0].strip() == head:
            for line in whole[1:]:
                entry = json.loads(line)
                self._known[entry["key"]] = entry["value"]
        else:
            whole = [head + "\n"]
        if whole != lines:
            self._write("w", "".join(whole))

    def get(self, key: str, compute: Callable[[], Value]) -> Value:
        """The result under a key; it is computed, and kept, if it is not there yet. It has to be JSON.

        Raises:
            SaveError: it could not be kept.
        """
        if key not in self._known:
            value: Any = compute()
            self._known[key] = value
            if self._file is not None:
                self._write("a", json.dumps({"key": key, "value": value}) + "\n")
        found: Value = self._known[key]
        return found

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def _write(self, mode: str, text: str) -> None:
        assert self._file is not None
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SaveError(
                f"could not be written ({error})", where=str(self._file), hint="Free some space."
            ) from error
