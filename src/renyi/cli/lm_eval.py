"""`renyi lm_eval`: EleutherAI's lm-evaluation-harness, with an ensemble as its model.

renyi lm_eval ARGS… is the harness's own lm_eval ARGS…, which then knows --model renyi --model_args ensemble=DIR.
renyi lm_eval run --help lists the arguments. docs/serving.md says what an ensemble answers.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from renyi.cli.console import stream
from renyi.errors import ConfigError
from renyi.keys import install_line


def run(argv: Sequence[str]) -> int:
    """Hand the arguments over to the harness."""
    if not argv or argv[0] in ("-h", "--help"):
        stream().print(__doc__)
        return 0
    if find_spec("lm_eval") is None:
        raise ConfigError("is not installed", where="lm_eval", hint=f"Install it: {install_line('lm_eval')}")
    from lm_eval.__main__ import cli_evaluate

    import renyi.inference.lm_eval  # noqa: F401 (its import makes the name known)

    before, sys.argv = sys.argv, ["renyi lm_eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
    return 0
