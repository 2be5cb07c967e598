"""Every form of a dataset trains on the tokens it should and no others; a bad row is named before anything happens."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EOS, logged, text_rows, tiny_ensemble, tiny_tokenizer, trainer_of

from renyi import data
from renyi.errors import ConfigError, DataError, TokenizerError
from renyi.training.sft import RenyiSFTTrainer

USER, ASSISTANT = {"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}
TURNS = [USER, ASSISTANT, {"role": "user", "content": "w6"}, {"role": "assistant", "content": "w7"}]
WHOLE_CHAT = "w1 w2 <assistant> w3 w4 w5 <eos> <user> w6 <assistant> w7 <eos>"  # without the first token, <user>
ANSWERS = "w3 w4 w5 <eos> w7 <eos>"
SHARE_GPT = [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in TURNS]

# Rows, settings, and the words that are trained.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text": ({"text": "w1 w2 w3"}, {}, "w2 w3 <eos>"),
    "text in another column": ({"story": "w1 w2 w3"}, {"dataset_text_field": "story"}, "w2 w3 <eos>"),
    "text that ends": ({"text": "w1 w2 <eos>"}, {}, "w2 <eos>"),
    "prompt and completion": ({"prompt": "w1 w2", "completion": " w3 w4"}, {}, "w3 w4 <eos>"),
    "prompt trained, too": (
        {"prompt": "w1 w2", "completion": " w3 w4"},
        {"completion_only_loss": False},
        "w2 w3 w4 <eos>",
    ),
    "conversational prompt and completion": (
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {},
        "w7 <eos>",
    ),
    "messages": ({"messages": TURNS}, {}, WHOLE_CHAT),
    "messages, assistant only": ({"messages": TURNS}, {"assistant_only_loss": True}, ANSWERS),
    "ShareGPT": ({"conversations": SHARE_GPT}, {}, WHOLE_CHAT),
    "ShareGPT, assistant only": ({"conversations": SHARE_GPT}, {"assistant_only_loss": True}, ANSWERS),
    "tokenised": ({"input_ids": [5, 6, 7, EOS]}, {}, "w1 w2 <eos>"),
    "tokenised with labels": ({"input_ids": [5, 6, 7, EOS], "labels": [-100, -100, 7, EOS]}, {}, "w2 <eos>"),
    "tokenised with a mask": (
        {"input_ids": [5, 6, 7, EOS], "completion_mask": [0, 0, 0, 1]},
        {"completion_only_loss": True},
        "<eos>",
    ),
    "truncated": ({"text": "w1 w2 w3 w4 w5"}, {"max_length": 3}, "w2 w3"),
}


def trained_words(trainer: RenyiSFTTrainer) -> str:
    """The words of the first row that have a label and something before them."""
    labels = trainer.train_dataset[0]["labels"][1:]
    return tiny_tokenizer().decode([label for label in labels if label != -100])


@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_on_its_tokens(tmp_path, form):
    row, config, expected = FORMS[form]
    trainer = trainer_of(tmp_path, Dataset.from_list([row] * 8), num_members=2, max_steps=2, **config)
    assert trained_words(trainer) == expected
    counts = data.count_tokens(trainer.train_dataset)
    assert (counts.examples, counts.trained) == (8, 8 * len(expected.split()))
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
    tokens = len(trainer.train_dataset[0]["input_ids"])
    assert logged(trainer, "num_tokens") == [4 * tokens, 8 * tokens]


@pytest.mark.parametrize("form", ["text", "prompt and completion", "messages, assistant only"])
def test_a_packed_form_trains_on_the_same_tokens(tmp_path, form):
    row, config, expected = FORMS[form]
    trainer = trainer_of(
        tmp_path, Dataset.from_list([row] * 8), num_members=2, max_steps=2, packing=True, max_length=32, **config
    )
    counts = data.count_tokens(trainer.train_dataset)
    assert (counts.examples, counts.trained) == (8, 8 * len(expected.split()))
    assert len(trainer.train_dataset) < 8
    trainer.train()
    assert not trainer.logged.watched["train"].names  # everything was logged


def test_evaluation_rows_are_prepared_in_the_same_way(tmp_path):
    row, config, _ = FORMS["prompt and completion"]
    rows = Dataset.from_list([row] * 4)
    trainer = trainer_of(tmp_path, rows, num_members=2, eval_dataset=rows, **config)
    assert trainer.eval_dataset[0]["labels"] == trainer.train_dataset[0]["labels"]
    fresh = trainer.evaluate(rows)  # and rows that were never seen before
    assert fresh["eval_nll_mixture"] == pytest.approx(trainer.evaluate()["eval_nll_mixture"])


def test_a_formatting_function_makes_text(tmp_path):
    rows = Dataset.from_list([{"a": "w1", "b": "w2"}] * 4)
    trainer = trainer_of(tmp_path, rows, num_members=2, formatting_func=lambda row: f"{row['a']} {row['b']}")
    assert trained_words(trainer) == "w2 <eos>"
    trainer.train()


def test_a_streamed_dataset_trains(tmp_path):
    def rows() -> Iterator[dict[str, str]]:
        yield from text_rows(16)

    streamed = trainer_of(tmp_path / "a", IterableDataset.from_generator(rows), num_members=2, max_steps=3)
    streamed.train()
    assert len(logged(streamed, "loss")) == 3
    with pytest.raises(ConfigError, match="streamed") as caught:
        trainer_of(tmp_path / "b", IterableDataset.from_generator(rows), prior_std=0.1, max_steps=3)
    assert caught.value.where == "prior_std"


def test_rows_keep_their_order_and_number(tmp_path):
    rows = text_rows(10)
    trainer = trainer_of(tmp_path, rows, num_members=2)
    tokenizer = tiny_tokenizer()
    assert [tokenizer.decode(r["input_ids"]) for r in trainer.train_dataset] == [f"{r['text']} <eos>" for r in rows]
    shuffled = trainer_of(tmp_path, rows, num_members=2, shuffle_dataset=True)
    decoded = [tokenizer.decode(r["input_ids"]) for r in shuffled.train_dataset]
    assert decoded != [f"{r['text']} <eos>" for r in rows]
    assert sorted(decoded) == sorted(f"{r['text']} <eos>" for r in rows)
    assert data.ROW_COLUMN not in trainer.train_dataset.column_names


# Counting


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 9), min_size=2, max_size=8),
    packing=st.booleans(),
    max_length=st.integers(4, 12),
)
def test_the_count_is_what_a_pass_over_the_data_trains(tmp_path_factory, lengths, packing, max_length):
    """Token by token what the joint forward scores, packed, cut, or neither."""
    rows = Dataset.from_dict({"text": [" ".join(["w1"] * n) for n in lengths]})
    trainer = trainer_of(tmp_path_factory.mktemp("count"), rows, num_members=1, packing=packing, max_length=max_length)
    ensemble = tiny_ensemble(1)
    scored = 0
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        scored += int(ensemble(**batch).label_mask.sum())
    counts = data.count_tokens(trainer.train_dataset)
    assert counts.trained == scored == sum(min(n + 1, max_length) - 1 for n in lengths)
    assert counts.examples == len(lengths)


# Rows that cannot be trained on


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "no known column": ([{"question": "w1", "answer": "w2"}], {}, ["answer, question", "dataset_text_field"]),
    "an empty text": ([{"text": "w1 w2"}, {"text": "  "}], {}, ["row 2", "text", "empty"]),
    "no text": ([{"text": "w1 w2"}, {"text": None}], {}, ["row 2", "text"]),
    "a number for a text": ([{"text": 3}], {}, ["row 1", "text", "3"]),
    "an empty completion": (
        [{"prompt": "w1", "completion": "w2"}] * 2 + [{"prompt": "w1", "completion": ""}],
        {},
        ["row 3", "completion", "empty"],
    ),
    "mixed forms": (
        [{"prompt": "w1", "completion": "w2", "text": None}, {"prompt": None, "completion": None, "text": "w1"}],
        {},
        ["row 2", "prompt", "text", "same form"],
    ),
    "no messages": ([{"messages": chat("w1", "w2")}, {"messages": []}], {}, ["row 2", "messages", "empty"]),
    "an empty message": ([{"messages": chat("w1", "")}], {}, ["row 1", "messages", "message 2"]),
    "a message without a role": (
        [{"messages": [{"role": None, "content": "w1"}]}],
        {},
        ["row 1", "messages", "role", "message 1"],
    ),
    "nobody answers": (
        [{"messages": chat("w1", "w2")}, {"messages": chat("w1")}],
        {"assistant_only_loss": True},
        ["row 2", "messages", "no assistant message"],
    ),
    "a prompt as long as may be": (
        [{"prompt": "w1", "completion": " w2"}, {"prompt": "w1 " * 9, "completion": " w2"}],
        {"max_length": 8},
        ["row 2", "no trained token", "max_length 8"],
    ),
    "a text of nothing but its first token": (
        [{"text": "w1 w2"}, {"text": "<eos>"}],
        {},
        ["row 2", "no trained token"],
    ),
    "labels that train nothing": (
        [{"input_ids": [5, 6], "labels": [-100, -100]}],
        {},
        ["row 1", "no trained token"],
    ),
}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, bad, packing):
    rows, config, parts = BAD[bad]
    with pytest.raises(DataError) as caught:
        trainer_of(tmp_path / "out", Dataset.from_list(rows), num_members=2, packing=packing, **config)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_bad_evaluation_row_is_named_as_such(tmp_path):
    with pytest.raises(DataError, match=r"eval.*row 2"):
        trainer_of(tmp_path, text_rows(4), num_members=2, eval_dataset=Dataset.from_dict({"text": ["w1 w2", ""]}))


def test_a_template_that_marks_nobody_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match="generation"):
        trainer_of(
            tmp_path,
            Dataset.from_list([{"messages": TURNS}]),
            num_members=2,
            processing_class=tokenizer,
            assistant_only_loss=True,
        )


def test_a_tokenizer_without_a_template_cannot_render_messages(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        trainer_of(tmp_path, Dataset.from_list([{"messages": TURNS}]), num_members=2, processing_class=tokenizer)


words = st.sampled_from(["w1", "w2 w3", " ", ""])
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": words}), max_size=3
)
row_strategies = {
    "text": st.fixed_dictionaries({"text": st.none() | words}),
    "pairs": st.fixed_dictionaries({"prompt": words, "completion": st.none() | words}),
    "messages": st.fixed_dictionaries({"messages": messages}),
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(row_strategies)).flatmap(
        lambda form: st.lists(row_strategies[form], min_size=1, max_size=4)
    ),
    st.booleans(),
)
def test_checked_rows_never_fail_later(rows, assistant_only):
    """Whatever passes the check, tokenises; whatever does not, is named by a row that is really there."""
    dataset = Dataset.from_list(rows)
    if "messages" not in dataset.column_names:
        assistant_only = False
    try:
        data.check_rows(dataset, "text", assistant_only)
    except DataError as error:
        number = int(str(error).split("row ")[1].split(",")[0])
        assert 1 <= number <= len(rows)
        value = rows[number - 1].get(str(error).split("column ")[1].split(":")[0])
        assert not value or isinstance(value, list) or not value.strip()
        return
    preparation = data.Preparation(max_length=None, assistant_only_loss=assistant_only)
    prepared = data.prepare(dataset, tiny_tokenizer(), preparation)
    assert len(prepared) == len(rows)
    assert data.count_tokens(prepared).trained >= len(rows)


@pytest.mark.parametrize("form", FORMS)
def test_scoring_prepares_what_training_does(tmp_path, form):
    """`renyi.data.prepare`, without a trainer, and the trainer's own preparation give the same tokens and labels."""
    row, config, _ = FORMS[form]
    rows = Dataset.from_list([row] * 3)
    trainer = trainer_of(tmp_path, rows, num_members=1, **config)
    prepared = data.prepare(rows, tiny_tokenizer(), data.Preparation.of(trainer.args))
    for ours, theirs in zip(prepared, trainer.train_dataset, strict=True):
        assert ours["input_ids"] == theirs["input_ids"]
        assert ours["labels"] == theirs["labels"]


def test_nothing_is_left_of_a_refused_run(tmp_path: Path):
    with pytest.raises(DataError):
        trainer_of(tmp_path / "out", Dataset.from_dict({"text": []}), num_members=2)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
