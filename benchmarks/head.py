"""What log-likelihoods under a frozen head cost: ours against naive logits and PyTorch's fused loss.

    python benchmarks/head.py [--rows 1024] [--hidden 576] [--vocabulary 49152] [--dtypes bfloat16 float32] [--gpu]

Forward and backward to the hidden rows, one log-likelihood a row, upstream gradients that differ.

    naive            logits in the model's precision, raised to float32, cross-entropy of each row
    naive, raw       the same without raising: in bfloat16 its log-likelihoods are rounded to 3 digits
    linear_ce        F.linear_cross_entropy as it comes
    linear_ce, chunk the same in chunks, as it offers to save memory
    two products     the two matrix products that every way needs

Times are medians of rounds in turns. Memory is the most that was allocated beyond the inputs, from PyTorch's own
profiler. Error is the greatest error of a row's log-likelihood against float64 logits of the same inputs. By default
malloc returns half a gigabyte of logits to the system and gets it back page by page; with --keep_memory it keeps them,
as in our trainers.
"""

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from joint_step import measure as in_turns
from joint_step import precisions
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from renyi.ensemble.head import LogitTransform, token_scores
from renyi.machine import keep_freed_memory


def ways(hidden: Tensor, head: nn.Linear, targets: Tensor, upstream: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each does a forward and a backward, and returns the log-likelihoods."""

    def with_backward(log_likelihood: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            rows = hidden.clone().requires_grad_()
            ell = log_likelihood(rows)
            (ell.float() * upstream).sum().backward()
            return ell.detach()

        return run

    def fused(rows: Tensor, **given: object) -> Tensor:
        return -F.linear_cross_entropy(rows, head.weight, targets, reduction="none", **given)

    def products() -> Tensor:
        return F.linear(hidden, head.weight) @ head.weight

    made = {
        "ours": with_backward(lambda rows: token_scores(rows, head, targets, LogitTransform()).log_probs),
        "naive": with_backward(lambda rows: -F.cross_entropy(head(rows).float(), targets, reduction="none")),
        "naive, raw": with_backward(lambda rows: -F.cross_entropy(head(rows), targets, reduction="none")),
        "two products": products,
    }
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        made["linear_ce"] = with_backward(fused)
    options = getattr(nn, "LinearCrossEntropyOptions", None)
    if options is not None:
        made["linear_ce, chunk"] = with_backward(lambda rows: fused(rows, options=options()))
    return made


def peak(run: Callable[[], Tensor], device: str) -> int:
    """Bytes at the peak beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def measure(rows: int, features: int, words: int, dtype: str, device: str, rounds: int) -> list[dict[str, Any]]:
    """A line for each way; times are medians of rounds in turns."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, features, device=device).to(getattr(torch, dtype))
    head = nn.Linear(features, words, bias=False, device=device).to(hidden.dtype).requires_grad_(False)
    targets, upstream = torch.randint(words, (rows,), device=device), torch.rand(rows, device=device)
    few = slice(0, 256)
    exact = -F.cross_entropy(hidden[few].double() @ head.weight.double().T, targets[few], reduction="none")
    made = ways(hidden, head, targets, upstream)
    medians = in_turns(made, rounds, device)
    memory = {name: peak(run, device) for name, run in made.items() if name != "two products"}
    faster = min(medians[name] for name in ("naive", "linear_ce") if name in medians)
    found: list[dict[str, Any]] = []
    for name, median in medians.items():
        row = {"dtype": dtype, "way": name, "ms": 1e3 * median, "of_faster_peer": median / faster}
        if name in memory:
            row |= {"bytes": memory[name], "of_naive": memory[name] / memory["naive"]}
            row["error"] = (made[name]()[few].double() - exact).abs().max().item()
        found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--keep_memory", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    device = "cuda" if args.gpu else "cpu"
    if args.keep_memory:
        keep_freed_memory()
    default = (8192, 4096, 128_256) if args.gpu else (1024, 576, 49_152)
    rows, features, words = (
        given or usual for given, usual in zip((args.rows, args.hidden, args.vocabulary), default, strict=True)
    )
    where = torch.cuda.get_device_name() if args.gpu else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads; N {rows}, D {features}, V {words}")
    print("dtype     way               ms     of the faster peer  memory MB  of naive's  greatest error, nats")
    found = []
    for dtype in args.dtypes or precisions(device):
        for row in measure(rows, features, words, dtype, device, args.rounds):
            text = f"{dtype:9} {row['way']:16} {row['ms']:7.1f} {row['of_faster_peer']:12.2f}"
            if "bytes" in row:
                text += f" {row['bytes'] / 1e6:17.1f} {row['of_naive']:11.3f}  {row['error']:.6f}"
            print(text, flush=True)
            found.append(row)
    print(json.dumps({"benchmark": "head", "rows": rows, "hidden": features, "vocabulary": words, "found": found}))


if __name__ == "__main__":
    main()
