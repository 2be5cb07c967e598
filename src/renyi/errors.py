"""Every error that a user can meet.

Each error says what was wrong, where it was found and what to write instead. Each class also derives from the standard
exception that a caller would expect.
"""

from renyi.text import printable


class RenyiError(Exception):
    """Base of all errors of this library.

    Args:
        what: what was wrong, in one sentence.
        where: the file, row, column or key where it was found.
        hint: what to do about it.

    All three may quote users' files: control characters in them are shown as escapes.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what = printable(what)
        self.where = printable(where) if where is not None else None
        self.hint = printable(hint) if hint is not None else None
        message = f"{self.where}: {self.what}" if where else self.what
        super().__init__(f"{message}\n{self.hint}" if hint else message)

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(RenyiError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another setting."""


class DataError(RenyiError, ValueError):
    """A dataset is missing, empty or malformed, or it has nothing to train on."""


class TokenizerError(RenyiError, ValueError):
    """A tokenizer cannot be used for training as it is."""


class EnsembleFormatError(RenyiError, ValueError):
    """A folder is not a readable ensemble, or its members do not fit each other or the base model."""


class SaveError(RenyiError, OSError):
    """A file or folder could not be written. The earlier files are not changed, unless the message says so."""


class TrainingDivergedError(RenyiError, FloatingPointError):
    """The loss is no longer a finite number."""


class BusyError(RenyiError, RuntimeError):
    """A server's queue is full. The same request may succeed later."""


class EngineError(RenyiError, RuntimeError):
    """An engine failed on a request, or does not run."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or the name of its class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
