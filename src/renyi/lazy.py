"""Names that a package offers and imports at first use, so that one light file of it costs no heavy import.

`import renyi.evaluation.metrics` runs `renyi/evaluation/__init__.py` first. If that file imported all that it offers,
metrics would cost the seconds that TRL and transformers take.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562) for names that live in its modules.

    Args:
        package: its `__name__`.
        homes: the names in each module; a module is given by its full name.

    Raises:
        ValueError: a name is also the name of a module of the package. Importing that module would put it in the
            name's place, so the package has to import such a name at once.
    """
    for home, names in homes.items():
        for name in names:
            if home == f"{package}.{name}":
                raise ValueError(f"{name!r} of {home} is a module's name as well, and cannot be lazy")
    home_of = {name: home for home, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home_of[name]), name)

    return find
