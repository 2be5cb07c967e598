"""`renyi evaluate --task refusal`: which prompts each member refuses, and which prompts split the members.

Every member answers every prompt, or the rows hold its answers already; a classifier of text finds the refusals. It
does no arithmetic: the figures are `renyi.evaluation.evaluate_refusal`'s.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.parser import converted
from renyi.cli.reading import load_ensemble, load_rows, progress_bar, write_lines
from renyi.cli.tables import (
    LONGEST_TEXT,
    WIDEST_TABLE,
    as_json,
    column_values,
    figures_table,
    group_names,
    shortened,
    titled,
)
from renyi.errors import ConfigError, DataError
from renyi.named import named_function

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.evaluation import GroupRefusal, RefusalEvaluation, RefusalRates
    from renyi.inference import Prompt

Classifier = Callable[[str, str], bool]

SAFE_COLUMNS = ("safe", "label", "type")  # looked for in this order; the latter two are XSTest's
_SAFE, _UNSAFE = {"safe", "harmless", "benign"}, {"unsafe", "harmful", "toxic"}
_TRUE, _FALSE = {"true", "yes", "1"}, {"false", "no", "0"}
# The types of XSTest v2's safe prompts; those of its unsafe ones begin with "contrast_".
_XSTEST_SAFE = {
    "homonyms",
    "figurative_language",
    "safe_targets",
    "safe_contexts",
    "definitions",
    "real_group_nons_discr",
    "nons_group_real_discr",
    "historical_events",
    "privacy_public",
    "privacy_fictional",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this task."""
    flags = parser.add_argument_group("refusal")
    flags.add_argument(
        "--safe", metavar="COLUMN", help="safe or unsafe, true or false; by default safe, or XSTest's label or type"
    )
    flags.add_argument(
        "--completions", metavar="COLUMN", help="a list of the members' answers; by default they answer now, greedily"
    )
    flags.add_argument(
        "--classifier", metavar="MODULE:FUNCTION", help="yours: (completion, prompt) to true for a refusal"
    )
    flags.add_argument("--max_new_tokens", default="128", metavar="N", help="length of an answer at most; 128")
    flags.add_argument("--batch_size", default="8", metavar="N", help="prompts that are answered together; 8")
    flags.add_argument(
        "--as_text", action="store_true", help="prompts of text as they are, even if there is a chat template"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate refusals."""
    max_new_tokens, batch_size = _above_zero(args, "max_new_tokens"), _above_zero(args, "batch_size")
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.ensemble.storage import read_manifest, resolve_folder
        from renyi.evaluation import evaluate_refusal

        quiet_progress_bars()
        classify = _classifier(args.classifier)
        weights = read_manifest(resolve_folder(args.ensemble)).weights
        rows = load_rows(args)
        groups = group_names(rows, args.group) if args.group else None
        safe = _safe(rows, args.safe, args.data)
        prompts = _prompts(rows, args.data)
        given = _completions(rows, args.completions, len(weights), args.data) if args.completions else None

    completions = given or _answers(args, prompts, max_new_tokens, batch_size)
    asked = [_text(prompt) for prompt in prompts]
    refused = [
        [_verdict(classify, args.classifier, text, prompt, number) for text in texts]
        for number, (texts, prompt) in enumerate(zip(completions, asked, strict=True), start=1)
    ]
    evaluation = evaluate_refusal(refused, safe, weights, groups)
    found = [_Row(*row) for row in zip(asked, completions, refused, evaluation.prompt_rate, strict=True)]
    if args.output:
        write_lines(_lines(found, safe, evaluation), args.output)
    if args.json:
        by = args.classifier or "renyi.evaluation:is_refusal"
        emit_json({"task": args.task, "classifier": by, **as_json(evaluation)})
        return 0
    out.print(_rates(evaluation, weights))
    if evaluation.groups is not None:
        out.print(_group_table(evaluation.groups, args.group))
    split = [i for i in evaluation.most_split[: args.show] if evaluation.prompt_variance[i] > 0]
    if split:
        out.print(_most_split(split, found))
    if args.output:
        err.print(f"\n{plural(len(found), 'line')} in {args.output}", soft_wrap=True)
    return 0


class _Row(NamedTuple):
    """A prompt, the M members' answers, which of them refuse, and the weight of those."""

    prompt: str
    completions: list[str]
    refused: list[bool]
    rate: float


def _above_zero(args: argparse.Namespace, name: str) -> int:
    value: int = converted(getattr(args, name), int, None, f"--{name}")
    if value < 1:
        raise ConfigError(f"is {value}", where=f"--{name}", hint="Give an integer above 0.")
    return value


def _answers(
    args: argparse.Namespace, prompts: "list[Prompt]", max_new_tokens: int, batch_size: int
) -> list[list[str]]:
    """Every member's greedy answer to every prompt, [P][M]."""
    from renyi.inference import generate

    err = stream(stderr=True)
    with err.status("loading"):
        _, ensemble, tokenizer = load_ensemble(args)
    if tokenizer.chat_template and not args.as_text:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    with progress_bar(err, "answering", len(prompts)) as progress:
        answers = generate(
            ensemble,
            prompts,
            tokenizer,
            batch_size=batch_size,
            progress=progress,
            mixture="member",
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    return [[answer.text for answer in of_members] for of_members in answers]


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _prompts(rows: "Dataset", data: str) -> "list[Prompt]":
    """Column `prompt`: text, or messages."""
    from renyi.data.rows import ROLE_AND_CONTENT, messages_problem

    if "prompt" not in rows.column_names:
        raise DataError(
            f"the columns are {', '.join(rows.column_names)}",
            where=data,
            hint="A row has a `prompt`, text or messages; rename the column.",
        )
    prompts = list(rows["prompt"])
    for number, prompt in enumerate(prompts, start=1):
        where = f"{data}, row {number}, column prompt"
        if not isinstance(prompt, str | list):
            raise DataError(f"is {prompt!r}", where=where, hint="Give text, or a list of messages.")
        if not (prompt.strip() if isinstance(prompt, str) else prompt):
            raise DataError("is empty", where=where, hint="Fill it, or remove the row.")
        problem = messages_problem(prompt, *ROLE_AND_CONTENT) if isinstance(prompt, list) else None
        if problem:
            raise DataError(problem[0], where=where, hint=problem[1])
    return prompts


def _text(prompt: "Prompt") -> str:
    """A prompt as a classifier gets it: of messages, the last."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _completions(rows: "Dataset", name: str, members: int, data: str) -> list[list[str]]:
    """A column of lists of M texts."""
    found = column_values(rows, name, "--completions")
    for number, texts in enumerate(found, start=1):
        where = f"{data}, row {number}, column {name}"
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError("is no list of texts", where=where, hint="Give an answer of every member, in their order.")
        if len(texts) != members:
            raise DataError(
                f"has {plural(len(texts), 'answer')} of {plural(members, 'member')}",
                where=where,
                hint="Give an answer of every member, in their order.",
            )
    return found


def _safe(rows: "Dataset", name: str | None, data: str) -> list[bool] | None:
    """Which rows are safe; without a flag, of the first column that says so, or None if none does."""
    if name is None:
        for name in SAFE_COLUMNS:
            if name in rows.column_names:
                # A bare 1 may mean harmful where the column is not called safe.
                found = [_is_safe(value, in_words=name != "safe") for value in rows[name]]
                if None not in found:
                    return [bool(x) for x in found]
        return None
    found = [_is_safe(value) for value in column_values(rows, name, "--safe")]
    if None in found:
        number = found.index(None)
        raise DataError(
            f"is {rows[name][number]!r}",
            where=f"{data}, row {number + 1}, column {name}",
            hint="Give true or false, or safe or unsafe, in every row.",
        )
    return [bool(x) for x in found]


def _is_safe(value: Any, in_words: bool = False) -> bool | None:
    """Whether a label says safe; None if it says neither. In words: not by true, yes or 1."""
    text = str(value).strip().lower()
    if text in _SAFE or text in _XSTEST_SAFE or (not in_words and text in _TRUE):
        return True
    return False if text in _UNSAFE or text.startswith("contrast_") or (not in_words and text in _FALSE) else None


# ---- The classifier --------------------------------------------------------------------------------------------------


def _classifier(name: str | None) -> Classifier:
    """The library's classifier, or the function that `module:function` names."""
    from renyi.evaluation import is_refusal

    return is_refusal if name is None else named_function(name, "--classifier", "a completion and its prompt")


def _verdict(classify: Classifier, name: str | None, completion: str, prompt: str, number: int) -> bool:
    try:
        verdict = classify(completion, prompt)
    except Exception as error:
        if name is None:
            raise
        raise ConfigError(
            f"{name} raised {type(error).__name__} ({error})",
            where=f"--classifier, on row {number}",
            hint="It is called with a completion and its prompt, both text.",
        ) from error
    if verdict not in (True, False):
        raise ConfigError(
            f"{name} gave {verdict!r}",
            where=f"--classifier, on row {number}",
            hint="Return true for a refusal, otherwise false.",
        )
    return bool(verdict)


# ---- Output ----------------------------------------------------------------------------------------------------------


def _lines(found: Sequence[_Row], safe: Sequence[bool] | None, evaluation: "RefusalEvaluation") -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "safe": None if safe is None else safe[i],
            "refused": row.refused,
            "refusal_rate": row.rate,
            "variance": evaluation.prompt_variance[i],
            "completions": row.completions,
        }
        for i, row in enumerate(found)
    ]


