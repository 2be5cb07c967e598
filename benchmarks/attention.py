"""Which attention is faster on a CPU, by the length of the rows: PyTorch's kernels, or plain matrix products.

    python benchmarks/attention.py [--lengths 16 32 64 128 256 512] [--dtypes bfloat16 float32] [--rows 1 8 64]
        [--keys 40 160 640] [--rounds 5]

One layer's attention in the shape of a SmolLM2-135M (9 heads, 3 of keys, 64 features each), 2,048 tokens in rows of
one length, without padding. Times are medians of rounds in turns, in milliseconds: forward and backward, and in
brackets the forward alone, as in scoring. "flash" is what transformers runs by default, "math" is PyTorch's other
kernel, and "products" is ours. A second table has decoding: one new token a row, after `keys` tokens.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
from joint_step import precisions
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from renyi.ensemble import attention

HEADS, KEYS, FEATURES, TOKENS = 9, 3, 64, 2048
KINDS = ("flash", "math", "products")


def run(kind: str, layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> None:
    math = sdpa_kernel(SDPBackend.MATH) if kind == "math" else nullcontext()
    with math, nullcontext() if backward else torch.inference_mode():
        if kind == "products":
            tokens = inputs[0].shape[2]
            causal = None if tokens == 1 else torch.ones(tokens, tokens, dtype=torch.bool).tril()
            found = attention.products(*inputs, causal, FEATURES**-0.5)
        else:
            found, _ = sdpa_attention_forward(layer, *inputs, None)
        if backward:
            found.sum().backward()


def medians(
    layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], rounds: int, passes: tuple[bool, ...]
) -> dict[tuple[str, bool], float]:
    """Milliseconds of each kind, with a backward and without, by turns."""
    times: dict[tuple[str, bool], list[float]] = {(kind, backward): [] for kind in KINDS for backward in passes}
    for number in range(rounds + 1):
        for (kind, backward), seen in times.items():
            begun = time.perf_counter()
            run(kind, layer, inputs, backward)
            if number:
                seen.append(1000 * (time.perf_counter() - begun))
    return {at: statistics.median(seen) for at, seen in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64], help="of decoding")
    parser.add_argument("--keys", type=int, nargs="+", default=[40, 160, 640], help="of decoding")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = HEADS // KEYS, True  # type: ignore[assignment]
    print(f"{'':9} {'tokens':>6}" + "".join(f"{kind:>22}" for kind in KINDS))
    for dtype in args.dtypes or precisions():
        for length in args.lengths:
            shape = partial(torch.randn, TOKENS // length, dtype=getattr(torch, dtype), requires_grad=True)
            inputs = shape(HEADS, length, FEATURES), shape(KEYS, length, FEATURES), shape(KEYS, length, FEATURES)
            times = medians(layer, inputs, args.rounds, (True, False))
            cells = "".join(f"{times[kind, True]:>12.2f} ({times[kind, False]:7.2f})" for kind in KINDS)
            print(f"{dtype:9} {length:>6}{cells}", flush=True)
    print(f"\n{'':9} {'rows':>6} {'keys':>6}" + "".join(f"{kind:>12}" for kind in KINDS))
    for dtype in args.dtypes or precisions():
        for rows in args.rows:
            for length in args.keys:
                shape = partial(torch.randn, rows, dtype=getattr(torch, dtype))
                inputs = shape(HEADS, 1, FEATURES), shape(KEYS, length, FEATURES), shape(KEYS, length, FEATURES)
                times = medians(layer, inputs, 3 * args.rounds, (False,))
                cells = "".join(f"{times[kind, False]:>12.3f}" for kind in KINDS)
                print(f"{dtype:9} {rows:>6} {length:>6}{cells}", flush=True)


if __name__ == "__main__":
    main()
