"""Rows as users write them, drawn at random, each with what it says: the whole text, and the parts that are trained.

What a row says is made first, and then written in one of many ways, good or bad. Nothing here calls the library, so
what is expected does not come from it.
"""

import csv
import io
import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

TEXTS = [
    *(
        "007",
        "1",
        "true",
        "null",
        "12.0",
        "-3",
        "0x1F",
        "1e5",
        "NaN",
        "02134",
        "3,000",
        '"quoted"',
        "a, b",
        "[1]",
        "{}",
    ),
    *(
        "Hello there.",
        "two\nlines",
        "a\ttab",
        "U\u2028S",
        "next\u0085line",
        "form\x0cfeed",
        "\ufeffmarked",
        "é",
        "日本語",
        "🙂",
    ),
    *(
        "<user>",
        "[assistant]",
        "{{ message }}",
        "{% if x %}",
        "'single'",
        "back\\slash",
        "C:\\new",
        " spaces ",
        "x" * 60,
    ),
]
ROLES = {
    "user": ["user", "user", "human", "User", "HUMAN", "prompter", "user "],
    "assistant": ["assistant", "assistant", "gpt", "chatgpt", "Assistant", "GPT", "bot", "model", "ai"],
    "system": ["system", "system", "System", "SYSTEM"],
    "tool": ["tool", "observation", "Tool"],
}
UNKNOWN = ["critic", "narrator", "usr", "chat gpt", "0"]


class Case(NamedTuple):
    """A row and what it says: None where it must be refused.

    Attributes:
        kind: "sft", "pairs" or "prompts".
        row: as written.
        whole: the whole text, of a pair with the chosen answer.
        trained: the trained text; of a pair both answers.
        assistant_only: whether to prepare it with assistant_only_loss.
        columns: those that say something.
    """

    kind: str
    row: dict[str, Any]
    whole: str | None
    trained: tuple[str, ...] | None
    assistant_only: bool
    columns: tuple[str, ...] = ()


def rendered(turns: list[tuple[str, str]]) -> str:
    return "".join(f"[{role}]{text}<end>" for role, text in turns)


def draw_case(draw: Random, table: bool = False) -> Case:
    """One row; for a `table` only of texts, as csv has them."""
    kind = draw.choices(["sft", "pairs", "prompts"], [6, 2, 1])[0]
    made = {"sft": _sft, "pairs": _pair, "prompts": _prompt}[kind](draw, table)
    row = {**_others(draw, kind, made.row, table), **made.row}
    row = {column: row[column] for column in draw.sample(sorted(row), len(row))}
    return made._replace(row=row, columns=tuple(sorted(made.row)))


def _turns(draw: Random, last: str | None = "assistant", first_system: bool = True) -> list[tuple[str, str]]:
    turns = [("system", draw.choice(TEXTS))] if first_system and draw.random() < 0.3 else []
    for _ in range(draw.choice([1, 1, 2, 3])):
        turns += [("user", draw.choice(TEXTS)), ("assistant", draw.choice(TEXTS))]
        if draw.random() < 0.1:
            turns.append(("tool", draw.choice(TEXTS)))
            turns.append(("assistant", draw.choice(TEXTS)))
    return turns if last == "assistant" else turns[:-1] if turns[-2][0] == "user" else [turns[0], ("user", "x")]


class _Written(NamedTuple):
    messages: Any
    is_good: bool


def _write(draw: Random, turns: list[tuple[str, str]], table: bool, share_gpt: bool | None = None) -> _Written:
    """Messages that say `turns`, or, one time in eight, something that nobody could train."""
    share_gpt = draw.random() < 0.4 if share_gpt is None else share_gpt
    role_key, content_key = ("from", "value") if share_gpt else ("role", "content")
    messages: list[Any] = []
    for role, text in turns:
        content: Any = text
        if draw.random() < 0.15:
            cut = draw.randrange(len(text) + 1)
            content = [{"type": "text", "text": text[:cut]}, {"type": "text", "text": text[cut:]}]
            content = draw.choice([content, [{"type": "text", "text": text}], [text], [{"text": text}]])
        message = {role_key: draw.choice(ROLES[role]), content_key: content}
        if draw.random() < 0.2:
            message |= draw.choice(
                [{"weight": 1}, {"weight": None}, {"name": "n"}, {"train": True}, {"tool_calls": None}]
            )
        messages.append(message)
    is_good = draw.random() >= 0.125
    if not is_good:
        messages = _spoiled(draw, messages, role_key, content_key)
    if table or draw.random() < 0.15:
        if not any(isinstance(m, dict) and {"role", "from"} & set(m) for m in messages):
            messages = [*messages, {role_key: "user"}]  # or it would be a text like any other
        return _Written(json.dumps(messages, ensure_ascii=draw.random() < 0.5), is_good)
    return _Written(messages, is_good)


