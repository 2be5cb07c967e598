"""A reference is kept by what it depends on: another ensemble's is not taken for it."""

from tiny import scatter_members, tiny_ensemble

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
