"""A real model as an ensemble in a real vLLM, two replicas of it: are its answers ours?

    python benchmarks/vllm_ensemble.py --vllm_python build/vllm/bin/python [--ensemble runs/mine] [--replicas 2]

Without --ensemble it is --model with members whose B is random. Everything is float32. Each replica is a `vllm serve`
of the exported folder with the plugin, and the engine of `renyi serve --engine vllm` sends the requests to them, all at
once: greedy answers to chats, then groups of prompts and answers of many lengths. The table says how many have the
tokens of `LoraEnsemble.generate`, at which margin the others part, what each replica answered, and how many groups
vLLM's log says were broken. Exit code 1 if an answer failed, a group broke or one member answered for the mixture.
"""

import argparse
import asyncio
import os
import random
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
from serve_load import make_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi import load
from renyi.inference.generate import prompt_ids
from renyi.runs.export import export_adapters
from renyi.runs.load import Loaded
from renyi.serve.engine import EngineRequest, EngineToken, Sampled
from renyi.serve.replica import address_of
from renyi.serve.vllm import VllmEngine

WORDS = (
    "river",
    "seven",
    "light",
    "Canberra",
    "bread",
    "tax",
    "the moon",
    "oxygen",
    "chess",
    "winter",
    "honey",
    "Rome",
)
KINDS = ("Tell me about {}.", "What have {} in common?", "Which of {} is the oldest, and why?", "Write a line on {}.")
SOURCES = Path(__file__).parents[1] / "src"


class Running(NamedTuple):
    """A replica: where it is, and its log."""

    address: str
    log: Path


