"""Many clients that behave badly, for minutes: nothing is lost, and memory does not grow.

    python benchmarks/serve_soak.py [--model MODEL] [--members 4] [--clients 64] [--minutes 10]

Clients draw at random what they do next: ask for a whole answer or a stream, go in the middle of one, send a body that
is no JSON, a field of a wrong type, a prompt that is too long, a body that is too large, an unknown model, or ask for
scores. Each answer is checked: it is complete, or refused by the status that fits; or the client went by itself.
Memory is the server's resident set, read every second. What is in flight moves it by some percent from second to
second, so its means over the second and the last quarter of the time are compared. Then the server is killed (SIGKILL)
and started again, and the time until it is ready is measured beside what loading the model takes.
Exit code 1 if anything was lost.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from serve_load import make_folder, served, wait_until_ready

TIMEOUT = 600.0
KINDS = {
    "whole": 4,
    "stream": 4,
    "leave stream": 4,
    "leave whole": 3,
    **dict.fromkeys(("no json", "wrong type", "too long", "too large", "unknown", "score"), 1),
}  # and how often each


async def behave(session: httpx.AsyncClient, url: str, draw: random.Random, seen: Counter[str]) -> None:
    """One request of some kind; counts what came of it, under "lost: …" what should not have."""
    text = " ".join(draw.choice(("river", "seven", "why", "light", "Canberra")) for _ in range(draw.randrange(1, 40)))
    body = {"model": "mixture", "messages": [{"role": "user", "content": text}], "max_tokens": draw.randrange(1, 24)}
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    expected = {"no json": 400, "wrong type": 422, "too long": 400, "too large": 413, "unknown": 404}.get(kind, 200)
    path, content = "/v1/chat/completions", None
    if kind == "no json":
        content = b'{"model": "mixture", "mess'
    elif kind == "wrong type":
        body["max_tokens"] = "many"
    elif kind == "too long":
        body["messages"] = [{"role": "user", "content": "word " * 40_000}]
    elif kind == "too large":
        body["messages"] = [{"role": "user", "content": "x" * 1_500_000}]
    elif kind == "unknown":
        body["model"] = "nobody"
    elif kind == "score":
        path, body = "/v1/score", {"model": "mixture", "rows": [{"prompt": text, "completion": " yes"}]}
    content = content or json.dumps({**body, **({"stream": True} if "stream" in kind else {})}).encode()
    headers = {"content-type": "application/json"}
    try:
        if kind == "leave whole":
            await session.post(url + path, content=content, headers=headers, timeout=draw.uniform(0.01, 2.0))
            seen["whole"] += 1
            return
        async with session.stream("POST", url + path, content=content, headers=headers) as response:
            if response.status_code == 429:
                seen["429"] += 1
                await asyncio.sleep(float(response.headers["retry-after"]))
                return
            if response.status_code != expected:
                seen[f"lost: {kind} gave {response.status_code}: {(await response.aread())[:200]!r}"] += 1
                return
            if kind == "leave stream":
                stop = draw.randrange(1, 8)
                async for _ in response.aiter_lines():
                    stop -= 1
                    if not stop:
                        break
                seen[kind] += 1
                return
            data = (await response.aread()).decode()
        if kind == "stream" and not data.rstrip().endswith("data: [DONE]"):
            seen["lost: a stream without its end"] += 1
        elif kind == "whole" and json.loads(data)["choices"][0]["finish_reason"] not in ("stop", "length"):
            seen["lost: an answer without its end"] += 1
        else:
            seen[kind] += 1
    except httpx.TimeoutException:
        seen["leave whole" if kind == "leave whole" else f"lost: {kind} had no answer"] += 1
    except httpx.HTTPError as error:
        # A server may close a connection on which a refused body still arrives.
        refused_early = kind == "too large" and isinstance(error, httpx.WriteError | httpx.RemoteProtocolError)
        seen[kind if refused_early else f"lost: {kind} {type(error).__name__}"] += 1


async def idle(session: httpx.AsyncClient, url: str) -> bool:
    """Whether the server has nothing left to do within a minute, by its metrics."""
    for _ in range(120):
        lines = (await session.get(f"{url}/metrics")).text.splitlines()
        left = [line for line in lines if line.startswith(("renyi_running ", "renyi_waiting "))]
        if all(line.endswith(" 0.0") for line in left):
            return True
        await asyncio.sleep(0.5)
    return False


async def soak(url: str, pid: int, clients: int, seconds: float) -> tuple[Counter[str], list[float], bool]:
    """What came of the requests, the resident memory in MB every second, and whether all ended."""
    seen: Counter[str] = Counter()
    memory: list[float] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=limits) as session:
        ends = time.monotonic() + seconds

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < ends:
                await behave(session, url, draw, seen)

        async def watch() -> None:
            while time.monotonic() < ends:
                await asyncio.sleep(1)
                memory.append(psutil.Process(pid).memory_info().rss / 2**20)

        await asyncio.gather(watch(), *(client(number) for number in range(clients)))
        return seen, memory, await idle(session, url)


def restart(folder: Path, port: str) -> tuple[float, float]:
    """Seconds until a server is ready, and seconds that loading its model alone takes, in processes of their own."""
    load = f"from renyi import load; load({str(folder)!r})"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", load], check=True, capture_output=True)
    loading = time.monotonic() - began
    began = time.monotonic()
    command = [sys.executable, "-m", "renyi", "serve", str(folder), "--port", port, "--model_name", "mixture"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process)
        return time.monotonic() - began, loading
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = make_folder(Path(folder), args.model, args.members, args.dtype)
        with served(made, "--max_tokens", "64", "--max_waiting", str(args.clients // 2)) as (url, process):
            seen, memory, is_idle = asyncio.run(soak(url, process.pid, args.clients, 60 * args.minutes))
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        ready, loading = restart(made, url.rpartition(":")[2])
    for what, times in sorted(seen.items()):
        print(f"{times:>7}  {what}")
    early, late = (statistics.mean(memory[len(memory) * k // 4 : len(memory) * (k + 1) // 4]) for k in (1, 3))
    twentieths = [statistics.mean(memory[len(memory) * k // 20 : len(memory) * (k + 1) // 20]) for k in range(20)]
    growth = 100 * (late / early - 1)
    print(f"\nmemory in the second quarter {early:.0f} MB, in the last {late:.0f} MB: {growth:+.1f} %")
    print("means over twentieths of the time, MB: " + " ".join(f"{x:.0f}" for x in twentieths))
    print(f"all ended: {'yes' if is_idle else 'no'}; {os.cpu_count()} cores")
    print(f"after kill −9 ready again in {ready:.1f} s, of which loading the model is {loading:.1f} s")
    return int(any(what.startswith("lost") for what in seen) or not is_idle)


if __name__ == "__main__":
    sys.exit(main())
