"""Which attention is faster on a CPU, by the length of the rows: PyTorch's kernels, or plain matrix products.

    python benchmarks/attention.py [--lengths 16 32 64 128 256 512] [--dtypes bfloat16 float32] [--rounds 5]

One layer's attention in the shape of a SmolLM2-135M (9 heads, 3 of keys, 64 features each), 2,048 tokens in rows of
one length, without padding. Times are medians of rounds in turns, in milliseconds: forward and backward, and in
brackets the forward alone, as in scoring. "flash" is what transformers runs by default, "math" is PyTorch's other
kernel, and "products" is ours.
"""

import argparse
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from renyi.ensemble import attention

HEADS, KEYS, FEATURES, TOKENS = 9, 3, 64, 2048


def run(kind: str, layer: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> None:
    math = sdpa_kernel(SDPBackend.MATH) if kind == "math" else nullcontext()
    with math, nullcontext() if backward else torch.inference_mode():
        if kind == "products":
            causal = torch.ones(inputs[0].shape[2], inputs[0].shape[2], dtype=torch.bool).tril()
            found = attention.products(*inputs, causal, FEATURES**-0.5)
        else:
            found, _ = sdpa_attention_forward(layer, *inputs, None)
        if backward:
            found.sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = HEADS // KEYS, True  # type: ignore[assignment]
    kinds = ("flash", "math", "products")
    print(f"{'':9} {'tokens':>6}" + "".join(f"{kind:>22}" for kind in kinds))
    for dtype in args.dtypes:
        for length in args.lengths:
            shape = partial(torch.randn, TOKENS // length, dtype=getattr(torch, dtype), requires_grad=True)
            inputs = shape(HEADS, length, FEATURES), shape(KEYS, length, FEATURES), shape(KEYS, length, FEATURES)
            times: dict[tuple[str, bool], list[float]] = {(k, b): [] for k in kinds for b in (True, False)}
            for number in range(args.rounds + 1):
                for (kind, backward), seen in times.items():
                    begun = time.perf_counter()
                    run(kind, layer, inputs, backward)
                    if number:
                        seen.append(1000 * (time.perf_counter() - begun))
            row = ""
            for kind in kinds:
                both, alone = (statistics.median(times[kind, b]) for b in (True, False))
                row += f"{both:>12.2f} ({alone:7.2f})"
            print(f"{dtype:9} {length:>6}{row}", flush=True)


if __name__ == "__main__":
    main()
