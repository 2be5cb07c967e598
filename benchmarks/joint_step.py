"""What a training step of M members costs: one joint pass against M passes of one adapter, and against peers.

    python benchmarks/joint_step.py [--members 8] [--tokens 32 256] [--dtypes bfloat16 float32 | --fastest]
        [--leave_out NAME …] [--gpu]

Forward and backward of log-likelihoods on a random Llama of real shape (134 million parameters on a CPU, with the
vocabulary of a SmolLM; 0.5B, 1B and 8B shapes with --gpu), LoRA r = 16 on all linear layers, every token trained,
`tokens` a member in one example. Baselines, run in turns with ours:

    one adapter   transformers and PEFT, cross-entropy of its logits: what M separate TRL runs do M times
    PEFT loop     M adapters on one base, one after another by `set_adapter`, gradients of all kept
    vmap          `torch.func.functional_call` over stacked adapters, mapped by `torch.func.vmap`
    one member    ours with M = 1
    compiled      blocks compiled: the joint step by `LoraEnsemble.compile`, one adapter likewise

Times are medians of rounds in turns. In a round, what has one adapter or member runs M times, so that it takes about as
long as the joint step: on a machine that is shared, the same product may take twice as long a few seconds later. malloc
keeps freed memory, as in our trainers, for all alike. "ratio" is the joint step by M times one adapter's, "compiled"
that of the compiled joint step by M times one adapter's as TRL runs it, uncompiled. "of rate" is the joint step's
operations a second in the base's matrices, forward and backward to activations, as a share of the machine's own rate of
matrix products in its turns, and "of best" as a share of the best of ten products.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, logging

from renyi import LoraEnsemble
from renyi.machine import half_gain, keep_freed_memory

SHAPES = {  # hidden size, feed-forward, layers, heads, key-value heads, vocabulary, tied
    "134M": (576, 1536, 30, 9, 3, 49_152, True),
    "0.5B": (896, 4864, 24, 14, 2, 151_936, True),
    "1B": (2048, 8192, 16, 32, 8, 128_256, True),
    "8B": (4096, 14336, 32, 32, 8, 128_256, False),
    "tiny": (64, 128, 2, 4, 2, 2048, True),  # to try that all runs
}
NAMES = ("joint", "joint, compiled", "one member", "one adapter", "one, compiled", "PEFT loop", "vmap")
NEEDED = ("joint", "one adapter")  # for the ratio
ALONE = ("one member", "one adapter", "one, compiled")  # run M times in a round
PRODUCTS = 20  # in a round
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def model(shape: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    hidden, forward, layers, heads, key_value_heads, vocabulary, tied = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=forward, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def matrix_entries(shape: str) -> int:
    """Entries of all matrices that a token's features are multiplied by: a pass takes twice as many operations."""
    hidden, forward, layers, heads, key_value_heads, vocabulary, _ = SHAPES[shape]
    attention = 2 * hidden * hidden * (1 + key_value_heads / heads)
    return int(layers * (attention + 3 * hidden * forward) + hidden * vocabulary)


def feed_forward(hidden: int, inner: int, rows: int, dtype: torch.dtype, device: str) -> Callable[[], Tensor]:
    """The product of a feed-forward layer's matrix with so many rows."""
    a, b = (torch.randn(n, hidden, device=device).to(dtype) for n in (rows, inner))
    return lambda: torch.nn.functional.linear(a, b)


