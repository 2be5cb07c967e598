"""`renyi evaluate --task sampling`: how good samples of an ensemble are and how much they vary, the base's beside them.

It draws samples or reads them, and has them checked; the figures are `renyi.evaluation.evaluate_sampling`'s.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from renyi.cli.console import emit_json, plural, quiet_progress_bars, stream
from renyi.cli.parser import converted
from renyi.cli.reading import Loaded, load_ensemble, load_rows, progress_bar, write_lines
from renyi.cli.tables import LONGEST_TEXT, as_json, figures_table, shortened, titled
from renyi.cli.tasks.answers import CHECKS, Check, read_check
from renyi.cli.tasks.choice import interval
from renyi.cli.tasks.files import baseline_name, load_baseline
from renyi.errors import ConfigError, DataError

if TYPE_CHECKING:
    from renyi.evaluation import Sample, SamplingEvaluation
    from renyi.inference import Prompt
    from renyi.inference.draws import Draw

BASE = "base"  # what --baseline calls the ensemble's own base
SHOWN_SAMPLES = 6  # of one prompt


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this task, but for those that it shares with choice (baselines) and refusal (batches)."""
    flags = parser.add_argument_group(
        "sampling", f"and --max_new_tokens, --batch_size, --resamples, --baseline (DIR, or {BASE}: the base alone)"
    )
    flags.add_argument("--samples", default="16", metavar="K", help="samples of every prompt; 16")
    flags.add_argument("--temperature", default="1", metavar="T", help="to sample at; 1, which is the model itself")
    flags.add_argument("--top_p", default="1", metavar="P", help="sample from the likeliest tokens of this mass; 1")
    flags.add_argument("--seed", default="0", metavar="N", help="of the sampling; 0")
    flags.add_argument("--member", metavar="M", help="sample from one member, counted from 0; by default the mixture")
    flags.add_argument(
        "--baseline_temperature", action="append", metavar="T", help="the base at this temperature beside it; repeat"
    )
    flags.add_argument("--answer", metavar="COLUMN", help="the right answer, or a list of them; by default answer")
    flags.add_argument("--check", metavar="HOW", help=f"whether a sample is right: {CHECKS}; exact")
    flags.add_argument(
        "--samples_from",
        metavar="FILE",
        help="lines with index and sample, as --output writes them, to evaluate instead",
    )


