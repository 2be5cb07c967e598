"""The forms a row may have, and which row is wrong, in which column, and why.

TRL decides what a row means; this file only refuses what TRL would fail on obscurely or train on in silence.
It knows nothing about tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset

from renyi.errors import DataError

ROW_COLUMN = "__row__"  # the number of a row in its file, counted from 0, however rows are split or shuffled later

# Each form of a row by the columns that make it, in TRL's order of precedence.
_FORMS: dict[str, tuple[str, ...]] = {
    "tokenised": ("input_ids",),
    "prompt-completion": ("prompt", "completion"),
    "conversational": ("messages",),
    "ShareGPT": ("conversations",),
}


def number_rows(dataset: Dataset) -> Dataset:
    """The dataset with its rows numbered, so that a later message can name the row of the file."""
    if ROW_COLUMN in dataset.column_names:
        return dataset
    return dataset.add_column(ROW_COLUMN, list(range(len(dataset))))


ROLE_AND_CONTENT = ("role", "content")
FROM_AND_VALUE = ("from", "value")  # ShareGPT's names for the same
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # of ShareGPT, and what templates know


def with_messages(dataset: Any, where: str = "dataset") -> Any:
    """ShareGPT `conversations` as `messages`; any other dataset as it is.

    TRL renames the keys of ShareGPT messages but keeps its roles, and a chat template that knows no "gpt" would take
    every turn for the user's.

    Raises:
        DataError: names the first bad row.
    """
    if not isinstance(dataset, Dataset) or "conversations" not in dataset.column_names or len(dataset) == 0:
        return dataset
    if form_of(dataset, where=where) != "ShareGPT":
        return dataset
    check_rows(dataset, where=where)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": read_share_gpt(row["conversations"])}

    return dataset.map(convert, remove_columns="conversations", desc="Reading ShareGPT conversations")


def read_share_gpt(turns: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of `from` and `value` as messages of `role` and `content`."""
    return [{"role": standard_role(turn["from"]), "content": turn["value"]} for turn in turns]


def standard_role(role: str) -> str:
    """ShareGPT's name of a role as chat templates have it."""
    return _ROLES.get(role, role)


def form_of(dataset: Dataset, text_field: str = "text", where: str = "dataset") -> str:
    """The form of a dataset's rows: "text", "prompt-completion", "conversational", "ShareGPT" or "tokenised".

    Raises:
        DataError: no known form has these columns.
    """
    columns = set(dataset.column_names) - {ROW_COLUMN}
    for form, needed in _FORMS.items():
        if columns.issuperset(needed):
            return form
    if text_field in columns:
        return "text"
    raise DataError(
        f"the columns are {', '.join(sorted(columns))}",
        where=where,
        hint="A row is `text`, `messages`, `prompt` + `completion`, or ShareGPT `conversations`; rename the columns, "
        "or point dataset_text_field at the one that holds the text.",
    )


def check_rows(dataset: Dataset, text_field: str = "text", assistant_only: bool = False, where: str = "dataset") -> str:
    """Check every row against the dataset's form and return the form.

    Args:
        dataset: as it was loaded.
        text_field: the column that holds the text of a row of text.
        assistant_only: whether every row needs a message of the assistant.
        where: what to call the dataset, such as its file name.

    Raises:
        DataError: names the first bad row (counted from 1) and its column.
    """
    check_not_empty(dataset, where)
    form = form_of(dataset, text_field, where)
    if form == "tokenised":
        return form
    columns = _FORMS.get(form, (text_field,))
    kinds: dict[str, type] = {}
    for number, row in numbered_rows(dataset, columns):
        for column, value in row.items():
            problem = _problem(column, value, kinds, assistant_only)
            if value is None:
                rivals = [c for needed in [*_FORMS.values(), (text_field,)] for c in needed]
                problem = what_is_there_instead(dataset[number - 1], rivals)
            if problem:
                what, hint = problem
                raise DataError(what, where=f"{where}, row {number}, column {column}", hint=hint)
    return form


def check_not_empty(dataset: Dataset, where: str) -> None:
    """Raise `DataError` if there are no rows."""
    if len(dataset) == 0:
        raise DataError("the dataset is empty", where=where, hint="A dataset needs at least one row.")


def numbered_rows(dataset: Dataset, columns: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each row's number, counted from 1, and its values in `columns`."""
    columns = list(columns)
    number = 0
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            yield number, dict(zip(columns, values, strict=True))


Problem = tuple[str, str] | None  # what is wrong, and what to do about it


def _problem(column: str, value: Any, kinds: dict[str, type], assistant_only: bool) -> Problem:
    if value is None:
        return None
    if not isinstance(value, str | list):
        return f"is {value!r}", "Give text, or a list of messages."
    if kinds.setdefault(column, type(value)) is not type(value):
        return "mixes text and messages", "All rows must have the same form."
    if column != "prompt" and (not value or (isinstance(value, str) and not value.strip())):
        return "is empty", "Remove the row: there is nothing to learn from it."
    if not isinstance(value, list):
        return None
    role_key, content_key = FROM_AND_VALUE if column == "conversations" else ROLE_AND_CONTENT
    problem = messages_problem(value, role_key, content_key)
    if problem or not assistant_only or column == "prompt":
        return problem
    if not any(standard_role(m[role_key]) == "assistant" for m in value):
        return "has no assistant message", "With assistant_only_loss every row needs one; remove the row."
    return None


def messages_problem(messages: list[Any], role_key: str, content_key: str) -> Problem:
    """What is wrong with the first malformed message of a list."""
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not message.get(role_key):
            return f"has no {role_key} in message {turn}", f"A message has `{role_key}` and `{content_key}`."
        if _is_empty(message.get(content_key)) and not message.get("tool_calls"):
            return f"has an empty message {turn}", "Remove the row or fill the message."
    return None


def _is_empty(content: Any) -> bool:
    """Whether a message says nothing; its content is text, or parts such as `{"type": "text", "text": …}`."""
    if isinstance(content, list):
        return all(isinstance(p, dict) and p.get("type") == "text" and _is_empty(p.get("text")) for p in content)
    return not content.strip() if isinstance(content, str) else not content


def what_is_there_instead(row: dict[str, Any], rivals: Iterable[str]) -> Problem:
    """A missing value: either the row has another form than the others, made of `rivals`, or it has a hole."""
    there = [c for c in dict.fromkeys(rivals) if row.get(c) is not None]
    if there:
        return (
            f"is missing, though other rows have it; this row has {', '.join(there)}",
            "All rows of a dataset must have the same form; split the file, or fill the gap.",
        )
    return "is empty", "Remove the row: there is nothing to learn from it."
