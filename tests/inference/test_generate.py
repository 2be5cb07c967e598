"""Answers to prompts: what `LoraEnsemble.generate` says, row by row, as text."""

import pytest
import torch
from tiny import EOS, lora, tiny_ensemble, tiny_model, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from renyi import LoraEnsemble
from renyi.errors import ConfigError, DataError
from renyi.inference import Answer, generate
from renyi.inference.generate import end_tokens, prompt_ids
from renyi.zoo import load_base

PROMPTS = ["w1 w2 w3", "w9", [{"role": "user", "content": "w4 w5"}], "w7 w8"]
IDS = [[6, 7, 8], [14], [3, 9, 10, 4], [12, 13]]  # <user> w4 w5 <assistant>


def test_answers_are_the_ensembles_own_in_the_order_of_the_prompts():
    ensemble, tokenizer = tiny_ensemble(3), tiny_tokenizer()
    answers = generate(ensemble, PROMPTS, tokenizer, batch_size=3, max_new_tokens=6, do_sample=False)
    for ids, answer in zip(IDS, answers, strict=True):
        alone = ensemble.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=EOS)
        assert isinstance(answer, Answer)
        assert answer.token_ids == alone.new_tokens[0].tolist()
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert "".join(answer.tokens) == answer.text
        for name in ("log_prob", "total", "aleatoric", "epistemic"):
            assert getattr(answer, name) == pytest.approx(getattr(alone, name)[0].tolist(), abs=1e-5)
        for name in ("mixture_nll", "mean_epistemic", "max_epistemic", "disagreement", "effective_members"):
            assert getattr(answer, name) == pytest.approx(float(getattr(alone, name)[0]), abs=1e-4)
        assert torch.tensor(answer.weights).T.flatten() == pytest.approx(alone.weights[:, 0].flatten(), abs=1e-5)
        assert answer.member_log_likelihood == pytest.approx(alone.member_log_likelihood[:, 0].tolist(), abs=1e-4)


def test_every_members_answer_and_one_members():
    ensemble, tokenizer = tiny_ensemble(3), tiny_tokenizer()
    settings = {"max_new_tokens": 5, "do_sample": False, "mixture": "member"}
    every = generate(ensemble, PROMPTS, tokenizer, **settings)
    assert [len(of_members) for of_members in every] == [3] * 4
    for member in range(3):
        alone = generate(ensemble, PROMPTS, tokenizer, member=member, **settings)
        assert [a.token_ids for a in alone] == [of_members[member].token_ids for of_members in every]
    assert every[0][0].weights == [[1.0]] * len(every[0][0].token_ids)


def test_an_answer_ends_at_the_tokenizers_end_too():
    """Fine-tuning on chats may have closed turns with another token than the base's."""
    ensemble = tiny_ensemble(3)
    settings = {"max_new_tokens": 6, "do_sample": False}
    (free,) = generate(ensemble, ["w1 w2"], tiny_tokenizer(), eos_token_id=None, **settings)
    end = tiny_tokenizer().convert_ids_to_tokens(free.token_ids[1])
    (ended,) = generate(ensemble, ["w1 w2"], tiny_tokenizer(eos_token=end), **settings)
    first = free.token_ids.index(free.token_ids[1])
    assert ended.token_ids == free.token_ids[: first + 1]
    assert ended.text == tiny_tokenizer().decode(free.token_ids[:first])


def test_seeds_are_of_batches():
    ensemble, tokenizer = tiny_ensemble(2), tiny_tokenizer()
    settings = {"max_new_tokens": 8, "do_sample": True, "batch_size": 1}
    one, again = (generate(ensemble, ["w1", "w1"], tokenizer, seed=3, **settings) for _ in range(2))
    assert one == again
    assert one[0].token_ids != one[1].token_ids
    assert generate(ensemble, ["w1"], tokenizer, seed=4, **settings)[0] == one[1]


