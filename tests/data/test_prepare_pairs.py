"""Pairs become the tokens that TRL's DPOTrainer trains on; what it would drop, cut or not tell apart is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_pairs import CALL, CHAT, CHAT_IMPLICIT, DEMO, FORMS, PLAIN, SHARE_GPT, says, user
from tiny import CHAT_TEMPLATE, EOS, PAD, WORDS, lora, quiet, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from renyi import data
from renyi.data import PairPreparation, Preparation
from renyi.errors import ConfigError, DataError, EnsembleFormatError, TokenizerError

WITH_TOOLS = (
    "{% if tools %}{% for tool in tools %}{{ tool['name'] }} {% endfor %}{% endif %}{% if brief %}w9 {% endif %}"
    + CHAT_TEMPLATE
)
TEXT_ONLY = {k: row for k, (row, _) in FORMS.items() if not k.startswith(("structured", "a call"))}


def tokenizer_with(template: str | None = CHAT_TEMPLATE, **overrides: Any) -> Any:
    tokenizer = tiny_tokenizer(**overrides)
    tokenizer.chat_template = template
    return tokenizer


def prepared(rows: list[dict[str, Any]], tokenizer: Any = None, **config: Any) -> Dataset:
    return data.prepare_pairs(Dataset.from_list(rows), tokenizer or tiny_tokenizer(), PairPreparation(**config), "here")


# The tokens


def standard(rows: Dataset) -> Dataset:
    """ShareGPT's pairs as TRL reads them, written out here; others as they are."""
    if "conversations" not in rows.column_names or "prompt" in rows.column_names:
        return rows.remove_columns([c for c in ("conversations",) if c in rows.column_names])
    roles = {"system": "system", "human": "user", "gpt": "assistant"}

    def messages(value: Any) -> list[dict[str, Any]]:
        turns = value if isinstance(value, list) else [value]
        return [{"role": roles[t["from"]], "content": t["value"]} for t in turns]

    return Dataset.from_list(
        [
            {
                **{k: v for k, v in row.items() if k not in ("conversations", "chosen", "rejected")},
                "prompt": messages(row["conversations"]),
                "chosen": messages(row["chosen"]),
                "rejected": messages(row["rejected"]),
            }
            for row in rows
        ]
    )


def of_trl(tmp_path: Path, rows: Dataset, tokenizer: Any, **config: Any) -> Dataset:
    """What TRL's own trainer prepares."""
    args = DPOConfig(str(tmp_path), **quiet(config))
    return DPOTrainer(
        tiny_model(), args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora()
    ).train_dataset


@pytest.mark.parametrize("form", TEXT_ONLY)
@pytest.mark.parametrize("tools", [False, True])
def test_tokens_are_those_of_trl(tmp_path, form, tools):
    row = dict(TEXT_ONLY[form])
    rows = [row, {**row}]
    if tools:
        rows = [
            {**row, "tools": json.dumps([{"name": "w7"}]), "chat_template_kwargs": {"brief": True}},
            {**row, "tools": None, "chat_template_kwargs": {"brief": False}},
        ]
    dataset = standard(Dataset.from_list(rows))
    theirs = of_trl(tmp_path, dataset, tokenizer_with(WITH_TOOLS))
    ours = prepared(rows, tokenizer_with(WITH_TOOLS))
    assert len(ours) == len(theirs) == 2
    assert data.ROW_COLUMN not in ours.column_names
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column] == theirs[column]
    told_apart = ours["prompt_ids"][0] != ours["prompt_ids"][1]
    assert told_apart == (tools and not isinstance(dataset[0]["chosen"], str))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PLAIN, ("w1 w2", "w3 <eos>", "w4 <eos>")),
        ({"chosen": "w1 w2 <user>", "rejected": "w1 w2 w4"}, ("w1 w2", "<user> <eos>", "w4 <eos>")),
        (CHAT, ("<user> w1 <assistant>", "w3 <eos>", "w4 <eos>")),
        (CHAT_IMPLICIT, ("<user> w1 <assistant>", "w3 <eos>", "w4 <eos>")),
        (SHARE_GPT, ("<user> w0 <user> w1 <assistant>", "w3 <eos>", "w4 <eos>")),
    ],
)
def test_a_form_trains_on_its_tokens(row, expected):
    tokenizer = tiny_tokenizer()
    first = prepared([row] * 2)[1]
    assert tuple(tokenizer.decode(first[c]) for c in ("prompt_ids", "chosen_ids", "rejected_ids")) == expected


