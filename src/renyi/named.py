"""Finds a user's own function by its name, `package.module:function`, from a command line or a config file."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from renyi.errors import ConfigError


def named_function(name: str, where: str, called_with: str) -> Callable[..., Any]:
    """Find the function that `package.module:function` names. The working directory is searched as well.

    Args:
        name: the name of the function.
        where: the setting that gave the name, for the message.
        called_with: the arguments of the function in words, for the message.

    Raises:
        ConfigError: there is no such function.
    """
    module, _, function = name.partition(":")
    if not (module and function):
        raise ConfigError(f"{name!r} names no function", where=where, hint="Write package.module:function.")
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ImportError as error:
        hint = f"It was also looked for in {os.getcwd()}."
        raise ConfigError(f"{module} cannot be imported ({error})", where=where, hint=hint) from error
    except AttributeError as error:
        raise ConfigError(f"{module} has no {function}", where=where, hint="Write package.module:function.") from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigError(f"{name} is not a function", where=where, hint=f"It is called with {called_with}.")
    return found
