"""Packed rows: examples are summed by where they lie, and each is scored as if it were alone."""

from inspect import signature
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SPECIAL, VOCABULARY, lora, scatter_members, tiny_ensemble, tiny_model, trainer_of
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from renyi import LoraEnsemble
from renyi.ensemble import JointOutput, example_log_likelihood
from renyi.ensemble.member_rows import repeat_packed
from renyi.errors import ConfigError
from renyi.training.packing import check_packing


def examples(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def packed(rows: list[list[list[int]]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
    """TRL's padding-free batch of rows that each hold several examples."""
    collate = DataCollatorForLanguageModeling(0, padding_free=True, pad_to_multiple_of=pad_to_multiple_of)
    return collate([{"input_ids": [*chain(*row)], "seq_lengths": [len(example) for example in row]} for row in rows])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
@pytest.mark.parametrize("pad_to", [None, 16])
def test_packed_examples_score_as_they_do_alone(kind, pad_to):
    ensemble = tiny_ensemble(3, kind)
    sequences = examples([5, 3, 8, 2, 6])
    batch = packed([sequences[:2], sequences[2:]], pad_to)
    with torch.no_grad():
        ell_ME, tokens_E = example_log_likelihood(ensemble(**batch), batch["position_ids"])
        alone = torch.cat([ensemble.log_likelihood(torch.tensor([s])) for s in sequences], dim=1)
    assert tokens_E.tolist() == [4, 2, 7, 1, 5]
    torch.testing.assert_close(ell_ME, alone, atol=3e-5, rtol=1e-5)


def test_packed_labels_choose_what_is_summed_and_untrained_examples_vanish():
    ensemble = tiny_ensemble(2)
    sequences = examples([6, 4, 5])
    batch = packed([sequences])
    batch["labels"][0, 6:10] = -100  # nothing of the second example is trained
    batch["labels"][0, :3] = -100  # and only the second half of the first
    with torch.no_grad():
        ell_ME, tokens_E = example_log_likelihood(ensemble(**batch), batch["position_ids"])
        first = ensemble.token_log_likelihood(torch.tensor([sequences[0]]))[:, 0, 3:].sum(-1)
        third = ensemble.log_likelihood(torch.tensor([sequences[2]]))[:, 0]
    assert tokens_E.tolist() == [3, 4]
    torch.testing.assert_close(ell_ME, torch.stack([first, third], dim=1), atol=2e-5, rtol=1e-5)


def test_gradients_of_packed_examples_are_those_of_the_same_examples_padded():
    ensemble = tiny_ensemble(2).train()
    sequences = examples([5, 3, 8])
    weights = torch.tensor([[0.2, 1.0, -0.5], [1.5, 0.3, 0.7]])
    grads = []
    for batch in (packed([sequences]), DataCollatorForLanguageModeling(0)([{"input_ids": s} for s in sequences])):
        ensemble.zero_grad()
        ell_ME, _ = example_log_likelihood(ensemble(**batch), batch.get("position_ids"))
        (ell_ME * weights).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in ensemble.parameters() if p.requires_grad]))
    assert (grads[0] - grads[1]).norm() <= 1e-5 * grads[1].norm()


# Sums by segment, exactly


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3), st.randoms())
def test_segments_are_summed_as_a_loop_sums_them(rows, random):
    """Integers instead of log-probabilities, so that the sums must be equal exactly; rows are padded behind."""
    longest = max(sum(lengths) for lengths in rows)
    positions, tokens, values, mask = [], [], [], []
    for lengths in rows:
        row = [t for n in lengths for t in range(n)]
        trained = [t > 0 and random.random() < 0.7 for t in row]
        value = [random.randint(-9, -1) * int(m) for m in trained]
        start = 0
        for n in lengths:
            tokens.append((sum(trained[start : start + n]), sum(value[start : start + n])))
            start += n
        padding = longest - len(row)
        positions.append(row + [0] * padding)
        values.append(value + [0] * padding)
        mask.append(trained + [False] * padding)
    log_probs = torch.tensor(values, dtype=torch.float32)[None, :, 1:].repeat(2, 1, 1)
    log_probs[1] *= 2
    label_mask = torch.tensor(mask)[:, 1:]
    if label_mask.numel() == 0:
        return
    output = JointOutput(log_probs, label_mask, torch.zeros_like(log_probs), torch.zeros_like(log_probs).bool())
    ell_ME, tokens_E = example_log_likelihood(output, torch.tensor(positions))
    expected = [(n, ell) for n, ell in tokens if n > 0]
    assert tokens_E.tolist() == [n for n, _ in expected]
    assert ell_ME.tolist() == [[float(f * ell) for _, ell in expected] for f in (1, 2)]


