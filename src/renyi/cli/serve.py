"""`renyi serve`: serve an ensemble over OpenAI's API, with its uncertainty, and a playground at /.

Models are the mixture and each member: member_0, member_1, …. The mixture has the folder's name, or --model_name. It
needs the extra renyi[serve]. Without a key it listens on this machine only.

With --engine vllm the members run in one or several `vllm serve`, and no weights are loaded here. docs/serving.md says
how to start vLLM. The environment variable VLLM_API_KEY is the key of its API.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from renyi.cli.console import quiet_progress_bars, stream
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import add_ensemble_flags, load_ensemble, naming_flags
from renyi.errors import ConfigError

# Flags with a number, their type, and what they are.
_NUMBERS: dict[str, tuple[Any, str]] = {
    "port": (int, "port to listen on; 0 takes a free one (default: 8000)"),
    "max_running": (int, "requests answered together (default: 64)"),
    "max_waiting": (int, "requests that may wait; the next is refused with 429 (default: 256)"),
    "max_cached_tokens": (int, "the most tokens of prompts and answers in memory, for each member (default: no limit)"),
    "max_tokens": (int, "the most tokens of an answer (default: 1024)"),
    "max_prompt_tokens": (int, "the most tokens of a prompt (default: the base's limit)"),
    "max_answers": (int, "prompts × choices of one request (default: 16)"),
    "max_body_bytes": (int, "the largest body of a request (default: 1048576)"),
    "max_seconds": (float, "seconds that a request may take (default: 600)"),
    "stop_seconds": (int, "seconds that running answers get when the server stops (default: 30)"),
}


def run(argv: Sequence[str]) -> int:
    """Serve an ensemble until interrupted."""
    args = _parse(argv)
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"{error.name} is missing", hint="Install it with: pip install 'renyi[serve]'") from error
    del fastapi, prometheus_client, uvicorn
    err = stream(stderr=True)
    with err.status("loading"):
        from renyi.serve.memory import keep_few_shapes
        from renyi.serve.run import ServerSettings, serve

        settings = _settings(args, ServerSettings())
        settings.check()
        quiet_progress_bars()
        keep_few_shapes()  # before an ensemble is loaded, which tries its head
        served = _vllm_engine(args, settings) if args.engine == "vllm" else load_ensemble(args)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    err.print(f"serving {args.ensemble} on http://{host}:{settings.port}; Ctrl+C ends it", soft_wrap=True, markup=False)
    try:
        serve(served, settings)
    except (OSError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            return 0
        raise ConfigError(
            f"{host}:{settings.port} cannot be listened on",
            where="--port",
            hint="Give another port, or 0 for a free one.",
        ) from error
    return 0


def _vllm_engine(args: argparse.Namespace, settings: Any) -> Any:
    """The engine whose members run in vLLM."""
    from renyi.serve.replica import address_of
    from renyi.serve.vllm import VllmEngine

    with naming_flags(args):
        replicas = [address_of(url) for url in args.vllm_url]
    limits = settings.engine
    key = os.environ.get("VLLM_API_KEY")
    return VllmEngine(args.ensemble, replicas, args.base, key, limits.running + limits.waiting)


def _settings(args: argparse.Namespace, default: Any) -> Any:
    """`ServerSettings` from the flags and the environment."""
    from dataclasses import replace

    given = {name: value for name in _NUMBERS if (value := getattr(args, name)) is not None}

    def some(**names: str) -> dict[str, Any]:
        """The given ones of some flags, by the names of the fields that they set."""
        return {field: given[flag] for field, flag in names.items() if flag in given}

    answers = some(
        max_tokens="max_tokens", prompt_tokens="max_prompt_tokens", answers="max_answers", seconds="max_seconds"
    )
    engine = some(running="max_running", waiting="max_waiting", cached_tokens="max_cached_tokens")
    keys = args.api_key or [key for key in [os.environ.get("RENYI_API_KEY", "")] if key]
    return replace(
        default,
        **some(port="port", body_bytes="max_body_bytes", stop_seconds="stop_seconds"),
        host=args.host,
        keys=tuple(keys),
        is_open=args.open,
        model=args.model_name,
        log_text=args.log_text,
        answers=replace(default.answers, **answers),
        engine=replace(default.engine, **engine),
    )


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(prog="renyi serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_ensemble_flags(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--api_key",
        nargs="+",
        metavar="KEY",
        help="keys that clients may use (default: the environment variable RENYI_API_KEY)",
    )
    parser.add_argument("--open", action="store_true", help="listen beyond this machine without a key")
    parser.add_argument("--model_name", metavar="NAME", help="the mixture's name (default: the folder's)")
    parser.add_argument("--log_text", action="store_true", help="log prompts and answers, too")
    parser.add_argument(
        "--engine", choices=("ours", "vllm"), default="ours", help="what runs the members (default: ours)"
    )
    parser.add_argument(
        "--vllm_url",
        nargs="+",
        metavar="URL",
        help="with --engine vllm: http://HOST:PORT of each vLLM; add ,URL of its records if they are not at HOST:8001",
    )
    limits = parser.add_argument_group("limits")
    for name, (_, about) in _NUMBERS.items():
        limits.add_argument(f"--{name}", metavar="N", help=about)
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = parse_strictly(parser(), argv)
    for name, (kind, _) in _NUMBERS.items():
        if getattr(args, name) is not None:
            value = converted(getattr(args, name), kind, None, f"--{name}")
            least = 0 if name in ("port", "max_waiting", "stop_seconds") else 1
            if value < least or (name == "port" and value > 65535):
                raise ConfigError(f"is {value}", where=f"--{name}", hint=f"Give a number from {least}.")
            setattr(args, name, value)
    if (args.engine == "vllm") != bool(args.vllm_url):
        raise ConfigError(
            "needs --engine vllm, and --engine vllm needs it",
            where="--vllm_url",
            hint="Give both (--engine vllm --vllm_url http://HOST:PORT), or neither.",
        )
    if args.api_key and not all(args.api_key):
        raise ConfigError("is empty", where="--api_key", hint="Give a key, or leave it out.")
    return args
