"""Decoding against enumeration of every sequence, against transformers' own generate, and against full forwards."""

import itertools
import math

import pytest
import torch
from tiny import EOS, PAD, lora, padded_batch, scatter_members, tiny_ensemble, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from renyi import LoraEnsemble
from renyi.ensemble import Generation, decode
from renyi.errors import ConfigError
from renyi.members.adapters import joint_layers

WEIGHTS = torch.tensor([0.5, 0.3, 0.2])
LENGTH, VOCABULARY = 4, 5


class Forced(LogitsProcessor):
    """Makes row b say `tokens[b]`, and keeps the scores that it was given."""

    def __init__(self, tokens: Tensor, prompt: int):
        self.tokens, self.prompt, self.seen = tokens, prompt, []

    def __call__(self, input_ids, scores):
        self.seen.append(scores.clone())
        token = self.tokens[:, input_ids.shape[1] - self.prompt]
        return torch.full_like(scores, -math.inf).scatter(1, token[:, None], 0.0)


def forced(ensemble: LoraEnsemble, prompts: Tensor, tokens: Tensor, **settings) -> tuple[Generation, Tensor]:
    """What decoding says about given answers, and the scores [N, B, V] that processors were shown."""
    processor = Forced(tokens, prompts.shape[1])
    settings = {"eos_token_id": None, "max_new_tokens": tokens.shape[1], **settings}
    generation = ensemble.generate(prompts, logits_processor=LogitsProcessorList([processor]), **settings)
    return generation, torch.stack(processor.seen)


def enumerable() -> LoraEnsemble:
    """Three scattered members of uneven weight with a vocabulary of five."""
    base = tiny_model(vocab_size=VOCABULARY, pad_token_id=None, eos_token_id=None)
    ensemble = scatter_members(LoraEnsemble.from_base(base, 3, lora(), seed=7), std=0.3).eval()
    ensemble.weights.copy_(WEIGHTS)
    return ensemble


@pytest.fixture(scope="module")
def every_sequence() -> tuple[LoraEnsemble, Tensor, Tensor, Tensor]:
    """An ensemble, a prompt for each of the 5⁴ answers, the answers [625, 4], and every member's log p [3, 625, 4]."""
    ensemble = enumerable()
    answers = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))
    prompts = torch.tensor([[1, 3]]).expand(len(answers), -1)
    full = torch.cat([prompts, answers], dim=1)
    log_p = [torch.log_softmax(ensemble.merged(m)(full).logits.double(), -1) for m in range(3)]
    taken = torch.stack([p[:, 1:-1].gather(-1, answers[..., None])[..., 0] for p in log_p]).detach()
    return ensemble, prompts, answers, taken


