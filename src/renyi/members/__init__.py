"""What a member is: kinds of members (`kind.py`, `point.py`), the layer they run in (`layer.py`), all layers of an
ensemble together (`stack.py`), and their form as PEFT adapters (`adapters.py`)."""

from renyi.members.kind import KINDS, MemberLayer, Noise, kind_of, register
from renyi.members.layer import JointLayer, MemberSelection
from renyi.members.stack import MemberStack

__all__ = ["KINDS", "JointLayer", "MemberLayer", "MemberSelection", "MemberStack", "Noise", "kind_of", "register"]
