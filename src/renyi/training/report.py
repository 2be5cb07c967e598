"""What a run writes without any tracker: `metrics.jsonl` (every logged step) and `training.png` (the curves).

Both come from the trainer's log history alone, so a resumed run writes what an uninterrupted run writes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from renyi.errors import SaveError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
FIGURE_FILE = "training.png"
ACCURACY = "rewards/accuracies"

Row = dict[str, Any]


class MetricsFile(TrainerCallback):
    """Keeps `metrics.jsonl`: one JSON object for each logged step, evaluations included, no step twice."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A resumed run begins with the history of its checkpoint. Later lines of the killed run are removed.
        folder = Path(args.output_dir or "")
        if state.is_world_process_zero and (state.log_history or (folder / METRICS_FILE).exists()):
            _write(folder, state.log_history, mode="w")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            _write(Path(args.output_dir or ""), state.log_history[-1:], mode="a")


def _write(folder: Path, rows: Sequence[Row], mode: str) -> None:
    file = folder / METRICS_FILE
    try:
        with file.open(mode, encoding="utf-8") as lines:
            lines.writelines(json.dumps(_ordered(row)) + "\n" for row in rows)
    except OSError as error:
        raise SaveError(
            f"could not be written ({error})", where=str(file), hint="Free some space and run the same command."
        ) from error


def _ordered(row: Row) -> Row:
    """The row with its step first, then sorted by name. A number that is not finite becomes null: JSON has no NaN."""
    row = {"step": row["step"], **dict(sorted(row.items()))}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def draw_training(log_history: Sequence[Row], title: str, file: Path, unit: str = "trained token") -> None:
    """Draw the curves of a run: the loss of members and mixture per `unit`, alpha, and the members' loads.

    For preferences also how often the mixture and each member prefer the chosen completion.

    Nothing is drawn when nothing was logged.

    Raises:
        SaveError: the file could not be written.
    """
    train = [row for row in log_history if "nll_mixture" in row]
    if not train:
        return
    held_out = [row for row in log_history if "eval_nll_mixture" in row]
    heights = [3, 2, 2] + [2] * (ACCURACY in train[0])
    figure, (losses, *accuracies, routing, loads) = _panels(1.4, heights, title)
    _draw_losses(losses, train, held_out, unit)
    for axes in accuracies:
        _draw_accuracies(axes, train, held_out)
    _draw_routing(routing, train)
    _draw_loads(loads, train)
    loads.set_xlabel("step")
    _write_figure(figure, file)


def _draw_losses(axes: "Axes", train: list[Row], held_out: list[Row], unit: str) -> None:
    steps = _column(train, "step")
    members, mixture = _column(train, "nll_members"), _column(train, "nll_mixture")
    axes.fill_between(steps, mixture, members, color="tab:blue", alpha=0.15, label="Jensen gap")
    axes.plot(steps, members, color="tab:gray", label="members, mean", **_line(steps))
    axes.plot(steps, mixture, color="tab:blue", label="mixture", **_line(steps))
    if held_out:
        style: Any = {"linestyle": "none", "marker": "o", "markersize": 4}
        steps = _column(held_out, "step")
        axes.plot(steps, _column(held_out, "eval_nll_members"), color="tab:gray", **style)
        axes.plot(steps, _column(held_out, "eval_nll_mixture"), color="tab:blue", label="held out", **style)
    axes.set_ylabel(f"NLL, nats per {unit}")
    axes.legend(frameon=False)


def _draw_accuracies(axes: "Axes", train: list[Row], held_out: list[Row]) -> None:
    steps = _column(train, "step")
    for m in range(len(_loads(train))):
        accuracy = _column(train, f"{ACCURACY}/{m}")
        axes.plot(steps, accuracy, color="tab:gray", alpha=0.5, label=None if m else "members", **_line(steps))
    axes.plot(steps, _column(train, ACCURACY), color="tab:blue", label="mixture", **_line(steps))
    if held_out:
        at, accuracy = _column(held_out, "step"), _column(held_out, f"eval_{ACCURACY}")
        axes.plot(at, accuracy, color="tab:blue", linestyle="none", marker="o", markersize=4, label="held out")
    axes.set_ylabel("chosen preferred")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, loc="lower right")


