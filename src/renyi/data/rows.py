"""The forms of rows, and the reading of a row.

Training, scoring and display all read rows by one function, `read_row`. So what is shown is what is trained. It reads
the columns of the dataset's form and ignores all others. Read next: `prepare.py`, which turns a row into tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, IterableDataset, Json

from renyi.data.messages import is_messages, read_messages, renamed_roles, without_fillers
from renyi.errors import ConfigError, DataError

ROW_COLUMN = "__row__"  # the number of a row in its file, counted from 0, however rows are split or shuffled later
FILE_COLUMN = "__file__"  # the name of that file, where a dataset has several

# The columns that make each form of a row, in order of precedence.
FORMS: dict[str, tuple[str, ...]] = {
    "tokenised": ("input_ids",),
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "ShareGPT": ("conversations",),
    "Alpaca": ("instruction", "output"),
}
OF_ALPACA = ("input", "system", "history")  # columns that Alpaca records may have as well
# Columns that make some form, also of pairs. If a row has no value in a needed column, a message names those it has.
RIVALS = ("input_ids", "prompt", "completion", "messages", "conversations", "text", "chosen", "rejected")
_LABELS = (
    "labels",
    "completion_mask",
    "assistant_masks",
    "attention_mask",
)  # of tokenised rows, beside input_ids
WHOLE_LENGTH = "whole_length"  # a column of prepared rows: the number of tokens before the row was cut
FOR_TEMPLATES = ("tools", "chat_template_kwargs")  # columns that are passed on to the chat template
_OURS = (ROW_COLUMN, FILE_COLUMN)
# Arguments of `apply_chat_template` that this library sets. A row's `chat_template_kwargs` may not set them.
_RESERVED = {
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
    *("tokenizer_kwargs", "processor_kwargs", "messages"),
}


@dataclass(frozen=True)
class Form:
    """The way in which the rows of a dataset are read. `str(form)` is the line of it in a printed plan.

    Attributes:
        name: such as "text", "prompt-completion" or "conversational".
        columns: the columns that are read; the first ones make the form.
        left_out: columns that are not read.
        roles: roles of messages that are read under another name, each with that name.
        kept: columns that are read beside the form's: votes, and the column of `routing_group`.
    """

    name: str
    columns: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    roles: Mapping[str, str] = field(default_factory=dict)
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [self.name]
        if self.roles:
            parts.append("roles " + ", ".join(f"{role} → {known}" for role, known in self.roles.items()))
        if self.kept:
            parts.append(f"with {', '.join(self.kept)}")
        if self.left_out:
            parts.append(f"not read: {', '.join(self.left_out)}")
        return " · ".join(parts)


def columns_of(rows: Dataset | IterableDataset) -> list[str]:
    """The names of the columns. If a streamed dataset does not have them, they are taken from its first row."""
    names = rows.column_names
    return list(names if names is not None else next(iter(rows), {}))


def form_of(rows: Dataset | IterableDataset, text_field: str = "text", where: str = "dataset") -> Form:
    """The form of a dataset's rows, from the names of its columns.

    If `text_field` is another name than "text" and there is such a column, the form is text. A column "text" makes the
    form text only if the columns make no other form, or make Alpaca records, whose `text` is the whole row.

    Raises:
        DataError: no known form has these columns.
    """
    there = [c for c in columns_of(rows) if c not in _OURS]
    name, needed = _matching(there, text_field)
    if name is None:
        raise DataError(
            f"the columns are {', '.join(sorted(there))}",
            where=where,
            hint="A row is `text`, `messages`, `prompt` + `completion`, ShareGPT `conversations`, or Alpaca's "
            "`instruction` + `output`; rename the columns, or point dataset_text_field at the one that holds the text.",
        )
    others = {"tokenised": (*_LABELS, WHOLE_LENGTH), "text": (), "Alpaca": (*OF_ALPACA, *FOR_TEMPLATES)}.get(
        name, FOR_TEMPLATES
    )
    columns = (*needed, *(c for c in others if c in there))
    return Form(name, columns, tuple(c for c in there if c not in columns))


def _matching(there: Iterable[str], text_field: str) -> tuple[str | None, tuple[str, ...]]:
    there = set(there)
    if text_field != "text" and text_field in there:
        return "text", (text_field,)
    for form, needed in FORMS.items():
        if there.issuperset(needed) and not (form == "Alpaca" and text_field in there):
            return form, needed
    return ("text", (text_field,)) if text_field in there else (None, ())


def check_rows(
    rows: Dataset,
    text_field: str = "text",
    assistant_only: bool = False,
    where: str = "dataset",
    completion_only: bool | None = None,
) -> Form:
    """Read every row, and return the form with the roles that are read under another name.

    Args:
        rows: the rows as they were loaded.
        text_field: the column that holds the text of a row of text.
        assistant_only: whether every row needs a message of the assistant.
        where: a name of the dataset for messages, such as its file name.
        completion_only: whether only completions are trained; None means: if there are completions.

    Raises:
        ConfigError: completions or assistant messages are to be trained, and rows of this form have none.
        DataError: a row is bad; the message names the first one (counted from 1) and its column.
    """
    check_not_empty(rows, where)
    form = form_of(rows, text_field, where)
    check_losses(form, assistant_only, completion_only)
    exact = are_exact(rows, form.columns)
    roles: dict[str, str] = {}
    for row, at in numbered_rows(rows, (*form.columns, *RIVALS), where):
        read_row(row, form, at, assistant_only, exact)
        for column in ("messages", "conversations", "prompt", "completion"):
            if column in form.columns and is_messages(row[column]):
                roles |= renamed_roles(row[column])
    return replace(form, roles=roles)


def check_losses(form: Form, assistant_only: bool, completion_only: bool | None) -> None:
    """Raise `ConfigError` if a setting trains only a part of rows that rows of this form do not have."""
    has_completion = form.name in ("prompt-completion", "Alpaca") or {"completion_mask", "labels"} & set(form.columns)
    if completion_only and not has_completion:
        is_chat = form.name in ("conversational", "ShareGPT")
        raise ConfigError(
            f"true, and the rows are {form.name}: they have no completion, and all of them would be trained",
            where="completion_only_loss",
            hint="Write assistant_only_loss: true to train the assistant's messages only."
            if is_chat
            else "Give rows of `prompt` and `completion`, or leave it out.",
        )
    if assistant_only and form.name == "text":
        raise ConfigError(
            "true, and the rows are text, which has no messages of an assistant",
            where="assistant_only_loss",
            hint="Give rows of `messages`, or leave it out.",
        )


def are_exact(rows: Dataset | IterableDataset, columns: Iterable[str]) -> dict[str, bool]:
    """For each column, whether a None in it comes from the source. Otherwise it may be Arrow's filler for a key."""
    features = rows.features
    return {c: features is None or isinstance(features.get(c), Json) for c in columns}


