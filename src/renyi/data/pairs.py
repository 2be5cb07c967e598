"""The forms of rows of preferences, and the reading of a row as a pair.

A pair is a prompt with a chosen and a rejected completion. They are all text or all messages. Training, scoring and
display all read pairs by one function, `read_pair`. A row may also have votes, see `votes.py`. Read next:
`prepare_pairs.py`, which makes the tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt

from renyi.data.messages import is_messages, read_messages, renamed_roles, role_of
from renyi.data.rows import (
    FILE_COLUMN,
    FOR_TEMPLATES,
    RIVALS,
    ROW_COLUMN,
    Form,
    are_exact,
    check_not_empty,
    columns_of,
    numbered_rows,
    read_for_template,
    what_is_there_instead,
)
from renyi.data.votes import (
    ANNOTATIONS,
    OppositeLabels,
    check_not_all_ties,
    read_annotations,
    read_votes,
    vote_columns,
)
from renyi.errors import DataError

_WITH_PROMPTS, _SHARE_GPT, _IMPLICIT = "pairs with prompts", "ShareGPT pairs", "pairs with implicit prompts"
PREPARED = ("prompt_ids", "chosen_ids", "rejected_ids")

# The columns that make each form of a pair, in order of precedence.
_FORMS: dict[str, tuple[str, ...]] = {
    _WITH_PROMPTS: ("prompt", "chosen", "rejected"),
    _SHARE_GPT: ("conversations", "chosen", "rejected"),
    _IMPLICIT: ("chosen", "rejected"),
}
_A_PAIR = (
    "A pair is `prompt` + `chosen` + `rejected`, `chosen` + `rejected` that begin with the same prompt, or ShareGPT "
    "`conversations` + `chosen` + `rejected`"
)


def pair_form(rows: Dataset | IterableDataset, where: str = "dataset") -> Form:
    """The form of pairs, from the names of the columns.

    Raises:
        DataError: the columns do not make pairs.
    """
    there = [c for c in columns_of(rows) if c not in (ROW_COLUMN, FILE_COLUMN)]
    name = _matching(there)
    if name is None:
        what, hint = f"the columns are {', '.join(sorted(there))}", f"{_A_PAIR}; rename the columns."
        if {"completion", "label"} <= set(there):
            what = f"unpaired feedback is not supported: {what}"
            hint = f"Give two completions of the same prompt. {_A_PAIR}."
        raise DataError(what, where=where, hint=hint)
    columns, votes = (*_FORMS[name], *(c for c in FOR_TEMPLATES if c in there)), vote_columns(there, where)
    return Form(name, columns, tuple(c for c in there if c not in (*columns, *votes)), kept=votes)


def _matching(columns: Iterable[str]) -> str | None:
    return next((form for form, needed in _FORMS.items() if set(needed) <= set(columns)), None)


def check_pairs(rows: Dataset, where: str = "dataset") -> Form:
    """Read every pair and return the form, such as "pairs with prompts, conversational".

    Args:
        rows: the rows as they were loaded.
        where: a name of the dataset for messages, such as its file name.

    Raises:
        DataError: a row is bad; the message names the first one (counted from 1) and its column.
    """
    check_not_empty(rows, where)
    form = pair_form(rows, where)
    exact = are_exact(rows, form.columns)
    roles: dict[str, str] = {}
    is_text = True
    asked = (*form.columns, *form.kept, *RIVALS)
    votes, labels = [], OppositeLabels()
    for row, at in numbered_rows(rows, asked, where):
        pair = read_pair(row, form, at, exact)
        is_text = isinstance(pair["chosen"], str)
        votes.append(read_votes(row, form.kept, at))
        if ANNOTATIONS in form.kept:
            labels.see(pair, read_annotations(row, at), at)
        if not is_text:
            roles |= {k: v for c in _FORMS[form.name] for k, v in renamed_roles(row[c]).items()}
    if form.kept:
        check_not_all_ties((v for v in votes if v), where)
    kind = "" if form.name == _SHARE_GPT else f", {'plain text' if is_text else 'conversational'}"
    return replace(form, name=form.name + kind, roles=roles)


def read_pair(
    row: Mapping[str, Any], form: Form, where: str, exact: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """Read a row as a pair: `prompt`, `chosen` and `rejected`, all text or all messages of standard roles.

    For messages the result also has `tools` and `chat_template_kwargs`, if the row has them.

    Args:
        row: the row as it was loaded; it may have more columns than the form.
        form: the dataset's form, from `pair_form` or `check_pairs`.
        where: the row's name, for messages.
        exact: whether each column is exact, see `are_exact`; None means that all are.

    Raises:
        DataError: the row is malformed, or there is nothing to compare; the message names the column.
    """
    exact = exact or {}
    columns = [c for c in form.columns if c not in FOR_TEMPLATES]
    for column in columns:
        if row.get(column) is None:
            what, hint = what_is_there_instead(row, RIVALS)
            raise DataError(what, where=f"{where}, column {column}", hint=hint)
    is_chat = is_messages(row["chosen"])
    read = {c: _read_column(c, row[c], is_chat, f"{where}, column {c}", exact.get(c, True)) for c in columns}
    chosen, rejected = read["chosen"], read["rejected"]
    if chosen == rejected:
        hint = "Remove the row: what is learned is the difference between the two."
        raise DataError("equals chosen", where=f"{where}, column rejected", hint=hint)
    if len(columns) == 2:
        read = _with_prompt(chosen, rejected, where)
    else:
        prompt = read.pop(columns[0])
        if is_chat and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            at = f"{where}, column chosen"
            raise DataError("begins with the prompt again", where=at, hint="Give only what follows the prompt.")
        read = {"prompt": prompt, **read}
    return read | (read_for_template(row, where, exact) if is_chat else {})


def _read_column(column: str, value: Any, is_chat: bool, where: str, is_exact: bool) -> Any:
    if not isinstance(value, str | list | dict):
        raise DataError(f"is {value!r}", where=where, hint="Give text, or a list of messages.")
    if is_messages(value) != is_chat:
        hint = (
            "All columns of a row must be text, or all messages; if chosen and rejected hold whole conversations, "
            "drop column prompt."
        )
        raise DataError("mixes text and messages", where=where, hint=hint)
    if not value or (isinstance(value, str) and not value.strip()):
        hint = "Remove the row: there is nothing to compare."
        if column == "prompt":
            hint = "Fill it, or drop the column if chosen and rejected begin with the prompt."
        raise DataError("is empty", where=where, hint=hint)
    if not is_chat:
        return value
    messages = read_messages(value, where, is_exact)
    if column in ("chosen", "rejected") and messages[-1]["role"] != "assistant":
        last = value[-1] if isinstance(value, list) else value if isinstance(value, dict) else messages[-1]
        what = f"ends with a message of {role_of(last)!r}"
        raise DataError(what, where=where, hint="It must end with an answer of the assistant.")
    return messages


def _with_prompt(chosen: Any, rejected: Any, where: str) -> dict[str, Any]:
    """Split off the beginning that both completions share, and return it as their prompt."""
    hint = "Both must begin with the prompt, with an answer each after it. Or give the prompt in a column `prompt`."
    parts: dict[str, Any] = extract_prompt({"chosen": chosen, "rejected": rejected})
    # TRL compares the last items as well if the first ones differ, so check the first ones here.
    if chosen[0] != rejected[0] or _is_blank(parts["prompt"]):
        raise DataError("shares no beginning with rejected", where=f"{where}, column chosen", hint=hint)
    for column, mine, other in (("chosen", chosen, rejected), ("rejected", rejected, chosen)):
        if _is_blank(parts[column]) or (isinstance(mine, list) and mine == other[: len(mine)]):
            raise DataError("holds nothing but the prompt", where=f"{where}, column {column}", hint=hint)
    return {name: parts[name] for name in ("prompt", "chosen", "rejected")}


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)