@dataclass(frozen=True)
class _Settings:
    """How samples are drawn."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    member: int | None
    batch_size: int
    baseline_temperature: list[float]


def run(args: argparse.Namespace) -> int:
    """Evaluate samples."""
    settings = _settings(args)
    resamples = converted(args.resamples, int, None, "--resamples")
    if resamples < 0:
        raise ConfigError(f"is {resamples}", where="--resamples", hint="Give a number of draws, or 0 for none.")
    out, err = stream(), stream(stderr=True)
    with err.status("loading"):
        from renyi.data import check_prompts
        from renyi.evaluation import evaluate_sampling

        quiet_progress_bars()
        rows = load_rows(args)
        check_prompts(rows, args.data)
        prompts: list[Prompt] = list(rows["prompt"])
        check = read_check(rows, args.answer, args.check, args.data)
        given = _read_samples(args, len(prompts)) if args.samples_from else {}
        loaded = load_ensemble(args)

    drawn = {name: _as_draws(of_prompts, loaded) for name, of_prompts in given.items()}
    for source in _sources(args, settings, loaded, own=not given):
        if source.name in drawn:
            raise ConfigError(f"{source.name} is there already", where=source.flag, hint="Give every model once.")
        drawn[source.name] = _draw(settings, source, prompts, loaded)
    systems = {name: _judged(name, of_prompts, prompts, loaded, check) for name, of_prompts in drawn.items()}
    evaluation = evaluate_sampling(systems, resamples=resamples)
    if args.output:
        write_lines(_lines(prompts, drawn, systems), args.output)
    if args.json:
        told = {"task": args.task, "check": check.how, "samples_from": args.samples_from, "sampling": asdict(settings)}
        emit_json({**told, **as_json(evaluation)})
        return 0
    out.print(_report(evaluation, settings, check, is_given=bool(given)))
    first = next(iter(systems.values()))
    shown = [i for i in evaluation.most_varied[: args.show] if len({sample.answer for sample in first[i]}) > 1]
    if shown:
        out.print(_most_varied(shown, prompts, first, evaluation.systems[0].name))
    if args.output:
        number = sum(len(samples) for of_prompts in systems.values() for samples in of_prompts)
        err.print(f"\n{plural(number, 'line')} in {args.output}", soft_wrap=True)
    return 0


def _settings(args: argparse.Namespace) -> _Settings:
    if args.group:
        raise ConfigError("goes not with --task sampling", where="--group", hint="Leave it out.")
    if args.samples_from and args.member is not None:
        raise ConfigError("goes without --member", where="--samples_from", hint="Give one or the other.")
    top_p = converted(args.top_p, float, None, "--top_p")
    if not 0 < top_p <= 1:
        raise ConfigError(f"is {top_p:g}", where="--top_p", hint="Give a number above 0, up to 1.")
    return _Settings(
        samples=_above_zero(args.samples, int, "--samples"),
        max_new_tokens=_above_zero(args.max_new_tokens, int, "--max_new_tokens"),
        temperature=_above_zero(args.temperature, float, "--temperature"),
        top_p=top_p,
        seed=converted(args.seed, int, None, "--seed"),
        member=converted(args.member, int | None, None, "--member"),
        batch_size=_above_zero(args.batch_size, int, "--batch_size"),
        baseline_temperature=[
            _above_zero(text, float, "--baseline_temperature") for text in args.baseline_temperature or []
        ],
    )


def _above_zero(text: str, kind: type, flag: str) -> Any:
    value = converted(text, kind, None, flag)
    if not 0 < value < float("inf"):
        what = "an integer" if kind is int else "a number"
        raise ConfigError(f"is {value:g}", where=flag, hint=f"Give {what} above 0.")
    return value


# ---- Samples that are drawn ------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """A model to sample from: its name in tables, all its members (None), some or none, and the flag that asked."""

    name: str
    model: Loaded
    members: Sequence[int] | None
    temperature: float
    flag: str


def _sources(args: argparse.Namespace, settings: _Settings, loaded: Loaded, own: bool) -> Iterator[_Source]:
    """The ensemble or its member, unless samples are given, and the baselines; each is loaded when its turn comes."""
    member, temperature, many = settings.member, settings.temperature, loaded.ensemble.num_members
    if member is not None and not 0 <= member < many:
        raise ConfigError(f"there is no member {member} of {many}", where="--member", hint=f"Give 0 to {many - 1}.")
    if own and member is None:
        yield _Source("mixture", loaded, None, temperature, "ENSEMBLE")
    elif own:
        yield _Source(f"member {member}", loaded, [member or 0], temperature, "--member")
    for folder in args.baseline or []:
        if folder == BASE:
            yield _Source(BASE, loaded, (), temperature, "--baseline")
            continue
        other = load_baseline(args, folder)
        sizes = [len(x.ensemble.get_input_embeddings().weight) for x in (loaded, other)]  # type: ignore[arg-type]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"its base has {sizes[1]:,} tokens, and that of ENSEMBLE {sizes[0]:,}",
                where=f"--baseline {folder}",
                hint="Samples are compared under one base: give an ensemble on the same one.",
            )
        yield _Source(baseline_name(folder, [BASE]), other, None, temperature, "--baseline")
    for t in settings.baseline_temperature:
        yield _Source(f"{BASE}, T={t:g}", loaded, (), t, "--baseline_temperature")


def _draw(settings: _Settings, source: _Source, prompts: "Sequence[Prompt]", loaded: Loaded) -> "list[list[Draw]]":
    """Samples of every prompt, [P][K]; the tokens are those of the ensemble's tokenizer, whatever is sampled from."""
    from renyi.inference.draws import draw_samples

    ensemble = source.model.ensemble
    chosen = nullcontext() if source.members is None else ensemble.using(source.members)
    with progress_bar(stream(stderr=True), f"sampling {source.name}", len(prompts)) as progress, chosen:
        return draw_samples(
            ensemble,
            prompts,
            loaded.tokenizer,
            settings.samples,
            max_new_tokens=settings.max_new_tokens,
            temperature=source.temperature,
            top_p=settings.top_p,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )


def _judged(
    name: str, of_prompts: "list[list[Draw]]", prompts: "Sequence[Prompt]", loaded: Loaded, check: Check
) -> "list[list[Sample]]":
    """The same samples with how likely they are to the base, and whether they are right."""
    from renyi.evaluation import Sample
    from renyi.inference.draws import base_log_likelihood
    from renyi.inference.generate import prompt_ids

    contexts = [prompt_ids(prompt, loaded.tokenizer, number) for number, prompt in enumerate(prompts, start=1)]
    at = [row for row, draws in enumerate(of_prompts) for _ in draws]
    ids = [draw.token_ids for draws in of_prompts for draw in draws]
    with progress_bar(stream(stderr=True), f"scoring {name}", len(ids)) as progress:
        found = iter(base_log_likelihood(loaded.ensemble, [contexts[row] for row in at], ids, progress=progress))

    def judged(row: int, draw: "Draw") -> "Sample":
        nats = (next(found), draw.log_prob, draw.entropy)
        return Sample(draw.text, len(draw.token_ids), *nats, draw.truncated, *check.judge(row, draw.text))

    return [[judged(row, draw) for draw in draws] for row, draws in enumerate(of_prompts)]


