"""What serving costs: time to the first token and throughput at 1, 4, 16 and 64 clients, M members against one.

    python benchmarks/serve_load.py [--model HuggingFaceTB/SmolLM2-135M-Instruct] [--members 4] [--clients 1 4 16 64]
    python benchmarks/serve_load.py --vllm_python build/vllm/bin/python   # and vLLM, with one adapter and with M
    python benchmarks/serve_load.py --url http://127.0.0.1:9000 --names member_0 member_1 …   # another server

Every client sends one request after another: a prompt of 64 tokens, and an answer of at most 64. Servers are processes
of their own (`renyi serve`), one after the other, with members whose B is random. The last column is the time of M
members over that of one for equally many tokens. With --vllm_python vLLM serves the same members as LoRA adapters,
after ours have ended; a request then goes to one of them, or to all M at once. With --url another server is measured,
and a request goes to all of --names.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from renyi import LoraEnsemble

LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PROMPT = ANSWER = 64


class Load(NamedTuple):
    """What some clients measured together: tokens a second, and seconds to the first token of each request."""

    tokens_per_second: float
    first_token: list[float]


def make_folder(folder: Path, model: str, members: int, dtype: str) -> Path:
    """An ensemble of members that differ, with its base beside it in the precision that is asked for."""
    base, ensemble_folder = folder / "base", folder / f"members_{members}"
    if not base.exists():
        tokenizer = AutoTokenizer.from_pretrained(model)
        AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    ensemble = LoraEnsemble.from_base(AutoModelForCausalLM.from_pretrained(base), members, LoraConfig(**LORA))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ensemble.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    ensemble.save(ensemble_folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(ensemble_folder)
    return ensemble_folder


@contextmanager
def served(folder: Path, *flags: str, quiet: bool = True) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of a folder in a process of its own: its address, and the process. It is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "renyi", "serve", str(folder), "--port", str(port), "--model_name", "mixture"]
    output = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen([*command, *flags], stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen[bytes] | None = None, seconds: float = 300) -> None:
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            if httpx.get(f"{url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {seconds:g} s")


async def ask(client: httpx.AsyncClient, url: str, name: str, prompt: list[int], answer: int) -> tuple[float, int]:
    """Seconds to the first token, and how many came."""
    body = {"model": name, "prompt": prompt, "max_tokens": answer, "temperature": 1.0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    began, first, tokens = time.monotonic(), 0.0, 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            first = first or time.monotonic() - began
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    return first, tokens


async def measure(url: str, names: list[str], clients: int, rounds: int, vocabulary: int) -> Load:
    """Let some clients send so many requests each, one after another, to all of `names` at once."""
    draw = random.Random(clients)
    firsts: list[float] = []
    written = 0

    async def client_(session: httpx.AsyncClient) -> None:
        nonlocal written
        for _ in range(rounds):
            prompt = [draw.randrange(100, vocabulary) for _ in range(PROMPT)]
            found = await asyncio.gather(*(ask(session, url, name, prompt, ANSWER) for name in names))
            firsts.append(max(first for first, _ in found))
            written += max(tokens for _, tokens in found)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as session:
        await ask(session, url, names[0], [100] * PROMPT, 4)
        began = time.monotonic()
        await asyncio.gather(*(client_(session) for _ in range(clients)))
        return Load(written / (time.monotonic() - began), firsts)


@contextmanager
def vllm_serving(python: str, folder: Path, made: Path, dtype: str) -> Iterator[str]:
    """vLLM with the members of an ensemble as adapters: its address. It is ready."""
    from vllm_ensemble import vllm, wait

    from renyi.runs.export import export_adapters

    export = export_adapters(made, folder / "export", base=str(folder / "base"))
    flags = ("--dtype", dtype, "--enforce-eager", "--gpu-memory-utilization", "0.15", "--max-model-len", "512")
    with vllm(python, export.command, folder / "vllm.log", *flags, "--max-num-seqs", "256") as running:
        wait(running)
        yield running.address.partition(",")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--requests", type=int, default=0, help="a client; by default 8 to 1, fewer for more clients")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--vllm_python", help="the Python of an environment with vLLM, to measure it, too")
    parser.add_argument("--url", help="another server, instead of ours")
    parser.add_argument("--names", nargs="+", default=["member_0"], help="the models of --url")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {args.dtype}"
    )
    print(f"prompts of {PROMPT} and answers of {ANSWER} tokens\n")
    vocabulary = len(AutoTokenizer.from_pretrained(args.model))
    found: dict[str, dict[int, Load]] = {}

    def run(label: str, url: str, names: list[str]) -> None:
        found[label] = {}
        for clients in args.clients:
            rounds = args.requests or max(1, 8 // clients)
            load = found[label][clients] = asyncio.run(measure(url, names, clients, rounds, vocabulary))
            first = statistics.median(load.first_token)
            print(
                f"{label:<24} {clients:>3} clients  {load.tokens_per_second:7.1f} tokens/s  "
                f"first token {first:6.2f} s (worst {max(load.first_token):.2f})",
                flush=True,
            )

    if args.url:
        run(f"{args.url}, {len(args.names)}", args.url, args.names)
        return
    with tempfile.TemporaryDirectory() as folder:
        for members in (1, args.members):
            made = make_folder(Path(folder), args.model, members, args.dtype)
            with served(made) as (url, _):
                run(f"{members} member{'s' if members > 1 else ''}", url, ["mixture"])
        if args.vllm_python:
            with vllm_serving(args.vllm_python, Path(folder), made, args.dtype) as url:
                names = [f"member_{m}" for m in range(args.members)]
                run("vLLM, 1 adapter", url, names[:1])
                run(f"vLLM, {args.members} adapters", url, names)
    one, several = found["1 member"], found[f"{args.members} members"]
    print()
    for clients in args.clients:
        ratio = one[clients].tokens_per_second / several[clients].tokens_per_second
        print(f"{args.members} members over one at {clients:>2} clients: {ratio:.2f} × the time")


if __name__ == "__main__":
    main()
