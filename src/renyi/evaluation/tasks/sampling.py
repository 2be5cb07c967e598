"""Samples: how good an ensemble's samples are and how much they vary, beside those of the base and other ensembles.

Samples are drawn by `renyi.inference.draws` or read from a file, and checked by `renyi.evaluation.answer_checks`. The
figures are `renyi.evaluation.sample_quality`'s.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from renyi.errors import ConfigError, DataError
from renyi.evaluation.answer_checks import CHECKS, Check, read_check
from renyi.evaluation.files import File, load_rows
from renyi.evaluation.sections import Cell, Column, Example, Examples, Report, Section, Table, one_line, shortened
from renyi.evaluation.task import Compared, Model, Models, Resampled, Task, as_json, is_positive, setting
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.evaluation.sample_quality import Sample, SamplingEvaluation
    from renyi.inference import Prompt
    from renyi.inference.draws import Draw

BASE = "base"  # what --baseline calls the ensemble's own base
EXAMPLES = 10
SHOWN_SAMPLES = 6  # of one prompt
# The settings that say how samples are drawn.
DRAWING = (
    "samples",
    "max_new_tokens",
    "temperature",
    "top_p",
    "seed",
    "member",
    "batch_size",
    "baseline_temperature",
)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(Compared, Resampled):
    """Settings of the sampling task."""

    baseline: list[str] = setting(
        [], f"another ensemble to sample beside it, or {BASE}: its base alone; repeat the flag for more", "DIR"
    )
    samples: int = setting(16, "samples of every prompt", "K")
    temperature: float = setting(1.0, "temperature of the samples; 1 is the model itself", "T")
    top_p: float = setting(1.0, "sample from the likeliest tokens of this total probability", "P")
    seed: int = setting(0, "seed of the sampling", "N")
    member: int | None = setting(None, "sample from one member, counted from 0; by default the mixture", "M")
    max_new_tokens: int = setting(128, "the most tokens of a sample", "N")
    batch_size: int = setting(8, "prompts that are sampled together", "N")
    baseline_temperature: list[float] = setting(
        [], "also sample the base at this temperature; repeat the flag for more", "T"
    )
    answer: str | None = setting(
        None, "the column of the right answer, or of a list of them (default: answer)", "COLUMN"
    )
    check: str | None = setting(None, f"whether a sample is right: {CHECKS} (default: exact)", "HOW")
    samples_from: str | None = setting(
        None, "evaluate these lines (index and sample, as --output writes them) instead of sampling", "FILE"
    )

    def validate(self) -> None:
        super().validate()
        if self.samples_from and self.member is not None:
            raise ConfigError("cannot be combined with --member", where="samples_from", hint="Give one or the other.")
        for name in ("samples", "max_new_tokens", "batch_size"):
            self.require(is_positive(getattr(self, name)), name, "Give an integer above 0.")
        self.require(is_positive(self.temperature), "temperature", "Give a number above 0.")
        self.require(0 < self.top_p <= 1, "top_p", "Give a number above 0, up to 1.")
        for value in self.baseline_temperature:
            if not is_positive(value):
                raise ConfigError(f"is {value:g}", where="baseline_temperature", hint="Give a number above 0.")


class Read(NamedTuple):
    """Prompts, how samples are checked, and the lines of samples that are given, by model and row."""

    prompts: "list[Prompt]"
    check: Check
    given: dict[str, list[list[dict[str, Any]]]]


class Asked(NamedTuple):
    """By model, the samples of each prompt [P][K]: as they were drawn, and as they were judged."""

    drawn: "dict[str, list[list[Draw]]]"
    judged: "dict[str, list[list[Sample]]]"


class Sampling(Task):
    """Samples."""

    name = "sampling"
    Settings = SamplingSettings

    def read(self, files: Sequence[File], settings: SamplingSettings) -> Read:
        from renyi.data import check_prompts

        (file,) = files
        check_prompts(file.rows, file.name)
        prompts: list[Prompt] = list(file.rows["prompt"])
        check = read_check(file.rows, settings.answer, settings.check, file.name)
        given = _read_samples(settings.samples_from, file.name, len(prompts)) if settings.samples_from else {}
        return Read(prompts, check, given)

    def ask(self, models: Models, data: Read, settings: SamplingSettings) -> Asked:
        model = models.model
        drawn = {name: _as_draws(of_prompts, model) for name, of_prompts in data.given.items()}
        for source in _sources(models, settings, own=not data.given):
            if source.name in drawn:
                raise ConfigError(f"{source.name} is there already", where=source.where, hint="Give every model once.")
            drawn[source.name] = _draw(models, settings, source, data.prompts)
        judged = {name: _judged(models, name, of_prompts, data) for name, of_prompts in drawn.items()}
        return Asked(drawn, judged)

    def evaluate(self, data: Read, answers: Asked, settings: SamplingSettings) -> "SamplingEvaluation":
        from renyi.evaluation.sample_quality import evaluate_sampling

        return evaluate_sampling(answers.judged, resamples=settings.resamples)

    def result(
        self, data: Read, answers: Asked, found: "SamplingEvaluation", settings: SamplingSettings
    ) -> dict[str, Any]:
        made_with = {"check": data.check.how, "samples_from": settings.samples_from}
        drawing = {name: getattr(settings, name) for name in DRAWING}
        return {"task": self.name, **made_with, "sampling": drawing, **as_json(found)}

    def lines(
        self, data: Read, answers: Asked, found: "SamplingEvaluation", settings: SamplingSettings
    ) -> Iterator[dict[str, Any]]:
        for name, of_prompts in answers.judged.items():
            for index, (samples, draws) in enumerate(zip(of_prompts, answers.drawn[name], strict=True)):
                for sample, draw in zip(samples, draws, strict=True):
                    line = sample._asdict()
                    head = {"index": index, "model": name, "prompt": data.prompts[index], "sample": line.pop("text")}
                    yield as_json({**head, **line, "token_ids": draw.token_ids})

    def report(self, data: Read, answers: Asked, found: "SamplingEvaluation", settings: SamplingSettings) -> Report:
        subtitle = plural(found.prompts, "prompt")
        if data.given:
            subtitle += f" · {plural(found.systems[0].samples, 'sample')} of each, given"
        else:
            subtitle += (
                f" · {plural(settings.samples, 'sample')} of each, of at most {settings.max_new_tokens:,} tokens"
            )
            subtitle += f" · temperature {settings.temperature:g}, top-p {settings.top_p:g}"
        has_intervals = settings.resamples > 0
        sections: list[Section] = [] if data.check.how is None else [_right(found, data.check.how, has_intervals)]
        sections += [_variety(found, has_intervals), _lengths(found), _probability(found, has_intervals)]
        return Report("Samples", subtitle, [*sections, *_most_varied(data, answers, found)])


# ---- Samples that are drawn ------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A model to sample from: its name in tables, its members (None: all), and the setting that asked for it."""

    name: str
    model: Model
    members: Sequence[int] | None
    temperature: float
    where: str


