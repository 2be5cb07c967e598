"""Rows that hold only a prompt. The model itself writes the answer, as in PowerFlow and in generation.

A prompt is text or messages. Read next: `rendering.py`, which makes the tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from renyi.data.files import exact_dataset, new_fingerprint, read_files
from renyi.data.messages import is_messages, read_messages, renamed_roles
from renyi.data.prepare import NO_LIMITS, Limits, RowPreparation, check_ids
from renyi.data.rendering import chat_tokens, check_has_template, for_template, text_tokens
from renyi.data.rows import (
    FILE_COLUMN,
    FOR_TEMPLATES,
    ROW_COLUMN,
    Form,
    are_exact,
    check_not_empty,
    columns_of,
    numbered_rows,
    read_for_template,
    row_name,
)
from renyi.errors import DataError

PROMPT = "prompt"
_COLUMNS = (PROMPT, "messages", "conversations")  # columns that may hold the prompt, in order of precedence


@dataclass(frozen=True)
class PromptPreparation(RowPreparation):
    """The settings that decide the tokens of prompts. A prompt is never cut, because generation continues its end.

    Attributes:
        max_prompt_length: a prompt with more tokens is an error; None for the model's limit only.
    """

    max_prompt_length: int | None = None

    def check(self, rows: Dataset, name: str = "dataset") -> Form:
        return check_prompts(rows, name)

    def form(self, rows: Any, name: str = "dataset") -> Form:
        return prompt_form(rows, name)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        """The rows with a column `prompt` in TRL's format: text, or messages of standard roles."""
        form = prompt_form(rows, name)
        exact = are_exact(rows, form.columns)

        def read(row: Mapping[str, Any], index: int) -> dict[str, Any]:
            return {PROMPT: read_prompt(row, form, row_name(row, index, name), exact)[PROMPT]}

        if not isinstance(rows, Dataset):
            return rows.map(read, with_indices=True)
        if not any(is_messages(row[form.columns[0]]) for row in rows.select(range(min(1, len(rows))))):
            return rows
        read_rows = [{**row, **read(row, i)} for i, row in enumerate(rows)]
        return exact_dataset(read_rows)

    def prepare(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, name: str = "dataset", limits: Limits = NO_LIMITS
    ) -> Any:
        """The rows with one column, `input_ids`: the tokens of each prompt, as in TRL's GRPOTrainer."""
        form = prompt_form(rows, name)
        exact = are_exact(rows, form.columns)
        longest = limits.longest(self.max_prompt_length)

        def tokenise(row: dict[str, Any], index: int) -> dict[str, Any]:
            where = row_name(row, index, name)
            prompt = read_prompt(row, form, where, exact)[PROMPT]
            ids = prompt_tokens(prompt, tokenizer, f"{where}, column {form.columns[0]}")
            check_prompt_length(ids, longest, f"{where}, column {form.columns[0]}")
            check_ids(ids, limits, where)
            return {"input_ids": ids}

        named = {"new_fingerprint": new_fingerprint(rows)} if isinstance(rows, Dataset) else {}
        return rows.map(tokenise, with_indices=True, remove_columns=columns_of(rows), **named)


def check_prompt_length(ids: list[int], longest: int | None, where: str) -> None:
    """Raise `DataError` for a prompt of more than `longest` tokens."""
    if longest is not None and len(ids) > longest:
        raise DataError(
            f"has {len(ids)} tokens, and the longest allowed is {longest}",
            where=where,
            hint="Shorten or remove the row, lower max_completion_length, or raise max_prompt_length if the "
            "model can read more.",
        )


