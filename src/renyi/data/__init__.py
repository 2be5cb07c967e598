"""Loads datasets and tokenizers, checks rows, and turns rows into tokens and labels.

Training, scoring, generation and every display use this package, so a row and a label mean the same everywhere. An
error names the bad row and says what is wrong with it.

Read in this order: `splits.py` (with `files.py`), `rows.py` (with `messages.py`), `tokenizers.py`, `rendering.py`,
`prepare.py`. The other kinds of rows are in `pairs.py` and `prepare_pairs.py`, `rated.py`, `thumbs.py`,
`prompts.py`, and `questions.py`.
"""

from renyi.data.files import exact_dataset
from renyi.data.groups import GROUP_COLUMN
from renyi.data.messages import read_messages
from renyi.data.pairs import check_pairs, read_pair
from renyi.data.prepare import (
    IGNORED,
    CompletionPreparation,
    Counts,
    Limits,
    Preparation,
    RowPreparation,
    count_cut,
    count_tokens,
    countable,
    prepare,
    sample,
    told_cut,
)
from renyi.data.prepare_pairs import PairCounts, PairPreparation, count_cut_pairs, count_pairs, prepare_pairs
from renyi.data.prompts import PromptPreparation, check_prompts, prompt_tokens, prompts_of, read_prompts
from renyi.data.questions import LETTERS, Question, read_questions
from renyi.data.rated import RatedPreparation, prepare_rated, rated_tokens
from renyi.data.read import read_rows
from renyi.data.rendering import chat_tokens, end_tokens, text_tokens, training_template
from renyi.data.rows import FILE_COLUMN, ROW_COLUMN, Form, check_rows, number_rows
from renyi.data.splits import choose_split, load_splits
from renyi.data.thumbs import (
    ThumbCounts,
    ThumbPreparation,
    check_both_kinds,
    count_cut_thumbs,
    count_thumbs,
    prepare_thumbs,
    read_label,
)
from renyi.data.tokenizers import (
    check_fits,
    load_chat_template,
    load_tokenizer,
    load_tokenizer_of,
    settle_padding,
    told_tokenizer,
)
from renyi.data.votes import VOTE_COLUMNS, VoteCounts, read_annotations, read_votes

__all__ = [
    "FILE_COLUMN",
    "GROUP_COLUMN",
    "IGNORED",
    "LETTERS",
    "ROW_COLUMN",
    "VOTE_COLUMNS",
    "CompletionPreparation",
    "Counts",
    "Form",
    "Limits",
    "PairCounts",
    "PairPreparation",
    "Preparation",
    "PromptPreparation",
    "Question",
    "RatedPreparation",
    "RowPreparation",
    "ThumbCounts",
    "ThumbPreparation",
    "VoteCounts",
    "chat_tokens",
    "check_both_kinds",
    "check_fits",
    "check_pairs",
    "check_prompts",
    "check_rows",
    "choose_split",
    "count_cut",
    "count_cut_pairs",
    "count_cut_thumbs",
    "count_pairs",
    "count_thumbs",
    "count_tokens",
    "countable",
    "end_tokens",
    "exact_dataset",
    "load_chat_template",
    "load_splits",
    "load_tokenizer",
    "load_tokenizer_of",
    "number_rows",
    "prepare",
    "prepare_pairs",
    "prepare_rated",
    "prepare_thumbs",
    "prompt_tokens",
    "prompts_of",
    "rated_tokens",
    "read_annotations",
    "read_label",
    "read_messages",
    "read_pair",
    "read_prompts",
    "read_questions",
    "read_rows",
    "read_votes",
    "sample",
    "settle_padding",
    "text_tokens",
    "told_cut",
    "told_tokenizer",
    "training_template",
]
