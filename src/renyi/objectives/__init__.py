"""What is optimised, as pure functions on tensors: one file an objective, importing nothing but torch.

Nothing here knows what a model, a token or a trainer is.
"""

from renyi.objectives.mixture import effective_members, jensen_gap, renyi_loss, responsibilities

__all__ = ["effective_members", "jensen_gap", "renyi_loss", "responsibilities"]
