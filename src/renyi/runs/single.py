"""One training run from settings to a finished folder, in one call.

Read next: `build.py`, its stages; `auto.py`, what `alpha: auto` does before them.
"""

from renyi.runs.auto import with_chosen_alpha
from renyi.runs.build import Run, Watch, build, save, train
from renyi.runs.learned import ask_members
from renyi.runs.output import no_empty_folder
from renyi.runs.settings import Settings
from renyi.training.config import AUTO


def run(settings: Settings, watch: Watch | None = None) -> Run:
    """Train an ensemble, or continue what its folder holds, and save it. Commands such as `renyi sft` call this.

    Args:
        settings: of the run, such as `Settings.of("sft", model_name_or_path=…, dataset_name=…, output_dir=…)`.
        watch: told about progress.

    Returns:
        The run, with the trained ensemble, whose folder is complete.

    Raises:
        RenyiError: whatever is wrong with settings, data, tokenizer or output folder, before anything is trained.
        SaveError: something could not be written; the same call goes on from the newest checkpoint.
        TrainingDivergedError: the loss is no number any more.
    """
    watch = watch or Watch()
    with no_empty_folder(settings.values.get("output_dir")):
        ready = prepare(settings, watch)
        watch.ready(ready)
        with watch.training() as callbacks:
            train(ready, callbacks)
        watch.trained(ready)
        with watch.doing("saving"):
            save(ready)
        with watch.doing("asking every member what it learned"):
            learned = ask_members(ready)
        watch.learned(learned)
        watch.saved(ready)
        ready.trainer.end()
    return ready


def prepare(settings: Settings, watch: Watch | None = None) -> Run:
    """Everything before a run's training. With `alpha: auto` it includes the fit and the choice, except in a dry run.

    Raises:
        RenyiError: as `run`.
    """
    watch, asked = watch or Watch(), settings
    if settings.values.get("alpha") == AUTO:
        dry = settings.values.get("dry_run", False)
        settings = settings.replaced(alpha=0.0) if dry else with_chosen_alpha(settings, watch)
    ahead = ", and computing the reference" if settings.values.get("precompute_ref_log_probs") else ""
    with watch.doing(f"loading the data and the base model{ahead}"):
        return build(settings, asked)