@contextmanager
def vllm(python: str, command: str, log: Path, *flags: str) -> Iterator[Running]:
    """`vllm serve` in a process of its own. It may not be ready yet."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    start = "from vllm.entrypoints.cli.main import main; main()"
    where = ["--port", str(ports[0]), "--additional-config", f'{{"renyi": {{"port": {ports[1]}}}}}']
    own = {"PYTHONPATH": str(SOURCES), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [python, "-c", start, *shlex.split(command)[1:], *where, *flags],
            env={**os.environ, **own},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Running(f"http://127.0.0.1:{ports[0]},http://127.0.0.1:{ports[1]}", log)
        if process.poll() is not None:
            print(f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    finally:
        process.terminate()
        process.wait(60)


def wait(running: Running, seconds: float = 600) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            if httpx.get(f"{running.address.partition(',')[0]}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not start:\n{running.log.read_text()[-3000:]}")


async def answered(
    engine: VllmEngine, requests: Sequence[EngineRequest]
) -> list[tuple[list[EngineToken] | Exception, Sampled | None]]:
    """Answers, or errors, of requests that are made at once."""

    async def one(request: EngineRequest) -> tuple[list[EngineToken] | Exception, Sampled | None]:
        stream = engine.submit(request)
        try:
            return [token async for token in stream], stream.sampled
        except Exception as error:
            return error, stream.sampled

    await engine.start()
    try:
        return await asyncio.gather(*map(one, requests))
    finally:
        await engine.stop()


def compare(loaded: Loaded, engine: VllmEngine, requests: Sequence[EngineRequest]) -> tuple[bool, str]:
    """Whether all requests were answered by the whole mixture, and how many answers are ours."""
    began = time.monotonic()
    found = asyncio.run(answered(engine, requests))
    seconds = time.monotonic() - began
    problems = Counter(
        str(answer) if isinstance(answer, Exception) else f"sampled: {sampled.why}"
        for answer, sampled in found
        if isinstance(answer, Exception) or sampled
    )
    equal, margins, worst, epistemic = 0, [], 0.0, 0.0
    for request, (answer, _) in zip(requests, found, strict=True):
        if isinstance(answer, Exception):
            continue
        ours = loaded.ensemble.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=list(request.end_tokens),
            pad_token_id=0,
        )
        tokens = [token.token for token in answer]
        expected = ours.new_tokens[0].tolist()
        epistemic = max(epistemic, float(ours.epistemic.max()))
        if tokens == expected:
            equal += 1
            told, own = torch.tensor([t.log_prob for t in answer]), ours.log_prob[0]
            worst = max(worst, float((told - own).abs().max()))
            continue
        at = next(i for i, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b)
        top = answer[at].alternatives
        margins.append(f"{top[0].log_prob - top[1].log_prob:.1g} nats at token {at}")
    written = sum(len(answer) for answer, _ in found if isinstance(answer, list))
    written = sum(len(answer) for answer, _ in found if isinstance(answer, list))
    text = (
        f"{equal} of {len(requests)} answers have our tokens ({written} in all, in {seconds:.0f} s); greatest "
        f"difference of a log-probability {worst:.1g} nats; greatest epistemic uncertainty {epistemic:.2f} nats"
    )
    if margins:
        text += f"; the likeliest two tokens where others part: {', '.join(margins)}"
    for problem, times in problems.items():
        text += f"\n  {times} × {problem}"
    return not problems, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm_python", default=os.environ.get("VLLM_PYTHON", "build/vllm/bin/python"))
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--ensemble", help="folder of an ensemble of --model; by default random members")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8, help="of an answer to a chat")
    parser.add_argument("--groups", type=int, default=60)
    args = parser.parse_args()
    python = str(Path(args.vllm_python).absolute())
    versions = "import torch, transformers, vllm; print(vllm.__version__, torch.__version__, transformers.__version__)"
    told = subprocess.run([python, "-c", versions], check=True, capture_output=True, text=True).stdout.split()[-3:]
    print("vLLM {}, torch {}, transformers {};".format(*told), f"{os.cpu_count()} cores, float32")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder, base = Path(scratch), Path(scratch) / "base"
        if args.ensemble:
            AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).save_pretrained(base)
            AutoTokenizer.from_pretrained(args.model).save_pretrained(base)
            made = Path(args.ensemble)
        else:
            made = make_folder(folder, args.model, args.members, "float32")
        export = export_adapters(made, folder / "export", base=str(base), mixture=True)
        if export.command is None:
            raise SystemExit(f"vLLM cannot serve it: {export.unfit}")
        flags = ("--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.15", "--max-model-len", "1024")
        size = ("--max-num-seqs", "256", "--max-num-batched-tokens", "2048")
        replicas = [
            stack.enter_context(vllm(python, export.command, folder / f"vllm_{n}.log", *flags, *size))
            for n in range(args.replicas)
        ]
        for replica in replicas:
            wait(replica)
        loaded = load(made, base=base, device="cpu")
        draw = random.Random(0)
        chats, groups = [], []
        for _ in range(args.prompts):
            said = draw.choice(KINDS).format(", ".join(draw.choices(WORDS, k=draw.randint(1, 12))))
            ids = prompt_ids([{"role": "user", "content": said}], loaded.tokenizer, 1)
            chats.append(EngineRequest(ids, args.tokens, settings={"do_sample": False}, alternatives=2))
        for _ in range(args.groups):
            ids = [draw.randrange(100, len(loaded.tokenizer)) for _ in range(draw.randint(1, 200))]
            groups.append(EngineRequest(ids, draw.randint(1, 24), settings={"do_sample": False}, alternatives=2))
        addresses = [address_of(replica.address) for replica in replicas]
        results = []
        print(f"{loaded.ensemble.num_members} members, {len(replicas)} replicas")
        for what, requests in (("chats", chats), ("groups of mixed lengths", groups)):
            engine = VllmEngine(made, addresses, base=str(base), most=10_000)
            is_whole, text = compare(loaded, engine, requests)
            results.append(is_whole)
            lengths = [len(request.prompt) for request in requests]
            print(f"{len(requests)} {what}, prompts of {min(lengths)} to {max(lengths)} tokens: {text}", flush=True)
        for number, replica in enumerate(replicas):
            metrics = httpx.get(f"{replica.address.partition(',')[0]}/metrics", timeout=10).text.splitlines()
            lines = [line for line in metrics if line.startswith("vllm:request_success_total")]
            broken = replica.log.read_text().count("the group was ended")
            results.append(not broken)
            several = sum(float(line.split()[-1]) for line in lines)
            print(f"replica {number} answered {several:.0f} members' requests; broken groups: {broken}")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