def check_not_empty(rows: Dataset, where: str) -> None:
    """Raise `DataError` if there are no rows."""
    if len(rows) == 0:
        raise DataError("the dataset is empty", where=where, hint="A dataset needs at least one row.")


def number_rows(rows: Dataset) -> Dataset:
    """Add a column with the numbers of the rows, so that a later message can name the row of the file."""
    if ROW_COLUMN in rows.column_names:
        return rows
    return rows.add_column(ROW_COLUMN, list(range(len(rows))))


def row_name(row: Mapping[str, Any], index: int, where: str) -> str:
    """The name of a row in messages: its number in its file, counted from 1; without one, `index` + 1."""
    number = row.get(ROW_COLUMN)
    file = row.get(FILE_COLUMN)
    return f"{where}, {f'{file}, ' if file else ''}row {(index if number is None else number) + 1}"


def numbered_rows(rows: Dataset, columns: Iterable[str], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The values of each row in `columns`, and the row's name for messages."""
    asked = [c for c in dict.fromkeys((*columns, *_OURS)) if c in rows.column_names]
    index = 0
    for batch in rows.select_columns(asked).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in asked), strict=True):
            row = dict(zip(asked, values, strict=True))
            yield row, row_name(row, index, where)
            index += 1


def only_columns(rows: Any, form: Form) -> Any:
    """A dataset, streamed or not, with only the columns that make a form or number the rows."""
    there = columns_of(rows)
    kept = {*form.columns, *form.kept, *RIVALS, *_OURS}
    return rows.remove_columns([c for c in there if c not in kept])