def _sources(models: Models, settings: SamplingSettings, own: bool) -> Iterator[_Source]:
    """The ensemble or its member, unless samples are given, and the baselines; each is loaded when its turn comes."""
    model = models.model
    member, temperature, many = settings.member, settings.temperature, model.ensemble.num_members
    if member is not None and not 0 <= member < many:
        raise ConfigError(f"there is no member {member} of {many}", where="member", hint=f"Give 0 to {many - 1}.")
    if own and member is None:
        yield _Source("mixture", model, None, temperature, "ENSEMBLE")
    elif own:
        yield _Source(f"member {member}", model, [member or 0], temperature, "member")
    others = iter(models.baselines([name for name in settings.baseline if name != BASE], taken=[BASE]))
    for folder in settings.baseline:
        if folder == BASE:
            yield _Source(BASE, model, (), temperature, "baseline")
            continue
        name, other = next(others)
        sizes = [len(x.ensemble.get_input_embeddings().weight) for x in (model, other)]  # type: ignore[arg-type]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"its base has {sizes[1]:,} tokens, and that of ENSEMBLE {sizes[0]:,}",
                where=f"baseline {folder}",
                hint="Samples are compared under one base: give an ensemble on the same one.",
            )
        yield _Source(name, other, None, temperature, "baseline")
    for t in settings.baseline_temperature:
        yield _Source(f"{BASE}, T={t:g}", model, (), t, "baseline_temperature")