words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


@settings(max_examples=20, deadline=None)
@given(prompt=words, chosen=words, rejected=words, conversational=st.booleans())
def test_tokens_say_what_the_row_says(prompt, chosen, rejected, conversational):
    assume(chosen != rejected)
    row = {"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}
    if conversational:
        row = {"prompt": [user(prompt)], "chosen": [says(chosen)], "rejected": [says(rejected)]}
    [made] = prepared([row])
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(made["chosen_ids"]) == f"{chosen} <eos>"
    assert tokenizer.decode(made["rejected_ids"]) == f"{rejected} <eos>"
    assert tokenizer.decode(made["prompt_ids"]) == (f"<user> {prompt} <assistant>" if conversational else prompt)


text = st.sampled_from(["w1", "w2 w3", "w1 w2 w3", "w1 w2", " ", ""])
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", ""]), "content": text})
messages = st.lists(message, max_size=3)


def rows_of(side: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    pair = {"chosen": st.none() | side, "rejected": side}
    forms = (st.fixed_dictionaries(pair), st.fixed_dictionaries({"prompt": side, **pair}))
    return st.one_of(*(st.lists(form, min_size=1, max_size=3) for form in forms))


@settings(max_examples=60, deadline=None)
@given(rows_of(text) | rows_of(messages))
def test_checked_rows_never_fail_later(rows):
    """Whatever passes the check is tokenised; whatever does not is named by a row that is really there."""
    dataset = Dataset.from_list(rows)
    assume(any(row["chosen"] is not None for row in rows))  # or there is nothing to tell text from messages by
    whole = PairPreparation(max_length=None)
    if refused := refusal(lambda: data.check_pairs(dataset)):
        assert 1 <= int(refused.split("row ")[1].split(",")[0]) <= len(rows)
        assert refused.split("column ")[1].split(":")[0] in rows[0]
    elif refused := refusal(lambda: data.prepare_pairs(dataset, tiny_tokenizer(), whole)):
        assert "the same tokens" in refused  # only then can one see that they differ in nothing but space
    else:
        made = data.prepare_pairs(dataset, tiny_tokenizer(), whole)
        assert len(made) == len(rows)
        assert data.count_pairs(made, whole).trained >= 2 * len(rows)


def refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except DataError as error:
        return str(error)
    return None


CHAT_WITH_TURNS = (
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
STORIES = DEMO.parents[1] / "models" / "tinystories-656k"


@pytest.mark.skipif(not (DEMO.exists() and STORIES.exists()), reason="there are no real pairs or model in ../shared")
def test_real_pairs_become_the_tokens_of_trl(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = CHAT_WITH_TURNS
    rows = data.load_splits(str(DEMO))["train"]
    ours = data.prepare_pairs(rows, tokenizer, PairPreparation(max_length=None), DEMO.name)
    theirs = of_trl(tmp_path, standard(rows), tokenizer, max_length=None)
    assert len(ours) == 300
    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        assert ours[column] == theirs[column]


# What the cut leaves


def pair_of(prompt: int, chosen: int, rejected: int, same: bool = False) -> dict[str, Any]:
    """A pair of so many words, which differ from the first on, or only where one is longer."""
    return {
        "prompt": " ".join(["w1"] * prompt),
        "chosen": " ".join(["", *["w2"] * chosen]),
        "rejected": " ".join(["", *["w2" if same else "w3"] * rejected]),
    }


lengths = st.integers(1, 7)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(lengths, lengths, lengths), min_size=1, max_size=5),
    max_length=st.none() | st.integers(1, 12),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    same=st.booleans(),
)
def test_what_is_left_is_what_the_collator_leaves(sizes, max_length, mode, same):
    """Counted and checked as TRL's collator cuts; a pair is refused where it leaves nothing to learn from."""
    rows = [pair_of(*size, same=same) for size in sizes]
    assume(all(row["chosen"] != row["rejected"] for row in rows))
    whole = prepared(rows, max_length=None)
    batch = DataCollatorForPreference(PAD, max_length, mode)(list(whole))
    predicted = batch["completion_mask"][:, 1:].bool()
    sides = [batch[name].chunk(2) for name in ("input_ids", "attention_mask", "completion_mask")]
    good = predicted.sum(dim=1).reshape(2, -1).min(dim=0).values > 0
    differ = np.logical_or.reduce([(one != other).any(dim=1).numpy() for one, other in sides])

    config = PairPreparation(max_length, mode)
    counts = data.count_pairs(whole, config)
    assert counts == (len(rows), int(batch["attention_mask"].sum()), int(predicted.sum()))
    if bool(good.all()) and differ.all():
        assert (
            data.prepare_pairs(Dataset.from_list(rows), tiny_tokenizer(), config)["chosen_ids"] == whole["chosen_ids"]
        )
        return
    with pytest.raises(DataError) as caught:
        data.prepare_pairs(Dataset.from_list(rows), tiny_tokenizer(), config, "here")
    first = int((~good).nonzero()[0]) if not good.all() else int(np.flatnonzero(~differ)[0])
    assert str(caught.value).startswith(f"here, row {first + 1}: ")
    assert ("no trained token" in str(caught.value)) == (not good.all())


def test_counting_takes_the_whole_dataset():
    assert data.count_pairs(prepared([PLAIN] * 2500), PairPreparation()) == (2500, 2500 * 8, 2500 * 4)
    merged = Dataset.from_dict({"prompt_ids": [[]], "chosen_ids": [[5, 6, EOS]], "rejected_ids": [[7, EOS]]})
    assert data.count_pairs(merged, PairPreparation()) == (1, 5, 3)  # nothing comes before a first token
    assert data.count_pairs(merged, PairPreparation(2, "keep_end")) == (1, 4, 2)
    with pytest.raises(ConfigError, match="streamed"):
        data.count_pairs(IterableDataset.from_generator(lambda: iter([PLAIN])), PairPreparation())


# Rows that cannot be trained on

TELLS_LENGTH = "{% if not add_generation_prompt %}w5 {% endif %}" + CHAT_TEMPLATE
THINKS = CHAT_TEMPLATE.replace(
    "{% if add_generation_prompt %}<assistant> {% endif %}",
    "{% if add_generation_prompt %}<assistant> w8 w9{% endif %}",
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT_TEMPLATE
)
LONG = {"prompt": "w1 " * 9, "chosen": " w3", "rejected": " w4"}
SYSTEM = {**CHAT, "prompt": [{"role": "system", "content": "w0"}, user("w1")]}

BAD: dict[str, tuple[list[dict[str, Any]], str, dict[str, Any], list[str]]] = {
    "malformed": ([PLAIN, {**PLAIN, "chosen": ""}], CHAT_TEMPLATE, {}, [", row 2, column chosen: is empty"]),
    "a prompt that fills max_length": (
        [PLAIN, LONG, PLAIN, LONG],
        CHAT_TEMPLATE,
        {"max_length": 9},
        [", row 2: no trained token is left (nor in 1 other rows)", "max_length 9", "raise max_length"],
    ),
    "an answer whose one token is the first": (
        [PLAIN],
        CHAT_TEMPLATE,
        {"max_length": 1, "truncation_mode": "keep_end"},
        [", row 1: no trained token is left", "max_length 1"],
    ),
    "answers that differ after the cut": (
        [PLAIN, pair_of(2, 3, 4, same=True)],
        CHAT_TEMPLATE,
        {"max_length": 5},
        [", row 2: chosen and rejected are the same tokens within max_length 5", "Raise max_length"],
    ),
    "answers that differ before the cut": (
        [PLAIN, {"prompt": "w1", "chosen": " w2 w4 w5", "rejected": " w3 w4 w5"}],
        CHAT_TEMPLATE,
        {"max_length": 3, "truncation_mode": "keep_end"},
        [", row 2: chosen and rejected are the same tokens within max_length 3", "Raise max_length"],
    ),
    "answers that are one in tokens": (
        [PLAIN, {"prompt": "w1", "chosen": " w2", "rejected": "  w2 <eos>"}],
        CHAT_TEMPLATE,
        {},
        [", row 2: chosen and rejected are the same tokens\n", "Remove the row"],
    ),
    "a prompt that is rendered otherwise alone": (
        [CHAT],
        TELLS_LENGTH,
        {},
        [
            ", row 1: the rendered conversation does not begin",
            "lost: '<user> w1 <assistant>'",
            "chat_template_",
        ],
    ),
    "a generation prompt that no answer has": (
        [CHAT_IMPLICIT],
        THINKS,
        {},
        [", row 1: the rendered conversation does not begin with", "lost: 'w8 w9'", "chat_template_kwargs"],
    ),
    "a row that the template refuses": (
        [CHAT, SYSTEM],
        NO_SYSTEM,
        {},
        [", row 2: the chat template refuses the conversation (System role not supported)", "--chat_template_path"],
    ),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("numbered", [False, True])
def test_a_bad_row_is_named(bad, numbered):
    rows, template, config, (where, *parts) = BAD[bad]
    dataset = Dataset.from_list(rows)
    if numbered:  # in a file in which 10 rows were before it
        dataset = dataset.add_column(data.ROW_COLUMN, [10 + i for i in range(len(rows))])
        where = where.replace("row 1", "row 11").replace("row 2", "row 12")
    with pytest.raises(DataError) as caught:
        PairPreparation(**config).prepare(dataset, tokenizer_with(template), "here")
    assert str(caught.value).startswith("here" + where)
    for part in parts:
        assert part in str(caught.value)
    assert caught.value.hint


def test_a_template_that_only_some_prompts_survive_names_the_first_that_does_not():
    template = "{% if messages[0].role == 'system' and add_generation_prompt %}w9 {% endif %}" + CHAT_TEMPLATE
    assert len(prepared([CHAT, CHAT], tokenizer_with(template))) == 2
    with pytest.raises(DataError, match="here, row 2: the rendered conversation does not begin"):
        prepared([CHAT, SYSTEM, SYSTEM], tokenizer_with(template))


def test_settings_of_a_row_can_mend_its_template():
    template = THINKS.replace("w8 w9", "{% if think %}w8 w9{% endif %}")
    mended = {**CHAT, "chat_template_kwargs": {"think": False}}
    assert prepared([mended], tokenizer_with(template))["prompt_ids"] == prepared([CHAT])["prompt_ids"]
    with pytest.raises(DataError, match="row 1: the rendered conversation does not begin"):
        prepared([{**CHAT, "chat_template_kwargs": {"think": True}}], tokenizer_with(template))


def test_tools_take_part_in_the_comparison_of_prompts():
    template = CHAT_TEMPLATE.replace(
        "<assistant> {% endif %}", "<assistant> {% if not tools %}w8 {% endif %}{% endif %}"
    )
    for tools in ([{"name": "w7"}], json.dumps([{"name": "w7"}])):
        assert (
            prepared([{**CHAT, "tools": tools}], tokenizer_with(template))["prompt_ids"]
            == prepared([CHAT])["prompt_ids"]
        )
    with pytest.raises(DataError, match="row 1: the rendered conversation does not begin"):
        prepared([CHAT], tokenizer_with(template))


@pytest.mark.skipif(not STORIES.exists(), reason="there is no real tokenizer in ../shared/models")
def test_tokens_may_merge_where_the_answer_begins():
    """As in plain text: "\\nThe" is one token, so the prompt has one less, and every character is still there."""
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    tokenizer.chat_template = CHAT_WITH_TURNS
    row = {"prompt": [user("Who?")], "chosen": [says("The cat.")], "rejected": [says("A dog.")]}
    [made] = prepared([row], tokenizer)
    alone = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    assert len(made["prompt_ids"]) < len(alone)
    whole = tokenizer.apply_chat_template(row["prompt"] + row["chosen"], return_dict=False)
    assert made["prompt_ids"] + made["chosen_ids"] == whole


def test_a_call_without_content_is_rendered(tmp_path):
    """By a template that can; one that cannot is named with the row."""
    template = CHAT_TEMPLATE.replace("{{ message.content }} <eos>", "{{ message.tool_calls[0].function.name }} <eos>")
    call = {"role": "assistant", "tool_calls": [CALL]}
    other = {"role": "assistant", "tool_calls": [{**CALL, "function": {**CALL["function"], "name": "w6"}}]}
    row = {**CHAT, "chosen": [call], "rejected": [other]}
    [made] = prepared([row], tokenizer_with(template))
    assert tiny_tokenizer().decode(made["chosen_ids"]) == "w5 <eos>"
    joins = CHAT_TEMPLATE.replace("{{ message.content }} <eos>", "{{ message.content + ' <eos>' }}")
    with pytest.raises(DataError, match="row 1: the chat template refuses the conversation"):
        prepared([{**row, "chosen": [{**call, "content": None}]}], tokenizer_with(joins))


def test_a_tokenizer_must_close_a_text_and_render_a_conversation():
    with pytest.raises(TokenizerError, match="no eos token"):
        prepared([PLAIN], tokenizer_with(eos_token=None))
    for row in (CHAT, CHAT_IMPLICIT, SHARE_GPT):
        with pytest.raises(TokenizerError, match="no chat template"):
            prepared([row], tokenizer_with(None))
    assert prepared([PLAIN], tokenizer_with(None))["chosen_ids"][0][-1] == EOS


def test_columns_of_other_forms_do_not_confuse():
    """TRL takes whichever of its columns comes first from a set to tell text from messages."""
    made = prepared([{**PLAIN, "messages": [user("w1")], "completion": "w2", "score": 1}])
    assert made["prompt_ids"] == prepared([PLAIN])["prompt_ids"]
    assert set(made.column_names) == {"prompt_ids", "chosen_ids", "rejected_ids"}


# Both kinds of preparation


@pytest.mark.parametrize("kept", [PairPreparation(7, "keep_end"), Preparation(7, "keep_end", "story", True, True)])
def test_a_preparation_is_kept_with_its_ensemble(tmp_path, kept):
    kind = type(kept)
    assert kind.read(tmp_path) == kind()
    kept.write(tmp_path)
    assert kind.read(tmp_path) == kept == kind.of(kept)
    assert PairPreparation.read(tmp_path) == PairPreparation(7, "keep_end")  # of whichever kind it was
    (tmp_path / "preparation.json").write_text("{", encoding="utf-8")
    with pytest.raises(EnsembleFormatError, match=r"preparation\.json: cannot be read"):
        kind.read(tmp_path)


def test_both_kinds_are_used_alike():
    rows = {Preparation: {"conversations": SHARE_GPT["conversations"]}, PairPreparation: SHARE_GPT}
    for kind, row in rows.items():
        dataset = Dataset.from_list([row] * 2)
        assert kind().check(dataset).name.startswith("ShareGPT")
        assert set(kind().readable(dataset.add_column("image", [None, None])).column_names) == set(row)
        assert len(kind().prepare(dataset, tiny_tokenizer())) == 2
