"""Every small input of ../shared/cases that once went wrong, through the real command, ends as its table says."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Settings, assert_refused, renyi, save_base
from tiny import tiny_model

from renyi.errors import RenyiError

SHARED = Path(__file__).parents[3] / "shared"
CASES = SHARED / "cases"
STORIES = SHARED / "models" / "tinystories-656k"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="there are no cases in ../shared")

# The file, and what its plan and panel say; or, after "refused", what the one error says.
ROWS: dict[str, tuple[str, ...]] = {
    "bos_text.jsonl": ("· text", "2 examples"),
    "columns_of_an_agent_trace.jsonl": ("· conversational", "not read: id, source, model, system_prompt"),
    "conv_and_messages.jsonl": ("· conversational", "not read: conversations"),
    "input_ids_badlabels.jsonl": ("refused", "row 1, column labels: has 2 values, and input_ids has 4"),
    "input_ids_oov.jsonl": ("refused", "row 1: has the token 999999 at place 3", "64 embeddings"),
    "kwargs_null.jsonl": ("· conversational", "2 examples"),
    "label_str.jsonl": ("· text", "not read: labels", "all"),
    "labels_as_long_as_tokens.jsonl": ("· text", "not read: labels", "all"),
    "latin1.jsonl": ("refused", "latin1.jsonl, line 1: is not UTF-8: byte 0xe9 at place 14", "latin-1"),
    "messages_and_prompt.jsonl": ("· conversational", "not read: prompt, prompt_id"),
    "messages_as_json_text.csv": ("· conversational", "<assistant>"),
    "messages_str.jsonl": ("· conversational", "<assistant>"),
    "parts.jsonl": ("· conversational", "4 of 5 tokens"),
    "prompt_list_completion_str.jsonl": ("· prompt-completion", "2 of 5 tokens"),
    "role_chatgpt.jsonl": ("· ShareGPT", "roles chatgpt → assistant", "<assistant>"),
    "set[1].jsonl": ("set[1].jsonl · text",),
    "system.jsonl": ("· conversational",),
    "tool_arguments_text_and_number.jsonl": ("· prompt-completion", "3 examples"),
    "weight0.jsonl": ("refused", "row 1, column messages: has a message of weight 0 (message 2)"),
}


def test_every_row_file_is_here() -> None:
    assert {f.name for f in (CASES / "rows").iterdir()} == set(ROWS)
    assert {f.name for f in (CASES / "templates").iterdir()} == {"gemma_like.jinja", "syntax_error.jinja"}
    assert {f.name for f in (CASES / "prompts").iterdir()} == set(PROMPTS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, streaming: bool, settings: Settings, tmp_path: Path) -> None:
    said = ROWS[name]
    given = {"dataset_streaming": True, "max_steps": 1} if streaming else {}
    ended = renyi("sft", "--config", settings(dataset_name=CASES / "rows" / name, **given), "--dry_run")
    if said[0] == "refused":
        assert_refused(ended, *said[1:])
    else:
        assert ended.code == 0, ended
        text = " ".join(ended.out.replace("│", " ").split())
        for part in said:
            if not (streaming and (part.startswith("roles") or part.endswith("examples"))) and part != "all":
                assert part in text, ended.out
        if "all" in said:
            assert "5 of 6 tokens are trained" in text or "6 of 7 tokens are trained" in text, text
        assert "WRONG" not in text
    assert not (tmp_path / "out").exists()


def test_the_template_says_what_it_refuses(settings: Settings) -> None:
    file = CASES / "rows" / "system.jsonl"
    config = settings(dataset_name=file, chat_template_path=CASES / "templates" / "gemma_like.jinja")
    parts = ("system.jsonl", "row 2: the chat template refuses the conversation (System role not supported)")
    assert_refused(renyi("sft", "--config", config, "--dry_run"), *parts)
    config = settings(dataset_name=file, chat_template_path=CASES / "templates" / "syntax_error.jinja")
    assert_refused(renyi("sft", "--config", config, "--dry_run"), "syntax_error.jinja, line 1: the template cannot be")


PROMPTS: dict[str, tuple[str, ...]] = {
    "ends_with_the_assistant.jsonl": ("refused", "row 1, column messages: ends with the assistant's turn"),
    "u2028.jsonl": ("First line\u2028second line. What is this?", "hello"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    from renyi.data import read_prompts

    said = PROMPTS[name]
    if said[0] == "refused":
        with pytest.raises(RenyiError, match="row 1, column messages: ends with the assistant's turn"):
            read_prompts(CASES / "prompts" / name)
    else:
        assert [row["prompt"] for row in read_prompts(CASES / "prompts" / name)] == list(said)


@pytest.mark.skipif(not STORIES.is_dir(), reason="there is no model in ../shared")
def test_one_beginning_of_text(settings: Settings) -> None:
    given: dict[str, Any] = {"model_name_or_path": STORIES, "dataset_name": CASES / "rows" / "bos_text.jsonl"}
    ended = renyi("sft", "--config", settings(**given), "--dry_run")
    assert ended.code == 0, ended
    assert ended.out.count("<|start_story|>") == 1, ended.out


def test_rows_that_do_not_fit_are_counted_and_cut(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text('{"text": "w1 w2"}\n' + '{"text": "' + "w1 " * 300 + '"}\n', encoding="utf-8")
    base = save_base(tmp_path / "base")
    tiny_model(max_position_embeddings=64).save_pretrained(base)
    ended = renyi("sft", "--config", settings(dataset_name=file, model_name_or_path=base), "--dry_run")
    assert "1 row cut at the 64 positions of the base" in ended.out, ended
    ended = renyi("sft", "--config", settings(dataset_name=file, max_length=3), "--dry_run")
    assert "1 row cut at max_length 3" in ended.out, ended
    assert " cut at " not in renyi("sft", "--config", settings(), "--dry_run").out
    assert_refused(renyi("sft", "--config", settings(max_length=-1), "--dry_run"), "max_length", "-1")


def test_a_part_that_rows_do_not_have_is_refused(settings: Settings) -> None:
    chats = settings(dataset_name=CASES / "rows" / "parts.jsonl", completion_only_loss=True)
    assert_refused(renyi("sft", "--config", chats, "--dry_run"), "completion_only_loss", "assistant_only_loss: true")
    texts = settings(dataset_name=CASES / "rows" / "label_str.jsonl", assistant_only_loss=True)
    assert_refused(renyi("sft", "--config", texts, "--dry_run"), "assistant_only_loss", "`messages`")


def test_another_end_of_turn_is_said(settings: Settings, tmp_path: Path) -> None:
    closing = "{% for m in messages %}<user> {{ m.content }} <assistant> {% endfor %}"  # not with the end of text
    base = save_base(tmp_path / "base", template=closing)
    config = settings(dataset_name=CASES / "rows" / "parts.jsonl", model_name_or_path=base)
    ended = renyi("sft", "--config", config, "--dry_run")
    assert "a turn ends with <assistant>, a text with <eos>" in ended.out, ended