def _rates(evaluation: "RefusalEvaluation", weights: Sequence[float]) -> RenderableType:
    """Who refuses how much, and how much members differ: of all, unsafe and safe prompts where it is known which."""
    kinds = ["all"] + [k for k in ("unsafe", "safe") if getattr(evaluation.mixture, k) is not None]
    kinds = kinds if evaluation.safe not in (0, evaluation.prompts) else kinds[1:]

    def cells(rates: "RefusalRates", form: str) -> list[str]:
        return [f"{getattr(rates, kind):{form}}" for kind in kinds]

    table = figures_table(["refused", "weight", *kinds])
    table.add_row("mixture", "", *cells(evaluation.mixture, ".1%"))
    for m, (rates, weight) in enumerate(zip(evaluation.members, weights, strict=True)):
        table.add_row(f"member {m}", f"{weight:.3f}", *cells(rates, ".1%"))
    table.add_row()
    table.add_row("variance over members", "", *cells(evaluation.variance, ".4f"))
    table.add_row("variance of their rates", "", *cells(evaluation.rate_variance, ".4f"))
    subtitle = plural(evaluation.prompts, "prompt")
    if evaluation.safe is not None:
        subtitle += f" · {evaluation.prompts - evaluation.safe:,} unsafe, {evaluation.safe:,} safe"
    legend = "safe: over-refusal · variance over members: of refusing a prompt, at most 0.25, mean of the prompts"
    return Group(titled("Refusals"), Text(subtitle, "dim"), table, Text(legend, "dim"))


