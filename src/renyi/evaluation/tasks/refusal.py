"""Refusals: which prompts each member refuses, and which prompts split the members.

Every member answers every prompt, or the rows have its answers already. Read next:
`renyi.evaluation.refusal_classifier`, which finds refusals, and `renyi.evaluation.refusal_rates`, the figures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError, DataError
from renyi.evaluation.files import File, Groups, column_values, group_names
from renyi.evaluation.sections import Cell, Column, Example, Examples, Report, Section, Table, one_line, shortened
from renyi.evaluation.task import Grouped, Models, Task, as_json, is_positive, setting
from renyi.named import named_function
from renyi.text import plural

if TYPE_CHECKING:
    from datasets import Dataset

    from renyi.evaluation.refusal_rates import RefusalEvaluation
    from renyi.inference import Prompt

Classifier = Callable[[str, str], bool]

EXAMPLES = 10
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


@dataclass(frozen=True, kw_only=True)
class RefusalSettings(Grouped):
    """Settings of the refusal task."""

    safe: str | None = setting(
        None, "a column of safe or unsafe, or true or false (default: safe, or XSTest's label or type)", "COLUMN"
    )
    completions: str | None = setting(
        None, "a column with a list of the members' answers (default: they answer now, greedily)", "COLUMN"
    )
    classifier: str | None = setting(
        None, "your function of (completion, prompt), true for a refusal", "MODULE:FUNCTION"
    )
    max_new_tokens: int = setting(128, "the most tokens of an answer", "N")
    batch_size: int = setting(8, "prompts that are answered together", "N")
    as_text: bool = setting(False, "continue prompts of text without the chat template")

    def validate(self) -> None:
        super().validate()
        for name in ("max_new_tokens", "batch_size"):
            self.require(is_positive(getattr(self, name)), name, "Give an integer above 0.")


class Read(NamedTuple):
    """Prompts, their groups, which are safe, and answers if they are given."""

    name: str
    prompts: "list[Prompt]"
    groups: Groups | None
    safe: list[bool] | None
    completions: list[list[str]] | None
    classify: Classifier


class Asked(NamedTuple):
    """Of each prompt the members' answers [P][M] and which of them refuse; the mixture weights."""

    completions: list[list[str]]
    refused: list[list[bool]]
    weights: list[float]


class Refusal(Task):
    """Refusals."""

    name = "refusal"
    Settings = RefusalSettings

    def read(self, files: Sequence[File], settings: RefusalSettings) -> Read:
        (file,) = files
        classify = _classifier(settings.classifier)
        groups = Groups(settings.group, group_names(file.rows, settings.group)) if settings.group else None
        safe, prompts = _safe(file, settings.safe), _prompts(file)
        given = _completions(file, settings.completions) if settings.completions else None
        return Read(file.name, prompts, groups, safe, given, classify)

    def ask(self, models: Models, data: Read, settings: RefusalSettings) -> Asked:
        weights = models.weights
        if data.completions is None:
            completions = _answers(models, data.prompts, settings)
        else:
            completions = data.completions
            for number, texts in enumerate(completions, start=1):
                if len(texts) != len(weights):
                    raise DataError(
                        f"has {plural(len(texts), 'answer')} of {plural(len(weights), 'member')}",
                        where=f"{data.name}, row {number}, column {settings.completions}",
                        hint="Give an answer of every member, in their order.",
                    )
        refused = [
            [_verdict(data.classify, settings.classifier, text, _text(prompt), number) for text in texts]
            for number, (texts, prompt) in enumerate(zip(completions, data.prompts, strict=True), start=1)
        ]
        return Asked(completions, refused, weights)

    def evaluate(self, data: Read, answers: Asked, settings: RefusalSettings) -> "RefusalEvaluation":
        from renyi.evaluation.refusal_rates import evaluate_refusal

        groups = data.groups.of_rows if data.groups else None
        return evaluate_refusal(answers.refused, data.safe, answers.weights, groups)

    def result(
        self, data: Read, answers: Asked, found: "RefusalEvaluation", settings: RefusalSettings
    ) -> dict[str, Any]:
        by = settings.classifier or "renyi.evaluation:is_refusal"
        return {"task": self.name, "classifier": by, **as_json(found)}

    def lines(
        self, data: Read, answers: Asked, found: "RefusalEvaluation", settings: RefusalSettings
    ) -> Iterator[dict[str, Any]]:
        for i, (completions, refused) in enumerate(zip(answers.completions, answers.refused, strict=True)):
            yield {
                "index": i,
                "safe": None if data.safe is None else data.safe[i],
                "refused": refused,
                "refusal_rate": found.prompt_rate[i],
                "variance": found.prompt_variance[i],
                "completions": completions,
            }

    def report(self, data: Read, answers: Asked, found: "RefusalEvaluation", settings: RefusalSettings) -> Report:
        sections: list[Section] = [_rates(found, answers.weights)]
        if data.groups and found.groups is not None:
            rows: list[list[Cell]] = [
                [shortened(g.group, 40), g.prompts, min(g.members), max(g.members), g.variance, *g.members]
                for g in found.groups
            ]
            figures = [Column("least", ".1%"), Column("most", ".1%"), Column("variance", ".4f")]
            members = [Column(f"member {m}", ".1%") for m in range(len(answers.weights))]
            columns: list[Column | str] = [data.groups.name, Column("prompts", ","), *figures, *members]
            note = "least, most: refused by the member that refuses least, most of the group"
            sizes = [g.prompts for g in found.groups]
            sections.append(Table(f"By {data.groups.name}", columns, rows, note, sizes, narrow=5))
        sections += _most_split(data, answers, found)
        subtitle = plural(found.prompts, "prompt")
        if found.safe is not None:
            subtitle += f" · {found.prompts - found.safe:,} unsafe, {found.safe:,} safe"
        return Report("Refusals", subtitle, sections)


