"""Loads a tokenizer and prepares it for training: its pad token, its chat template and its end-of-text token.

Read next: `rendering.py`, which makes tokens with it.
"""

import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from renyi.data.rendering import end_of_turn, syntax_error, told_ends
from renyi.errors import TokenizerError, first_line

# Patterns for the names of special tokens that can serve as pad token, in order of preference.
_PADS = (r"\bpad\b|_pad_|^<\|?pad|pad\|?>$", r"reserved|unused|extra_|control_", r"^.?unk")
_BRACKETED = re.compile(r"[<\[].*[>\]]")


def load_tokenizer(name: str, pad_token: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer and choose its pad token, see `settle_padding`.

    Raises:
        TokenizerError: there is no tokenizer, or `pad_token` cannot serve as pad token.
    """
    tokenizer = _loaded(name, f"tokenizer of {name}", **kwargs)
    settle_padding(tokenizer, pad_token)
    return tokenizer


def load_tokenizer_of(folder: Path, base_name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in an ensemble's folder, or else the base's. Its pad token is not changed.

    Raises:
        TokenizerError: there is no tokenizer.
    """
    name = str(folder) if (folder / "tokenizer_config.json").is_file() else base_name
    return _loaded(name, f"tokenizer of {name}")


def _loaded(name: str, where: str, hint: str | None = None, **kwargs: Any) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **kwargs})
    except (OSError, ValueError) as error:
        raise TokenizerError(f"could not be loaded ({first_line(error)})", where=where, hint=hint) from error


# ---- Padding ---------------------------------------------------------------------------------------------------------


def settle_padding(tokenizer: PreTrainedTokenizerBase, pad_token: str | None = None) -> None:
    """Give the tokenizer a pad token that is not the end of text, if it has an unused special token.

    Padding is masked by length here, so training does not depend on the pad token. But other tools mask every pad
    token, and would mask the end of text if both were the same. Only a token that is already special is chosen. Making
    another token special would change the tokens of texts that hold it.

    Args:
        tokenizer: the tokenizer; it is changed.
        pad_token: the pad token to use; None to choose one. The end of text is allowed.

    Raises:
        TokenizerError: `pad_token` is not in the vocabulary, or is an ordinary word.
    """
    if pad_token is None:
        if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.pad_token = _spare(tokenizer) or tokenizer.eos_token
        return
    if pad_token not in tokenizer.get_vocab():
        example = _spare(tokenizer) or tokenizer.eos_token
        raise TokenizerError(
            f"{pad_token!r} is not in the vocabulary", where="pad_token", hint=f"For example: {example!r}."
        )
    if pad_token not in _special(tokenizer) and not _BRACKETED.fullmatch(pad_token):
        raise TokenizerError(
            f"{pad_token!r} is a word like any other: as a special token it would be cut out of every text",
            where="pad_token",
            hint=f"Leave it out: {_spare(tokenizer) or tokenizer.eos_token!r} will be the pad token.",
        )
    tokenizer.pad_token = pad_token


def told_padding(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A line of the printed plan about the pad token; None if it is the one that the tokenizer was saved with."""
    own = str(tokenizer.init_kwargs.get("pad_token") or "")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        return f"{tokenizer.pad_token}, the end of text (there is no other special token); padding is masked by length"
    if tokenizer.pad_token == own:
        return None
    why = f"pad token {own} also ends a text" if own else "tokenizer has none of its own"
    return f"{tokenizer.pad_token}, because the {why}"


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The special tokens, in the order of their ids. They are found in a text before it is split into other tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = [token.content for _, token in sorted(added.items()) if token.special]
    return [*names, *(t for t in tokenizer.all_special_tokens if t not in names)]


def _spare(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A special token that can serve as pad token; None if there is none."""
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    free = [t for t in _special(tokenizer) if t not in taken]
    for pattern in _PADS:
        found = [t for t in free if re.search(pattern, t, re.IGNORECASE)]
        if found:
            return found[0]
    unknown = tokenizer.unk_token
    return unknown if unknown in free else None


# ---- The base's embedding --------------------------------------------------------------------------------------------


def check_fits(tokenizer: PreTrainedTokenizerBase, embeddings: int | None) -> None:
    """Raise `TokenizerError` if training would meet a token that the base has no embedding for.

    These are the tokens that begin, end and pad a text, and the added ones that the chat template writes. Others are
    found where a row holds them. A tokenizer may have more tokens than that; they only must not appear.

    Args:
        tokenizer: to train with.
        embeddings: rows of the base's embedding; None if that is not known.
    """
    if embeddings is None:
        return
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    uses = {"eos_token": tokenizer.eos_token_id, "pad_token": tokenizer.pad_token_id}
    uses |= {"what it adds to every text": max(tokenizer("")["input_ids"], default=None)}
    uses |= {"the chat template's end of turn": end_of_turn(tokenizer)}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    uses |= {f"the chat template's {t.content}": token for token, t in added.items() if t.content in template}
    for use, token in uses.items():
        if token is not None and token >= embeddings:
            raise TokenizerError(
                f"the token {tokenizer.convert_ids_to_tokens(token)!r} has id {token}, and the base has {embeddings} "
                "embeddings",
                where=f"tokenizer, {use}",
                hint="Take the base's own tokenizer, or another token or template: the base is frozen, so no new "
                "tokens can be learned.",
            )


# ---- Chat templates --------------------------------------------------------------------------------------------------


def load_chat_template(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    """Give `tokenizer` the chat template of a Jinja file or of another model's tokenizer.

    The other model's end-of-text token is taken as well, because its template closes turns with that token.

    Raises:
        TokenizerError: there is no such template, its syntax is wrong, or it needs tokens that are not in this
            vocabulary.
    """
    where = f"chat_template_path {path}"
    if path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise TokenizerError("there is no such file", where=where)
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise TokenizerError(f"is not UTF-8 ({error})", where=where, hint="Write it in UTF-8.") from error
        check_template(tokenizer, where)
        return
    source = _loaded(path, where, "Give a .jinja file, a folder with a tokenizer, or a hub id.")
    if source.chat_template is None:
        raise TokenizerError("has no chat template", where=where, hint="Give a .jinja file or another tokenizer.")
    added = [token.content for token in source.added_tokens_decoder.values()]
    vocabulary = tokenizer.get_vocab()
    missing = [t for t in added if t in source.chat_template and t not in vocabulary]
    missing += [t for t in (source.eos_token,) if t and t not in vocabulary]
    if missing:
        raise TokenizerError(
            f"its template uses {', '.join(map(repr, dict.fromkeys(missing)))}, which this vocabulary lacks",
            where=where,
            hint="The base is frozen, so no new tokens can be learned: give a .jinja file that uses only known ones.",
        )
    tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token
    check_template(tokenizer, where)


def check_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Raise `TokenizerError` with the line if the template's syntax is wrong. It may still refuse a conversation."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise syntax_error(error, where) from error
    except Exception:  # only this conversation failed; rows are checked when they are prepared
        return


def told_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Lines of the printed plan about padding and the end of answers, by name. Expected settings have no line."""
    lines = {"padding": told_padding(tokenizer), "end of turn": told_ends(tokenizer)}
    return {name: line for name, line in lines.items() if line}