def _spoiled(draw: Random, messages: list[Any], role_key: str, content_key: str) -> list[Any]:
    place = draw.randrange(len(messages))
    message = dict(messages[place])
    how = draw.randrange(10)
    if how == 0:
        message[role_key] = draw.choice(UNKNOWN)
    elif how == 1:
        del message[role_key]
    elif how == 2:
        message[role_key] = draw.choice([None, 3, "", " ", ["user"]])
    elif how == 3:
        message[content_key] = draw.choice(["", " \n", None, [], [{"type": "text", "text": ""}]])
    elif how == 4:
        message[content_key] = draw.choice([7, True, 1.5, {"a": 1}])
        message[role_key] = "user"
    elif how == 5:
        message[content_key] = [{"type": "image"}, {"type": "text", "text": "x"}]
    elif how == 6:
        message |= draw.choice([{"weight": 0}, {"weight": 0.5}, {"train": False}])
    elif how == 7:
        return [*messages[:place], draw.choice(["text", 3, None, ["x"]]), *messages[place:]]
    elif how == 8:
        del message[content_key]
    else:
        message = {"speaker": "a", "words": "b"}
    return [*messages[:place], message, *messages[place + 1 :]]


def _sft(draw: Random, table: bool) -> Case:
    form = draw.choice(["text", "completion", "chat completion", "chat and text", "messages", "messages"])
    if form == "text":
        text = draw.choice(TEXTS)
        if draw.random() < 0.1:
            return Case(
                "sft",
                {"text": draw.choice([None, "", " "] if table else [None, "", " ", 3, True, {"a": 1}])},
                None,
                None,
                False,
            )
        return Case("sft", {"text": text}, f"{text}<eos>", (f"{text}<eos>"[1:],), False)
    if form == "completion":
        prompt, completion = draw.choice(TEXTS), draw.choice(TEXTS)
        if draw.random() < 0.1:
            bad = draw.choice([None, "", "\n"] if table else [None, "", "\n", 7, 1.5, {"a": 1}])
            return Case("sft", {"prompt": prompt, "completion": bad}, None, None, False)
        return Case(
            "sft",
            {"prompt": prompt, "completion": completion},
            f"{prompt}{completion}<eos>",
            (f"{completion}<eos>",),
            False,
        )
    turns = _turns(draw)
    assistant_only = draw.random() < 0.4
    if form in ("chat completion", "chat and text"):
        prompt, completion = turns[:-1], turns[-1:]
        written = _write(draw, prompt, table)
        row = {"prompt": written.messages}
        good = written.is_good
        if form == "chat and text":
            row["completion"] = completion[0][1]
        else:
            answer = _write(draw, completion, table)
            row["completion"], good = answer.messages, good and answer.is_good
        if not good:
            return Case("sft", row, None, None, assistant_only)
        return Case(
            "sft", row, rendered(turns[:-1]) + rendered(completion), (f"{completion[0][1]}<end>",), assistant_only
        )
    written = _write(draw, turns, table)
    column = draw.choice(["messages", "conversations"])
    row = {column: written.messages}
    if not written.is_good:
        return Case("sft", row, None, None, assistant_only)
    whole = rendered(turns)
    answers = tuple(f"{text}<end>" for role, text in turns if role == "assistant")
    return Case("sft", row, whole, answers if assistant_only else (whole[1:],), assistant_only)


def _pair(draw: Random, table: bool) -> Case:
    one, other = draw.sample(TEXTS, 2)
    if draw.random() < 0.4:
        prompt = draw.choice(TEXTS)
        row: dict[str, Any] = {"prompt": prompt, "chosen": one, "rejected": other}
        if draw.random() < 0.15:
            row[draw.choice(["chosen", "rejected"])] = draw.choice(
                [None, "", " "] if table else [None, "", 3, {"a": 1}]
            )
            return Case("pairs", row, None, None, False)
        return Case("pairs", row, f"{prompt}{one}<eos>", (f"{one}<eos>", f"{other}<eos>"), False)
    turns = _turns(draw, last="user")
    column = draw.choice(["prompt", "conversations"])
    written = [_write(draw, t, table) for t in (turns, [("assistant", one)], [("assistant", other)])]
    row = dict(zip((column, "chosen", "rejected"), (w.messages for w in written), strict=True))
    if not all(w.is_good for w in written):
        return Case("pairs", row, None, None, False)
    whole = rendered([*turns, ("assistant", one)])
    return Case("pairs", row, whole, (f"{one}<end>", f"{other}<end>"), False)


