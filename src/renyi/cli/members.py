"""The table of what each member learned. Training and `renyi score` end with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import headed

if TYPE_CHECKING:
    from renyi.inference import MemberSummary


def members_table(
    members: "Sequence[MemberSummary]",
    title: str,
    subtitle: str,
    clearest: Sequence[str] = (),
    example: str = "example",
    nll: str = "NLL in nats a token",
) -> RenderableType:
    """One row a member.

    Args:
        members: their summaries.
        title: of the table.
        subtitle: what was scored.
        clearest: for each member, the example that it claims most strongly; left out if not given.
        example: the word for an example.
        nll: the meaning and unit of the summaries' NLL.
    """
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("member", "weight", "load", "leads", "NLL led", "NLL others"):
        table.add_column(column, justify="right", no_wrap=True, min_width=max(len(column), 6))
    if clearest:
        table.add_column(f"clearest {example}", style="italic")  # the only one that may become narrower
    for m, member in enumerate(members):
        cells = [str(m), f"{member.weight:.3f}", f"{member.load:.1%}", f"{member.leads:,}"]
        cells += [_nll(member.nll_led), _nll(member.nll_others)]
        claimed = [Text(clearest[m], no_wrap=True, overflow="ellipsis")] if clearest else []
        table.add_row(*(Text(cell) for cell in cells), *claimed)
    legend = f"load: share of the {example}s it learns from · leads: {example}s it explains best · {nll}"
    return Group(headed(title), Text(subtitle, "dim"), table, Text(legend, "dim"))


def _nll(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
