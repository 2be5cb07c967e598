"""From which alpha on do members part? Theory, diagnosis of one adapter, and training, on the zoo's world.

    python benchmarks/critical_alpha.py [--statements 1 2 4 8] [--contested 0 0.1 0.25 0.5] [--fit_steps 500] [--seed 0]

A record holds k statements by one of two schools, which contradict each other on a share of the facts. In theory
members part above E[k_c] / E[k_c²], where k_c counts a record's contested statements (docs/choosing-alpha.md). For each
world one adapter is fitted and diagnosed on held-out records; then two copies of it, started a little apart along the
direction found, are trained on at several alphas; bisection finds the alpha at which they end up apart (mutual
information on contested facts above 0.1 nats). AUROC: do loadings on the leading direction find records with a
contested statement, before any ensemble is trained; and, with their sign, which school wrote them. Draws FIGURE.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import disable_progress_bars
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from renyi.data import Preparation
from renyi.ensemble.curvature import AdapterSpace
from renyi.inference.diagnose import diagnose, spread
from renyi.zoo import World
from renyi.zoo.base import load_base
from renyi.zoo.demo import train
from renyi.zoo.measure import measure

FIGURE = Path(__file__).parents[1] / "docs" / "images" / "critical_alpha.png"
HELD_OUT = 77  # the seed of the records that are diagnosed
STATEMENTS_A_STEP = 128
# A fifth of the rate of the fit. At the full rate the members' common part changes from step to step and is never
# calibrated, and members part at 0.7 instead of 1.
PARTING_RATE = 6e-4
START, APART = 0.03, 0.1  # nats of mutual information on contested facts: of the start, and of members that parted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statements", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--contested", type=float, nargs="+", default=[0.0, 0.1, 0.25, 0.5])
    parser.add_argument("--fit_steps", type=int, default=500)
    parser.add_argument("--part_steps", type=int, default=120)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; fit {args.fit_steps} steps, seed {args.seed}")
    print("k contested  theory  diagnosed [95 %]      error  calibration  parts at          AUROC  school  seconds")
    rows = []
    for statements in args.statements:
        for contested in args.contested:
            row = one_world(World(statements=statements, contested=contested, seed=args.seed), args)
            rows.append(row)
            print(as_line(row), flush=True)
    print(json.dumps({"benchmark": "critical_alpha", "rows": rows}))
    draw(rows, args.figure)


def critical_alpha_of(world: World) -> float:
    """E[k_c] / E[k_c²] for k statements drawn from the facts without replacement; 1 where nothing is contested."""
    contested = len(world.contested_facts)
    if contested == 0:  # every answer is certain, so spreading gains nothing: the diagnosis is far above 1
        return 1.0
    return 1 / (1 + (world.statements - 1) * (contested - 1) / (world.num_facts - 1))


def one_world(world: World, args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fit = {"max_steps": args.fit_steps, "per_device_train_batch_size": batch(world)}
        trainer, _ = train(world, 1, 0.0, folder / "fit", args.seed, **fit)
        records = world.records(2 * args.examples, HELD_OUT)
        rows = Preparation(assistant_only_loss=True).prepare(world.dataset(2 * args.examples, HELD_OUT), load_base()[1])
        found = diagnose(trainer.model, rows, num_directions=16, max_examples=args.examples, seed=args.seed)
        loadings = np.array(found.loadings)
        is_contested = np.array([any(fact.contested for fact in records[i].facts) for i in found.examples])
        school = np.array([records[i].source for i in found.examples])
        row: dict[str, Any] = {
            "statements": world.statements,
            "contested": world.contested,
            "theory": critical_alpha_of(world),
            "diagnosed": found.critical_alpha,
            "low": found.low,
            "high": found.high,
            "calibration": found.calibration,
            "mean_share": found.mean_share,
            "eigenvalues": found.eigenvalues[:4],
            "auroc_contested": _auroc(is_contested, abs(loadings)),
            "auroc_school": _auroc(school[is_contested], loadings[is_contested]),
            "parts_between": None,
        }
        if world.contested_facts:
            # START nats of disagreement on every contested fact to begin with; below the critical alpha it dies out.
            size = (2 * START * world.statements * world.contested) ** 0.5
            with trainer.model.acting_as(AdapterSpace(trainer.model).displaced(spread(found, 2, size))):
                trainer.model.save(folder / "start")
            row["parts_between"] = bisect(world, folder, args)
    return row | {"seconds": time.perf_counter() - started}


def bisect(world: World, folder: Path, args: argparse.Namespace, halvings: int = 4) -> tuple[float, float]:
    """The alphas between which two members part: from half to twice the theory's, halved `halvings` times."""

    def apart(alpha: float) -> bool:
        schedule = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0, "max_steps": args.part_steps}
        schedule |= {"learning_rate": PARTING_RATE, "lr_scheduler_type": "constant"}
        start = {"start": folder / "start", "per_device_train_batch_size": batch(world), **schedule}
        trainer, seconds = train(world, 2, alpha, folder / f"alpha_{alpha:g}", args.seed, **start)
        return measure(trainer, world, seconds).mi_contested > APART

    low, high = critical_alpha_of(world) / 2, min(1.0, 2 * critical_alpha_of(world))
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (low, middle) if apart(middle) else (middle, high)
    return low, high