def product_rate(hidden: int, inner: int, rows: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of the product of a feed-forward layer's matrix with so many rows, the best of ten."""
    product, seconds = feed_forward(hidden, inner, rows, dtype, device), []
    for _ in range(10):
        began = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * rows * hidden * inner / min(seconds)


def steps(
    shape: str,
    dtype: torch.dtype,
    device: str,
    members: int,
    tokens: int,
    names: Sequence[str],
    backend: str = "inductor",
) -> dict[str, Callable[[], None]]:
    """What is timed, of NAMES those that are named; adapters have the precision of the base, for all alike.

    `backend` is what compiles.
    """
    ids = torch.randint(5, 1000, (1, tokens + 1), device=device)

    def ours(members: int, compiles: bool = False) -> Callable[[], None]:
        ensemble = LoraEnsemble.from_base(model(shape, dtype, device), members, LoraConfig(**LORA), seed=0)
        ensemble.to(dtype).train()
        if compiles:
            ensemble.compile(backend=backend)
        return lambda: (-ensemble(ids).log_probs.sum()).backward()

    def one_adapter(compiles: bool = False) -> Callable[[], None]:
        peft = get_peft_model(model(shape, dtype, device), LoraConfig(**LORA)).to(dtype).train()
        if compiles:
            for block in peft.get_base_model().model.layers:
                block.compile(backend=backend)
        return lambda: peft(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def loop() -> Callable[[], None]:
        peft = get_peft_model(model(shape, dtype, device), LoraConfig(**LORA), adapter_name="0")
        for m in range(1, members):
            peft.add_adapter(str(m), LoraConfig(**LORA))
        peft.to(dtype).train()

        def run() -> None:
            for m in range(members):
                peft.set_adapter(str(m))
                peft(input_ids=ids, labels=ids, use_cache=False).loss.backward()

        return run

    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "joint": lambda: ours(members),
        "joint, compiled": lambda: ours(members, compiles=True),
        "one member": lambda: ours(1),
        "one adapter": one_adapter,
        "one, compiled": lambda: one_adapter(compiles=True),
        "PEFT loop": loop,
        "vmap": lambda: vmapped(shape, dtype, device, members, ids),
    }
    return {name: makers[name]() for name in names}


def vmapped(shape: str, dtype: torch.dtype, device: str, members: int, ids: Tensor) -> Callable[[], None]:
    base = get_peft_model(model(shape, dtype, device), LoraConfig(**LORA)).to(dtype).train()
    base.config._attn_implementation = "eager"
    stacked = {
        n: p.detach().expand(members, *p.shape).clone().requires_grad_()
        for n, p in base.named_parameters()
        if p.requires_grad
    }

    def loss(adapter: dict[str, Tensor]) -> Tensor:
        logits = torch.func.functional_call(base, adapter, (), {"input_ids": ids, "use_cache": False}).logits
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    def run() -> None:
        torch.func.vmap(loss, randomness="same")(stacked).sum().backward()

    return run


def measure(
    made: dict[str, Callable[[], object]], rounds: int, device: str, times: Mapping[str, int] | int = 1
) -> dict[str, float]:
    """Median seconds of one run, in turns. In its turn each runs `times` times, by name where not all run as often.

    Two rounds of one run each come first and do not count: they compile, and the process grows until its memory lies as
    the turns need it.
    """
    often = {name: times if isinstance(times, int) else times.get(name, 1) for name in made}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(-2, rounds):
        for name, run in made.items():
            many = often[name] if number >= 0 else 1
            began = time.perf_counter()
            for _ in range(many):
                run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append((time.perf_counter() - began) / many)
    return {name: statistics.median(s) for name, s in seconds.items()}


def precisions(device: str = "cpu") -> list[str]:
    """The precisions to measure, the fastest one first. A CPU without bfloat16 would take minutes for a step in it."""
    has_half = device == "cuda" or half_gain(torch.bfloat16) >= 1
    return ["bfloat16", "float32"] if has_half else ["float32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--fastest", action="store_true", help="only the precision that this machine computes fastest")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--leave_out", nargs="+", choices=[n for n in NAMES if n not in NEEDED], default=[])
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    keep_freed_memory()
    device = "cuda" if args.gpu else "cpu"
    shapes = args.shapes or (["0.5B", "1B", "8B"] if args.gpu else ["134M"])
    tokens = args.tokens or ([32, 512, 2048] if args.gpu else [32, 256])
    where = torch.cuda.get_device_name() if args.gpu else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {where}, {torch.get_num_threads()} threads, M = {args.members}")
    names = [name for name in NAMES if name not in args.leave_out]
    print(
        "shape dtype     tokens   ratio  compiled  of rate  of best  against PEFT loop  "
        + "  ".join(f"{n:>15}" for n in names)
        + "  tokens/s"
    )
    rows = []
    for shape in shapes:
        for dtype in args.dtypes or precisions(device)[: 1 if args.gpu or args.fastest else 2]:
            for many in tokens:
                hidden, inner, *_ = SHAPES[shape]
                made = steps(shape, getattr(torch, dtype), device, args.members, many, names)
                sizes = (hidden, inner, args.members * many, getattr(torch, dtype), device)
                made["products"] = feed_forward(*sizes)
                times = dict.fromkeys(ALONE, args.members) | {"products": PRODUCTS}
                seconds = measure(made, args.rounds, device, times)
                ratio = seconds["joint"] / (args.members * seconds["one adapter"])
                gain = seconds["PEFT loop"] / seconds["joint"] if "PEFT loop" in seconds else float("nan")
                best = min(seconds["joint"], seconds.get("joint, compiled", math.inf))
                compiled = ratio * seconds.get("joint, compiled", math.nan) / seconds["joint"]
                speed = args.members * many / best
                rate = 4 * matrix_entries(shape) * args.members * many / seconds["joint"]
                share = rate / (2 * hidden * inner * args.members * many / seconds["products"])
                of_best = rate / product_rate(*sizes)
                cells = "  ".join(f"{1e3 * seconds[n]:12.1f} ms" for n in names)
                print(
                    f"{shape:5} {dtype:9} {many:6}  {ratio:6.3f}  {compiled:8.3f}  {share:7.0%}  {of_best:7.0%}  "
                    f"{gain:17.2f}  {cells}  {speed:8.0f}",
                    flush=True,
                )
                row = {"shape": shape, "dtype": dtype, "tokens": many, "ratio": ratio, "compiled": compiled}
                row |= {"of_rate": share, "of_best": of_best, "against_loop": gain, "tokens_a_second": speed}
                rows.append({**row, "seconds": seconds})
                del made
    print(json.dumps({"benchmark": "joint_step", "members": args.members, "rows": rows}))


if __name__ == "__main__":
    main()
