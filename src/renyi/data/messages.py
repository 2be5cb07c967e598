"""Reads messages of several formats into the format that chat templates take.

`read_messages` accepts a list of messages with `role` and `content` or with ShareGPT's `from` and `value`, such a list
as JSON text, or a single message. Read next: `rows.py`, which says which columns hold messages.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from renyi.errors import DataError

Problem = tuple[str, str] | None  # what is wrong, and what to do about it

# Other names of the roles, in lower case. A name that could mean two roles is not in the list.
_ALIASES = {
    **dict.fromkeys(("human", "prompter", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "chatbot", "ai", "model"), "assistant"),
    **dict.fromkeys(("observation", "tool", "tool_response", "function_response"), "tool"),
    "system": "system",
    "developer": "developer",
}
KNOWN_ROLES = ("system", "user", "assistant", "tool")  # allowed even if the template does not name them
_A_MESSAGE = "A message has `role` and `content`, or ShareGPT's `from` and `value`."


def standard_role(role: str) -> str:
    """The role's name in chat templates: "assistant" for "gpt", "user" for "User". Other names are not changed."""
    return _ALIASES.get(role.strip().lower(), role)


def role_of(message: Mapping[str, Any]) -> str:
    """The role of a message as the source writes it."""
    role = message.get("role")
    return role if role is not None else message.get("from")  # type: ignore[return-value]


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages or the JSON text of one. Other text is trained as it is.

    JSON text counts as messages only if one of its objects has a `role` or a `from`, because a text may be other JSON.
    """
    if not isinstance(value, str):
        return isinstance(value, list | dict)
    text = value.strip()
    if not (text.startswith("[") and text.endswith("]") and ('"role"' in text or '"from"' in text)):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(message, dict) and ("role" in message or "from" in message) for message in value)


def read_messages(value: Any, where: str, is_exact: bool = True) -> list[dict[str, Any]]:
    """Read messages: the result has standard roles, text contents, and no keys that a template does not expect.

    A content that is a list of text parts becomes one text. Otherwise a template that does not loop over parts would
    print the Python list.

    Args:
        value: a list of messages, the JSON text of one, or one message.
        where: file, row and column, for error messages.
        is_exact: whether the source itself says None. If false, None may be Arrow's filler for keys that a row does not
            have, and such keys are dropped.

    Raises:
        DataError: the value is not messages, or a message is malformed or empty, or it says that it is not trained.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, list | dict):
            hint = 'Give a list of messages, or its JSON: [{"role": "user", "content": "…"}, …].'
            raise DataError("is text, not messages", where=where, hint=hint)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"is {value!r}", where=where, hint="Give text, or a list of messages.")
    if not value:
        raise DataError("is empty", where=where, hint="Remove the row: there is nothing to learn from it.")
    return [_message(message, turn, where, is_exact) for turn, message in enumerate(value, start=1)]


def renamed_roles(value: Any) -> dict[str, str]:
    """The roles of well-formed messages that are read under another name, each with that name."""
    if isinstance(value, str):
        value = json.loads(value)
    messages = [value] if isinstance(value, dict) else value
    roles = {str(role_of(m)) for m in messages}
    return {role: standard_role(role) for role in sorted(roles) if standard_role(role) != role}


def without_fillers(value: Any) -> Any:
    """A value from Arrow without the keys that only other rows have. Arrow fills such keys with None."""
    if isinstance(value, dict):
        return {key: without_fillers(item) for key, item in value.items() if item is not None}
    return [without_fillers(item) for item in value] if isinstance(value, list) else value


def _message(message: Any, turn: int, where: str, is_exact: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"has no role in message {turn}", where=where, hint=_A_MESSAGE)
    if not is_exact:
        message = {key: without_fillers(item) for key, item in message.items() if item is not None or key == "content"}
    if message.get("role") is not None and message.get("from") is not None:
        what = f"has a role and a from in message {turn}"
        raise DataError(what, where=where, hint=f"Leave one of them out. {_A_MESSAGE}")
    share_gpt = message.get("role") is None and message.get("from") is not None
    role_key, content_key = ("from", "value") if share_gpt else ("role", "content")
    role = message.get(role_key)
    if not isinstance(role, str) or not role.strip():
        raise DataError(f"has no role in message {turn}", where=where, hint=_A_MESSAGE)
    _check_weight(message, turn, where)
    content = _content(message.get(content_key), standard_role(role), turn, where)
    says_otherwise = message.get("tool_calls") or message.get("reasoning_content") or message.get("thinking")
    if (content is None or (isinstance(content, str) and not content.strip())) and not says_otherwise:
        raise DataError(f"has an empty message {turn}", where=where, hint="Remove the row or fill the message.")
    left_out = {"from", "value"} if share_gpt else set()
    others = {k: v for k, v in message.items() if k not in {"role", "content", "weight", "train", *left_out}}
    read = {"role": standard_role(role), "content": content, **others}
    if content is None and "content" not in message:
        del read["content"]
    return read


def _content(content: Any, role: str, turn: int, where: str) -> Any:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        texts = []
        for part in content:
            text = part if isinstance(part, str) else part.get("text")
            kind = "text" if isinstance(part, str) else part.get("type", "text")
            if kind != "text" or not isinstance(text, str):
                what = f"has a part of type {kind!r} in message {turn}"
                raise DataError(what, where=where, hint="Only text can be trained: remove the row, or the part.")
            texts.append(text)
        return "".join(texts)
    if role == "tool":  # a tool's result may be an object; the template renders it
        return content
    raise DataError(f"has no text in message {turn}: {content!r}", where=where, hint="Write the content as text.")


def _check_weight(message: Mapping[str, Any], turn: int, where: str) -> None:
    """Refuse a message with a training weight other than 1, because single messages cannot be weighted here."""
    for key, allowed in (("weight", (None, 1)), ("train", (None, True))):
        value = message.get(key)
        if value not in allowed or (key == "weight" and isinstance(value, bool)):
            raise DataError(
                f"has a message of {key} {value!r} (message {turn}), which would be trained like any other",
                where=where,
                hint=f"Leave `{key}` out to train the message. To train only one message, give it as `completion`, and "
                "the messages before it as `prompt`.",
            )


def check_roles(messages: Iterable[Mapping[str, Any]], template: str, where: str) -> None:
    """Raise `DataError` for a role that the chat template does not name. It would print such a role unchanged."""
    for turn, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in KNOWN_ROLES and f"'{role}'" not in template and f'"{role}"' not in template:
            hint = f"The chat template has no such role. Write {', '.join(KNOWN_ROLES[:-1])} or {KNOWN_ROLES[-1]}."
            raise DataError(f"has the role {role!r} in message {turn}", where=where, hint=hint)