def test_the_steps_multiply_to_the_exact_mixture_of_sequences(every_sequence):
    ensemble, prompts, answers, log_p = every_sequence
    generation, _ = forced(ensemble, prompts, answers)
    exact = (WEIGHTS.double()[:, None] * log_p.sum(-1).exp()).sum(0)
    ours = generation.log_prob.sum(-1).exp()
    assert exact.sum().item() == pytest.approx(1.0, abs=1e-6)
    assert 0.5 * (ours - exact).abs().sum() < 1e-6
    torch.testing.assert_close(generation.mixture_nll, -exact.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(generation.member_log_likelihood, log_p.sum(-1), rtol=0, atol=2e-5)


def test_running_weights_are_bayes_rule(every_sequence):
    ensemble, prompts, answers, log_p = every_sequence
    generation, _ = forced(ensemble, prompts, answers)
    before = log_p.cumsum(-1) - log_p  # of the tokens so far
    posterior = (WEIGHTS.double().log()[:, None, None] + before).softmax(0)
    torch.testing.assert_close(generation.weights, posterior, rtol=0, atol=1e-5)
    entropy = -torch.special.xlogy(*(2 * [(WEIGHTS.double().log()[:, None] + log_p.sum(-1)).softmax(0)])).sum(0)
    torch.testing.assert_close(generation.effective_members, entropy.exp(), rtol=0, atol=1e-4)


def test_the_scores_that_tokens_are_drawn_from_are_the_mixtures(every_sequence):
    """Not only of the token taken: every next token's probability, at every prefix."""
    ensemble, prompts, answers, log_p = every_sequence
    _, scores = forced(ensemble, prompts, answers)
    exact = (WEIGHTS.double()[:, None] * log_p.sum(-1).exp()).sum(0).view([VOCABULARY] * LENGTH)
    for step in range(LENGTH):
        joint = exact.sum(tuple(range(step + 1, LENGTH))) if step + 1 < LENGTH else exact  # of the first step + 1
        conditional = joint / joint.sum(-1, keepdim=True)
        ours = scores[step].double().softmax(-1).view(*[VOCABULARY] * LENGTH, VOCABULARY)
        ours = ours[(..., *[0] * (LENGTH - step), slice(None))]
        torch.testing.assert_close(ours, conditional, rtol=0, atol=1e-6)


def test_token_mixing_keeps_the_weights_and_is_another_distribution(every_sequence):
    ensemble, prompts, answers, log_p = every_sequence
    generation, _ = forced(ensemble, prompts, answers, mixture="token")
    exact = (WEIGHTS.double()[:, None, None] * log_p.exp()).sum(0).log()
    torch.testing.assert_close(generation.log_prob, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(generation.weights, WEIGHTS.double()[:, None, None].expand_as(log_p), rtol=0, atol=1e-7)
    of_sequences = (WEIGHTS.double()[:, None] * log_p.sum(-1).exp()).sum(0)
    assert 0.5 * (generation.log_prob.sum(-1).exp() - of_sequences).abs().sum() > 0.01


def test_sampling_draws_from_the_mixture(every_sequence):
    """First tokens of many rows against their exact probabilities; the rest follows from the scores above."""
    ensemble, prompts, _, log_p = every_sequence
    exact = (WEIGHTS.double()[:, None] * log_p[:, :: VOCABULARY ** (LENGTH - 1), 0].exp()).sum(0)
    rows = 20_000
    drawn = ensemble.generate(prompts[:1].expand(rows, -1), do_sample=True, top_k=0, max_new_tokens=1, seed=0)
    frequency = drawn.new_tokens[:, 0].bincount(minlength=VOCABULARY) / rows
    assert 0.5 * (frequency - exact).abs().sum() < 0.01


def test_greedy_takes_the_likeliest_token_of_the_exact_mixture(every_sequence):
    ensemble, prompts, _, log_p = every_sequence
    exact = (WEIGHTS.double()[:, None] * log_p.sum(-1).exp()).sum(0).view([VOCABULARY] * LENGTH)
    greedy = ensemble.generate(prompts[:1], do_sample=False, max_new_tokens=LENGTH).new_tokens[0].tolist()
    for step, token in enumerate(greedy):
        rest = exact[tuple(greedy[:step])]
        assert token == rest.flatten(1).sum(-1).argmax() if rest.dim() > 1 else token == rest.argmax()


# ---- One member is what transformers makes of it ---------------------------------------------------------------------

SETTINGS = [
    {"do_sample": False},
    {"do_sample": False, "repetition_penalty": 1.5, "suppress_tokens": [18, 52], "no_repeat_ngram_size": 2},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0, "temperature": 2.0},
    {"do_sample": True, "top_k": 12, "top_p": 0.8, "temperature": 1.4, "repetition_penalty": 1.3, "min_p": 0.01},
]


@pytest.mark.parametrize(
    ("kind", "settings"), [("llama", s) for s in SETTINGS] + [(k, SETTINGS[4]) for k in ("gpt2", "gemma2", "granite")]
)
def test_a_member_alone_is_transformers_generate(kind, settings):
    ensemble = tiny_ensemble(2, kind)
    input_ids, mask = padded_batch("left")
    settings = {"max_new_tokens": 10, **settings}
    for member in range(2):
        plain = ensemble.merged(member)
        torch.manual_seed(5)
        theirs = plain.generate(input_ids, attention_mask=mask, **settings)
        torch.manual_seed(5)
        chosen = ensemble.generate(input_ids, mask, mixture="member", member=member, **settings)
        seeded = ensemble.generate(input_ids, mask, mixture="member", member=member, seed=5, **settings)
        assert torch.equal(chosen.sequences, theirs)
        assert torch.equal(seeded.sequences, theirs)
        with ensemble.using([member]):  # a mixture of one is that one
            assert torch.equal(ensemble.generate(input_ids, mask, seed=5, **settings).sequences, theirs)


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[4]])
def test_members_that_agree_are_one_member_to_every_processor(settings):
    """A penalty on repetition looks at the sign of logits, and must see the members' own."""
    ensemble = LoraEnsemble.from_base(tiny_model(), 3, lora(), seed=7)  # fresh: all of them are the base
    input_ids, mask = padded_batch("left")
    plain = tiny_model()
    torch.manual_seed(0)
    theirs = plain.generate(input_ids, attention_mask=mask, max_new_tokens=10, **settings)
    ours = ensemble.generate(input_ids, mask, seed=0, max_new_tokens=10, **settings)
    assert torch.equal(ours.sequences, theirs)
    assert (ours.epistemic < 1e-12).all()  # rows of a batch differ in the last bit
    assert (ours.disagreement == 0).all()
    torch.testing.assert_close(ours.effective_members, torch.full((3,), 3.0, dtype=torch.float64))