def read_row(
    row: Mapping[str, Any],
    form: Form,
    where: str,
    assistant_only: bool = False,
    exact: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Read a row: `text`; or `messages`; or `prompt` and `completion`, both text or both messages; or tokens.

    For messages the result also has `tools` and `chat_template_kwargs`, if the row has them.

    Args:
        row: the row as it was loaded; it may have more columns than the form.
        form: the dataset's form.
        where: the row's name, for messages.
        assistant_only: whether the row needs a message of the assistant.
        exact: whether each column is exact, see `are_exact`; None means that all are.

    Raises:
        DataError: the row is malformed; the message names the column.
    """
    exact = exact or {}
    needed = FORMS.get(form.name, form.columns[:1])
    for column in needed:
        if row.get(column) is None:
            what, hint = what_is_there_instead(row, (*form.columns[:1], *RIVALS))
            raise DataError(what, where=f"{where}, column {column}", hint=hint)
    if form.name == "tokenised":
        return _tokens(row, where)
    if form.name == "text":
        return {"text": _text(row[needed[0]], f"{where}, column {needed[0]}")}
    read: dict[str, Any] = {}
    if form.name in ("prompt-completion", "Alpaca"):
        read = _alpaca(row, where) if form.name == "Alpaca" else _prompt_and_completion(row, where, exact)
        answers = read["completion"]
    else:
        column = needed[0]
        answers = read_messages(row[column], f"{where}, column {column}", exact.get(column, True))
        read = {"messages": answers}
    if isinstance(answers, str):
        if assistant_only:
            raise DataError("has no assistant message", where=where, hint="assistant_only_loss needs messages.")
        return read
    if assistant_only and not any(m["role"] == "assistant" for m in answers):
        raise DataError(
            "has no assistant message",
            where=f"{where}, column {needed[-1]}",
            hint="With assistant_only_loss every row needs one; remove the row.",
        )
    return read | read_for_template(row, where, exact)


def _text(value: Any, where: str) -> str:
    if isinstance(value, list) and is_messages(value) and value and isinstance(value[0], dict):
        raise DataError("is messages, not text", where=where, hint="Call the column `messages`.")
    if not isinstance(value, str):
        raise DataError(f"is {value!r}", where=where, hint="Give text, or a list of messages.")
    if not value.strip():
        raise DataError("is empty", where=where, hint="Remove the row: there is nothing to learn from it.")
    return value


def _prompt_and_completion(row: Mapping[str, Any], where: str, exact: Mapping[str, bool]) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    of_prompt, of_completion = f"{where}, column prompt", f"{where}, column completion"
    if not is_messages(prompt):
        if not isinstance(prompt, str):
            raise DataError(f"is {prompt!r}", where=of_prompt, hint="Give text, or a list of messages.")
        if is_messages(completion):
            hint = 'Write the prompt as messages, too: [{"role": "user", "content": "…"}].'
            raise DataError("is text, and completion is messages", where=of_prompt, hint=hint)
        return {"prompt": prompt, "completion": _text(completion, of_completion)}
    read = {"prompt": read_messages(prompt, of_prompt, exact.get("prompt", True))}
    if is_messages(completion):
        read["completion"] = read_messages(completion, of_completion, exact.get("completion", True))
    else:  # after a prompt of messages, a text is the assistant's answer
        read["completion"] = [{"role": "assistant", "content": _text(completion, of_completion)}]
    return read


def _alpaca(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record as a conversation: its system prompt, its earlier turns, and the question with its answer."""
    for column in ("input", "system"):
        if not isinstance(row.get(column) or "", str):
            raise DataError(
                f"is {row[column]!r}", where=f"{where}, column {column}", hint="Give text, or leave it out."
            )
    prompt = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(x, str) and x.strip() for x in turn):
            hint = "Give a list of pairs of an instruction and its answer, both text."
            raise DataError(f"has {turn!r}"[:80], where=f"{where}, column history", hint=hint)
        prompt += [{"role": role, "content": x} for role, x in zip(("user", "assistant"), turn, strict=True)]
    question = alpaca_question({**row, "instruction": _text(row["instruction"], f"{where}, column instruction")})
    answer = _text(row["output"], f"{where}, column output")
    return {
        "prompt": [*prompt, {"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def alpaca_question(row: Mapping[str, Any]) -> str:
    """The question of an Alpaca record: its instruction, and its input on a line of its own."""
    return "\n".join(filter(None, (row["instruction"], row.get("input"))))


def read_for_template(row: Mapping[str, Any], where: str, exact: Mapping[str, bool]) -> dict[str, Any]:
    """A row's `tools` and `chat_template_kwargs`, if it has them. Both may be JSON text."""
    found: dict[str, Any] = {}
    for column, kind, what in (("tools", list, "a list of tools"), ("chat_template_kwargs", dict, "settings by name")):
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                hint = f"Give {what}, the JSON of that, or null."
                raise DataError("is not JSON", where=f"{where}, column {column}", hint=hint) from error
        if not exact.get(column, True):
            value = without_fillers(value)
        if value is None or value == "" or value == {} or value == []:
            continue
        taken = sorted(_RESERVED & set(value)) if isinstance(value, dict) else []
        if taken:
            at = f"{where}, column {column}"
            raise DataError(f"sets {taken[0]!r}", where=at, hint="Leave it out: it is not a setting of a template.")
        if not isinstance(value, kind):
            hint = f"Give {what}, the JSON of that, or null."
            raise DataError(f"is {value!r}", where=f"{where}, column {column}", hint=hint)
        found[column] = value
    return found


def _tokens(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`input_ids`, and `labels` or masks of the same length. Padding (`attention_mask` 0) is removed."""
    ids = row["input_ids"]
    _check_ids(ids, f"{where}, column input_ids", least=0)
    read: dict[str, Any] = {"input_ids": ids}
    for column in _LABELS:
        values = row.get(column)
        if values is None:
            continue
        at = f"{where}, column {column}"
        if column == "labels":
            _check_ids(values, at, least=-100)
        elif not isinstance(values, list) or not all(v in (0, 1) for v in values):
            raise DataError("is not a list of 0 and 1", where=at, hint="Give 1 for a token that counts.")
        if len(values) != len(ids):
            what = f"has {len(values)} values, and input_ids has {len(ids)}"
            raise DataError(what, where=at, hint="Give one value per token (labels: −100 where it is not trained).")
        read[column] = values
    mask = read.pop("attention_mask", None)
    if mask and not all(mask):
        kept = [i for i, here in enumerate(mask) if here]
        if not kept or kept != list(range(kept[0], kept[-1] + 1)):
            hint = "It may be 0 only for padding at the beginning and the end of the row."
            raise DataError("hides tokens within the row", where=f"{where}, column attention_mask", hint=hint)
        read = {column: values[kept[0] : kept[-1] + 1] for column, values in read.items()}
    return read


def _check_ids(ids: Any, where: str, least: int) -> None:
    if not isinstance(ids, list) or not ids:
        raise DataError(f"is {ids!r}"[:80], where=where, hint="Give a list of token ids.")
    for place, token in enumerate(ids):
        if type(token) is not int or token < least or (least < token < 0) or token >= 2**31:
            raise DataError(f"is {token!r} at place {place + 1}", where=where, hint="A token's id is 0 or above.")


def what_is_there_instead(row: Mapping[str, Any], rivals: Iterable[str]) -> tuple[str, str]:
    """Message and hint for a missing value.

    If the row has values in some of the columns `rivals`, it has another form than the other rows. Otherwise the value
    is just missing.
    """
    there = [c for c in dict.fromkeys(rivals) if row.get(c) is not None]
    if there:
        return (
            f"is missing, though other rows have it; this row has {', '.join(there)}",
            "All rows of a dataset must have the same form; split the file, or fill the gap.",
        )
    return "is empty", "Remove the row: there is nothing to learn from it."