def _group_table(groups: "Sequence[GroupRefusal]", column: str) -> RenderableType:
    shown = sorted(groups, key=lambda g: -g.prompts)[:WIDEST_TABLE] if len(groups) > WIDEST_TABLE else groups
    table = figures_table([column, "prompts", "least", "most", "variance"])
    for group in shown:
        least, most = min(group.members), max(group.members)
        name = Text(shortened(group.group, 40))
        table.add_row(name, f"{group.prompts:,}", f"{least:.1%}", f"{most:.1%}", f"{group.variance:.4f}")
    legend = "least, most: refused by the member that refuses least, most of the group"
    parts: list[RenderableType] = [titled(f"By {column}"), table, Text(legend, "dim")]
    if len(shown) < len(groups):
        parts.append(Text(f"and {len(groups) - len(shown)} smaller ones; all with --json", "dim"))
    return Group(*parts)


def _most_split(split: Sequence[int], found: Sequence[_Row]) -> RenderableType:
    parts: list[RenderableType] = [titled("Prompts that split the members"), Text("rows counted from 1", "dim")]
    for i in split:
        row = found[i]
        head = Text.assemble((f"\nrow {i + 1}", "bold"), f"   refused by {row.rate:.0%}, by weight")
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column()
        grid.add_row("prompt", "", Text(_one_line(row.prompt)))
        for m, (text, refused) in enumerate(zip(row.completions, row.refused, strict=True)):
            verdict = Text("refuses", "red") if refused else Text("answers", "green")
            grid.add_row(f"member {m}", verdict, Text(_one_line(text)))
        parts += [head, Padding(grid, (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), LONGEST_TEXT)
