"""`alpha: auto`: fit one adapter, ask its curvature from which alpha on members part, and let them start apart.

What a training command does ahead of the training itself; that then goes on from members that stand spread along the
directions in which the data contradict the adapter. The tie is broken where it matters instead of by chance. Every
stage is kept in the run's folder, so that a killed run goes on where it was. It prints nothing.

    OUT/auto/fit           the one adapter, its checkpoints and curves
    OUT/auto/start         the members as training begins: an ensemble's folder
    OUT/auto/chosen.json   what was found and chosen; written last
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback
from trl import ScriptArguments

from renyi import data
from renyi.ensemble.curvature import AdapterSpace
from renyi.ensemble.storage import MANIFEST_FILE
from renyi.errors import ConfigError, EnsembleFormatError
from renyi.inference.diagnose import Diagnosis, Pairs, diagnose, spread
from renyi.runs.single import MemberConfig, RunArguments, build, save, train
from renyi.training import RenyiDPOTrainer
from renyi.training.trainer import EnsembleTrainer

FOLDER, CHOSEN_FILE = "auto", "chosen.json"
# Enough to see a contradiction in data that have one, at a tenth of the cost of a short training run.
NUM_DIRECTIONS, MAX_EXAMPLES = 16, 256


class Chosen(NamedTuple):
    """What the curvature of the one adapter said, and what was chosen by it.

    Attributes:
        alpha: the order to train with.
        critical_alpha, low, high: as of `Diagnosis`.
        members: the number of members that it recommends; the run keeps its own.
        mean_share, calibration: as of `Diagnosis`.
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


def fit_and_spread(
    trainer_class: type[EnsembleTrainer],
    script: ScriptArguments,
    args: Any,
    model: MemberConfig,
    own: RunArguments,
    callbacks: Sequence[TrainerCallback],
    of_tokenizer: Any = None,
    watch: Callable[[str], object] = lambda what: None,
) -> Chosen:
    """Fit one adapter, diagnose it, and write the members' start; or read what an earlier call chose.

    Args:
        trainer_class, script, args, model, own, of_tokenizer: as for `renyi.runs.single.build`, which changes them.
        callbacks: of the one adapter's training.
        watch: called with what is done next.

    Raises:
        RenyiError: as `build`; or the run starts from an ensemble, or in several processes.
    """
    if (Path(model.model_name_or_path or "") / MANIFEST_FILE).is_file():
        raise ConfigError(
            "auto starts from one fresh adapter, and model_name_or_path is an ensemble",
            where="alpha",
            hint="Give a number, such as what `renyi diagnose` says of this ensemble.",
        )
    if args.world_size > 1:
        raise ConfigError(
            f"auto is for one process, and there are {args.world_size}",
            where="alpha",
            hint="Run `renyi diagnose` on a fitted adapter and give the number that it recommends.",
        )
    num_members, folder = args.num_members, Path(args.output_dir) / FOLDER
    if (folder / CHOSEN_FILE).is_file():
        return _read(folder / CHOSEN_FILE)

    watch("fitting one adapter")
    hold, ramp = args.alpha_hold_ratio, args.alpha_ramp_ratio
    args.alpha, args.num_members, args.output_dir = 0.0, 1, str(folder / "fit")
    args.eval_strategy, args.load_best_model_at_end = "no", False
    run = build(trainer_class, script, args, model, own, list(callbacks), of_tokenizer)
    total = run.trainer.num_steps
    # One adapter costs a member's share: it may train as long as members otherwise take to be apart.
    fit_steps = max(1, round((hold + ramp) * total))
    run.trainer.args.max_steps = fit_steps
    train(run)
    save(run, None)

    watch("diagnosing it")
    rows = run.preparation.prepare(data.sample(run.train_rows, MAX_EXAMPLES), run.tokenizer)
    pairs = None
    if isinstance(run.trainer, RenyiDPOTrainer):
        preparation: Any = run.preparation
        pairs = Pairs(run.trainer.args.preference_loss, run.trainer.reference, preparation)
    found = diagnose(
        run.ensemble, rows, pairs, num_directions=NUM_DIRECTIONS, max_examples=MAX_EXAMPLES, seed=args.seed
    )
    start = AdapterSpace(run.ensemble).displaced(spread(found, num_members))
    with run.ensemble.acting_as(start):
        run.ensemble.save(folder / "start")
    run.tokenizer.save_pretrained(folder / "start")
    chosen = _chosen(found, fit_steps, max(1, total - round(hold * total)))
    part = folder / f"{CHOSEN_FILE}.partial"
    part.write_text(json.dumps(chosen._asdict(), indent=2) + "\n", encoding="utf-8")
    part.replace(folder / CHOSEN_FILE)
    return chosen


def go_on_with(chosen: Chosen, args: Any, model: MemberConfig, own: RunArguments) -> None:
    """Set what the members' own training needs, in settings that asked for `auto`."""
    args.alpha, args.alpha_hold_ratio, args.max_steps = chosen.alpha, 0.0, chosen.steps
    model.model_name_or_path = str(Path(args.output_dir) / FOLDER / "start")
    own.given -= {"lora_target_modules"}  # the start has them
    if hasattr(args, "reference"):
        args.reference = "base"  # what the one adapter was compared with


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
