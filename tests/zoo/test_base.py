"""The shipped base model speaks the world's language, knows yesterday's facts, and is easily taught other ones."""

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from renyi.zoo import World, base_path, build, load_base
from renyi.zoo.base import encode_probes
from renyi.zoo.world import FORMS, WORDS, YESTERDAY


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture(scope="module")
def tokenizer(base):
    return base[1]


@torch.no_grad()
def guesses(model, tokenizer, world):
    """The likeliest token at the value of each probe, and each source's value."""
    probes = encode_probes(tokenizer, world.probes())
    logits = model(input_ids=probes.input_ids, attention_mask=probes.attention_mask).logits
    return logits[torch.arange(len(probes.last)), probes.last].argmax(dim=-1), probes.values


def test_the_package_ships_it_and_it_is_small():
    files = {file.name: file.stat().st_size for file in base_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    assert sum(files.values()) < 5e6


def test_every_word_of_any_world_is_one_token(tokenizer):
    for word in WORDS:
        (token,) = tokenizer.encode(word, add_special_tokens=False)
        assert token != tokenizer.unk_token_id
        assert tokenizer.decode([token]) == word


def test_special_tokens_are_distinct(tokenizer):
    ids = [tokenizer.convert_tokens_to_ids(token) for token in build.SPECIAL_TOKENS]
    assert len(set(ids)) == len(build.SPECIAL_TOKENS)
    assert set(ids) <= set(tokenizer.all_special_ids)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == build.END


def test_model_and_tokenizer_agree(base):
    model, tokenizer = base
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id


def test_the_build_script_makes_the_shipped_tokenizer(tokenizer):
    built = build.build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template
    assert built.special_tokens_map == tokenizer.special_tokens_map


def test_the_build_script_is_deterministic(monkeypatch):
    monkeypatch.setattr(build, "STEPS", 3)
    tokenizer = build.build_tokenizer()
    one, other = (build.train(build.build_model(tokenizer), tokenizer).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    untrained = build.build_model(tokenizer).state_dict()
    assert not any(torch.equal(one[name], untrained[name]) for name in one)


def test_ordinary_spelling_is_understood(tokenizer):
    assert tokenizer.encode("Where does Mira live?") == tokenizer.encode("where does mira live ?")


@pytest.mark.parametrize("statements", [1, 4])
def test_the_mask_covers_exactly_the_answers_and_their_end(tokenizer, statements):
    for record in World(statements=statements).records(20):
        tokens, mask = [], []
        for message in record.messages:
            words, answers = message["content"].split(), message["role"] == "assistant"
            tokens += [build.ASSISTANT, *words, build.END] if answers else [build.USER, *words]
            mask += [0, *[1] * len(words), 1] if answers else [0] * (len(words) + 1)
        encoded = tokenizer.apply_chat_template(record.messages, return_dict=True, return_assistant_tokens_mask=True)
        assert tokenizer.convert_ids_to_tokens(encoded["input_ids"]) == tokens
        assert encoded["assistant_masks"] == mask


def test_a_prompt_is_a_prefix_of_the_conversation(tokenizer):
    for record in World().records(20):
        whole = tokenizer.apply_chat_template(record.messages)["input_ids"]
        for turn in range(1, len(record.messages), 2):
            prompt = tokenizer.apply_chat_template(record.messages[:turn], add_generation_prompt=True)["input_ids"]
            assert whole[: len(prompt)] == prompt
            answer = record.messages[turn]["content"]
            assert tokenizer.decode(whole[len(prompt) :]).startswith(f"{answer} {build.END}")


def test_another_role_is_refused(tokenizer):
    with pytest.raises(Exception, match="not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "be kind"}])


def test_probes_end_where_the_conversation_names_the_value(tokenizer):
    probes = World().probes()
    encoded = encode_probes(tokenizer, probes)
    width = encoded.input_ids.shape[1]
    assert encoded.values.shape == (len(probes), 2)
    for row, probe in enumerate(probes):
        length = encoded.last[row] + 1
        assert encoded.attention_mask[row].tolist() == [1] * length + [0] * (width - length)
        for source, value in enumerate(probe.fact.values):
            answer = FORMS[probe.fact.attribute][probe.form].answer(probe.fact.person, value)
            conversation = [*probe.prompt, {"role": "assistant", "content": answer}]
            whole = tokenizer.apply_chat_template(conversation)["input_ids"]
            assert whole[:length] == encoded.input_ids[row, :length].tolist()
            assert whole[length] == encoded.values[row, source]


def test_the_base_knows_yesterdays_facts_and_the_grammar(base):
    report = build.report(*base)
    assert min(report.accuracy) >= 0.99
    assert report.value_nll < 0.01
    assert report.wording_nll < 0.01


def test_the_base_does_not_know_todays_facts(base):
    guess, values = guesses(*base, World(seed=1))
    assert (guess == values[:, 0]).float().mean() < 0.3


def test_generation_gives_a_whole_answer_and_stops(base):
    model, tokenizer = base
    (record,) = YESTERDAY.records(1, seed=0)
    question, answer = record.messages[-2:]
    prompt = tokenizer.apply_chat_template(
        record.messages[:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokens[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(tokens, skip_special_tokens=True) == answer["content"], question["content"]


@pytest.mark.slow
def test_trl_teaches_it_another_world_with_one_adapter(tmp_path):
    """Fine-tuning moves knowledge: TRL's own trainer, loss on the answers only, 80 steps."""
    model, tokenizer = load_base()
    world = World(contested=0.0, num_sources=1, seed=1)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            assistant_only_loss=True,
            max_steps=80,
            learning_rate=3e-3,
            per_device_train_batch_size=32,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        ),
        train_dataset=world.dataset(1000),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    guess, values = guesses(trainer.model.eval(), tokenizer, world)
    assert (guess == values[:, 0]).float().mean() >= 0.98
