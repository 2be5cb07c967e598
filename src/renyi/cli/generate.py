"""`renyi generate`: an ensemble's answers, and where its members disagree.

PROMPT is a user's message if the tokenizer has a chat template (--plain: text to continue). Without PROMPT, prompts are
the rows of --input, or stdin is one prompt. On a terminal, tokens are coloured by epistemic uncertainty.
`renyi evaluate` can write a threshold to the folder. An answer above the threshold is marked, or with --withhold
not shown.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from renyi.cli.console import quiet_progress_bars, say, stream
from renyi.cli.parser import StrictParser, converted, parse_strictly
from renyi.cli.reading import (
    add_draw_flags,
    add_ensemble_flags,
    check_output,
    load_ensemble,
    naming_flags,
    progress_bar,
    write_lines,
)
from renyi.errors import ConfigError, DataError
from renyi.text import plural

if TYPE_CHECKING:
    from renyi.inference import Answer
    from renyi.inference.abstention import Abstention
    from renyi.inference.generate import PromptRow
    from renyi.runs.load import Loaded

# The greatest epistemic uncertainty of each colour, in nats. log 2: two equal halves of the members disagree.
SCALE = ((0.02, ""), (0.1, "green"), (0.3, "yellow"), (0.6, "dark_orange"), (math.inf, "bold red"))

# Flags that are settings of `Loaded.generate`. A flag that is not given has the default of that function.
_SETTINGS: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "the most tokens of an answer (default: 256)"),
    "do_sample": (bool, "sample, instead of taking the likeliest token; the next four flags turn it on"),
    "temperature": (float, "temperature of the mixture; 0 takes the likeliest token"),
    "top_k": (int, "sample from the k likeliest tokens; 0 for all"),
    "top_p": (float, "sample from the likeliest tokens of this total probability"),
    "min_p": (float, "leave out tokens with less than this share of the likeliest token's probability"),
    "repetition_penalty": (float, "a value above 1 makes repeated tokens less likely"),
    "seed": (int | None, "of the sampling"),
}


def run(argv: Sequence[str]) -> int:
    """Answer prompts under an ensemble."""
    args = _parse(argv)
    out, err = stream(), stream(stderr=True)
    prompts = _read_prompts(args)
    with err.status("loading"):
        quiet_progress_bars()
        loaded = load_ensemble(args)
    abstention = _abstention(loaded, args.withhold)
    with naming_flags(args):
        if args.json or args.output:
            answers = _answers(loaded, prompts, args, err)
            lines = (_line(i, p, a, args, abstention) for i, (p, a) in enumerate(zip(prompts, answers, strict=True)))
            write_lines(lines, args.output)
            if args.output:
                err.print(f"{plural(len(prompts), 'line')} in {args.output}", soft_wrap=True)
            return 0
        if args.members or args.withhold:
            for prompt, of_prompt in zip(prompts, _answers(loaded, prompts, args, err), strict=True):
                _show(out, prompt, of_prompt, args, abstention)
        else:
            _stream(out, loaded, prompts, args, abstention)
    if out.is_terminal and args.settings["mixture"] != "member":
        out.print(_legend())
    return 0


def _answers(
    loaded: "Loaded", prompts: "list[PromptRow]", args: argparse.Namespace, err: Console
) -> "list[list[Answer]]":
    """Of each prompt one answer, or every member's."""
    with progress_bar(err, "answering", len(prompts)) as progress:
        found = loaded.generate(prompts, progress=progress, **args.settings)
    return [answer if isinstance(answer, list) else [answer] for answer in found]


def _abstention(loaded: "Loaded", needed: bool) -> "Abstention | None":
    """The threshold in the ensemble's folder. If it does not fit answers: an error if it is needed, else a warning."""
    if needed:
        return loaded.needed_abstention("--withhold")
    found = loaded.abstention
    try:
        if found:
            found.check()
    except ConfigError as error:
        say("warning", "bold yellow", error.what, error.hint)
        return None
    return found


