"""An ensemble is opened in the precision that this machine computes fastest."""

import pytest
import torch
from tiny import tiny_ensemble, tiny_model, tiny_tokenizer

import renyi
from renyi.inference import model

SLOW, FAST = 0.02, 2.0


@pytest.fixture
def measured(monkeypatch):
    """Sets what a trial of half precision says, and how many parameters a base needs to be raised."""

    def settle(gain=SLOW, least=0, memory=10**9):
        monkeypatch.setattr(model, "half_gain", lambda dtype: gain)
        monkeypatch.setattr(model, "LEAST_PARAMETERS", least)
        monkeypatch.setattr(model, "main_memory", lambda: memory)

    return settle


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_raised_where_it_is_slow(measured, half):
    measured()
    ensemble = tiny_ensemble(2)
    ensemble.base.to(half)  # with its adapters
    before = {name: p.clone() for name, p in ensemble.named_parameters()}
    raised = model.fastest(ensemble)
    assert raised is ensemble
    assert ensemble.dtype == torch.float32
    for name, p in ensemble.named_parameters():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, before[name].float(), atol=0, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"gain": FAST}, {"gain": 1.0}, {"least": 10**9}, {"memory": 1000}],
    ids=["fast", "as fast", "small", "no room"],
)
def test_half_precision_stays_elsewhere(measured, settings):
    measured(**settings)
    ensemble = tiny_ensemble(2)
    ensemble.base.bfloat16()
    assert model.fastest(ensemble).dtype == torch.bfloat16


def test_double_precision_stays(measured):
    measured()
    assert model.fastest(tiny_ensemble(2).double()).dtype == torch.float64


def test_a_folder_is_opened_in_it(measured, tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    tiny_ensemble(2).save(tmp_path / "ensemble")
    for gain, expected in ((SLOW, torch.float32), (FAST, torch.bfloat16)):
        measured(gain)
        loaded = renyi.load(tmp_path / "ensemble", base=tmp_path / "base")
        assert loaded.ensemble.dtype == expected
