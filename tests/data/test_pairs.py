"""Every form of a preference row is known by its columns, and a bad one by its row, its column and what to write."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset, load_dataset
from tiny import tiny_tokenizer

from renyi import data
from renyi.data.pairs import pair_form
from renyi.data.rows import are_exact
from renyi.errors import DataError

DEMO = Path(__file__).parents[3] / "shared" / "data" / "dpo_en_demo.json"


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def turn(role: str, text: str) -> dict[str, Any]:
    return {"from": role, "value": text}


PLAIN = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}
CHAT = {"prompt": [user("w1")], "chosen": [says("w3")], "rejected": [says("w4")]}
PLAIN_IMPLICIT = {"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}
CHAT_IMPLICIT = {"chosen": [user("w1"), says("w3")], "rejected": [user("w1"), says("w4")]}
SHARE_GPT = {
    "conversations": [turn("system", "w0"), turn("human", "w1")],
    "chosen": turn("gpt", "w3"),
    "rejected": turn("gpt", "w4"),
}
CALL = {"type": "function", "function": {"name": "w5", "arguments": {"x": 1}}}

FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "plain": (PLAIN, "pairs with prompts, plain text"),
    "conversational": (CHAT, "pairs with prompts, conversational"),
    "plain, implicit": (PLAIN_IMPLICIT, "pairs with implicit prompts, plain text"),
    "conversational, implicit": (CHAT_IMPLICIT, "pairs with implicit prompts, conversational"),
    "ShareGPT": (SHARE_GPT, "ShareGPT pairs"),
    "ShareGPT, lists": (
        {**SHARE_GPT, "chosen": [SHARE_GPT["chosen"]], "rejected": [SHARE_GPT["rejected"]]},
        "ShareGPT pairs",
    ),
    "a prompt takes precedence": (
        {**CHAT, "conversations": [turn("human", "w9")]},
        "pairs with prompts, conversational",
    ),
    "other columns": ({**PLAIN, "score": 0.5, "source": None}, "pairs with prompts, plain text"),
    "structured content": (
        {**CHAT, "chosen": [says([{"type": "text", "text": "w3"}])]},
        "pairs with prompts, conversational",
    ),
    "a call without content": (
        {**CHAT, "chosen": [{"role": "assistant", "tool_calls": [CALL]}]},
        "pairs with prompts, conversational",
    ),
    "several turns": (
        {**CHAT, "chosen": [says("w3"), user("w5"), says("w6")]},
        "pairs with prompts, conversational",
    ),
    "tools and settings": (
        {**CHAT, "tools": "[]", "chat_template_kwargs": {"brief": True}},
        "pairs with prompts, conversational",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_known(form):
    row, expected = FORMS[form]
    dataset = data.number_rows(Dataset.from_list([row] * 3))
    assert data.check_pairs(dataset).name == expected
    assert data.PairPreparation().check(dataset) == data.check_pairs(dataset)


# ShareGPT

READ = {"prompt": [{"role": "system", "content": "w0"}, user("w1")], "chosen": [says("w3")], "rejected": [says("w4")]}


def read_all(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dataset = Dataset.from_list(rows)
    form = pair_form(dataset)
    return [data.read_pair(row, form, f"row {i}", are_exact(dataset, form.columns)) for i, row in enumerate(dataset)]


@pytest.mark.parametrize("form", ["ShareGPT", "ShareGPT, lists"])
def test_share_gpt_becomes_messages(form):
    row = {**FORMS[form][0], "score": 1}
    assert read_all([row] * 3) == [READ] * 3
    told = str(data.check_pairs(Dataset.from_list([row])))
    assert told == "ShareGPT pairs · roles human → user, gpt → assistant · not read: score"


@pytest.mark.parametrize("form", ["plain", "conversational", "several turns"])
def test_standard_pairs_are_read_as_they_are(form):
    assert read_all([FORMS[form][0]] * 2) == [FORMS[form][0]] * 2


def test_messages_of_either_kind_are_read_in_either_column():
    """What is meant is clear: a message has a role and a text, whatever their keys."""
    chosen, alone = {**CHAT, "chosen": [turn("gpt", "w3")]}, {**CHAT, "chosen": says("w3")}
    conversations = {**SHARE_GPT, "conversations": [{"role": "system", "content": "w0"}, user("w1")]}
    assert read_all([chosen]) == read_all([alone]) == [CHAT]
    assert read_all([conversations]) == [READ]
    assert read_all([{**CHAT, "chosen": json.dumps(CHAT["chosen"])}]) == [CHAT]


def test_a_bad_streamed_row_is_named_when_it_comes():
    def rows() -> Iterator[dict[str, Any]]:
        yield SHARE_GPT
        yield {**SHARE_GPT, "chosen": turn("gpt", " ")}

    stream = IterableDataset.from_generator(rows)
    streamed = iter(data.PairPreparation().prepare(stream, tiny_tokenizer(), "here"))
    whole = data.PairPreparation().prepare(Dataset.from_list([SHARE_GPT]), tiny_tokenizer())
    assert next(streamed) == whole[0]
    with pytest.raises(DataError, match="here, row 2, column chosen: has an empty message 1"):
        next(streamed)


@pytest.mark.skipif(not DEMO.exists(), reason=f"there is no {DEMO.name} in ../shared/data")
@pytest.mark.parametrize("streaming", [False, True])
def test_real_share_gpt_pairs(streaming):
    rows = data.load_splits(str(DEMO), streaming=streaming)["train"]
    form = pair_form(rows)
    assert form.name == "ShareGPT pairs"
    read = [data.read_pair(row, form, "") for row in rows]
    raw = list(load_dataset("json", data_files=str(DEMO))["train"])
    assert len(read) == len(raw) == 300
    for ours, theirs in zip(read, raw, strict=True):
        for column, name in (("prompt", "conversations"), ("chosen", "chosen"), ("rejected", "rejected")):
            turns = theirs[name] if isinstance(theirs[name], list) else [theirs[name]]
            assert [m["content"] for m in ours[column]] == [t["value"] for t in turns]
        assert {m["role"] for m in ours["chosen"] + ours["rejected"]} == {"assistant"}
        assert ours["prompt"][-1]["role"] == "user"


# Rows that are no pairs

BAD: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "other columns": (
        [{"question": "w1", "better": "w2"}],
        [": the columns are better, question", "`prompt` + `chosen` + `rejected`", "rename"],
    ),
    "unpaired feedback": (
        [{"prompt": "w1", "completion": "w2", "label": True}],
        [": unpaired feedback is not supported: the columns are completion, label, prompt", "two completions"],
    ),
    "a hole": (
        [PLAIN, {**PLAIN, "rejected": None}],
        [", row 2, column rejected: is missing", "has prompt, chosen"],
    ),
    "a hole in the first row": (
        [{**PLAIN, "chosen": None}, PLAIN],
        [", row 1, column chosen: is missing", "has prompt, rejected"],
    ),
    "a row of another form": (
        [{**PLAIN, "text": None}, {"prompt": None, "chosen": None, "rejected": None, "text": "w1"}],
        [", row 2, column prompt: is missing", "this row has text", "same form"],
    ),
    "a prompt that is implicit in one row": (
        [PLAIN, {**PLAIN_IMPLICIT, "prompt": None}],
        [", row 2, column prompt: is missing", "this row has chosen, rejected"],
    ),
    "a row of nothing": (
        [PLAIN, {"prompt": None, "chosen": None, "rejected": None}],
        [", row 2, column prompt: is empty", "Remove the row"],
    ),
    "an empty prompt": ([PLAIN, {**PLAIN, "prompt": " "}], [", row 2, column prompt: is empty", "drop the column"]),
    "no messages in the prompt": (
        [CHAT, {**CHAT, "prompt": []}],
        [", row 2, column prompt: is empty", "drop the column"],
    ),
    "an empty chosen": ([PLAIN, {**PLAIN, "chosen": "\n"}], [", row 2, column chosen: is empty", "Remove the row"]),
    "an empty rejected": ([CHAT, {**CHAT, "rejected": []}], [", row 2, column rejected: is empty", "Remove the row"]),
    "an empty answer": (
        [CHAT, {**CHAT, "chosen": [says(" ")]}],
        [", row 2, column chosen: has an empty message 1", "fill the message"],
    ),
    "an empty structured answer": (
        [{**CHAT, "rejected": [says([{"type": "text", "text": ""}])]}],
        [", row 1, column rejected: has an empty message 1", "fill the message"],
    ),
    "an answer of the user": (
        [CHAT, {**CHAT, "rejected": [user("w4")]}],
        [", row 2, column rejected: ends with a message of 'user'", "the assistant"],
    ),
    "a ShareGPT answer of the user": (
        [SHARE_GPT, {**SHARE_GPT, "chosen": turn("human", "w3")}],
        [", row 2, column chosen: ends with a message of 'human'", "the assistant"],
    ),
    "an empty ShareGPT answer": (
        [{**SHARE_GPT, "rejected": turn("gpt", "")}],
        [", row 1, column rejected: has an empty message 1", "fill the message"],
    ),
    "no ShareGPT turns": (
        [SHARE_GPT, {**SHARE_GPT, "conversations": []}],
        [", row 2, column conversations: is empty", "Remove the row"],
    ),
    "a message without a role": (
        [{**CHAT, "prompt": [{"role": None, "content": "w1"}]}],
        [", row 1, column prompt: has no role in message 1", "`role` and `content`"],
    ),
    "a message of keys that nobody knows": (
        [{**CHAT, "chosen": [{"speaker": "gpt", "text": "w3"}]}],
        [", row 1, column chosen: has no role in message 1", "`role` and `content`"],
    ),
    "a number": ([{**PLAIN, "rejected": 3}], [", row 1, column rejected: is 3", "Give text"]),
    "a prompt of text, answers of messages": (
        [{**CHAT_IMPLICIT, "prompt": "w1"}],
        [", row 1, column prompt: mixes text and messages", "drop column prompt"],
    ),
    "one answer of text": ([{**CHAT, "rejected": "w4"}], [", row 1, column rejected: mixes text and messages", "All"]),
    "equal answers": ([PLAIN, {**PLAIN, "rejected": " w3"}], [", row 2, column rejected: equals chosen", "Remove"]),
    "equal messages": ([{**CHAT, "rejected": [says("w3")]}], [", row 1, column rejected: equals chosen", "Remove"]),
    "equal ShareGPT": (
        [{**SHARE_GPT, "rejected": turn("gpt", "w3")}],
        [", row 1, column rejected: equals chosen", "pair"],
    ),
    "equal conversations": (
        [{**CHAT_IMPLICIT, "rejected": CHAT_IMPLICIT["chosen"]}],
        [", row 1, column rejected: equals chosen", "Remove"],
    ),
    "no prompt in plain text": (
        [PLAIN_IMPLICIT, {"chosen": "w3", "rejected": "x4"}],
        [", row 2, column chosen: shares no beginning with rejected", "column `prompt`"],
    ),
    # Where the first characters differ, TRL's `extract_prompt` looks at the last one, and cuts there if it is a space.
    "no prompt in plain text that ends with a space": (
        [{"chosen": "w3 ", "rejected": "x4 "}],
        [", row 1, column chosen: shares no beginning with rejected", "column `prompt`"],
    ),
    "no prompt but a space": (
        [{"chosen": " w3", "rejected": " x4"}],
        [", row 1, column chosen: shares no beginning with rejected", "column `prompt`"],
    ),
    "no prompt in messages": (
        [CHAT_IMPLICIT, {"chosen": [says("w3")], "rejected": [says("w4")]}],
        [", row 2, column chosen: shares no beginning with rejected", "column `prompt`"],
    ),
    "an implicit prompt without an answer": (
        [{"chosen": "w1 w2 w3", "rejected": "w1 w2 "}],
        [", row 1, column rejected: holds nothing but the prompt", "an answer each"],
    ),
    "an answer that begins the other": (
        [{**CHAT_IMPLICIT, "rejected": [*CHAT_IMPLICIT["chosen"], user("w5"), says("w6")]}],
        [", row 1, column chosen: holds nothing but the prompt", "an answer each"],
    ),
    "the prompt twice": (
        [{**CHAT_IMPLICIT, "prompt": [user("w1")]}],
        [", row 1, column chosen: begins with the prompt again", "only what follows"],
    ),
    "tools that are no JSON": ([{**CHAT, "tools": "w1("}], [", row 1, column tools: is not JSON", "null"]),
    "no settings of the template": (
        [{**CHAT, "chat_template_kwargs": "[1]"}],
        [", row 1, column chat_template_kwargs: is [1]", "by name"],
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_named(bad):
    rows, (where, *rest) = BAD[bad]
    with pytest.raises(DataError) as caught:
        data.check_pairs(Dataset.from_list(rows), "pairs.jsonl")
    assert str(caught.value).startswith("pairs.jsonl" + where)
    for part in rest:
        assert part in str(caught.value)
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)


def test_rows_that_differ_in_kind_are_named(tmp_path):
    file = tmp_path / "pairs.jsonl"  # a table of its own cannot hold both
    file.write_text(
        '{"prompt": "w1", "chosen": "w2", "rejected": "w3"}\n'
        '{"prompt": [{"role": "user", "content": "w1"}], "chosen": "w2", "rejected": "w3"}\n',
        encoding="utf-8",
    )
    with pytest.raises(DataError, match="row 2, column prompt: mixes text and messages"):
        data.check_pairs(data.load_splits(str(file))["train"])


def test_no_rows_are_no_pairs():
    empty = Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
    with pytest.raises(DataError, match=r"pairs\.jsonl: the dataset is empty"):
        data.check_pairs(empty, "pairs.jsonl")
    with pytest.raises(DataError, match="the dataset is empty"):
        data.prepare_pairs(empty, tiny_tokenizer(), data.PairPreparation())