def _prompt(draw: Random, table: bool) -> Case:
    if draw.random() < 0.3:
        text = draw.choice(TEXTS)
        return Case("prompts", {"prompt": text}, text, (), False)
    turns = _turns(draw, last="user")
    if draw.random() < 0.15:
        return Case(
            "prompts", {"messages": _write(draw, [*turns, ("assistant", "x")], table).messages}, None, None, False
        )
    written = _write(draw, turns, table)
    row = {draw.choice(["prompt", "messages", "conversations"]): written.messages}
    return Case("prompts", row, f"{rendered(turns)}[assistant]" if written.is_good else None, (), False)


def _others(draw: Random, kind: str, row: dict[str, Any], table: bool) -> dict[str, Any]:
    """Columns that have no part in training, some of which look as if they had."""
    others: dict[str, Any] = {
        "id": "7",
        "source": "made",
        "score": "1.0",
        "image": None,
        "labels": "positive",
        "label": "1",
    }
    if not table:
        others |= {"labels": [0, 1, 0], "label": 3, "meta": {"a": [1, None, "1"]}, "tags": [], "attention_mask": [1, 0]}
        others |= {"model": None, "trace": [{"role": "x"}], "prompt_id": 5}
    if kind == "sft" and "messages" in row:
        others |= {"conversations": [{"from": "human", "value": "WRONG"}], "prompt": "WRONG", "text": "WRONG"}
    if kind == "sft" and "conversations" in row:
        others |= {"prompt": "WRONG", "text": "WRONG"}
    if kind == "sft" and "completion" in row:
        others |= {"messages": [{"role": "user", "content": "WRONG"}], "text": "WRONG"}
    if kind == "sft" and "text" in row:
        others |= {"prompt": "WRONG", "completions": "WRONG"}
    if kind == "pairs" and "prompt" in row:
        others |= {"messages": [{"role": "user", "content": "WRONG"}], "completion": "WRONG"}
    if any(isinstance(row.get(c), list) for c in ("messages", "prompt", "conversations")):
        others |= {"chat_template_kwargs": draw.choice([None, {}, {"x": None}, {"enable_thinking": False}])}
        others |= {"tools": draw.choice([None, [], "[]", [{"name": "t"}], '[{"name": "t"}]'])}
    names = draw.sample(sorted(others), draw.randrange(4))
    return {n: json.dumps(others[n]) if table and not isinstance(others[n], str | None) else others[n] for n in names}


# ---- Files -----------------------------------------------------------------------------------------------------------


class Written(NamedTuple):
    """A file, and whether its bytes can be read at all."""

    file: Path
    is_readable: bool


def write_file(draw: Random, rows: list[dict[str, Any]], folder: Path, name: str, kind: str) -> Written:
    """Rows as a file of `kind` "jsonl", "json" or "csv", in an encoding drawn at random."""
    file = folder / f"{name}{draw.choice(['', '[1]', ' x', '{a}', '*'])}.{kind}"
    text = _as_text(draw, rows, kind)
    encoding = draw.choices(["utf-8", "utf-8-sig", "latin-1", "utf-16"], [8, 1, 1, 0.3])[0]
    try:
        raw = text.encode(encoding)
    except UnicodeEncodeError:
        encoding, raw = "utf-8", text.encode()
    file.write_bytes(raw)
    return Written(file, encoding.startswith("utf-8") or (encoding == "latin-1" and text.isascii()))


def _as_text(draw: Random, rows: list[dict[str, Any]], kind: str) -> str:
    if kind == "csv":
        out = io.StringIO()
        writer = csv.DictWriter(
            out, sorted({c for row in rows for c in row}), lineterminator=draw.choice(["\n", "\r\n"])
        )
        writer.writeheader()
        writer.writerows({c: "" if v is None else v for c, v in row.items()} for row in rows)
        return out.getvalue()
    escaped = draw.random() < 0.5
    if kind == "json":
        return json.dumps(rows, ensure_ascii=escaped, indent=draw.choice([None, 1]))
    end = draw.choice(["\n", "\r\n", "\n\n"])
    return end.join(json.dumps(row, ensure_ascii=escaped) for row in rows) + draw.choice(["", end])
