"""Lets a package import its public names at first use, so that importing one light module of it stays fast.

For example, `import renyi.evaluation.metrics` runs `renyi/evaluation/__init__.py` first. If that file imported all of
its public names at once, importing the metrics would take as long as importing TRL and transformers.
"""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Make the `__getattr__` (PEP 562) of a package for names that its modules define.

    Args:
        package: the package's `__name__`.
        homes: the full name of each module, and the names that it defines.

    Raises:
        ValueError: a name is also the name of a module of the package. Importing that module would replace the name
            by the module, so the package has to import such a name at once.
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