# ---- Samples that are there ------------------------------------------------------------------------------------------


def _read_samples(args: argparse.Namespace, prompts: int) -> dict[str, list[list[dict[str, Any]]]]:
    """The lines of `--samples_from` by model (the file's name where they name none) and row, [P][K]."""
    single = copy.copy(args)
    single.data, single.split, single.dataset_config = args.samples_from, None, None
    lines = load_rows(single)
    for column in ("index", "sample"):
        if column not in lines.column_names:
            raise DataError(
                f"the columns are {', '.join(lines.column_names)}",
                where=args.samples_from,
                hint="A line has an `index`, the row of DATA counted from 0, and a `sample`, text.",
            )
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{args.samples_from}, line {number}, column "
        index = line["index"]
        if not isinstance(index, int) or not 0 <= index < prompts:
            hint = f"Give the row of the prompt in {args.data}, counted from 0."
            raise DataError(f"is {index!r}, of {plural(prompts, 'prompt')}", where=f"{where}index", hint=hint)
        if not isinstance(line["sample"], str):
            raise DataError(f"is {line['sample']!r}", where=f"{where}sample", hint="Give text; it may be empty.")
        model = str(line.get("model") or Path(args.samples_from).stem)
        found.setdefault(model, [[] for _ in range(prompts)])[index].append(line)
    for model, of_prompts in found.items():
        for index, of_prompt in enumerate(of_prompts):
            if len(of_prompt) != len(of_prompts[0]) or not of_prompt:
                has = plural(len(of_prompt), "sample")
                raise DataError(
                    f"row {index + 1} has {has} of {model}, and row 1 {len(of_prompts[0])}",
                    where=args.samples_from,
                    hint="Give as many samples of every prompt, and at least one.",
                )
    return found


def _as_draws(of_prompts: list[list[dict[str, Any]]], loaded: Loaded) -> "list[list[Draw]]":
    """Lines as samples. What a line does not say stays unknown; only tokens are then those of its text."""
    from renyi.inference.draws import Draw

    def draw(line: dict[str, Any]) -> "Draw":
        ids = line.get("token_ids")
        ids = loaded.tokenizer(line["sample"], add_special_tokens=False)["input_ids"] if ids is None else ids
        return Draw(line["sample"], list(ids), *(line.get(name) for name in ("log_prob", "entropy", "truncated")))

    return [[draw(line) for line in lines] for lines in of_prompts]


def _lines(
    prompts: "Sequence[Prompt]", drawn: "dict[str, list[list[Draw]]]", systems: "dict[str, list[list[Sample]]]"
) -> Iterator[dict[str, Any]]:
    for name, of_prompts in systems.items():
        for index, (prompt, samples, draws) in enumerate(zip(prompts, of_prompts, drawn[name], strict=True)):
            for sample, draw in zip(samples, draws, strict=True):
                line = sample._asdict()
                text = line.pop("text")
                yield as_json(
                    {
                        "index": index,
                        "model": name,
                        "prompt": prompt,
                        "sample": text,
                        **line,
                        "token_ids": draw.token_ids,
                    }
                )


# ---- Tables ----------------------------------------------------------------------------------------------------------


def _report(evaluation: "SamplingEvaluation", settings: _Settings, check: Check, is_given: bool) -> RenderableType:
    subtitle = plural(evaluation.prompts, "prompt")
    if is_given:
        subtitle += f" · {plural(evaluation.systems[0].samples, 'sample')} of each, given"
    else:
        subtitle += f" · {plural(settings.samples, 'sample')} of each, of at most {settings.max_new_tokens:,} tokens"
        subtitle += f" · temperature {settings.temperature:g}, top-p {settings.top_p:g}"
    parts: list[RenderableType] = [titled("Samples"), Text(subtitle, "dim")]
    parts += [] if check.how is None else _right(evaluation, check.how)
    return Group(*parts, *_variety(evaluation), *_lengths(evaluation), *_probability(evaluation))