def _draw(
    models: Models, settings: SamplingSettings, source: _Source, prompts: "Sequence[Prompt]"
) -> "list[list[Draw]]":
    """Samples of every prompt, [P][K]. Every model uses the tokens of the ensemble's tokenizer."""
    from renyi.inference.draws import draw_samples

    ensemble = source.model.ensemble
    chosen = nullcontext() if source.members is None else ensemble.using(source.members)
    with models.progress(f"sampling {source.name}", len(prompts)) as progress, chosen:
        return draw_samples(
            ensemble,
            prompts,
            models.model.tokenizer,
            settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=source.temperature,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )


def _judged(models: Models, name: str, of_prompts: "list[list[Draw]]", data: Read) -> "list[list[Sample]]":
    """The same samples with how likely they are to the base, and whether they are right."""
    from renyi.evaluation.sample_quality import Sample
    from renyi.inference.draws import base_log_likelihood
    from renyi.inference.generate import prompt_ids

    model = models.model
    contexts = [prompt_ids(prompt, model.tokenizer, number) for number, prompt in enumerate(data.prompts, start=1)]
    at = [row for row, draws in enumerate(of_prompts) for _ in draws]
    ids = [draw.token_ids for draws in of_prompts for draw in draws]
    with models.progress(f"scoring {name}", len(ids)) as progress:
        found = iter(base_log_likelihood(model.ensemble, [contexts[row] for row in at], ids, progress=progress))

    def judged(row: int, draw: "Draw") -> "Sample":
        nats = (next(found), draw.log_prob, draw.entropy)
        return Sample(draw.text, len(draw.token_ids), *nats, draw.truncated, *data.check.judge(row, draw.text))

    return [[judged(row, draw) for draw in draws] for row, draws in enumerate(of_prompts)]


# ---- Samples that are there ------------------------------------------------------------------------------------------


def _read_samples(file: str, data: str, prompts: int) -> dict[str, list[list[dict[str, Any]]]]:
    """The lines of `samples_from` by model (the file's name where they name none) and row, [P][K]."""
    lines = load_rows(file)
    for column in ("index", "sample"):
        if column not in lines.column_names:
            raise DataError(
                f"the columns are {', '.join(lines.column_names)}",
                where=file,
                hint="A line has an `index`, the row of DATA counted from 0, and a `sample`, text.",
            )
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}, column "
        index = line["index"]
        if not isinstance(index, int) or not 0 <= index < prompts:
            hint = f"Give the row of the prompt in {data}, counted from 0."
            raise DataError(f"is {index!r}, of {plural(prompts, 'prompt')}", where=f"{where}index", hint=hint)
        if not isinstance(line["sample"], str):
            raise DataError(f"is {line['sample']!r}", where=f"{where}sample", hint="Give text; it may be empty.")
        model = str(line.get("model") or Path(file).stem)
        found.setdefault(model, [[] for _ in range(prompts)])[index].append(line)
    for model, of_prompts in found.items():
        for index, of_prompt in enumerate(of_prompts):
            if len(of_prompt) != len(of_prompts[0]) or not of_prompt:
                has = plural(len(of_prompt), "sample")
                raise DataError(
                    f"row {index + 1} has {has} of {model}, and row 1 {len(of_prompts[0])}",
                    where=file,
                    hint="Give as many samples of every prompt, and at least one.",
                )
    return found


def _as_draws(of_prompts: list[list[dict[str, Any]]], model: Model) -> "list[list[Draw]]":
    """Lines as samples. What a line does not say stays unknown, except tokens, which are made from its text."""
    from renyi.inference.draws import Draw

    def draw(line: dict[str, Any]) -> "Draw":
        ids = line.get("token_ids")
        ids = model.tokenizer(line["sample"], add_special_tokens=False)["input_ids"] if ids is None else ids
        return Draw(line["sample"], list(ids), *(line.get(name) for name in ("log_prob", "entropy", "truncated")))

    return [[draw(line) for line in lines] for lines in of_prompts]


# ---- Sections --------------------------------------------------------------------------------------------------------


