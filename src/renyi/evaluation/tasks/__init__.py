"""One file a task: each holds its settings, and a `TASK` that `renyi.evaluation.task` finds by the file's name."""
