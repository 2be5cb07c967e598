"""A small world that contradicts itself, and a tiny base model of its language. The demo and the tests use them."""

from renyi.zoo.base import base_path, load_base
from renyi.zoo.world import World

__all__ = ["World", "base_path", "load_base"]