def _right(found: "SamplingEvaluation", how: str, has_intervals: bool) -> Table:
    ks = sorted({k for s in found.systems for k in s.pass_at or {} if k > 1})
    rows: list[list[Cell]] = []
    for s in found.systems:
        of_k = [s.pass_at[k].value if s.pass_at and k in s.pass_at else None for k in ks]
        rows.append([shortened(s.name, 20), s.accuracy, s.majority, *of_k])
    columns: list[Column | str] = [
        Column(name, ".1%", "high") for name in ("one sample", "majority", *(f"pass@{k}" for k in ks))
    ]
    note = f"by {shortened(how, 32)} · pass@k: one of k is right · intervals of 95 % over prompts"
    return Table("", ["right", *columns], rows, note, has_intervals=has_intervals)


def _variety(found: "SamplingEvaluation", has_intervals: bool) -> Table:
    orders = list(found.systems[0].distinct)
    names = [*(f"dist-{n}" for n in orders), *(f"all-{n}" for n in orders), "self-BLEU", "unique"]
    rows: list[list[Cell]] = [
        [
            shortened(s.name, 20),
            *(s.distinct[n].value for n in orders),
            *(s.distinct_all[n] for n in orders),
            s.self_bleu,
            s.unique.value,
        ]
        for s in found.systems
    ]
    note = "dist-n: distinct-n among a prompt's samples, all-n: among all · unique: answers that differ"
    return Table("", ["variety", *(Column(n, ".3f") for n in names)], rows, note, has_intervals=has_intervals)


def _lengths(found: "SamplingEvaluation") -> Table:
    quantiles = list(found.systems[0].lengths.quantiles)
    rows: list[list[Cell]] = []
    for s in found.systems:
        of = s.lengths
        rows.append([shortened(s.name, 20), of.mean, of.sd, *(of.quantiles[q] for q in quantiles), of.truncated])
    figures = [Column("mean", ",.1f"), Column("sd", ",.1f"), *(Column(f"{q} %", ",.0f") for q in quantiles)]
    note = "in tokens, the end of text being one · cut: still going on at the most tokens"
    return Table("", ["length", *figures, Column("cut", ".1%")], rows, note)


def _probability(found: "SamplingEvaluation", has_intervals: bool) -> Table:
    rows: list[list[Cell]] = [
        [
            shortened(s.name, 20),
            *(s.base_log_prob_per_token, s.log_prob_per_token, s.entropy_per_token),
            *(s.base_log_prob.value, s.log_prob.value),
        ]
        for s in found.systems
    ]
    a_token = [Column(f"{name} a token", ".3f") for name in ("base", "own", "entropy")]
    columns: list[Column | str] = [
        "log-probability",
        *a_token,
        Column("base a sample", ".2f"),
        Column("own a sample", ".2f"),
    ]
    note = "nats · own: under what was sampled from · entropy: exact at each sampled token, their mean"
    return Table("", columns, rows, note, has_intervals=has_intervals)


def _most_varied(data: Read, answers: Asked, found: "SamplingEvaluation") -> list[Section]:
    samples = next(iter(answers.judged.values()))
    shown = [i for i in found.most_varied if len({sample.answer for sample in samples[i]}) > 1]
    examples = []
    for i in shown[:EXAMPLES]:
        asked = data.prompts[i]
        prompt = asked if isinstance(asked, str) else asked[-1]["content"]
        first = {sample.answer: sample for sample in reversed(samples[i])}
        counts = Counter(sample.answer for sample in samples[i]).most_common()
        rows, marks = [["prompt", one_line(str(prompt))]], {}
        for answer, count in counts[:SHOWN_SAMPLES]:
            right = first[answer].right
            if right is not None:
                marks[len(rows)] = "good" if right else "bad"
            rows.append([f"{count} ×", one_line(first[answer].text) or "(nothing)"])
        if len(counts) > SHOWN_SAMPLES:
            rows.append(["", f"and {len(counts) - SHOWN_SAMPLES} more"])
        aside = f"{len(counts)} different of {len(samples[i])}"
        examples.append(Example(f"row {i + 1}", aside, "", [], rows, marks))  # type: ignore[arg-type]
    note = f"of {found.systems[0].name} · rows counted from 1"
    return [Examples("Prompts with the most varied samples", note, examples)] if examples else []


TASK = Sampling()
