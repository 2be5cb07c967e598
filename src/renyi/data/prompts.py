"""Rows that hold a prompt and nothing to learn from but what the model itself makes of it.

A prompt is text or messages, as in TRL. This file knows tokens and lengths; nothing about models or rollouts.
"""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from renyi.data.prepare import RowPreparation, check_has_template
from renyi.data.rows import (
    ROLE_AND_CONTENT,
    ROW_COLUMN,
    Problem,
    check_not_empty,
    messages_problem,
    number_rows,
    numbered_rows,
)
from renyi.errors import DataError

PROMPT = "prompt"


@dataclass(frozen=True)
class PromptPreparation(RowPreparation):
    """The settings that decide the tokens of prompts; a prompt is never cut, because its end is what is continued.

    Attributes:
        max_prompt_length: tokens above which a prompt is an error; None for no limit.
    """

    max_prompt_length: int | None = None

    def check(self, rows: Dataset, name: str = "dataset") -> str:
        return check_prompts(rows, name)

    def readable(self, rows: Any, name: str = "dataset") -> Any:
        return rows

    def prepare(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, name: str = "dataset") -> Dataset:
        """The one column `input_ids`: each prompt's tokens, as TRL's GRPOTrainer makes them."""
        form = check_prompts(rows, name)
        if form == "prompts, conversational":
            check_has_template(tokenizer)
        numbered = number_rows(rows)

        def tokenise(row: dict[str, Any]) -> dict[str, Any]:
            where = f"{name}, row {row[ROW_COLUMN] + 1}, column {PROMPT}"
            ids = prompt_tokens(row[PROMPT], tokenizer, where)
            if self.max_prompt_length is not None and len(ids) > self.max_prompt_length:
                raise DataError(
                    f"has {len(ids)} tokens, and the longest allowed is {self.max_prompt_length}",
                    where=where,
                    hint="Shorten or remove the row, lower max_completion_length, or raise max_prompt_length if the "
                    "model can read more.",
                )
            return {"input_ids": ids}

        return numbered.map(tokenise, remove_columns=numbered.column_names, desc="Tokenising prompts")


def prompt_tokens(prompt: str | list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    """The tokens of one prompt, with the template's opening of an answer behind a conversation.

    Raises:
        DataError: the chat template refuses it, or there are none.
    """
    try:
        if isinstance(prompt, str):
            encoded: Any = tokenizer(text=prompt)
        else:
            encoded = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses it: {error}", where=where, hint="Mend the messages.") from error
    ids = list(encoded["input_ids"])
    if not ids:
        raise DataError("has no tokens", where=where, hint="Give a text to continue, or remove the row.")
    return ids


def check_prompts(rows: Dataset, name: str = "dataset") -> str:
    """Check every row and return the form of the prompts: "prompts, plain text" or "prompts, conversational".

    Raises:
        DataError: names the first bad row (counted from 1).
    """
    check_not_empty(rows, name)
    columns = set(rows.column_names) - {ROW_COLUMN}
    if PROMPT not in columns:
        raise DataError(
            f"the columns are {', '.join(sorted(columns))}",
            where=name,
            hint=f"A row needs a column `{PROMPT}`: text, or a list of messages; others are left alone.",
        )
    kind = list if isinstance(rows[0][PROMPT], list) else str
    for number, row in numbered_rows(rows, [PROMPT]):
        problem = _problem(row[PROMPT], kind)
        if problem:
            raise DataError(problem[0], where=f"{name}, row {number}, column {PROMPT}", hint=problem[1])
    return f"prompts, {'plain text' if kind is str else 'conversational'}"


def _problem(prompt: Any, kind: type) -> Problem:
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        return "is empty", "Give a text to continue, or remove the row."
    if not isinstance(prompt, str | list):
        return f"is {prompt!r}", "Give text, or a list of messages."
    if not isinstance(prompt, kind):
        return "mixes text and messages", "All rows must have the same form."
    if isinstance(prompt, str):
        return None
    problem = messages_problem(prompt, *ROLE_AND_CONTENT)
    if problem is None and prompt[-1]["role"] == "assistant":
        return "ends with the assistant's turn", "End it with the user's: the answer is what the model gives."
    return problem