def prompt_tokens(
    prompt: str | list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    row: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of one prompt. After a conversation come the tokens with which the template opens an answer.

    Args:
        prompt: a text to continue, or messages from `read_messages`.
        tokenizer: the base's tokenizer.
        where: a name of the prompt, for messages.
        row: other arguments of the template: `tools`, `chat_template_kwargs`.

    Raises:
        DataError: the chat template refuses the prompt, or the prompt has no tokens.
        TokenizerError: the prompt is a conversation, and the tokenizer has no chat template.
    """
    if isinstance(prompt, str):
        ids = text_tokens(tokenizer, prompt, where)
    else:
        check_has_template(tokenizer)
        options = {"add_generation_prompt": True, **for_template(row or {})}
        ids = list(chat_tokens(tokenizer, prompt, where, options)["input_ids"])
    if not ids:
        raise DataError("has no tokens", where=where, hint="Give a text to continue, or remove the row.")
    return ids


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Read the prompts of a json, jsonl or csv file.

    Returns:
        One dictionary per row. It has `prompt`, which is text or messages of standard roles, and `tools` and
        `chat_template_kwargs` if the row has them.

    Raises:
        DataError: the file cannot be read, or a row has no prompt; the message names the file and the row.
    """
    if not file.is_file():
        raise DataError("there is no such file", where=str(file), hint=f"Looked in {file.absolute().parent}.")
    rows = read_files([file])
    assert isinstance(rows, Dataset)
    return prompts_of(rows, str(file))


def prompts_of(rows: Dataset, name: str = "dataset") -> list[dict[str, Any]]:
    """Read the prompts of loaded rows; result and errors as in `read_prompts`."""
    check_not_empty(rows, name)
    form = prompt_form(rows, name, for_templates=True)
    exact = are_exact(rows, form.columns)
    return [read_prompt(row, form, where, exact) for row, where in numbered_rows(rows, form.columns, name)]


def prompt_form(rows: Dataset | IterableDataset, name: str = "dataset", for_templates: bool = False) -> Form:
    """The form of rows with prompts. The prompt is in `prompt`, else in `messages`, else in ShareGPT's `conversations`.

    Args:
        rows: the rows as loaded.
        name: a name of the dataset, for messages.
        for_templates: whether to read `tools` and `chat_template_kwargs` as well. Training does not read them from
            rows, because its settings hold for all rows.

    Raises:
        DataError: no column can hold the prompt.
    """
    there = [c for c in columns_of(rows) if c not in (ROW_COLUMN, FILE_COLUMN)]
    column = next((c for c in _COLUMNS if c in there), None)
    if column is None:
        raise DataError(
            f"the columns are {', '.join(sorted(there))}",
            where=name,
            hint=f"A row needs a column `{PROMPT}`: text, or a list of messages; others are left alone.",
        )
    columns = (column, *(c for c in FOR_TEMPLATES if for_templates and c in there))
    return Form("prompts", columns, tuple(c for c in there if c not in columns))


def check_prompts(rows: Dataset, name: str = "dataset") -> Form:
    """Read every row and return the form of the prompts: "prompts, plain text" or "prompts, conversational".

    Raises:
        DataError: a row is bad; the message names the first one (counted from 1).
    """
    check_not_empty(rows, name)
    form = prompt_form(rows, name)
    exact = are_exact(rows, form.columns)
    kinds: set[type] = set()
    roles: dict[str, str] = {}
    for row, where in numbered_rows(rows, form.columns, name):
        prompt = read_prompt(row, form, where, exact)[PROMPT]
        kinds.add(type(prompt))
        if len(kinds) > 1:
            at = f"{where}, column {form.columns[0]}"
            raise DataError("mixes text and messages", where=at, hint="All rows must have the same form.")
        if isinstance(prompt, list):
            roles |= renamed_roles(row[form.columns[0]])
    return Form(f"prompts, {'plain text' if kinds == {str} else 'conversational'}", form.columns, form.left_out, roles)


def read_prompt(row: Mapping[str, Any], form: Form, where: str, exact: Mapping[str, bool]) -> dict[str, Any]:
    """Read a row's `prompt` and its arguments of the template.

    The prompt is text, or messages that do not end with an answer.

    Raises:
        DataError: the row has no such prompt.
    """
    column = form.columns[0]
    value, at = row.get(column), f"{where}, column {column}"
    if value is None or (isinstance(value, str | list) and not value) or (isinstance(value, str) and not value.strip()):
        raise DataError("is empty", where=at, hint="Give a text to continue, or remove the row.")
    if not is_messages(value):
        if not isinstance(value, str):
            raise DataError(f"is {value!r}", where=at, hint="Give text, or a list of messages.")
        if column == PROMPT:
            return {PROMPT: value}
    messages = read_messages(value, at, exact.get(column, True))
    if messages[-1]["role"] == "assistant":
        raise DataError(
            "ends with the assistant's turn",
            where=at,
            hint="End it with the user's turn: the model writes the answer.",
        )
    extras = {c: row[c] for c in form.columns[1:]}
    return {PROMPT: messages, **read_for_template(extras, where, exact)}
