"""What scoring costs beside training, and how exact it is in half precision.

    python benchmarks/scoring.py [--model FOLDER_OR_HUB_ID] [--members 4] [--tokens 64 256] [--rounds 3]

M members with float32 adapters on a base in the precision that this machine computes fastest, as a folder is opened;
LoRA r = 16 on all linear layers with random B; 16 rows of random tokens. Every token is trained and scored. Without
--model the base is a random Llama of 134 million parameters. Columns:

    training    forward and backward, in half precision under autocast, as `bf16` trains
    scoring     the joint forward as `renyi score` runs it: adapters act in the base's precision
    float32     the same with the adapters in float32, as `renyi` did before
    of rate     operations of the base's matrices a second, as a share of the machine's rate of matrix products

Times are medians of rounds in turns, and tokens are those of all members. The error is the mean absolute difference of
log-likelihoods, in nats a token, from those of the base and the adapters in float32.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from joint_step import LORA, model, precisions, product_rate
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

from renyi import LoraEnsemble
from renyi.ensemble import evaluating

ROWS = 16


def members_of(base: PreTrainedModel, members: int) -> LoraEnsemble:
    """Members with float32 adapters and random B."""
    ensemble = LoraEnsemble.from_base(base, members, LoraConfig(**LORA), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for A, B in ensemble.stack.matrices().values():
            B.copy_(torch.randn(B.shape, generator=generator) * 0.01)
            assert A.dtype == B.dtype == torch.float32
    return ensemble


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(ensemble: LoraEnsemble, tokens: int, rounds: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(tokens)
    device = ensemble.device
    ids = torch.randint(5, 1000, (ROWS, tokens + 1), generator=generator).to(device)

    def training() -> None:
        ensemble.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=ensemble.dtype == torch.bfloat16):
            loss = -ensemble(ids).log_probs.sum()
        loss.backward()
        ensemble.zero_grad(set_to_none=True)

    def scoring(context: Callable) -> torch.Tensor:
        with context(ensemble), torch.inference_mode():
            return ensemble.log_likelihood(ids)

    ways = {
        "training": training,
        "scoring": lambda: scoring(LoraEnsemble.inference),
        "float32": lambda: scoring(evaluating),
    }
    ensemble.eval()
    found = {name: scoring(context) for name, context in (("scoring", LoraEnsemble.inference), ("float32", evaluating))}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(_seconds(way))
    everyone = ensemble.num_members * ROWS * tokens
    result = {name: everyone / statistics.median(of) for name, of in times.items()}
    config = ensemble.config
    rows = ensemble.num_members * ROWS * tokens
    rate = product_rate(config.hidden_size, config.intermediate_size, rows, ensemble.dtype, device.type)
    parameters = sum(p.numel() for n, p in ensemble.base.named_parameters() if "members" not in n and p.dim() == 2)
    result["of_rate"] = 2 * parameters * result["scoring"] / rate
    result["products_a_second"] = rate
    dtype = ensemble.dtype
    ensemble.base.float()
    exact = scoring(lambda of: nullcontext())
    ensemble.base.to(dtype)
    for layer in ensemble.stack.layers.values():
        layer.members.float()
    return result | {f"error_{name}": float((ell - exact).abs().mean() / tokens) for name, ell in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{'tokens':>6} {'training':>9} {'scoring':>9} {'float32':>9} {'scoring/training':>17} {'of rate':>8} error")
    results, dtype = {}, getattr(torch, precisions()[0])
    for tokens in args.tokens:
        if args.model is None:
            base = model("134M", dtype, "cpu")
        else:
            base = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
        ensemble = members_of(base, args.members)
        found = results[tokens] = measure(ensemble, tokens, args.rounds)
        print(
            f"{tokens:>6} {found['training']:>9.0f} {found['scoring']:>9.0f} {found['float32']:>9.0f} "
            f"{found['scoring'] / found['training']:>17.2f} {found['of_rate']:>8.0%} "
            f"{found['error_scoring']:.4f} (float32 adapters {found['error_float32']:.4f}) nats a token",
            flush=True,
        )
    print(json.dumps({"benchmark": "scoring", "machine": platform.processor(), "rows": ROWS, **vars(args), **results}))


if __name__ == "__main__":
    main()
