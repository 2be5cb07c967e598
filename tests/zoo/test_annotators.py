"""Two members become two groups of annotators, at the size of the benchmark; three seeds."""

import pytest

from renyi.zoo.annotators import groups_of_annotators, measure_annotators, named_rows, train_annotators
from renyi.zoo.preferences import PreferenceWorld


def test_a_short_run_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("renyi.zoo.annotators.TRAIN_PAIRS", 64)
    monkeypatch.setattr("renyi.zoo.annotators.HELD_OUT_PAIRS", 96)
    world = PreferenceWorld()
    trainer, seconds = train_annotators(world, 2, 0.8, tmp_path, max_steps=2, per_device_train_batch_size=4)
    measured = measure_annotators(trainer, world, seconds)
    assert measured.mixture_nll == pytest.approx(0.69, abs=0.1)
    assert sum(measured.member_load) == pytest.approx(1)
    assert 0 <= measured.auroc_epistemic_share <= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_members_become_the_groups(tmp_path, seed):
    world = PreferenceWorld(seed=seed)
    runs = {"single": (1, 0.0), "alpha_0": (2, 0.0), "renyi": (2, 0.8)}
    found = {}
    for name, (members, alpha) in runs.items():
        trainer, _ = train_annotators(world, members, alpha, tmp_path / name, seed)
        found[name] = measure_annotators(trainer, world)
    assert found["renyi"].groups_found >= 0.9
    assert abs(found["alpha_0"].groups_found) <= 0.1
    assert found["renyi"].mixture_nll < min(found["single"].mixture_nll, found["alpha_0"].mixture_nll)
    assert found["renyi"].auroc_epistemic_share >= 0.95


@pytest.mark.slow  # 250 steps of training
def test_groups_are_found_from_ten_labels_of_each_annotator(tmp_path):
    world = PreferenceWorld(contested=0.5)  # so that ten labels always say something about the group
    rows, _ = named_rows(world.pairs(8000), 10)
    settings = {"max_steps": 250, "per_device_train_batch_size": 40, "routing_group": "annotator"}
    trainer, _ = train_annotators(world, 2, 0.8, tmp_path, rows=rows, **settings)
    assert groups_of_annotators(trainer, world, 10) >= 0.9


def test_named_rows_are_of_one_group_each():
    rows, group_of = named_rows(PreferenceWorld(contested=1.0).pairs(100), 10)
    assert len(rows) == 100
    assert sorted(group_of.values()) == [0] * 5 + [1] * 5
    assert all(rows["annotator"].count(name) == 10 for name in group_of)
