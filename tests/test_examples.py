"""The examples run as they are."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from renyi.cli.main import main

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*command: str) -> str:
    finished = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[str, str], str]:
    """What a dry run says of a config of the examples, in this process."""

    def plan(method: str, config: str) -> str:
        monkeypatch.chdir(ROOT)
        assert main([method, "--config", f"examples/{config}", "--dry_run"]) == 0
        return capfd.readouterr().out

    return plan


def test_the_config_is_understood(planned: Callable[[str, str], str]) -> None:
    printed = planned("sft", "two_schools.yaml")
    assert "1,140 examples" in printed
    assert "«" in printed


def test_the_preferences_are_understood(planned: Callable[[str, str], str]) -> None:
    printed = planned("dpo", "annotators.yaml")
    assert "4,560 pairs" in printed
    assert "rejected  «" in printed


def test_the_prompts_are_understood(planned: Callable[[str, str], str]) -> None:
    printed = planned("powerflow", "powerflow.yaml")
    assert "80 prompts" in printed
    assert "what does mira ? <assistant> «…»" in printed


@pytest.mark.slow  # a process of its own
def test_rewards_train_a_policy(tmp_path: Path) -> None:
    command = (sys.executable, "examples/reward_for_grpo.py", "--output_dir", str(tmp_path))
    printed = run(*command, "--steps", "2")
    assert "lower bound of the reward, first and last step" in printed
    assert (tmp_path / "rewards" / "reward.json").is_file()


@pytest.mark.slow
def test_the_loop_finds_the_schools() -> None:
    *_, first, second = run(sys.executable, "examples/loop.py").splitlines()
    shares = sorted(int(line.split(";")[1].split("%")[0]) for line in (first, second))
    assert shares[0] <= 10, (first, second)
    assert shares[1] >= 90, (first, second)


@pytest.mark.slow
def test_the_config_trains(tmp_path: Path) -> None:
    config = ["--config", "examples/two_schools.yaml", "--output_dir", str(tmp_path)]
    printed = run(sys.executable, "-m", "renyi", "sft", *config)
    assert "What each member learned" in printed
    assert (tmp_path / "training.png").exists()


@pytest.mark.slow
def test_the_policy_sharpens(tmp_path: Path) -> None:
    config = ["--config", "examples/powerflow.yaml", "--output_dir", str(tmp_path)]
    table = run(sys.executable, "-m", "renyi", "powerflow", *config).partition("What the policy learned")[2]
    found = {line.split()[0]: list(map(float, line.split()[1:4])) for line in table.splitlines()[2:5] if "%" in line}
    assert found["base"][2] == 1
    assert found["policy"][0] > found["base"][0] + 0.05
    assert found["policy"][2] > 1.5
