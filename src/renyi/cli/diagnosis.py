"""How a diagnosis is shown: what was found and what it means, what else could explain it, and the examples behind it.

Read next: `renyi.inference.diagnose`, which makes the diagnosis.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.tables import LONGEST_TEXT, shortened, titled
from renyi.labels import IGNORED
from renyi.text import plural

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from renyi.inference import Diagnosis

LONGEST_EXAMPLE = 2 * LONGEST_TEXT  # characters shown of an example


class LoadedExample(NamedTuple):
    """An example with its row, counted from 0, its loading on the leading direction, and its text."""

    index: int  # type: ignore[assignment]
    loading: float
    text: Text


class Doubt(NamedTuple):
    """Another cause that could look like a contradiction, and what to do about it."""

    what: str
    hint: str


def doubts_of(found: "Diagnosis", is_trained: bool, is_fitted_to: bool = False) -> list[Doubt]:
    """Causes other than the data that could explain the critical alpha.

    Args:
        found: the diagnosis.
        is_trained: whether the adapter does anything.
        is_fitted_to: whether the rows are known to be those that the adapter was fitted to.
    """
    from renyi.inference.diagnose import OVERCONFIDENT, UNDERCONFIDENT, UNFINISHED

    if not is_trained:
        what = "the adapter is untrained: this is the base against the data, not the data against themselves"
        return [Doubt(what, "Train one adapter on these data first, then diagnose it.")]
    doubts = []
    if found.undecided:
        what = f"these examples cannot tell: the interval is from {found.low:.2g} to {found.high:.2g}"
        doubts.append(Doubt(what, "Measure more: raise --max_examples, or give more rows."))
    if found.mean_share > UNFINISHED:
        what = f"{found.mean_share:.0%} of the leading direction is work that the adapter has not done yet"
        doubts.append(Doubt(what, "Train it longer first: members would part over what one of them could still learn."))
    if is_fitted_to:
        what = "these are the rows that the adapter was fitted to, and on them it looks better than it is"
        doubts.append(Doubt(what, "Diagnose rows that training did not see: hold some out with test_split_size."))
    if found.calibration is not None and found.calibration < UNDERCONFIDENT:
        what = f"the adapter is less sure than it is right (calibration {found.calibration:.2f}, where 1 is calibrated)"
        hint = "It is not fitted, or these rows are its own training rows; the critical alpha may be too high."
        doubts.append(Doubt(what, hint))
    if found.calibration is not None and found.calibration > OVERCONFIDENT:
        what = f"the adapter is surer than it is right (calibration {found.calibration:.2f}, where 1 is calibrated)"
        hint = "It is not fitted, fits its training data too well, or is too small; the critical alpha may be too low."
        doubts.append(Doubt(what, hint))
    return doubts


def findings(found: "Diagnosis", kind: str, seconds: float) -> RenderableType:
    """Each figure with what it means; `kind` is what an example is called."""
    from renyi.inference.diagnose import OVERCONFIDENT, UNDERCONFIDENT, UNFINISHED

    table = Table.grid(padding=(0, 3))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")

    def add(name: str, value: str, meaning: str, style: str = "") -> None:
        table.add_row(name, Text(value, style), Text(meaning))

    add("critical alpha", f"{found.critical_alpha:.3g} [{found.low:.3g}, {found.high:.3g}]", _meaning(found), "bold")
    meaning = "half-way from the critical alpha to 1"
    if not found.contradicted:
        meaning = f"{meaning}, if at all" if found.undecided else "members stay together whatever it is"
    add("recommended alpha", f"{found.alpha:g}", meaning, "bold")
    apart = plural(found.members - 1, "direction")
    alike = "more may be alike" if found.undecided else "more would be alike"
    meaning = f"they part along {apart} at that alpha" if found.members > 1 else alike
    add("recommended members", str(found.members), meaning, "bold")
    meaning = f"of the leading direction; below {UNFINISHED:.0%} is fine"
    style = "yellow" if found.mean_share > UNFINISHED else ""
    add("unfinished fitting", f"{found.mean_share:.1%}", meaning, style)
    if found.calibration is not None:
        meaning = f"1: as sure as right; above {OVERCONFIDENT}: too sure; below {UNDERCONFIDENT}: not sure enough"
        style = "" if UNDERCONFIDENT <= found.calibration <= OVERCONFIDENT else "yellow"
        add("calibration", f"{found.calibration:.3g}", meaning, style)
    measured = plural(len(found.examples), kind)
    if found.groups is not None:
        measured = f"{plural(len(found.groups), 'group')} of {measured}"
    subtitle = (
        f"{measured} along {plural(len(found.eigenvalues), 'direction')} that others chose · "
        f"{seconds:.1f} s · brackets: 95 % interval"
    )
    return Group(titled("Diagnosis"), Text(subtitle, "dim"), table)


def _meaning(found: "Diagnosis") -> str:
    if found.contradicted:
        return f"members part above α ≈ {found.critical_alpha:.2f}: the data contradict the model"
    if found.undecided:
        return "undecided: the data may contradict the model or not"
    where = "no α up to 1" if found.low > 1 else "α ≈ 1 at the earliest"
    return f"the data do not contradict the model: a spread of members pays at {where}"


def examples_table(sides: Sequence[Sequence[LoadedExample]], contradicted: bool) -> RenderableType:
    """The examples of both sides."""
    legend = "loadings on the leading direction, in units of their root mean square · rows counted from 1"
    title = "What members would part over" if contradicted else "What loads most on the leading direction"
    parts: list[RenderableType] = [titled(title), Text(legend, "dim")]
    for examples, style in zip(sides, ("cyan", "red"), strict=True):
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", justify="right", no_wrap=True)
        table.add_column(style=style, justify="right", no_wrap=True)
        table.add_column()
        for example in examples:
            table.add_row(f"row {example.index + 1}", f"{example.loading:+.2f}", example.text)
        parts += [Text(), table]
    return Group(*parts)


def text_of(row: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> Text:
    """An example as text; tokens that are not trained are dim. For a pair: the prompt's end and both completions."""
    if "prompt_ids" in row:
        prompt, chosen, rejected = (
            " ".join(str(tokenizer.decode(row[name], skip_special_tokens=True)).split())
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
        prompt = prompt if len(prompt) <= LONGEST_TEXT else f"…{prompt[1 - LONGEST_TEXT :]}"
        names = (("chosen    ", "dim"), ("\nrejected  ", "dim"))
        rivals = [shortened(text, LONGEST_TEXT) for text in (chosen, rejected)]
        return Text.assemble((f"{prompt}\n", "dim"), names[0], rivals[0], names[1], rivals[1])
    text, start, ids, trained = Text(), 0, row["input_ids"], [label != IGNORED for label in row["labels"]]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or trained[end] != trained[start]:
            part = " ".join(str(tokenizer.decode(ids[start:end], skip_special_tokens=True)).split())
            text.append(f"{part} " if part else "", "" if trained[start] else "dim")
            start = end
    text.truncate(LONGEST_EXAMPLE, overflow="ellipsis")
    return text