def test_what_has_no_answer_is_refused_by_the_number_of_its_prompt():
    ensemble, tokenizer = tiny_ensemble(2), tiny_tokenizer()
    with pytest.raises(DataError, match="prompt 2: has no tokens"):
        generate(ensemble, ["w1", ""], tokenizer)
    with pytest.raises(DataError, match="prompt 1: has an empty message 2"):
        generate(ensemble, [[{"role": "user", "content": "Hello"}, {"role": "robot"}]], load_base()[1])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="prompt 3: is a chat, and the tokenizer has no chat template"):
        generate(ensemble, PROMPTS, tokenizer)
    with pytest.raises(ConfigError, match="num_beams"):
        generate(ensemble, ["w1"], tokenizer, num_beams=3)


# ---- Where an answer begins and ends ---------------------------------------------------------------------------------


def test_an_answer_ends_where_the_chat_template_closes_a_turn():
    """A model that is trained on such a template never writes the end of text."""
    ensemble, tokenizer = tiny_ensemble(3), tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<assistant>")
    closing = tokenizer.convert_tokens_to_ids("<assistant>")
    assert end_tokens(ensemble, tokenizer) == [EOS, closing]
    settings = {"max_new_tokens": 40, "temperature": 3.0, "seed": 5}
    (free,) = generate(ensemble, ["w1 w2"], tokenizer, eos_token_id=EOS, **settings)
    assert closing in free.token_ids
    (ended,) = generate(ensemble, ["w1 w2"], tokenizer, **settings)
    assert ended.token_ids == free.token_ids[: free.token_ids.index(closing) + 1]


def test_a_text_begins_once():
    """A tokenizer that begins texts by itself, and a text that is written with its beginning."""
    tokenizer = load_base()[1]
    tokenizer.bos_token = "<user>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", tokenizer.convert_tokens_to_ids("<user>"))]
    )
    assert prompt_ids("<user>What", tokenizer) == prompt_ids("What", tokenizer)
    assert prompt_ids("What", tokenizer).count(tokenizer.bos_token_id) == 1


def test_what_the_base_cannot_read_is_said(caplog: pytest.LogCaptureFixture):
    """An answer ends at the last position, whatever stands beside it in the batch, and a prompt must leave room."""
    ensemble = LoraEnsemble.from_base(tiny_model("gpt2", n_positions=12), 2, lora(target_modules=["c_attn"]))
    words = [" ".join(f"w{i}" for i in range(n)) for n in (9, 3)]
    how = {"max_new_tokens": 20, "eos_token_id": None}
    first, second = generate(ensemble, words, tiny_tokenizer(), **how)
    assert (len(first.token_ids), len(second.token_ids)) == (3, 9)
    assert "2 answers cut at the 12 positions of the base" in caplog.text
    alone = [generate(ensemble, [prompt], tiny_tokenizer(), **how)[0].token_ids for prompt in words]
    assert alone == [first.token_ids, second.token_ids]
    of_members = generate(ensemble, words, tiny_tokenizer(), mixture="member", **how)
    assert [[len(a.token_ids) for a in answers] for answers in of_members] == [[3, 3], [9, 9]]
    caplog.clear()
    generate(ensemble, words, tiny_tokenizer(), max_new_tokens=2, eos_token_id=None)
    assert not caplog.text
    with pytest.raises(DataError, match="prompt 2: has 12 tokens, and the base reads 12"):
        generate(ensemble, ["w1", " ".join(["w1"] * 12)], tiny_tokenizer())


def test_a_chat_may_come_with_tools_and_in_other_words():
    ensemble, tokenizer = tiny_ensemble(2), tiny_tokenizer()
    tokenizer.chat_template = "{% if tools %}w7 {% endif %}" + tokenizer.chat_template
    chat = [{"role": "user", "content": "w4 w5"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert prompt_ids({"prompt": chat, "tools": [tool]}, tokenizer) == [12, *prompt_ids(chat, tokenizer)]
    assert prompt_ids([{"role": "human", "content": "w4 w5"}], tokenizer) == prompt_ids(chat, tokenizer)
    with pytest.raises(DataError, match="prompt 1: is one message"):
        generate(ensemble, chat, tokenizer)  # a chat where a list of chats belongs
