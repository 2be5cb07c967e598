"""One file for each task, with its settings and a `TASK`. `renyi.evaluation.running` finds it by the file's name."""
