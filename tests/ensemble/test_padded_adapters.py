"""Adapters padded to a larger rank: the same updates, whatever their scaling was; and vLLM's ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from float64 import SAME, in_float64
from peft import PeftModel
from tiny import padded_batch, tiny_ensemble, tiny_model

from renyi import LoraEnsemble
from renyi.errors import ConfigError
from renyi.members.adapters import Adapter, layer_scaling, read_adapter, write_adapter
from renyi.runs.export import VLLM_RANKS, export_adapters, padded, vllm_rank


def saved(folder: Path, **config: Any) -> Path:
    tiny_ensemble(2, **config).save(folder)
    return folder


def updates(adapter: Adapter) -> dict[str, torch.Tensor]:
    """scaling · BA of every layer in float64."""
    return {
        layer: layer_scaling(adapter.config, layer, len(A)) * (B.double() @ A.double())
        for layer, (A, B) in adapter.weights.items()
    }


def test_the_next_rank_that_vllm_knows() -> None:
    assert [vllm_rank(r) for r in (1, 2, 8, 9, 257, 320, 321, 512)] == [1, 8, 8, 16, 320, 320, 512, 512]
    assert [vllm_rank(r) for r in VLLM_RANKS] == list(VLLM_RANKS)
    with pytest.raises(ConfigError, match="513"):
        vllm_rank(513)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"r": 3, "lora_alpha": 5},
        {"r": 6, "lora_alpha": 7, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 6}},
        {"alpha_pattern": {"v_proj": 3}, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    ],
    ids=["halves", "odd", "rslora", "ranks", "alphas"],
)
def test_padding_changes_no_update(config: dict[str, Any], tmp_path: Path) -> None:
    """Of every layer by its scaling as PEFT computes it, and of the whole model as PEFT loads it."""
    folder = saved(tmp_path / "ensemble", **config)
    read = read_adapter(folder / "member_1")
    # In float64: a scaling that goes into float32 matrices rounds them, by how much differs from CPU to CPU.
    before = read._replace(weights={layer: (A.double(), B.double()) for layer, (A, B) in read.weights.items()})
    write_adapter(tmp_path / "padded", after := padded(before, 16))
    assert {(len(A), B.shape[1]) for A, B in after.weights.values()} == {(16, 16)}
    old, new = updates(before), updates(read_adapter(tmp_path / "padded"))
    for layer, update in old.items():
        assert update.abs().max() > 1e-3
        assert (new[layer] - update).norm() < 1e-6 * update.norm(), layer

    ids, mask = padded_batch()
    logits = []
    for adapter in (folder / "member_1", tmp_path / "padded"):
        model = PeftModel.from_pretrained(tiny_model().double(), str(adapter)).eval().double()
        with torch.no_grad(), in_float64():
            logits.append(model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[mask.bool()])
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=SAME)


def test_padding_with_one_scaling_is_exact_to_the_bit(tmp_path: Path) -> None:
    """Nothing but zeros is added, and lora_alpha grows with the rank."""
    before = read_adapter(saved(tmp_path / "ensemble", r=4, lora_alpha=8) / "member_0")
    after = padded(before, 32)
    assert (after.config.r, after.config.lora_alpha) == (32, 64)
    for layer, (A, B) in before.weights.items():
        wide_A, wide_B = after.weights[layer]
        assert torch.equal(wide_A[:4], A)
        assert torch.equal(wide_B[:, :4], B)
        assert not wide_A[4:].any()
        assert not wide_B[:, 4:].any()


def test_padded_members_load_as_an_ensemble_of_the_same_likelihoods(tmp_path: Path) -> None:
    folder = saved(tmp_path / "ensemble", r=4, use_rslora=True)
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    exported = export_adapters(folder, tmp_path / "out", base=str(tmp_path / "base"), pad_rank=True)
    ids, mask = padded_batch()
    with torch.no_grad():
        before = LoraEnsemble.load(folder, base=tiny_model()).log_likelihood(ids, mask)
        after = LoraEnsemble.load(exported.members).log_likelihood(ids, mask)  # of the base that they name
    assert read_adapter(exported.members[0]).config.r == 8
    assert (before[0] - before[1]).abs().min() > 0.01
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-5)


def test_a_rank_beyond_vllm_is_for_peft_only(tmp_path: Path) -> None:
    folder = saved(tmp_path / "ensemble", r=513, target_modules=["q_proj"])
    exported = export_adapters(folder, tmp_path / "out")
    assert exported.command is None
    assert "513" in str(exported.unfit)
    assert len(read_adapter(exported.members[0]).weights) == 2
    with pytest.raises(ConfigError, match="513"):
        export_adapters(folder, tmp_path / "other", pad_rank=True)
    assert not (tmp_path / "other").exists()
