"""Turns texts and conversations into token ids, and finds the tokens at which an answer ends.

Training, scoring and generation all tokenise here. So a text has one beginning-of-text token and one end everywhere,
and a template that fails gives an error of this library. Read next: `prepare.py`, which builds rows from the tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from renyi.data.messages import check_roles
from renyi.errors import DataError, TokenizerError


def text_tokens(tokenizer: PreTrainedTokenizerBase, text: str, where: str = "text") -> list[int]:
    """The tokens of a text, with the special tokens that the tokenizer adds.

    If the text already has a beginning-of-text or end-of-text token and the tokenizer adds another one, only one stays.

    Raises:
        DataError: the text cannot be encoded.
    """
    try:
        ids = list(tokenizer(text=text)["input_ids"])
    except (TypeError, ValueError) as error:  # such as a lone half of a surrogate pair
        raise DataError(f"cannot be tokenised ({error})", where=where, hint="Correct or remove the row.") from error
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is not None and ids[:2] == [begin, begin] and not text.startswith(2 * str(tokenizer.bos_token)):
        ids = ids[1:]
    if end is not None and ids[-2:] == [end, end] and not text.endswith(2 * str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, options: Mapping[str, Any]
) -> dict[str, list[int]]:
    """A conversation's `input_ids`, and its `assistant_masks` if options ask for `return_assistant_tokens_mask`.

    Args:
        tokenizer: has a chat template.
        messages: the result of `read_messages`.
        where: the row's name, for error messages.
        options: options of `apply_chat_template` (`tools`, `add_generation_prompt`, `chat_template`), and of the
            template itself.

    Raises:
        DataError: the template refuses the conversation, or has no such role.
    """
    return dict(_applied(tokenizer, messages, where, {"tokenize": True, "return_dict": True, **options}))


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, options: Mapping[str, Any]
) -> str:
    """A conversation as the text that the template writes; arguments and errors as in `chat_tokens`."""
    return str(_applied(tokenizer, messages, where, {"tokenize": False, **options}))


def _applied(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, options: Mapping[str, Any]
) -> Any:
    check_roles(messages, str(options.get("chat_template") or tokenizer.chat_template), where)
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **options)
    except TemplateSyntaxError as error:
        raise syntax_error(error, "chat template") from error
    except Exception as error:  # a template is a program, and may fail in any way
        raise DataError(
            f"the chat template refuses the conversation ({str(error).strip() or type(error).__name__})",
            where=where,
            hint="Change the row, or give another template by --chat_template_path.",
        ) from error


def for_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the template beside the messages, from a row that was read."""
    return {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}


# ---- Templates -------------------------------------------------------------------------------------------------------


def syntax_error(error: TemplateSyntaxError, where: str) -> TokenizerError:
    """The error for a template with wrong syntax; it names the line."""
    return TokenizerError(
        f"the template cannot be read: {error.message}",
        where=f"{where}, line {error.lineno}",
        hint="Correct the template.",
    )


def check_has_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `TokenizerError` unless the tokenizer has a chat template."""
    if tokenizer.chat_template is None:
        raise TokenizerError(
            "has no chat template, and the rows are conversations",
            where="tokenizer",
            hint="Give one by --chat_template_path: a .jinja file, or the id of a model that has one.",
        )


def check_can_tokenise(tokenizer: PreTrainedTokenizerBase, is_text: bool) -> None:
    """Raise `TokenizerError` unless there is an end-of-text token (for text) or a chat template (for messages)."""
    if not is_text:
        check_has_template(tokenizer)
    elif tokenizer.eos_token is None:
        raise TokenizerError(
            "has no eos token, which must end a text", where="tokenizer", hint="Choose one with --eos_token."
        )


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A template that marks the assistant's tokens; None if the tokenizer's own template marks them.

    Raises:
        TokenizerError: the tokenizer has no chat template.
        DataError: the template does not mark tokens, and TRL has no version of it that does.
    """
    check_has_template(tokenizer)
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise no_masks() from error


def no_masks() -> DataError:
    """The error for a template that does not mark the assistant's tokens."""
    return DataError(
        "the chat template marks no assistant tokens, so nothing would be trained",
        where="assistant_only_loss",
        hint="Give a template with {% generation %} markers by chat_template_path, use prompt + completion rows, "
        "or drop assistant_only_loss.",
    )


# ---- Where an answer ends --------------------------------------------------------------------------------------------

_ANSWER = "a1b2c3d4"  # a text that templates do not contain and do not change


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids at which generation stops: the end of text, and the token with which the chat template closes an answer.

    A chat template may close turns with another token than the end of text. A model that is trained with it learns to
    write that token. It would never stop if only the end of text stopped it.
    """
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer)]
    return list(dict.fromkeys(int(end) for end in ends if end is not None))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template closes an answer; None without such a token or template."""
    closing = _closing(tokenizer)
    if not closing:
        return None
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    ids: Any = tokenizer(closing, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id  # it takes the place of tokens that are not in this vocabulary
    return next((int(token) for token in ids if token in special and token != unknown), None)


def _closing(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text that the template writes after the last answer; None without a template, or if the template fails."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # the same error comes with a row's name when rows are prepared
        return None
    _, found, closing = rendered.rpartition(_ANSWER)
    return closing if found else None


def told_ends(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line of the printed plan about where answers end.

    None without a chat template, or if the template closes answers with the end of text.
    """
    closing = _closing(tokenizer)
    if closing is None:
        return None
    end = end_of_turn(tokenizer)
    if end is None:
        return "the chat template does not end a turn with a special token, so the model may not learn to stop"
    if end == tokenizer.eos_token_id:
        return None
    token = tokenizer.convert_ids_to_tokens(end)
    return f"a turn ends with {token}, a text with {tokenizer.eos_token}: generation stops at either of them"