def test_the_base_alone_is_the_base():
    ensemble = tiny_ensemble(2)
    input_ids, mask = padded_batch("left")
    theirs = tiny_model().generate(input_ids, attention_mask=mask, max_new_tokens=8)
    with ensemble.using(()):
        assert torch.equal(ensemble.generate(input_ids, mask, max_new_tokens=8).sequences, theirs)


def test_every_member_answers_as_it_would_alone():
    ensemble = tiny_ensemble(3)
    input_ids, mask = padded_batch("left")
    together = ensemble.generate(input_ids, mask, mixture="member", max_new_tokens=8)
    assert together.sequences.shape == (3, 3, 17)
    assert together.weights.shape == (1, 3, 3, 8)
    for member in range(3):
        alone = ensemble.generate(input_ids, mask, mixture="member", member=member, max_new_tokens=8)
        assert torch.equal(together.sequences[member], alone.sequences)
        for name in ("log_prob", "total", "mixture_nll"):
            torch.testing.assert_close(getattr(together, name)[member], getattr(alone, name), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.member_log_likelihood[0, member], -alone.mixture_nll, atol=1e-5, rtol=1e-5)
    assert (together.epistemic == 0).all()
    assert not torch.equal(together.sequences[0], together.sequences[1])


# ---- The same by another way -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("mixture", ["sequence", "token"])
def test_figures_are_those_of_a_full_forward(kind, mixture):
    """No cache, no padding, no loop: each finished row read once by the joint forward."""
    ensemble = tiny_ensemble(3, kind)
    ensemble.weights.copy_(WEIGHTS)
    input_ids, mask = padded_batch("left")
    generation = ensemble.generate(input_ids, mask, mixture=mixture, max_new_tokens=8)
    for row in range(3):
        prompt = input_ids[row][mask[row] == 1]
        answer = generation.new_tokens[row][generation.mask[row]]
        with torch.no_grad():
            logits = ensemble.logits(torch.cat([prompt, answer])[None])[:, 0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        taken = log_p.gather(-1, answer.expand(3, -1)[..., None])[..., 0]
        before = taken.cumsum(-1) - taken if mixture == "sequence" else torch.zeros_like(taken)
        w = (WEIGHTS.double().log()[:, None] + before).softmax(0)
        mixed = (w[..., None] * log_p.exp()).sum(0)
        n = len(answer)
        expected = {
            "log_prob": mixed.gather(-1, answer[:, None])[:, 0].log(),
            "total": -(mixed * mixed.log()).sum(-1),
            "aleatoric": -(w * (log_p.exp() * log_p).sum(-1)).sum(0),
        }
        expected["epistemic"] = expected["total"] - expected["aleatoric"]
        for name, value in expected.items():
            torch.testing.assert_close(getattr(generation, name)[row, :n], value, atol=2e-5, rtol=1e-4)
        assert torch.equal(answer, mixed.argmax(-1))
        assert generation.mean_epistemic[row].item() == pytest.approx(expected["epistemic"].mean().item(), abs=2e-5)
        assert generation.max_epistemic[row].item() == pytest.approx(expected["epistemic"].max().item(), abs=2e-5)


def test_the_cache_changes_nothing():
    ensemble = tiny_ensemble(3)
    input_ids, mask = padded_batch("left")
    cached, full = (ensemble.generate(input_ids, mask, max_new_tokens=8, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, full.sequences)
    for one, other in zip(cached, full, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def compiled() -> CompileConfig:
    """Captured, but not made into code, which takes long; and on a CPU, where transformers would not."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return config


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("llama", {"compile_config": compiled()}),
        pytest.param("gpt2", {"compile_config": compiled()}, marks=pytest.mark.slow),
        pytest.param("gemma2", {"compile_config": compiled()}, marks=pytest.mark.slow),
    ],
)
def test_a_static_cache_changes_nothing_compiled_or_not(kind, settings):
    ensemble = tiny_ensemble(3, kind)
    input_ids, mask = padded_batch("left")
    dynamic, static = (
        ensemble.generate(input_ids, mask, max_new_tokens=8, cache_implementation=cache, **given)
        for cache, given in (("dynamic", {}), ("static", settings))
    )
    assert hasattr(ensemble.base, "_compiled_call") == bool(settings)
    assert torch.equal(dynamic.sequences, static.sequences)
    for one, other in zip(dynamic, static, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole(kind, monkeypatch):
    ensemble = tiny_ensemble(3, kind)
    input_ids, mask = padded_batch("left")
    seen = []
    layer = next(iter(joint_layers(ensemble.base).values()))
    layer.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    whole = ensemble.generate(input_ids, mask, max_new_tokens=4, eos_token_id=None)
    monkeypatch.setattr(decode, "_CPU_ROWS", 36)  # four tokens of nine rows
    chunked = ensemble.generate(input_ids, mask, max_new_tokens=4, eos_token_id=None)
    asked = ensemble.generate(input_ids, mask, max_new_tokens=4, eos_token_id=None, prefill_chunk_size=5)
    assert seen == [9, 1, 1, 1, 4, 4, 1, 1, 1, 1, 5, 4, 1, 1, 1]
    for other in (chunked, asked):
        assert torch.equal(whole.sequences, other.sequences)
        for one, value in zip(whole, other, strict=True):
            torch.testing.assert_close(one, value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixture", ["sequence", "token", "member"])
def test_rows_are_what_they_would_be_without_others_and_without_padding(side, mixture):
    ensemble = tiny_ensemble(3)
    input_ids, mask = padded_batch(side)
    batch = ensemble.generate(input_ids, mask, mixture=mixture, max_new_tokens=8)
    for row in range(3):
        alone = ensemble.generate(input_ids[row][mask[row] == 1][None], mixture=mixture, max_new_tokens=8)
        n = alone.mask.shape[-1]
        assert torch.equal(batch.new_tokens[..., row, :n], alone.new_tokens[..., 0, :])
        for name in ("log_prob", "epistemic", "total"):
            ours, theirs = getattr(batch, name)[..., row, :n], getattr(alone, name)[..., 0, :]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_base_is_read_once_a_step_whatever_the_number_of_members():
    ensemble = tiny_ensemble(3)
    seen = []
    layer = next(iter(joint_layers(ensemble.base).values()))
    layer.base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:2]))
    input_ids, mask = padded_batch("left")
    ensemble.generate(input_ids, mask, max_new_tokens=4, eos_token_id=None)
    assert seen == [(9, 9), (9, 1), (9, 1), (9, 1)]


def test_the_head_multiplies_all_rows_at_once():
    """Over rows that do not follow one another torch multiplies one by one, for each with its own copy of the head."""
    ensemble = tiny_ensemble(3)
    rows = []
    ensemble.base.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    input_ids, mask = padded_batch("left")
    ensemble.generate(input_ids, mask, max_new_tokens=2, eos_token_id=None)
    assert [x.shape for x in rows] == [(9, 1, 32)] * 2
    assert all(x.stride(0) == x.shape[1] * x.stride(1) for x in rows)


# ---- Uncertainty by hand ---------------------------------------------------------------------------------------------


def opposed(members: int) -> LoraEnsemble:
    """Members that are sure of one token each, another each, whatever the text: all tokens look the same to them."""
    base = tiny_model(tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        base.model.embed_tokens.weight[:, 0] = 1.0
        for layer in base.model.layers:
            layer.mlp.gate_proj.weight[:, 0] = 1.0
            layer.mlp.up_proj.weight[:, 0] = 1.0
        base.lm_head.weight[:32] = 20.0 * torch.eye(32)  # token v reads feature v
    ensemble = LoraEnsemble.from_base(base, members, lora(target_modules=["down_proj"]), seed=0)
    *_, last = joint_layers(ensemble.base).values()
    with torch.no_grad():
        last.members.lora_A.fill_(1.0)
        for m in range(members):
            last.members.lora_B[m, 10 + m] = 1.0
    return ensemble


def test_members_sure_of_different_tokens_are_told_apart_by_one():
    """Mutual information log M before the first token, and none after it: it says which member is speaking."""
    ensemble = opposed(4)
    generation = ensemble.generate(torch.tensor([[7, 8]]), max_new_tokens=3, eos_token_id=None)
    assert generation.epistemic[0].tolist() == pytest.approx([math.log(4), 0.0, 0.0], abs=1e-3)
    assert generation.disagreement[0].item() == pytest.approx(0.75 / 3, abs=1e-6)
    assert generation.effective_members[0].item() == pytest.approx(1.0, abs=1e-3)
    flat = ensemble.generate(torch.tensor([[7, 8]]), mixture="token", max_new_tokens=3, eos_token_id=None)
    assert flat.epistemic[0].tolist() == pytest.approx([math.log(4)] * 3, abs=1e-3)


def test_a_member_of_weight_zero_has_no_say():
    ensemble = tiny_ensemble(3)
    ensemble.weights.copy_(torch.tensor([0.5, 0.0, 0.5]))
    input_ids, mask = padded_batch("left")
    with_it = ensemble.generate(input_ids, mask, max_new_tokens=6, repetition_penalty=1.2)
    with ensemble.using([0, 2]):
        without = ensemble.generate(input_ids, mask, max_new_tokens=6, repetition_penalty=1.2)
    assert torch.equal(with_it.sequences, without.sequences)
    for name in ("log_prob", "total", "epistemic", "mixture_nll", "disagreement", "effective_members"):
        torch.testing.assert_close(getattr(with_it, name), getattr(without, name), atol=1e-5, rtol=1e-4)
    assert all(value.isfinite().all() for value in with_it)


# ---- Where answers end -----------------------------------------------------------------------------------------------


def test_every_token_of_a_list_ends_an_answer():
    ensemble = tiny_ensemble(3)
    input_ids, mask = padded_batch("left")
    free = ensemble.generate(input_ids, mask, max_new_tokens=10, eos_token_id=None)
    ends = [int(free.new_tokens[0, 2]), int(free.new_tokens[2, 1])]
    ended = ensemble.generate(input_ids, mask, max_new_tokens=10, eos_token_id=ends, pad_token_id=PAD)
    for row in range(3):
        tokens = free.new_tokens[row].tolist()
        length = next((i + 1 for i, t in enumerate(tokens) if t in ends), 10)
        n = ended.mask.shape[1]
        assert ended.mask[row].tolist() == [i < length for i in range(n)]
        assert ended.new_tokens[row].tolist() == (tokens[:length] + [PAD] * n)[:n]
        for values in (ended.log_prob, ended.total, ended.epistemic, ended.aleatoric, ended.weights[0]):
            assert (values[row, length:] == 0).all()
        expected = free.log_prob[row, :length].sum()
        torch.testing.assert_close(ended.mixture_nll[row], -expected, atol=1e-5, rtol=1e-5)
    assert ended.mask.sum() < 30


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter; transformers' stop strings need a vocabulary that spells anything."""
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,"
    model = models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="a")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_stop_strings_and_a_wanted_minimum():
    ensemble, tokenizer = tiny_ensemble(3), letters_tokenizer()
    prompt = torch.tensor([[7, 8, 9]])
    free = ensemble.generate(prompt, max_new_tokens=6, eos_token_id=None, repetition_penalty=5.0)
    word = tokenizer.decode(free.new_tokens[0, 2])
    settings = {"max_new_tokens": 6, "eos_token_id": None, "repetition_penalty": 5.0}
    stopped = ensemble.generate(prompt, stop_strings=[word], tokenizer=tokenizer, **settings)
    assert stopped.new_tokens[0].tolist() == free.new_tokens[0, :3].tolist()
    config = GenerationConfig(**settings, stop_strings=[word])
    assert torch.equal(
        ensemble.generate(prompt, generation_config=config, tokenizer=tokenizer).sequences, stopped.sequences
    )
    with pytest.raises(ConfigError, match=r"stop_strings.*\n.*tokenizer"):
        ensemble.generate(prompt, stop_strings=[word], max_new_tokens=3)
    early = {"max_new_tokens": 6, "eos_token_id": int(free.new_tokens[0, 0]), "repetition_penalty": 5.0}
    assert ensemble.generate(prompt, **early).mask.shape == (1, 1)
    assert ensemble.generate(prompt, min_new_tokens=4, **early).mask.shape[1] >= 4


class Recorder(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_a_streamer_sees_every_token_as_transformers_would_show_it():
    ensemble = tiny_ensemble(3)
    streamer, seen = Recorder(), []
    generation = ensemble.generate(
        torch.tensor([[7, 8, 9]]), max_new_tokens=5, streamer=streamer, on_token=lambda t, u: seen.append((t, u))
    )
    assert streamer.got == generation.sequences[0].tolist()
    assert streamer.ended
    assert [int(t) for t, _ in seen] == generation.new_tokens[0].tolist()
    assert [float(u.epistemic) for _, u in seen] == generation.epistemic[0].tolist()


def test_a_seed_leaves_torchs_own_generator_alone():
    ensemble = tiny_ensemble(2)
    state = torch.get_rng_state()
    prompt = torch.tensor([[7, 8, 9]])
    one, two, other = (
        ensemble.generate(prompt, do_sample=True, max_new_tokens=10, seed=seed).sequences for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_training_goes_on_afterwards():
    ensemble = tiny_ensemble(2, lora_dropout=0.5).train()
    prompt = torch.tensor([[7, 8, 9]])
    assert torch.equal(*(ensemble.generate(prompt, max_new_tokens=5).sequences for _ in range(2)))  # no dropout
    assert ensemble.training
    assert ensemble.base.training


# ---- What cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"cache_implementation": "paged"}, "cache_implementation"),
        ({"tempreature": 0.5}, "tempreature: there is no such setting of generation\nDid you mean temperature"),
        ({"do_sample": True, "temperature": -1.0}, "temperature"),
        ({"max_length": 2, "max_new_tokens": None}, "max_length"),
        ({"mixture": "logits"}, "mixture: 'logits' is none of sequence, token, member"),
        ({"member": 1}, "member: goes with"),
        ({"mixture": "member", "member": 5}, "there is no member 5 of 2"),
        ({"mixture": "member", "streamer": Recorder()}, "streamer: takes one answer, not 2"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(settings, where):
    with pytest.raises(ConfigError) as refused:
        tiny_ensemble(2).generate(torch.tensor([[7, 8, 9]]), **{"max_new_tokens": 3, **settings})
    assert where in str(refused.value)


def test_an_empty_prompt_is_refused():
    ensemble = tiny_ensemble(2)
    with pytest.raises(ConfigError, match="prompt 2: no token to continue"):
        ensemble.generate(torch.tensor([[7, 8], [PAD, PAD]]), torch.tensor([[1, 1], [0, 0]]), max_new_tokens=2)
    with pytest.raises(ConfigError, match="no token to continue"):
        ensemble.generate(torch.zeros(1, 0, dtype=torch.long), max_new_tokens=2)
    with pytest.raises(ConfigError, match=r"Both are \[B, T\]"):
        ensemble.generate(torch.tensor([7, EOS]), max_new_tokens=2)
