"""What a member is: the kinds of members, the layers that they run in, and their form as PEFT adapters.

Read in this order: `kind.py` (the interface of a kind), `point.py` (the simplest kind), `layer.py` (one adapted layer
with all members), `stack.py` (all layers of an ensemble), `adapters.py` (members as PEFT adapters and in files).
"""

from renyi.members.kind import KINDS, MemberLayer, Noise, kind_of, register
from renyi.members.layer import JointLayer, MemberSelection
from renyi.members.stack import MemberStack

__all__ = ["KINDS", "JointLayer", "MemberLayer", "MemberSelection", "MemberStack", "Noise", "kind_of", "register"]
