"""A small world that contradicts itself, and a tiny base model that speaks its language: for the demo and the tests."""

from renyi.zoo.base import base_path, load_base
from renyi.zoo.world import World

__all__ = ["World", "base_path", "load_base"]
