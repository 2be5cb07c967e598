"""From settings to a finished folder: a run, `alpha: auto`, a sweep, an export.

from renyi import runs
run = runs.run(runs.Settings.of("sft", model_name_or_path=…, dataset_name=…, output_dir=…, alpha="auto"))
found = runs.sweep(runs.SweepSettings.of("sft", alphas=[0.0, 0.8], members=[1, 4], test_split_size=0.1, …))
"""

from typing import TYPE_CHECKING

from renyi.lazy import lazy_names

__all__ = ["Run", "Settings", "Sweep", "SweepSettings", "SweepWatch", "Watch", "run", "sweep"]

if TYPE_CHECKING:
    from renyi.runs.build import Run, Watch
    from renyi.runs.grid import Sweep, SweepWatch, sweep
    from renyi.runs.settings import Settings, SweepSettings
    from renyi.runs.single import run

__getattr__ = lazy_names(
    __name__,
    {
        "renyi.runs.grid": ("Sweep", "SweepWatch", "sweep"),
        "renyi.runs.settings": ("Settings", "SweepSettings"),
        "renyi.runs.build": ("Run", "Watch"),
        "renyi.runs.single": ("run",),
    },
)
