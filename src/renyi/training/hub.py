"""Pushing an ensemble to the hub, as `push_to_hub` of TRL does with one model.

Read next: `trainer.py`, whose hooks call this, and `card.py`, the model card that goes along.
"""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy

from renyi.errors import ConfigError, SaveError, first_line

logger = logging.getLogger(__name__)

# Files of a checkpoint that only a resumed run needs.
_OF_TRAINING = ["optimizer*", "scheduler*", "rng_state*", "scaler*", "trainer_state.json", "*logging_state.json"]


def without_token(args: Any) -> Any:
    """Training arguments to keep in a file. The hub's token is left out, because the file may be pushed."""
    kept = copy.copy(args)
    kept.hub_token = None
    return kept


@contextmanager
def refused_by_the_hub() -> Iterator[None]:
    """Turn an error of the hub into one that names the setting."""
    try:
        yield
    except OSError as error:  # the hub's errors, a missing token, and no network
        raise ConfigError(
            f"the repository cannot be made or written ({first_line(error)})",
            where="push_to_hub",
            hint="Log in with a token that may write there: hf auth login",
        ) from error


@contextmanager
def pushed(repository: str, folder: Path) -> Iterator[None]:
    """Turn an error of the last push into one that says how to push by hand."""
    try:
        yield
    except SaveError:  # a file on this machine
        raise
    except OSError as error:
        raise SaveError(
            f"could not be pushed ({first_line(error)})",
            where=repository,
            hint=f"The ensemble is complete. To push it: hf upload {repository} {folder} --exclude 'checkpoint-*'",
        ) from error


def push_checkpoint(args: Any, repository: str | None, checkpoint: Path) -> None:
    """Upload a checkpoint's ensemble, as `hub_strategy` asks; the states of training only where that asks for them.

    A failed upload is a warning: training goes on, and the end pushes again.
    """
    strategy = HubStrategy(args.hub_strategy)
    if repository is None or strategy == HubStrategy.END:
        return
    step = checkpoint.name.rpartition("-")[2]
    uploads: dict[str | None, list[str] | None] = {None: _OF_TRAINING}
    if strategy == HubStrategy.CHECKPOINT:
        uploads["last-checkpoint"] = None
    elif strategy == HubStrategy.ALL_CHECKPOINTS:
        uploads[checkpoint.name] = None
    try:
        for inside, left_out in uploads.items():
            HfApi().upload_folder(
                repo_id=repository,
                folder_path=checkpoint,
                path_in_repo=inside,
                commit_message=f"Training in progress, step {step}",
                token=args.hub_token,
                ignore_patterns=left_out,
                revision=args.hub_revision,
            )
    except OSError as error:
        logger.warning("Step %s could not be pushed to %s (%s). Training goes on.", step, repository, first_line(error))