def batch(world: World) -> int:
    """Records of a step: equally many statements in every world. Otherwise short records would be fitted less."""
    return STATEMENTS_A_STEP // world.statements


def _auroc(label: np.ndarray, score: np.ndarray) -> float | None:
    """AUROC of the score with the better sign, because it is not known which school is positive."""
    if label.astype(bool).all() or not label.any():
        return None
    area = float(roc_auc_score(label, score))
    return max(area, 1 - area)


def as_line(row: dict[str, Any]) -> str:
    between = "–" if row["parts_between"] is None else "{:.3f}–{:.3f}".format(*row["parts_between"])
    error = f"{row['diagnosed'] / row['theory'] - 1:+.1%}" if row["contested"] else "–"
    aurocs = ["    –" if row[k] is None else f"{row[k]:.3f}" for k in ("auroc_contested", "auroc_school")]
    return (
        f"{row['statements']} {row['contested']:9.2f} {row['theory']:7.3f}  {row['diagnosed']:6.3f} "
        f"[{row['low']:.3f}, {row['high']:.3f}] {error:>7} "
        f"{row['calibration']:12.2f}  {between:16}  {aurocs[0]}   {aurocs[1]}  {row['seconds']:7.0f}"
    )


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Diagnosed against theoretical critical alpha, with the alphas between which members parted."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0.1, 1.3], [0.1, 1.3], color="tab:gray", linewidth=1)
    axes.fill_between([0.1, 1.3], [0.085, 1.105], [0.115, 1.495], color="tab:gray", alpha=0.15, label="theory ± 15 %")
    for k, marker in zip(sorted({row["statements"] for row in rows}), "os^Dv", strict=False):
        those = [row for row in rows if row["statements"] == k]
        x = [row["theory"] for row in those]
        errors = np.abs([[row["diagnosed"] - row["low"], row["high"] - row["diagnosed"]] for row in those]).T
        axes.errorbar(
            x, [row["diagnosed"] for row in those], errors, fmt=marker, color="tab:blue", markersize=6,
            label=f"diagnosed on one adapter, {k} statement{'s' * (k > 1)} a record",
        )  # fmt: skip
        for row in those:
            if row["parts_between"]:
                low, high = row["parts_between"]
                axes.plot([row["theory"] * 1.02] * 2, [low, min(high, 1.3)], color="tab:red", linewidth=3, alpha=0.7)
    axes.plot([], [], color="tab:red", linewidth=3, label="two members part in training")
    axes.set(xscale="log", yscale="log", xlabel="critical alpha in theory, E[k_c] / E[k_c²]", ylabel="critical alpha")
    ticks = [0.2, 0.3, 0.5, 0.7, 1.0]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlim(0.18, 1.15)
    axes.set_ylim(0.15, 1.6)
    axes.legend(frameon=False, fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
