"""A fuzz of the API against its own OpenAPI schema: no request may be answered with a 500, or not at all.

    python benchmarks/serve_fuzz.py [--requests 10000]

schemathesis draws requests from the schema, both ones that fit it and ones that break it. They go to an application in
this process, over an ensemble of a tiny, randomly drawn model, whose answers have at most 4 tokens. Exit code 1 if a
request failed.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from requests import RequestException
from schemathesis import GenerationMode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import live, tiny_folder

from renyi.serve.answers import AnswerLimits
from renyi.serve.schemas import ChatBody, CompletionBody


def fuzz(operation: Any, requests: int, start: int, statuses: Counter[tuple[str, int]], failed: list[str]) -> None:
    """Send so many requests to one operation, and note the status of each; 0 if there was no answer."""
    label = f"{operation.method.upper()} {operation.path}"

    @seed(start)
    @settings(
        max_examples=requests,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: schemathesis.Case) -> None:
        _fitting(case)
        status = 0
        try:
            status = case.call(timeout=60).status_code
        except RequestException as error:
            failed.append(f"{error!r}")
        statuses[label, status] += 1
        if status == 500:
            failed.append(case.as_curl_command()[:500])

    send()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    statuses: Counter[tuple[str, int]] = Counter()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = tiny_folder(Path(folder))
        with live(loaded, model="tiny", answers=AnswerLimits(max_tokens=4)) as server:
            schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
            schema.config.generation.update(modes=list(GenerationMode))
            operations = [found.ok() for found in schema.get_all_operations()]
            rounds = 0
            while sum(statuses.values()) < args.requests:  # those without a body have few different requests
                for operation in operations:
                    fuzz(operation, max(20, args.requests // 20), args.seed + rounds, statuses, failed)
                rounds += 1
            idle = server.wait_for_idle(30)
    for (label, status), times in sorted(statuses.items()):
        print(f"{times:>7}  {status}  {label}")
    print(f"\n{sum(statuses.values())} requests, {len(failed)} failed; idle at the end: {'yes' if idle else 'no'}")
    print("\n".join(failed[:10]))
    return int(bool(failed) or not idle)


def _fitting(case: schemathesis.Case) -> None:
    """Let most requests name a model that there is and leave out what is refused, so that they come further."""
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 4:
        body["model"] = "tiny"
        for name in [*ChatBody.refused, *CompletionBody.refused, "stream_options", "top_logprobs", "best_of"]:
            body.pop(name, None)
        if isinstance(body.get("max_tokens"), int):
            body["max_tokens"] = 1 + abs(body["max_tokens"]) % 4


if __name__ == "__main__":
    sys.exit(main())
