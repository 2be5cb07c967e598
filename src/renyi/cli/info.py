"""`renyi info`: what an ensemble is, and how far apart its members are.

It reads the adapters' files and never loads the base model.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from renyi.cli.console import bytes_text, emit_json, facts, stream
from renyi.cli.parser import StrictParser, parse_strictly
from renyi.text import number_text

if TYPE_CHECKING:
    from renyi.ensemble.describe import Description

WIDEST_MATRIX = 6  # members, beyond which only the nearest other is shown


def run(argv: Sequence[str]) -> int:
    """Describe an ensemble as a table, or as one JSON object."""
    args = parse_strictly(parser(), argv)
    from renyi.ensemble.describe import describe

    description = describe(args.ensemble)
    if args.json:
        emit_json(_as_json(description))
        return 0
    out = stream()
    out.print(_facts(description))
    out.print(_members(description))
    return 0


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(prog="renyi info", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", metavar="ENSEMBLE", help="folder of an ensemble, or a hub id")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _as_json(d: "Description") -> dict[str, object]:
    manifest = d.manifest
    return {
        "folder": str(d.folder),
        "base_model": manifest.base_model,
        "num_members": len(manifest.members),
        "weights": manifest.weights,
        "alpha": manifest.alpha,
        "routing_quantity": manifest.routing_quantity,
        "member_kind": manifest.member_kind,
        "num_draws": manifest.num_draws,
        "divergence": manifest.divergence,
        "std": d.stds,
        "renyi_version": manifest.renyi_version,
        "lora_r": d.rank,
        "lora_alpha": d.lora_alpha,
        "use_rslora": d.rslora,
        "target_modules": d.targets,
        "layers": d.layers,
        "parameters_per_member": d.parameters,
        "bytes": d.bytes,
        "update_norm": d.norms.tolist(),
        "update_distance": d.distances.tolist(),
        "update_cosine": d.cosines.tolist(),
    }


def _facts(d: "Description") -> RenderableType:
    manifest = d.manifest
    scaling = f"lora_alpha {d.lora_alpha}{', rsLoRA' if d.rslora else ''}"
    return facts(
        str(d.folder),
        {
            "base": manifest.base_model,
            "members": f"{len(manifest.members)} × LoRA rank {d.rank}, {scaling}",
            **_distribution(d),
            "targets": f"{', '.join(d.targets)} ({d.layers} layers)",
            "parameters": f"{number_text(d.parameters)} a member",
            "on disk": bytes_text(d.bytes),
            **({"alpha": f"{manifest.alpha:g}, {manifest.routing_quantity} routed"} if len(d.norms) > 1 else {}),
            "written by": f"renyi {manifest.renyi_version}",
        },
    )


def _distribution(d: "Description") -> dict[str, str]:
    """What a member is if it is not a point, how wide it is, and its divergence from the prior."""
    manifest, found = d.manifest, {}
    if manifest.member_kind != "point":
        found["kind"] = manifest.member_kind
    if manifest.num_draws > 1:
        found["kind"] = f"{manifest.num_draws} draws of each of {len(manifest.members) // manifest.num_draws} members"
    if d.stds:
        by_target: dict[str, list[float]] = {}
        for layer, values in d.stds.items():
            by_target.setdefault(layer.rpartition(".")[2], []).extend(values)
        means = {target: sum(values) / len(values) for target, values in by_target.items()}
        found["std of A"] = ", ".join(f"{target} {mean:.3g}" for target, mean in sorted(means.items()))
    if manifest.divergence is not None:
        found["KL from prior"] = f"{', '.join(f'{x:,.0f}' for x in manifest.divergence)} nats a member"
    return found


def _members(d: "Description") -> RenderableType:
    """Weight and size of each member's update, and its distance (and cosine) to the others'."""
    members = range(len(d.norms))
    wide = len(members) > WIDEST_MATRIX
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for column in ("member", "weight", "‖update‖"):
        table.add_column(column, justify="right")
    if len(members) > 1:
        for column in ("nearest",) if wide else [f"to {m}" for m in members]:
            table.add_column(column, justify="right")
    for m in members:
        others = [n for n in members if n != m]
        if wide:
            nearest = min(others, key=lambda n, m=m: float(d.distances[m, n]))  # type: ignore[misc]
            cells = [f"{nearest}: {_pair(d, m, nearest)}"]
        else:
            cells = ["·" if m == n else _pair(d, m, n) for n in members] if others else []
        table.add_row(str(m), f"{d.manifest.weights[m]:.3f}", f"{float(d.norms[m]):.3g}", *cells)
    title = Text.assemble("\n", ("Members' updates", "bold"))
    and_others = ", and its distance (cosine) to the other members' updates" if len(members) > 1 else ""
    return Group(title, table, Text(f"‖scaling·BA‖ over all layers{and_others}", "dim"))


def _pair(d: "Description", m: int, n: int) -> str:
    return f"{float(d.distances[m, n]):.3g} ({float(d.cosines[m, n]):.2f})"
