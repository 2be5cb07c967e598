"""`renyi lm_eval` where the harness is not installed; where it is, tests/inference/test_lm_eval.py runs it."""

import pytest
from conftest import assert_refused, renyi


def test_the_harness_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("renyi.cli.lm_eval.find_spec", lambda name: None)
    assert_refused(renyi("lm_eval", "--model", "renyi"), "not installed", "renyi[lm-eval]")
    assert renyi("lm_eval").code == renyi("lm_eval", "--help").code == 0