def _name(name: str) -> Text:
    return Text(shortened(name, 20))


def _figure(value: float, form: str) -> str:
    return "–" if value != value else format(value, form)


def _right(evaluation: "SamplingEvaluation", how: str) -> list[RenderableType]:
    ks = sorted({k for s in evaluation.systems for k in s.pass_at or {} if k > 1})
    table = figures_table(["right", "one sample", "majority", *(f"pass@{k}" for k in ks)])
    for s in evaluation.systems:
        of_k = [f"{s.pass_at[k].value:.1%}" if s.pass_at and k in s.pass_at else "–" for k in ks]
        table.add_row(_name(s.name), *(interval(x, ".1%") for x in (s.accuracy, s.majority) if x), *of_k)
    legend = f"by {shortened(how, 32)} · pass@k: one of k samples is right · ± half a 95 % interval over prompts"
    return [table, Text(legend, "dim"), Text()]


def _variety(evaluation: "SamplingEvaluation") -> list[RenderableType]:
    orders = list(evaluation.systems[0].distinct)
    columns = [*(f"dist-{n}" for n in orders), *(f"all-{n}" for n in orders), "self-BLEU", "unique"]
    table = figures_table(["variety", *columns])
    for s in evaluation.systems:
        figures = [_figure(s.distinct[n].value, ".3f") for n in orders]
        figures += [_figure(s.distinct_all[n], ".3f") for n in orders]
        table.add_row(_name(s.name), *figures, interval(s.self_bleu, ".3f"), _figure(s.unique.value, ".3f"))
    legend = "dist-n: distinct-n among a prompt's samples, all-n: among all · unique: answers that differ"
    return [table, Text(legend, "dim"), Text()]


def _lengths(evaluation: "SamplingEvaluation") -> list[RenderableType]:
    quantiles = list(evaluation.systems[0].lengths.quantiles)
    table = figures_table(["length", "mean", "sd", *(f"{q} %" for q in quantiles), "cut"])
    for s in evaluation.systems:
        found = s.lengths
        figures = [f"{found.mean:,.1f}", f"{found.sd:,.1f}", *(f"{found.quantiles[q]:,.0f}" for q in quantiles)]
        table.add_row(_name(s.name), *figures, "–" if found.truncated is None else f"{found.truncated:.1%}")
    return [table, Text("in tokens, the end of text being one · cut: still going on at the most tokens", "dim"), Text()]


def _probability(evaluation: "SamplingEvaluation") -> list[RenderableType]:
    columns = ["base a token", "own a token", "entropy a token", "base a sample", "own a sample"]
    table = figures_table(["log-probability", *columns])
    for s in evaluation.systems:
        a_token = [s.base_log_prob_per_token, s.log_prob_per_token, s.entropy_per_token]
        a_sample = [s.base_log_prob, s.log_prob]
        table.add_row(
            _name(s.name),
            *(interval(figure, ".3f") for figure in a_token),
            *(_figure(figure.value, ".2f") for figure in a_sample),
        )
    legend = "nats · own: under what was sampled from · entropy: exact at each sampled token, their mean"
    return [table, Text(legend, "dim")]


def _most_varied(
    shown: Sequence[int], prompts: "Sequence[Prompt]", samples: "Sequence[Sequence[Sample]]", name: str
) -> RenderableType:
    parts: list[RenderableType] = [
        titled("Prompts with the most varied samples"),
        Text(f"of {name} · rows counted from 1", "dim"),
    ]
    for i in shown:
        asked = prompts[i]
        prompt = asked if isinstance(asked, str) else asked[-1]["content"]
        first = {sample.answer: sample for sample in reversed(samples[i])}
        counts = Counter(sample.answer for sample in samples[i]).most_common()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, justify="right")
        grid.add_column()
        grid.add_row("prompt", Text(_one_line(str(prompt))))
        for answer, count in counts[:SHOWN_SAMPLES]:
            right = first[answer].right
            style = "" if right is None else "green" if right else "red"
            grid.add_row(f"{count} ×", Text(_one_line(first[answer].text) or "(nothing)", style))
        if len(counts) > SHOWN_SAMPLES:
            grid.add_row("", Text(f"and {len(counts) - SHOWN_SAMPLES} more", "dim"))
        head = Text.assemble((f"\nrow {i + 1}", "bold"), f"   {len(counts)} different of {len(samples[i])}")
        parts += [head, Padding(grid, (0, 0, 0, 2), expand=False)]
    return Group(*parts)


def _one_line(text: str) -> str:
    return shortened(" ".join(text.split()), LONGEST_TEXT)
