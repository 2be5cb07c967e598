"""Four real text domains on a real small model: four members find them, and the mixture gains by it."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="the real model and data are not beside the project")
def test_four_members_recover_four_domains(seed: int) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "four_domains.py"))
    names = ("one adapter, r = 16", "four, α = 0", "four, α = 0.8")
    single, alpha_0, renyi = (benchmark["run"](SHARED, *benchmark["RUNS"][name], seed) for name in names)
    assert sum(renyi["recovered"]) >= 0.95 * 4 * benchmark["TEST"]
    assert renyi["nll_per_token"] <= alpha_0["nll_per_token"] - 0.2
    assert renyi["nll_per_token"] < single["nll_per_token"]