def _draw_routing(axes: "Axes", train: list[Row]) -> None:
    steps = _column(train, "step")
    axes.plot(steps, _column(train, "alpha"), color="tab:red", **_line(steps))
    axes.set_ylabel("α in force", color="tab:red")
    axes.set_ylim(-0.05, 1.05)
    effective = axes.twinx()
    effective.plot(steps, _column(train, "effective_members"), color="tab:green", **_line(steps))
    effective.set_ylabel("effective members", color="tab:green")
    effective.set_ylim(0.9, len(_loads(train)) + 0.1)


def _draw_loads(axes: "Axes", train: list[Row]) -> None:
    steps, loads = _column(train, "step"), _loads(train)
    if len(steps) == 1:  # an area needs two ends
        steps, loads = [steps[0], steps[0] + 1], [load * 2 for load in loads]
    axes.stackplot(steps, loads, labels=[f"member {m}" for m in range(len(loads))], alpha=0.8)
    axes.set_ylabel("load")
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_powerflow(log_history: Sequence[Row], title: str, file: Path, power: float) -> None:
    """Draw the curves of a PowerFlow run: log-probabilities, whether the balance is met, the regression, and lengths.

    Nothing is drawn when nothing was logged.

    Raises:
        SaveError: the file could not be written.
    """
    rows = [row for row in log_history if "residual/variance" in row]
    if not rows:
        return
    written = [row for row in rows if "completions/mean_length" in row]  # the other rows used rollouts again
    heights = [3, 2, 2, 2] + [2] * (len(_loads(rows)) > 1)
    figure, (log_probs, balance, slopes, lengths, *loads) = _panels(0.6, heights, title)

    def curve(axes: "Axes", name: str, label: str, colour: str, rows: list[Row] = rows) -> None:
        steps = _column(rows, "step")
        axes.plot(steps, _column(rows, name), color=f"tab:{colour}", label=label, **_line(steps))

    curve(log_probs, "logps/policy", "under the policy", "blue")
    curve(log_probs, "logps/base", "under the base", "gray")
    log_probs.set_ylabel("rollouts, nats a token")
    curve(balance, "residual/variance", "", "red")
    balance.set_ylabel("residual's variance", color="tab:red")
    partition = balance.twinx()
    curve(partition, "log_partition", "", "green")
    partition.set_ylabel("log Z', nats a token", color="tab:green")
    curve(slopes, "slope/log_base", "of log π on log p_base", "blue")
    curve(slopes, "slope/length", "on the length", "orange")
    slopes.axhline(power, color="tab:blue", linestyle=":", label=f"power {power:g}")
    slopes.set_ylabel("slope")
    shortest, longest = (_column(written, f"completions/{end}_length") for end in ("min", "max"))
    steps = _column(written, "step")
    lengths.fill_between(steps, shortest, longest, color="tab:blue", alpha=0.15, label="shortest to longest")
    curve(lengths, "completions/mean_length", "mean", "blue", written)
    lengths.set_ylabel("tokens a rollout")
    lengths.set_ylim(bottom=0)
    for axes in (log_probs, slopes, lengths):
        axes.legend(frameon=False, fontsize="small", ncols=3)
    for axes in loads:
        _draw_loads(axes, rows)
    (loads or [lengths])[-1].set_xlabel("step")
    _write_figure(figure, file)


def _panels(margin: float, heights: list[int], title: str) -> tuple["Figure", list["Axes"]]:
    """A figure, and its panels from top to bottom. `heights` of the panels and the `margin` are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # at the end of a run, not at its start
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, margin + sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    return figure, list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))


def _write_figure(figure: "Figure", file: Path) -> None:
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise SaveError(f"could not be written ({error})", where=str(file), hint="Free some space.") from error


def _column(rows: list[Row], name: str) -> list[float]:
    return [row[name] for row in rows]


def _loads(rows: list[Row]) -> list[list[float]]:
    members = sum(name.startswith("member_load/") for name in rows[0])
    return [_column(rows, f"member_load/{m}") for m in range(members)]


def _line(steps: list[float]) -> dict[str, Any]:
    return {"marker": "o"} if len(steps) == 1 else {}
