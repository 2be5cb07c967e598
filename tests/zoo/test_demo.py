"""The demo: what it writes, and, over three seeds, what it claims."""

import json
from pathlib import Path

import pytest
from sklearn.metrics import adjusted_rand_score

from renyi.cli.main import main
from renyi.zoo import World
from renyi.zoo.demo import HELD_OUT_RECORDS, RUNS, held_out_seed, run_demo, train
from renyi.zoo.measure import held_out_log_likelihood, measure

SEEDS = (0, 1, 2)


def test_a_short_demo_writes_its_summary_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renyi.zoo.demo.TRAIN_RECORDS", 64)
    monkeypatch.setattr("renyi.zoo.demo.HELD_OUT_RECORDS", 32)
    run_demo(tmp_path, seed=3, max_steps=2, per_device_train_batch_size=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary.keys() == {*RUNS, "seed", "machine"}
    promised = {
        "mixture_nll",
        "agreed_accuracy",
        "mi_contested",
        "mi_agreed",
        "member_load",
        "member_source",
        "seconds",
    }
    for name, (num_members, _) in RUNS.items():
        assert promised <= summary[name].keys()
        assert len(summary[name]["member_load"]) == len(summary[name]["member_source"]) == num_members
        assert sum(summary[name]["member_load"]) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert main(["info", str(tmp_path / "alpha_renyi"), "--json"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_members_become_specialists(tmp_path: Path, seed: int) -> None:
    measured = run_demo(tmp_path, seed=seed)
    single, alpha_0, renyi = (measured[name] for name in RUNS)
    assert renyi.mi_contested >= 0.5
    assert renyi.mi_agreed <= 0.02
    assert max(alpha_0.mi_contested, alpha_0.mi_agreed) <= 0.05
    assert renyi.mixture_nll <= 0.65 * min(single.mixture_nll, alpha_0.mixture_nll)
    assert renyi.agreed_accuracy >= 0.99
    for load, followed in zip(renyi.member_load, renyi.member_source, strict=True):
        assert load <= 0.05 or followed >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_two_members_find_the_two_schools(tmp_path: Path, seed: int) -> None:
    world = World(seed=seed)
    records = world.records(HELD_OUT_RECORDS, held_out_seed(seed))
    contested = [i for i, record in enumerate(records) if any(fact.contested for fact in record.facts)]
    schools = [records[i].source for i in contested]
    for alpha, holds in ((0.8, lambda ari: ari >= 0.9), (0.0, lambda ari: ari <= 0.1)):
        trainer, _ = train(world, 2, alpha, tmp_path / str(alpha), seed)
        best = held_out_log_likelihood(trainer).argmax(dim=0)[contested].tolist()
        assert holds(adjusted_rand_score(schools, best)), alpha
        assert measure(trainer, world).agreed_accuracy >= 0.99
