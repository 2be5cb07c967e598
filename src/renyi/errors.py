"""Every error that a user can meet.

Each says what was wrong, where it was found and what to write instead, and also subclasses the standard
exception that a caller would expect. Nothing here knows who raises it.
"""


class RenyiError(Exception):
    """Base of all errors of this library.

    Args:
        what: what was wrong, in one sentence.
        where: the file, row, column or key where it was found.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        message = f"{where}: {what}" if where else what
        super().__init__(f"{message}\n{hint}" if hint else message)

    def __str__(self) -> str:
        return str(self.args[0])


class ConfigError(RenyiError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another."""


class DataError(RenyiError, ValueError):
    """A dataset is missing, empty, malformed, or leaves nothing to train on."""


class TokenizerError(RenyiError, ValueError):
    """A tokenizer cannot be trained with as it stands."""


class EnsembleFormatError(RenyiError, ValueError):
    """A folder is not a readable ensemble, or its members do not fit together or to the base model."""


class SaveError(RenyiError, OSError):
    """Something could not be written; what was there before is untouched."""


class TrainingDivergedError(RenyiError, FloatingPointError):
    """The loss is not a number any more."""
