"""Groups begin whole, in order, and only where they can stay whole to their end."""

import random

from renyi.vllm.admission import Admission, Need, Room
from renyi.vllm.groups import Membership


def add(admission, group, size, prompt=10, blocks=2, members=None, like=None, adapters=None):
    """Add a group's requests; what the last said."""
    said = None
    for member in range(size) if members is None else members:
        adapter = member if adapters is None else adapters[member]
        row = Membership(group, member, (1 / size,) * size)
        said = admission.add(f"{group}{member}", f"request {group}{member}", row, Need(prompt, blocks, adapter), like)
    return said


def names(groups):
    return [group.name for group in groups]


ROOM = Room(rows=8, step_tokens=100, blocks=20, adapters=3)


def test_a_group_waits_for_all_of_its_requests():
    admission = Admission(ROOM)
    add(admission, "a", 3, members=[2, 0])
    assert admission.next(0, 0) == []
    assert admission.num_waiting == 0
    add(admission, "b", 2)  # whole, so it need not wait for a
    assert names(admission.next(0, 0)) == ["b"]
    add(admission, "a", 3, members=[1])
    (group,) = admission.next(0, 0)
    assert [group.requests[member] for member in range(3)] == ["request a0", "request a1", "request a2"]


def test_one_step_reads_all_prompts_of_a_group():
    admission = Admission(ROOM)
    add(admission, "a", 3, prompt=20)
    add(admission, "b", 3, prompt=20)
    assert names(admission.next(0, 0)) == ["a"]
    assert names(admission.next(40, 3)) == ["b"]
    add(admission, "c", 3, prompt=33)
    assert admission.next(2, 2) == []  # 2 + 99 > 100
    assert names(admission.next(1, 1)) == ["c"]


def test_rows_blocks_and_adapters_bound_what_runs():
    for more, free in ((Room(5, 100, 99, 9), 5), (Room(99, 100, 11, 9), 5), (Room(99, 100, 99, 3), 3)):
        admission = Admission(more)
        add(admission, "a", 3)
        add(admission, "b", 3, adapters=[3, 4, 5])
        assert names(admission.next(0, 0)) == ["a"], more
        assert admission.next(3, 3) == [], more
        admission.forget(["a0", "a1"])
        assert admission.next(1, free - 2) == [], more  # what a group holds is free when all of it has ended
        admission.forget(["a2"])
        assert names(admission.next(0, 0)) == ["b"], more


def test_none_overtakes():
    admission = Admission(ROOM)
    add(admission, "a", 3, prompt=30)
    add(admission, "b", 3, prompt=30)
    admission.add("c", "request c", None, Need(5, 1))
    assert names(admission.next(0, 0)) == ["a"]
    assert admission.num_waiting == 4
    assert names(admission.next(3, 3)) == ["b", "c"]


def test_what_never_fits_is_refused():
    for need, option in (
        ({"size": 9}, "--max-num-seqs"),
        ({"size": 3, "prompt": 34}, "--max-num-batched-tokens"),
        ({"size": 3, "blocks": 7}, "--kv-cache-memory-bytes"),
        ({"size": 4}, "--max-loras"),
    ):
        admission = Admission(ROOM)
        said = add(admission, "a", **{"prompt": 1, "blocks": 1, **need})
        assert option in said
        assert admission.others("a0") == [f"a{member}" for member in range(need["size"])]
        admission.forget(admission.others("a0"))
        assert admission.next(0, 0) == []


def test_what_does_not_belong_is_refused():
    admission = Admission(ROOM)
    add(admission, "a", 3, members=[0], like="hello")
    assert "differ" in add(admission, "a", 3, members=[1], like="Hello")
    assert "cannot take member 0" in add(admission, "a", 3, members=[0], like="hello")
    assert "cannot take member 1" in add(admission, "a", 2, members=[1], like="hello")
    add(admission, "a", 3, members=[1, 2], like="hello")
    assert "complete" in admission.add("new", None, Membership("a", 1, (1 / 3,) * 3), Need(1, 1), "hello")
    assert admission.others("new") == []


def test_a_group_that_ends_before_it_began():
    admission = Admission(ROOM)
    add(admission, "a", 3, prompt=30)
    add(admission, "b", 3, prompt=30)
    admission.next(0, 0)
    admission.forget(admission.others("b1"))
    assert admission.num_waiting == 0
    assert admission.next(0, 0) == []
    add(admission, "b", 3)  # its name is free again
    assert names(admission.next(0, 0)) == ["b"]


def test_sixty_groups_of_mixed_lengths_are_never_cut():
    """A simulated server, in which each step must hold whole groups within all limits."""
    chance = random.Random(0)
    room = Room(rows=24, step_tokens=200, blocks=60, adapters=3)
    admission = Admission(room)
    left, needs, waiting = {}, {}, [f"g{number:02d}-" for number in range(60)]
    arriving = [(name, member) for name in waiting for member in range(3)]
    for name in waiting:
        left[name] = chance.randint(1, 30)
        needs[name] = Need(chance.randint(1, 60), chance.randint(1, 15))
    chance.shuffle(arriving)
    running, begun = [], []
    for _ in range(2000):
        for name, member in arriving[:2]:
            row = Membership(name, member, (1 / 3,) * 3)
            need = Need(needs[name].prompt, needs[name].blocks, member)
            assert admission.add(f"{name}{member}", name, row, need) is None
        del arriving[:2]
        new = admission.next(3 * len(running), 3 * len(running))
        assert 3 * len(running) + sum(group.prompt for group in new) <= room.step_tokens
        running += names(new)
        begun += names(new)
        assert 3 * len(running) <= room.rows
        assert sum(3 * needs[name].blocks for name in running) <= room.blocks
        for name in list(running):
            left[name] -= 1
            if left[name] == 0:
                running.remove(name)
                admission.forget(f"{name}{member}" for member in range(3))
        if len(begun) == 60 and not running:
            break
    assert sorted(begun) == sorted(waiting)
    assert admission.running == []
