"""`alpha: auto`: fit one adapter, find by its curvature from which alpha on members part, and let them start apart.

This happens before the training itself. The members start spread along the directions in which the data contradict the
adapter, and not in random directions. Every stage is kept in the run's folder, so that a killed run goes on from there.
Read next: `build.py` (the training), `renyi.inference.diagnose` (the curvature).

    OUT/auto/fit           the one adapter, its checkpoints and curves
    OUT/auto/start         the members as training begins: an ensemble's folder
    OUT/auto/chosen.json   what was found and chosen; written last
"""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from renyi.ensemble.curvature import AdapterSpace
from renyi.errors import ConfigError, EnsembleFormatError
from renyi.files import write_whole
from renyi.inference.diagnose import Diagnosis, Pairs, diagnose, spread
from renyi.layout import MANIFEST_FILE
from renyi.runs.build import Watch, build, save, train
from renyi.runs.record import Record, defaults
from renyi.runs.settings import Settings
from renyi.training import RenyiDPOTrainer

FOLDER, CHOSEN_FILE = "auto", "chosen.json"
# Enough to find a contradiction that is there, at a tenth of the cost of a short training run.
NUM_DIRECTIONS, MAX_EXAMPLES = 16, 256


class Chosen(NamedTuple):
    """What the curvature of the one adapter says, and what was chosen from it.

    Attributes:
        alpha: the order to train with.
        critical_alpha, low, high: as in `Diagnosis`.
        members: the number of members that it recommends; the run keeps its own.
        mean_share, calibration: as in `Diagnosis`.
        fit_steps: optimizer steps of the one adapter.
        steps: optimizer steps left for the members.
    """

    alpha: float
    critical_alpha: float
    low: float
    high: float
    members: int
    mean_share: float
    calibration: float | None
    fit_steps: int
    steps: int


def with_chosen_alpha(settings: Settings, watch: Watch) -> Settings:
    """Fit one adapter, diagnose it, and write the members' start. If an earlier call did so, read what it chose.

    Args:
        settings: of a run with `alpha: auto`.
        watch: told about progress and about the choice.

    Returns:
        The settings of the members' own training.

    Raises:
        RenyiError: as in `build`; also if the run starts from an ensemble, or in several processes.
    """
    parts = settings.parts()
    args, where = parts.args, settings.where("alpha")
    if (Path(parts.members.model_name_or_path or "") / MANIFEST_FILE).is_file():
        raise ConfigError(
            "auto starts from one fresh adapter, and model_name_or_path is an ensemble",
            where=where,
            hint="Give a number, such as what `renyi diagnose` says of this ensemble.",
        )
    if args.world_size > 1:
        raise ConfigError(
            f"auto is for one process, and there are {args.world_size}",
            where=where,
            hint="Run `renyi diagnose` on a fitted adapter and give the number that it recommends.",
        )
    folder = Path(args.output_dir) / FOLDER
    if (folder / CHOSEN_FILE).is_file():
        Record.of(settings).check(folder.parent)
        chosen = _read(folder / CHOSEN_FILE)
    else:
        chosen = _fit_and_spread(settings, args, folder, watch)
    watch.chosen(chosen, settings)
    start: dict[str, Any] = {"model_name_or_path": folder / "start", "lora_target_modules": ...}  # the start has them
    if "reference" in defaults(settings.method):
        start["reference"] = "base"  # the one adapter was compared with the base too
    return settings.replaced(alpha=chosen.alpha, alpha_hold_ratio=0.0, max_steps=chosen.steps, **start)


def _fit_and_spread(settings: Settings, args: Any, folder: Path, watch: Watch) -> Chosen:
    hold, ramp = args.alpha_hold_ratio, args.alpha_ramp_ratio
    early = {"early_stopping_patience": ..., "metric_for_best_model": ..., "load_best_model_at_end": False}
    one = {"alpha": 0.0, "num_members": 1, "output_dir": folder / "fit", "eval_strategy": "no", "push_to_hub": False}
    with watch.doing("loading the data and the base model"):
        run = build(settings.replaced(**one, **early), probes=MAX_EXAMPLES)
    Record.of(settings, run.trainer.args, run.train_rows, None, run.tokenizer).write(folder.parent)
    assert run.probe_rows is not None
    total = run.trainer.num_steps
    if args.max_steps <= 0 and isinstance(run.train_rows, Dataset) and isinstance(run.probe_rows, Dataset):
        # An epoch of the members is longer, because they also see the probes.
        total = round(total * len(run.train_rows) / (len(run.train_rows) - len(run.probe_rows)))
    # One adapter costs one member's share. It trains for as many steps as hold and ramp would have.
    fit_steps = max(1, round((hold + ramp) * total))
    run.trainer.args.max_steps = fit_steps
    with watch.training() as callbacks:
        train(run, callbacks)
    save(run)

    with watch.doing("diagnosing the one adapter"):
        # The adapter was not fitted to these rows. On rows that it was fitted to it would look better than it is.
        grouped = run.trainer.args.routing_group is not None
        rows = run.prepared(run.probe_rows, None if grouped else MAX_EXAMPLES)
        pairs = None
        if isinstance(run.trainer, RenyiDPOTrainer):
            preparation: Any = run.preparation
            pairs = Pairs(run.trainer.args.preference_loss, run.trainer.reference, preparation)
        # The precision of training; but gradients in fp16 would need the scaling that only training has.
        with run.trainer.accelerator.autocast() if run.trainer.args.bf16 else nullcontext():
            found = diagnose(
                run.ensemble, rows, pairs, num_directions=NUM_DIRECTIONS, max_examples=MAX_EXAMPLES, seed=args.seed
            )
        start = AdapterSpace(run.ensemble).displaced(spread(found, args.num_members))
        with run.ensemble.acting_as(start):
            run.ensemble.save(folder / "start")
        run.tokenizer.save_pretrained(folder / "start")
    chosen = _chosen(found, fit_steps, max(1, total - round(hold * total)))
    write_whole(folder / CHOSEN_FILE, (json.dumps(chosen._asdict(), indent=2) + "\n").encode())
    return chosen


def _chosen(found: Diagnosis, fit_steps: int, steps: int) -> Chosen:
    return Chosen(
        alpha=found.alpha,
        critical_alpha=found.critical_alpha,
        low=found.low,
        high=found.high,
        members=found.members,
        mean_share=found.mean_share,
        calibration=found.calibration,
        fit_steps=fit_steps,
        steps=steps,
    )


def _read(file: Path) -> Chosen:
    try:
        return Chosen(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise EnsembleFormatError(
            f"cannot be read ({error})", where=str(file), hint="Remove it: the diagnosis is then made again."
        ) from error