def _answers(models: Models, prompts: "list[Prompt]", settings: RefusalSettings) -> list[list[str]]:
    """Every member's greedy answer to every prompt, [P][M]."""
    from renyi.inference import generate

    tokenizer = models.model.tokenizer
    if tokenizer.chat_template and not settings.as_text:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    with models.progress("answering", len(prompts)) as progress:
        answers = generate(
            models.model.ensemble,
            prompts,
            tokenizer,
            batch_size=settings.batch_size,
            progress=progress,
            mixture="member",
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
        )
    return [[answer.text for answer in of_members] for of_members in answers]


# ---- Columns ---------------------------------------------------------------------------------------------------------


def _prompts(file: File) -> "list[Prompt]":
    """Column `prompt`: text, or messages."""
    from renyi.data import prompts_of

    return [row["prompt"] for row in prompts_of(file.rows, file.name)]


def _text(prompt: "Prompt") -> str:
    """A prompt as a classifier gets it: text, or the text of the last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _completions(file: File, name: str) -> list[list[str]]:
    """A column of lists of texts."""
    found = column_values(file.rows, name, "completions")
    for number, texts in enumerate(found, start=1):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(
                "is no list of texts",
                where=f"{file.name}, row {number}, column {name}",
                hint="Give an answer of every member, in their order.",
            )
    return found


def _safe(file: File, name: str | None) -> list[bool] | None:
    """Which rows are safe. Without a setting the first column that says it is used; None if there is no such column."""
    rows: Dataset = file.rows
    if name is None:
        for name in SAFE_COLUMNS:
            if name in rows.column_names:
                # In a column with another name than `safe`, a bare 1 may mean harmful.
                found = [_is_safe(value, in_words=name != "safe") for value in rows[name]]
                if None not in found:
                    return [bool(x) for x in found]
        return None
    found = [_is_safe(value) for value in column_values(rows, name, "safe")]
    if None in found:
        number = found.index(None)
        raise DataError(
            f"is {rows[name][number]!r}",
            where=f"{file.name}, row {number + 1}, column {name}",
            hint="Give true or false, or safe or unsafe, in every row.",
        )
    return [bool(x) for x in found]


def _is_safe(value: Any, in_words: bool = False) -> bool | None:
    """Whether a label says safe; None if it says neither safe nor unsafe. `in_words`: true, yes and 1 do not count."""
    text = str(value).strip().lower()
    if text in _SAFE or text in _XSTEST_SAFE or (not in_words and text in _TRUE):
        return True
    return False if text in _UNSAFE or text.startswith("contrast_") or (not in_words and text in _FALSE) else None


# ---- The classifier --------------------------------------------------------------------------------------------------


def _classifier(name: str | None) -> Classifier:
    """The library's classifier, or the function that `module:function` names."""
    from renyi.evaluation.refusal_classifier import is_refusal

    return is_refusal if name is None else named_function(name, "classifier", "a completion and its prompt")


def _verdict(classify: Classifier, name: str | None, completion: str, prompt: str, number: int) -> bool:
    try:
        verdict = classify(completion, prompt)
    except Exception as error:
        if name is None:
            raise
        raise ConfigError(
            f"{name} raised {type(error).__name__} ({error})",
            where=f"classifier, on row {number}",
            hint="It is called with a completion and its prompt, both text.",
        ) from error
    if verdict not in (True, False):
        raise ConfigError(
            f"{name} gave {verdict!r}",
            where=f"classifier, on row {number}",
            hint="Return true for a refusal, otherwise false.",
        )
    return bool(verdict)


# ---- Sections --------------------------------------------------------------------------------------------------------


def _rates(found: "RefusalEvaluation", weights: Sequence[float]) -> Table:
    """Who refuses how much, and how much members differ: of all, unsafe and safe prompts where it is known which."""
    kinds = ["all"] + [k for k in ("unsafe", "safe") if getattr(found.mixture, k) is not None]
    kinds = kinds if found.safe not in (0, found.prompts) else kinds[1:]

    def cells(rates: Any, form: str) -> list[str]:
        return [f"{getattr(rates, kind):{form}}" for kind in kinds]

    rows: list[list[Cell]] = [["mixture", "", *cells(found.mixture, ".1%")]]
    for m, (rates, weight) in enumerate(zip(found.members, weights, strict=True)):
        rows.append([f"member {m}", f"{weight:.3f}", *cells(rates, ".1%")])
    rows.append(["variance over members", "", *cells(found.variance, ".4f")])
    rows.append(["variance of their rates", "", *cells(found.rate_variance, ".4f")])
    note = "safe: over-refusal · variance over members: of refusing a prompt, at most 0.25, mean of the prompts"
    return Table("Who refuses?", ["refused", "weight", *kinds], rows, note)


def _most_split(data: Read, answers: Asked, found: "RefusalEvaluation") -> list[Section]:
    split = [i for i in found.most_split[:EXAMPLES] if found.prompt_variance[i] > 0]
    examples = [
        Example(
            f"row {i + 1}",
            f"refused by {found.prompt_rate[i]:.0%}, by weight",
            "",
            [],
            [
                ["prompt", "", one_line(_text(data.prompts[i]))],
                *(
                    [f"member {m}", "refuses" if refused else "answers", one_line(text)]
                    for m, (text, refused) in enumerate(zip(answers.completions[i], answers.refused[i], strict=True))
                ),
            ],
            {1 + m: "bad" if refused else "good" for m, refused in enumerate(answers.refused[i])},
        )
        for i in split
    ]
    return [Examples("Prompts that split the members", "rows counted from 1", examples)] if examples else []


TASK = Refusal()
