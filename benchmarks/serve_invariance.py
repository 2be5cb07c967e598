"""Whether an answer depends on what else is in flight: served answers beside `LoraEnsemble.generate` of each alone.

    python benchmarks/serve_invariance.py [--model MODEL] [--members 4] [--requests 16] [--tokens 48]

The requests have prompts of 8 to 120 tokens and join one after another, so that they are read and written together at
different positions. Half are greedy, half are sampled with a seed. For each precision of the base the table says how
many answers have all their tokens equal, and at which token the others part.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path

import torch
from serve_load import make_folder

from renyi import load
from renyi.runs.load import Loaded
from renyi.serve.batching import EngineLimits, OurEngine
from renyi.serve.engine import EngineRequest


async def together(loaded: Loaded, requests: list[EngineRequest]) -> list[list[int]]:
    engine = OurEngine(loaded, EngineLimits(running=len(requests)))
    await engine.start()

    async def one(number: int, request: EngineRequest) -> list[int]:
        while engine.steps < number:  # one more joins at each step
            await asyncio.sleep(0.001)
        return [token.token async for token in engine.submit(request)]

    try:
        return await asyncio.gather(*(one(i, request) for i, request in enumerate(requests)))
    finally:
        await engine.stop()


def alone(loaded: Loaded, request: EngineRequest) -> list[int]:
    found = loaded.ensemble.generate(
        torch.tensor([request.prompt]),
        seed=request.seed,
        max_new_tokens=request.max_new_tokens,
        eos_token_id=[],
        **request.settings,
    )
    return found.new_tokens[0].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    args = parser.parse_args()
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory() as folder:
            loaded = load(make_folder(Path(folder), args.model, args.members, dtype), device="cpu")
            draw = torch.Generator().manual_seed(0)
            requests = [
                EngineRequest(
                    torch.randint(100, len(loaded.tokenizer), (8 + 7 * i % 113,), generator=draw).tolist(),
                    args.tokens,
                    settings={"do_sample": True, "temperature": 1.0, "top_k": 0} if i % 2 else {"do_sample": False},
                    seed=i,
                )
                for i in range(args.requests)
            ]
            served = asyncio.run(together(loaded, requests))
            by_itself = [alone(loaded, request) for request in requests]
        parted = [
            next(at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b)
            for one, other in zip(served, by_itself, strict=True)
            if one != other
        ]
        equal = args.requests - len(parted)
        where = f"; the others part at token {', '.join(map(str, sorted(parted)))}" if parted else ""
        print(f"{dtype}: {equal} of {args.requests} answers of {args.tokens} tokens are equal{where}", flush=True)


if __name__ == "__main__":
    main()