# What variable-length kernels (flash attention, on a GPU) are told


def test_repeated_boundaries_are_those_of_the_members_rows_one_after_another():
    batch = packed([examples([5, 3]), examples([4])])
    length = 12
    repeated = repeat_packed({**batch, "use_cache": False, "attention_mask": None}, num_members=3)
    assert repeated["input_ids"].shape == (1, 3 * length)
    assert torch.equal(repeated["input_ids"].view(3, length), batch["input_ids"].expand(3, -1))
    assert torch.equal(repeated["position_ids"].view(3, length), batch["position_ids"].expand(3, -1))
    assert repeated["cu_seq_lens_q"].tolist() == [0, 5, 8, 12, 17, 20, 24, 29, 32, 36]
    assert torch.equal(repeated["cu_seq_lens_k"], repeated["cu_seq_lens_q"])
    assert repeated["cu_seq_lens_q"].dtype == torch.int32
    assert repeated["seq_idx"].tolist() == [[s for s, n in enumerate([5, 3, 4] * 3) for _ in range(n)]]
    assert repeated["max_length_q"] == batch["max_length_q"] == 5
    assert repeated["use_cache"] is False
    # The boundaries are where positions begin anew.
    starts = (repeated["position_ids"][0] == 0).nonzero().flatten()
    assert torch.equal(repeated["cu_seq_lens_q"][:-1].long(), starts)


# What a model does with packed rows, tried before training

COLLATE = DataCollatorForLanguageModeling(0, padding_free=True)
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
CROSSING = {
    "OPT": lambda: OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
    "Bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)),
    "Falcon": lambda: FalconForCausalLM(FalconConfig(**SIZES)),
    "FalconH1": lambda: FalconH1ForCausalLM(
        FalconH1Config(
            **SIZES, num_key_value_heads=2, intermediate_size=48, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8,
            mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8,
        )
    ),
}  # fmt: skip
KEEPS_FALCON_APART = "cache" in signature(FalconForCausalLM.forward).parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CROSSING)
def test_models_that_cross_packed_examples_are_refused_by_name(name, dtype):
    """Weights as a config initialises them, so that log-likelihoods differ little: it must be found all the same."""
    if name == "Falcon" and KEEPS_FALCON_APART:
        pytest.skip("since transformers 5.24 Falcon keeps packed examples apart")
    torch.manual_seed(0)
    model = CROSSING[name]().to(dtype).eval()
    targets = ["q_proj"] if name == "FalconH1" else "all-linear"
    ensemble = LoraEnsemble.from_base(model, 2, lora(target_modules=targets))
    with pytest.raises(ConfigError, match=f"{name}ForCausalLM") as error:
        check_packing(ensemble, COLLATE)
    assert error.value.where == "packing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma2"])
def test_models_that_keep_packed_examples_apart_are_taken(kind, dtype):
    check_packing(scatter_members(LoraEnsemble.from_base(tiny_model(kind).to(dtype), 2, lora())), COLLATE)


@pytest.mark.parametrize("setting", ["packing", "padding_free"])
def test_a_run_that_would_cross_examples_does_not_begin(tmp_path, setting):
    model = OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, pad_token_id=0, eos_token_id=1))
    with pytest.raises(ConfigError, match="OPTForCausalLM"):
        trainer_of(tmp_path, model=model, max_length=64 if setting == "packing" else None, **{setting: True})
    assert not list(tmp_path.iterdir())
