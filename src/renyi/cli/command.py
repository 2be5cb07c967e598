"""The interface of a training command: what differs between methods on the command line.

`sft.py`, `dpo.py` and `powerflow.py` fill it in,
`training.py` runs such a command, and `watch.py` shows how it goes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from rich.console import RenderableType

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.runs.build import Run


# The keys about data of methods whose rows have prompts and completions.
DATA = "max_length dataset_train_split dataset_test_split test_split_size chat_template_path pad_token eos_token"


class TrainingCommand(ABC):
    """What one method of training shows in its own way.

    Attributes:
        method: one of `renyi.runs.settings.METHODS`.
        trl_config: name of TRL's config; every key of it works.
        keys: the method's own keys on the help page, by group; `_BEFORE` and `_AFTER` are shown for all methods.
        row: its word for a row of a batch.
        about: what it does, for the help page.
        member, members: its words for a member and for several.
        first_keys: the keys among `keys` that a user chooses first; `renyi init` sets them in its file.
        holds_out: whether the file of `renyi init` holds out a share of the rows.
        for_tiny_model: values that `renyi init` writes for the tiny model that comes with renyi.
    """

    method: ClassVar[str]
    trl_config: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]
    row: ClassVar[str]
    about: ClassVar[str] = "Train an α-Rényi LoRA ensemble."
    member: ClassVar[str] = "member"
    members: ClassVar[str] = "members"
    first_keys: ClassVar[str] = ""
    holds_out: ClassVar[bool] = True
    for_tiny_model: ClassVar[Mapping[str, object]] = MappingProxyType({})

    @property
    def prog(self) -> str:
        return f"renyi {self.method}"

    def plan(self, ready: "Run") -> Mapping[str, str]:
        """Lines of the plan that only this method has."""
        return {}

    @abstractmethod
    def sizes(self, ready: "Run", prepared: "Dataset") -> str:
        """How much a prepared dataset holds."""

    @abstractmethod
    def first(self, ready: "Run", prepared: "Dataset", coloured: bool) -> RenderableType:
        """The first example as the model sees it."""

    def files(self, ready: "Run") -> Mapping[str, str]:
        """Files that only this method writes to an ensemble's folder, and what they are; without the reference."""
        return {}

    @abstractmethod
    def next(self, folder: str, dataset_name: str) -> Sequence[str]:
        """Commands that a user may want to run next. Folder and dataset are quoted for a shell."""


def command_of(method: str) -> TrainingCommand:
    """The training command of a method: the class in the file of its name."""
    inside = vars(import_module(f"renyi.cli.{method}")).values()
    made = (c for c in inside if isinstance(c, type) and issubclass(c, TrainingCommand))
    return next(c() for c in made if vars(c).get("method") == method)
