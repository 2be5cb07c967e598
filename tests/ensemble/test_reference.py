"""A reference is kept by what it depends on: another ensemble's is not taken for it."""

import torch
from tiny import padded_batch, scatter_members, tiny_ensemble

from renyi.ensemble import Reference


def test_the_members_that_a_reference_starts_from_are_in_its_fingerprint():
    one, again = tiny_ensemble(2), tiny_ensemble(2)
    other = scatter_members(tiny_ensemble(2), seed=5)
    of = {
        name: Reference(e, e.snapshot()).fingerprint() for name, e in (("one", one), ("again", again), ("other", other))
    }
    assert of["one"] == of["again"]
    assert of["one"] != of["other"]
    assert Reference(one).fingerprint() == Reference(other).fingerprint()  # of the base alone
    assert Reference(one).fingerprint() != of["one"]


def test_the_scaling_of_the_members_is_in_the_fingerprint():
    """Equal matrices with another lora_alpha are another policy."""
    one, other = (scatter_members(tiny_ensemble(2, lora_alpha=alpha)) for alpha in (8, 16))
    ids, mask = padded_batch()
    assert all(torch.equal(a, b) for a, b in zip(one.stack.parameters(), other.stack.parameters(), strict=True))
    assert not torch.allclose(one.log_likelihood(ids, mask), other.log_likelihood(ids, mask))
    assert Reference(one, one.snapshot()).fingerprint() != Reference(other, other.snapshot()).fingerprint()
    assert Reference(one).fingerprint() == Reference(other).fingerprint()  # the base has no scaling
