"""Rows of the standard forms become the tokens and labels that TRL's SFTTrainer makes of them."""

from types import SimpleNamespace
from typing import Any

import pytest
from bytewise import byte_tokenizer
from datasets import Dataset
from trl import SFTTrainer

from renyi import data
from renyi.errors import DataError

CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "cd"}]
ROWS: dict[str, dict[str, Any]] = {
    "text": {"text": "two words"},
    "text that ends": {"text": "two words<eos>"},
    "completion": {"prompt": "two", "completion": " words"},
    "messages": {"messages": [*CHAT, *CHAT]},
    "chat completion": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "tokenised": {"input_ids": [5, 6, 7, 8]},
    "tokenised with labels": {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
}


@pytest.mark.parametrize("max_length", [None, 9])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("assistant_only", [False, True])
@pytest.mark.parametrize("form", ROWS)
def test_tokens_and_labels_are_those_of_trl(form: str, assistant_only: bool, mode: str, max_length: int | None) -> None:
    if assistant_only and "messages" not in form:
        assistant_only = False
    tokenizer, rows = byte_tokenizer(), Dataset.from_list([ROWS[form]] * 3)
    completion_only = "completion" in form
    settings = data.Preparation(max_length, mode, assistant_only_loss=assistant_only)
    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=completion_only, chat_template=None)
    args = SimpleNamespace(**vars(settings), dataset_num_proc=None, shuffle_dataset=False)
    theirs = SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "train")
    if len(theirs) == 0:  # where it drops rows, we name one
        with pytest.raises(DataError, match="row 1"):
            data.prepare(rows, tokenizer, settings)
        return
    ours = data.prepare(rows, tokenizer, settings)
    assert list(ours["input_ids"]) == list(theirs["input_ids"])
    assert list(ours["labels"]) == list(theirs["labels"])
