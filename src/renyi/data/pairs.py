"""The forms a row of preferences may have, and which row is wrong, in which column, and why.

A pair is a prompt with a chosen and a rejected completion. As in `rows.py`, TRL decides what a row means, and this file
only refuses what TRL would fail on obscurely or train on in silence. It knows nothing about tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt
from trl.data_utils import get_dataset_column_names

from renyi.data.rows import (
    FROM_AND_VALUE,
    ROLE_AND_CONTENT,
    ROW_COLUMN,
    Problem,
    check_not_empty,
    messages_problem,
    numbered_rows,
    read_share_gpt,
    standard_role,
    what_is_there_instead,
)
from renyi.errors import DataError

_WITH_PROMPTS, _SHARE_GPT, _IMPLICIT = "pairs with prompts", "ShareGPT pairs", "pairs with implicit prompts"

# Each form of a pair by the columns that make it, in order of precedence.
_FORMS: dict[str, tuple[str, ...]] = {
    _WITH_PROMPTS: ("prompt", "chosen", "rejected"),
    _SHARE_GPT: ("conversations", "chosen", "rejected"),
    _IMPLICIT: ("chosen", "rejected"),
}
_FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # TRL hands them to the chat template
_RIVALS = ("prompt", "conversations", "chosen", "rejected", "completion", "messages", "text")
_A_PAIR = (
    "A pair is `prompt` + `chosen` + `rejected`, `chosen` + `rejected` that begin with the same prompt, or ShareGPT "
    "`conversations` + `chosen` + `rejected`"
)


def with_pairs(dataset: Any, where: str = "dataset") -> Any:
    """ShareGPT pairs, streamed or not, as messages `prompt`, `chosen` and `rejected`; any other dataset as it is.

    Raises:
        DataError: names the first bad row, of a streamed dataset as it comes by.
    """
    streamed = isinstance(dataset, IterableDataset)
    if not streamed and (not isinstance(dataset, Dataset) or len(dataset) == 0):
        return dataset
    if _matching(get_dataset_column_names(dataset)) != _SHARE_GPT:
        return dataset

    def convert(row: dict[str, Any], index: int) -> dict[str, Any]:
        if streamed:
            _check_row(row, _SHARE_GPT, list, f"{where}, row {index + 1}")
        turns = [_as_list(row[column]) for column in _FORMS[_SHARE_GPT]]
        return dict(zip(_FORMS[_WITH_PROMPTS], map(read_share_gpt, turns), strict=True))

    if streamed:  # which knows no progress bar
        return dataset.map(convert, with_indices=True, remove_columns="conversations")
    check_pairs(dataset, where)
    return dataset.map(convert, with_indices=True, remove_columns="conversations", desc="Reading ShareGPT pairs")


def check_pairs(dataset: Dataset, where: str = "dataset") -> str:
    """Check every row and return the form of the pairs, such as "pairs with prompts, conversational".

    Args:
        dataset: as it was loaded.
        where: what to call the dataset, such as its file name.

    Raises:
        DataError: names the first bad row (counted from 1) and its column.
    """
    check_not_empty(dataset, where)
    form = _form(dataset.column_names, where)
    kind = str if form != _SHARE_GPT and isinstance(dataset[0]["chosen"], str) else list
    columns = [c for c in (*_RIVALS, *_FOR_TEMPLATES) if c in dataset.column_names]
    for number, row in numbered_rows(dataset, columns):
        _check_row(row, form, kind, f"{where}, row {number}")
    if form == _SHARE_GPT:
        return form
    return f"{form}, {'plain text' if kind is str else 'conversational'}"


def template_settings(row: Mapping[str, Any]) -> dict[str, Any]:
    """What TRL hands to the chat template for a checked row, beside its messages."""
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **row.get("chat_template_kwargs", {})}


def _form(columns: Iterable[str], where: str) -> str:
    form = _matching(columns)
    if form is not None:
        return form
    there = sorted(set(columns) - {ROW_COLUMN})
    what, hint = f"the columns are {', '.join(there)}", f"{_A_PAIR}; rename the columns."
    if {"completion", "label"} <= set(there):
        what = f"unpaired feedback is not supported: {what}"
        hint = f"Give two completions of the same prompt. {_A_PAIR}."
    raise DataError(what, where=where, hint=hint)


def _matching(columns: Iterable[str]) -> str | None:
    return next((form for form, needed in _FORMS.items() if set(needed) <= set(columns)), None)


def _check_row(row: dict[str, Any], form: str, kind: type, where: str) -> None:
    """Raise `DataError` for the first bad column of a row, whose columns are of type `kind`: text or list."""
    for column, problem in _examined(row, form, kind):
        if problem:
            what, hint = problem
            raise DataError(what, where=f"{where}, column {column}", hint=hint)


def _examined(row: dict[str, Any], form: str, kind: type) -> Iterator[tuple[str, Problem]]:
    """One finding after the other, by column; each may rely on there being no problem before it."""
    for column in _FORMS[form]:
        if row[column] is None:
            yield column, what_is_there_instead(row, _RIVALS)
    for column in _FORMS[form]:
        yield column, _column_problem(column, row[column], form, kind)
    if "tools" in row:
        yield "tools", _tools_problem(row["tools"])
    template_kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(template_kwargs, dict):
        yield "chat_template_kwargs", (f"is {template_kwargs!r}", "Give the template's settings by name.")

    chosen, rejected = _as_list(row["chosen"]), _as_list(row["rejected"])
    if chosen == rejected:
        yield "rejected", ("equals chosen", "Remove the row: what is learned is the difference between the two.")
    if form == _IMPLICIT:
        yield from _examined_prompt(chosen, rejected)
    elif kind is list:
        prompt = row[_FORMS[form][0]]
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            yield "chosen", ("begins with the prompt again", "Give only what follows the prompt.")


def _examined_prompt(chosen: Any, rejected: Any) -> Iterator[tuple[str, Problem]]:
    """Findings on the beginning that both share, which is their prompt, and on what is left without it."""
    hint = "Both must begin with the prompt and go on to an answer each; or give it in a column `prompt`."
    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    if chosen[0] != rejected[0] or _is_blank(parts["prompt"]):  # where the first differ, TRL takes place −1 for 0
        yield "chosen", ("shares no beginning with rejected", hint)
    for column, mine, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        if _is_blank(parts[column]) or (isinstance(mine, list) and mine == other[: len(mine)]):
            yield column, ("holds nothing but the prompt", hint)


def _column_problem(column: str, value: Any, form: str, kind: type) -> Problem:
    if form == _SHARE_GPT:
        value = _as_list(value)
    if not isinstance(value, str | list):
        return f"is {value!r}", "Give text, or a list of messages."
    if not isinstance(value, kind):
        return (
            "mixes text and messages",
            "All columns of all rows must be text, or all messages; if chosen and rejected hold whole conversations, "
            "drop column prompt.",
        )
    if _is_blank(value):
        if column == "prompt":
            return "is empty", "Fill it, or drop the column if chosen and rejected begin with the prompt."
        return "is empty", "Remove the row: there is nothing to compare."
    if isinstance(value, str):
        return None
    role_key, content_key = FROM_AND_VALUE if form == _SHARE_GPT else ROLE_AND_CONTENT
    problem = messages_problem(value, role_key, content_key)
    if problem or column not in ("chosen", "rejected"):
        return problem
    role = value[-1][role_key]
    if standard_role(role) != "assistant":
        return f"ends with a message of {role!r}", "It must end with an answer of the assistant."
    return None


def _tools_problem(tools: Any) -> Problem:
    try:
        json.loads(tools) if isinstance(tools, str) else tools
    except ValueError:
        return "is no JSON", "Give a list of tools, the JSON of one, or null."
    return None


def _as_list(messages: Any) -> Any:
    """ShareGPT gives an answer of one message without a list."""
    return [messages] if isinstance(messages, dict) else messages


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)
