"""What decoding with an ensemble costs: M members at once, one member, and M separate generations one by one.

    python benchmarks/decoding.py [--members 8] [--new_tokens 64] [--large_new_tokens 8] [--repeats 3] [--device cpu]

One member is transformers' own `generate` on the base with one PEFT adapter; M separate generations are M of those, an
adapter after another on one base. The small model is a trained one of 656 thousand parameters, the large one a randomly
initialised Llama in bfloat16. No end-of-text token: everybody writes as many tokens. Times are medians; PEFT's are of
adapters left unmerged, as many are served from one base.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, logging

from renyi import LoraEnsemble

SMALL = Path(__file__).parents[2] / "shared/models/tinystories-656k"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PROMPT = 32


def small() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32)


def large() -> PreTrainedModel:
    """134 million parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--large_new_tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or "CPU"
    print(f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, M = {args.members}")
    print(f"prompts of {PROMPT} tokens; seconds an answer batch, and in times of one PEFT adapter alone")
    print(f"{'model':>8} {'batch':>5} {'tokens':>6} | " + " ".join(f"{column:>22}" for column in COLUMNS))
    models = [("656k", small, args.new_tokens)] if SMALL.is_dir() else []
    for model, make, tokens in [*models, ("134M", large, args.large_new_tokens)]:
        for batch in args.batch_sizes:
            times = measure(make, args.members, batch, tokens, args.repeats, args.device)
            cells = " ".join(f"{t:12.3f} s {t / times[0]:6.2f} ×" for t in times)
            print(f"{model:>8} {batch:5} {tokens:6} | {cells}", flush=True)


COLUMNS = ("PEFT, one adapter", "PEFT, M one by one", "one member", "M members, mixed", "M members, each own")


def measure(
    make: Callable[[], PreTrainedModel], members: int, batch: int, tokens: int, repeats: int, device: str
) -> list[float]:
    """Median seconds of each column, measured in turns so that a busy machine is busy for all."""
    ensemble = LoraEnsemble.from_base(make().to(device), members, LoraConfig(**LORA), seed=0).eval()
    peft = adapters(make().to(device), members)
    with torch.no_grad():
        for parameter_name, parameter in [*ensemble.named_parameters(), *peft.named_parameters()]:
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.01)
    ids = torch.randint(5, 2000, (batch, PROMPT), device=device)
    settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}

    def one_adapter(member: int = 0) -> None:
        peft.set_adapter(f"member_{member}")
        peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)

    runs: list[Callable[[], object]] = [
        one_adapter,
        lambda: [one_adapter(m) for m in range(members)],
        lambda: ensemble.generate(ids, mixture="member", member=0, **settings),
        lambda: ensemble.generate(ids, **settings),
        lambda: ensemble.generate(ids, mixture="member", **settings),
    ]
    return [statistics.median(column) for column in zip(*rounds(runs, repeats, device), strict=True)]


def adapters(base: PreTrainedModel, members: int) -> PeftModel:
    peft = get_peft_model(base, LoraConfig(**LORA), adapter_name="member_0")
    for member in range(1, members):
        peft.add_adapter(f"member_{member}", LoraConfig(**LORA))
    return peft.eval()


def rounds(runs: list[Callable[[], object]], repeats: int, device: str) -> Iterator[list[float]]:
    for number in range(repeats + 1):
        times = []
        for run in runs:
            start = time.perf_counter()
            run()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        if number > 0:  # the first round warms up
            yield times


if __name__ == "__main__":
    main()
