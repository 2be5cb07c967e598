"""Two members become two kinds of users, from their thumbs alone."""

import pytest

from renyi.zoo.preferences import THUMBS_OF_A_USER, PreferenceWorld
from renyi.zoo.thumbs import measure_thumbs, train_thumbs

WORLD = PreferenceWorld(contested=1.0)


def test_a_user_gives_ten_thumbs_of_both_kinds_and_is_of_one_group():
    rows = WORLD.thumbs(200)
    assert sorted(set(rows["label"])) == [False, True]
    for user in set(rows["user"]):
        of_user = [row for row in rows if row["user"] == user]
        assert len(of_user) == THUMBS_OF_A_USER
        assert len({row["group"] for row in of_user}) == 1
        assert 0 < sum(row["label"] for row in of_user) < THUMBS_OF_A_USER


def test_a_short_run_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("renyi.zoo.thumbs.TRAIN_THUMBS", 40)
    monkeypatch.setattr("renyi.zoo.thumbs.HELD_OUT_THUMBS", 40)
    trainer = train_thumbs(WORLD, 2, 0.8, tmp_path, max_steps=1, per_device_train_batch_size=10)
    found = measure_thumbs(trainer, WORLD)
    assert sum(found.member_load) == pytest.approx(1)
    assert -0.5 <= found.users_found <= 1


@pytest.mark.slow  # 160 steps of training
def test_members_become_the_kinds_of_users(tmp_path):
    found = measure_thumbs(train_thumbs(WORLD, 2, 0.8, tmp_path), WORLD)
    assert found.users_found >= 0.9
    assert found.thumbs_found >= 0.9
