"""From settings to a finished folder: a run, `alpha: auto`, a sweep, an export."""