# ---- What is asked ---------------------------------------------------------------------------------------------------


def parser() -> StrictParser:
    """What the command reads."""
    parser = StrictParser(
        prog="renyi generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_ensemble_flags(parser)
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="what to answer; put a text with spaces in quotes")
    parser.add_argument("--input", type=Path, metavar="FILE", help="rows with `prompt` (text or messages)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one JSON line for each prompt here")
    parser.add_argument("--json", action="store_true", help="print one JSON object for each prompt")
    parser.add_argument("--system", metavar="TEXT", help="the system message of every chat")
    parser.add_argument("--plain", action="store_true", help="continue the text, without a chat template")
    parser.add_argument("--withhold", action="store_true", help="do not show answers above the threshold")
    parser.add_argument("--batch_size", metavar="N", help="prompts answered together (default: 8)")
    members = parser.add_argument_group("members")
    members.add_argument(
        "--mixture", help="sequence (exact), token, or member: every member by itself (default: sequence)"
    )
    members.add_argument("--members", action="store_true", help="show every member's own answer, side by side")
    add_draw_flags(parser, "seed of the sampling, and of the draws")
    members.add_argument("--member", metavar="M", help="only the answer of one member, counted from 0")
    decoding = parser.add_argument_group("decoding, by default as the base's generation config says")
    for name, (_, text) in _SETTINGS.items():
        if name == "seed":  # added above
            continue
        decoding.add_argument(f"--{name}", help=text, metavar="VALUE")
    decoding.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer at this text; repeat the flag for more texts"
    )
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    args = parse_strictly(parser(), argv)
    args.settings = _settings(args)
    check_output(args.output)
    return args


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `Loaded.generate`."""
    flags = {**_SETTINGS, "batch_size": (int, ""), "member": (int, "")}
    given: dict[str, Any] = {
        name: converted(getattr(args, name), hint, None, f"--{name}")
        for name, (hint, _) in flags.items()
        if getattr(args, name) is not None
    }
    mixture = converted(args.mixture or "sequence", str, ["sequence", "token", "member"], "--mixture")
    if args.members or args.member is not None:
        if args.mixture not in (None, "member"):
            raise ConfigError(
                f"is {mixture}, and with --members or --member members answer alone",
                where="--mixture",
                hint="Leave it out.",
            )
        mixture = "member"
    args.members = mixture == "member" and args.member is None
    if args.stop:
        given["stop_strings"] = args.stop
    return {**given, "mixture": mixture, "system": args.system, "plain": args.plain}


def _read_prompts(args: argparse.Namespace) -> "list[PromptRow]":
    """PROMPTs, the rows of `--input`, or stdin."""
    if args.prompts and args.input:
        raise ConfigError("cannot be combined with PROMPT", where="--input", hint="Leave one of the two out.")
    if args.input:
        from renyi.data import read_prompts

        return [row if len(row) > 1 else row["prompt"] for row in read_prompts(args.input)]
    prompts = list(args.prompts) or [sys.stdin.read().strip()]
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise DataError("is empty", where=f"prompt {number}", hint="Give PROMPT, --input, or text on stdin.")
    return prompts


# ---- What is shown ---------------------------------------------------------------------------------------------------


def _stream(
    out: Console,
    loaded: "Loaded",
    prompts: "list[PromptRow]",
    args: argparse.Namespace,
    abstention: "Abstention | None",
) -> None:
    """Answers token by token, as they come."""

    def on_piece(piece: str, epistemic: float) -> None:
        out.print(Text(piece, _colour(epistemic)), end="", soft_wrap=True)

    for prompt in prompts:
        if len(prompts) > 1:
            out.print(Text(_last(prompt), "dim"), soft_wrap=True)
        (answer,) = loaded.generate([prompt], on_piece=on_piece, **args.settings)
        out.print()
        _told(out, answer, args, abstention)


def _show(
    out: Console,
    prompt: "PromptRow",
    answers: "list[Answer]",
    args: argparse.Namespace,
    abstention: "Abstention | None",
) -> None:
    """Show whole answers: withheld if they are too uncertain, or the members' answers side by side."""
    out.print(Text(_last(prompt), "dim"), soft_wrap=True)
    if not args.members:
        (answer,) = answers
        if abstention and abstention.is_above(answer):
            out.print(Text(f"I do not know ({_not_sure(abstention, answer)}).", "italic"), soft_wrap=True)
        else:
            out.print(_coloured(answer), soft_wrap=True)
            _told(out, answer, args, None)
        return
    width = max(24, out.width // min(len(answers), max(1, out.width // 40)) - 1)
    panels = [
        Panel(
            Text(answer.text.strip()),
            title=f"member {m}",
            subtitle=Text(f"NLL {answer.mixture_nll / max(1, len(answer.token_ids)):.2f} a token", "dim"),
            title_align="left",
            subtitle_align="left",
            border_style="dim",
            width=width,
        )
        for m, answer in enumerate(answers)
    ]
    out.print(Columns(panels, padding=(0, 1)))


def _told(out: Console, answer: "Answer", args: argparse.Namespace, abstention: "Abstention | None") -> None:
    """Show how sure the answer is (on a terminal), and whether it is above the threshold (always)."""
    if abstention and abstention.is_above(answer):
        out.print(Text(f"[{_not_sure(abstention, answer)}]", "bold yellow"), soft_wrap=True)
    if out.is_terminal and args.settings["mixture"] != "member":
        out.print(
            Text(
                f"{plural(len(answer.token_ids), 'token')} · epistemic mean {answer.mean_epistemic:.3f}, "
                f"max {answer.max_epistemic:.3f} nats{_parts(answer)} · {answer.effective_members:.1f} of "
                f"{len(answer.member_log_likelihood)} members explain it\n",
                "dim",
            ),
            soft_wrap=True,
        )


def _parts(answer: "Answer") -> str:
    """Where the epistemic uncertainty lies, if members are draws."""
    within, between = answer.mean_within_members, answer.mean_between_members
    return "" if within is None else f" (within members {within:.3f}, between {between:.3f})"


def _not_sure(abstention: "Abstention", answer: "Answer") -> str:
    value = abstention.value(answer)
    return f"not sure: {abstention.score} {value:.3f}, above the threshold of {abstention.threshold:.3f}"


def _coloured(answer: "Answer") -> Text:
    return Text.assemble(*(zip(answer.tokens, map(_colour, answer.epistemic), strict=True)))


def _colour(epistemic: float) -> str:
    return next(colour for limit, colour in SCALE if epistemic <= limit)


def _legend() -> Text:
    text = Text.assemble(("members disagree, in nats a token: ", "dim"))
    below = 0.0
    for limit, colour in SCALE:
        text.append(f"≤ {limit:g}" if limit < math.inf else f"> {below:g}", colour or "default")
        text.append("  ")
        below = limit
    return text


def _last(prompt: "PromptRow") -> str:
    """A prompt as a heading: the text, or the last message."""
    if isinstance(prompt, Mapping):
        return _last(prompt["prompt"])
    return prompt if isinstance(prompt, str) else str(prompt[-1].get("content", ""))


def _line(
    index: int, prompt: "PromptRow", answers: "list[Answer]", args: argparse.Namespace, abstention: "Abstention | None"
) -> dict[str, Any]:
    """The JSON object of a prompt, with the fields of its answer, or of every member's answer."""

    def fields(answer: "Answer") -> dict[str, Any]:
        found = {name: value for name, value in answer._asdict().items() if value is not None}
        if abstention:
            found["above_threshold"] = abstention.is_above(answer)
            if found["above_threshold"] and args.withhold:
                found |= {"text": None, "token_ids": None, "tokens": None}
        return found

    if args.members:
        return {"index": index, "prompt": prompt, "members": [fields(answer) for answer in answers]}
    return {"index": index, "prompt": prompt, **fields(answers[0])}
