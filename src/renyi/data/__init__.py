"""Datasets and tokenizers: loading them, saying which row is wrong and why, and turning rows into tokens and labels.

Training and scoring both stand on this, so that a label means the same to both. Nothing here knows about models.
"""

from renyi.data.load import choose_split, load_chat_template, load_splits, load_tokenizer, load_tokenizer_of
from renyi.data.pairs import check_pairs, with_pairs
from renyi.data.prepare import (
    IGNORED,
    Counts,
    Preparation,
    RowPreparation,
    checked,
    count_tokens,
    prepare,
    sample,
    training_template,
)
from renyi.data.prepare_pairs import PairCounts, PairPreparation, checked_pairs, count_pairs, prepare_pairs
from renyi.data.prompts import PromptPreparation, check_prompts, prompt_tokens
from renyi.data.questions import LETTERS, Question, read_questions
from renyi.data.read import read_rows
from renyi.data.rows import ROW_COLUMN, check_rows, form_of, number_rows, with_messages

__all__ = [
    "IGNORED",
    "LETTERS",
    "ROW_COLUMN",
    "Counts",
    "PairCounts",
    "PairPreparation",
    "Preparation",
    "PromptPreparation",
    "Question",
    "RowPreparation",
    "check_pairs",
    "check_prompts",
    "check_rows",
    "checked",
    "checked_pairs",
    "choose_split",
    "count_pairs",
    "count_tokens",
    "form_of",
    "load_chat_template",
    "load_splits",
    "load_tokenizer",
    "load_tokenizer_of",
    "number_rows",
    "prepare",
    "prepare_pairs",
    "prompt_tokens",
    "read_questions",
    "read_rows",
    "sample",
    "training_template",
    "with_messages",
    "with_pairs",
]
