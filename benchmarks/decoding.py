"""What decoding with an ensemble costs: M members at once against one member, and against PEFT's ways of serving M.

    python benchmarks/decoding.py [--members 8] [--new_tokens 64] [--large_new_tokens 8] [--repeats 3] [--gpu]

The peers are transformers' own `generate` with one PEFT adapter, with M of them one after another, and with all M in
PEFT's mixed-adapter batch (`adapter_names=`: every prompt M times, each with its adapter; no mixture, M answers). The
small model is a trained one of 656 thousand parameters, the large one a randomly initialised Llama in the precision
that this machine computes fastest: of 134 million parameters, or of 8 billion with `--gpu`. There one adapter, one
member and M members mixed have a static cache and compiled steps (CUDA graphs). There is no end-of-text token, so all
write equally many tokens. Times are medians, measured in turns. PEFT's adapters are not merged, because many are served
from one base. A step is the time of one more token, without the prompt. Beside the large model stands what the matrix
products of M members take by themselves, at the rate that this machine multiplies a feed-forward layer's matrices of as
many rows.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from joint_step import model as random_llama
from joint_step import precisions, product_rate
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, logging

from renyi import LoraEnsemble

SMALL = Path(__file__).parents[2] / "shared/models/tinystories-656k"
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PROMPT = 32
COLUMNS = (
    "PEFT, one adapter",
    "PEFT, M one by one",
    "PEFT, mixed batch",
    "one member",
    "M members, mixed",
    "M members, each own",
)


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
    return LlamaForCausalLM(config).to(getattr(torch, precisions()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--large_new_tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = f"{platform.processor() or 'CPU'}, {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if args.gpu else threads
    print(f"torch {torch.__version__}, {where}, M = {args.members}")
    print(f"prompts of {PROMPT} tokens; an answer batch and a step, each also in times of one PEFT adapter's")
    models = [("656k", small, args.new_tokens)] if SMALL.is_dir() else []
    huge = partial(random_llama, "8B", torch.bfloat16, "cuda")
    models.append(("8B", huge, args.new_tokens) if args.gpu else ("134M", large, args.large_new_tokens))
    line: dict[str, object] = {"members": args.members, "prompt": PROMPT}
    for model, make, tokens in models:
        peers = Peers(make, args.members, "cuda" if args.gpu else "cpu", static_cache=args.gpu)
        for batch in args.batch_sizes:
            answers, steps = peers.measure(batch, tokens, args.repeats)
            whole, step = (times["M members, mixed"] / times["one member"] for times in (answers, steps))
            print(f"\n{model}, batch {batch}, {tokens} tokens: M members mixed against one member of ours: ", end="")
            print(f"{whole:.2f} × an answer's time, {step:.2f} × a step's")
            for column in COLUMNS:
                cells = (
                    f"{seconds[column]:9.4f} s {seconds[column] / seconds['PEFT, one adapter']:6.2f} ×"
                    for seconds in (answers, steps)
                )
                print(f"  {column:20}" + " | ".join(cells), flush=True)
            if model != "656k":
                alone = peers.products(batch, tokens)
                print(f"  {'M members, products':20}{alone:9.4f} s {alone / answers['PEFT, one adapter']:6.2f} ×")
                line[f"{model}, batch {batch}, products"] = alone
            line[f"{model}, batch {batch}"] = {"tokens": tokens, "seconds": answers, "seconds_a_step": steps}
        del peers
    print(json.dumps(line))


class Peers:
    """A base with M adapters for PEFT, and one with M members for us.

    With `static_cache`, one adapter, one member and M members mixed have one, and on a GPU compiled steps.
    """

    def __init__(self, make: Callable[[], PreTrainedModel], members: int, device: str, static_cache: bool):
        self.members, self.device = members, device
        self.ensemble = LoraEnsemble.from_base(make().to(self.device), members, LoraConfig(**LORA), seed=0).eval()
        self.peft = adapters(make().to(self.device), members)
        with torch.no_grad():
            for name, parameter in [*self.ensemble.named_parameters(), *self.peft.named_parameters()]:
                if "lora_B" in name:
                    parameter.normal_(std=0.01)
        self.compiled = {"cache_implementation": "static"} if static_cache else {}

    def measure(
        self, batch: int, tokens: int, repeats: int, columns: Sequence[str] = COLUMNS
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Median seconds of an answer and of a step, by column. They take turns, so other load affects all alike."""
        ids = torch.randint(5, 2000, (batch, PROMPT), device=self.device)
        runs = self.runs()
        answers: dict[str, list[float]] = {column: [] for column in columns}
        steps: dict[str, list[float]] = {column: [] for column in columns}
        for number in range(repeats + 1):
            for column in columns:
                whole, first = (self.seconds(runs[column], ids, new) for new in (tokens, 1))
                if number > 0:  # the first round warms up
                    answers[column].append(whole)
                    steps[column].append((whole - first) / (tokens - 1))
        answer, step = ({c: statistics.median(s) for c, s in times.items()} for times in (answers, steps))
        return answer, step

    def seconds(self, run: Callable[[Tensor, dict[str, Any]], object], ids: Tensor, new_tokens: int) -> float:
        start = time.perf_counter()
        run(ids, {"do_sample": False, "eos_token_id": None, "max_new_tokens": new_tokens})
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def products(self, batch: int, tokens: int) -> float:
        """Seconds of the base's products for an answer of all members: the prompt, then token by token."""
        config, rows = self.ensemble.config, self.members * batch
        head = config.vocab_size * config.hidden_size
        layers = sum(p.numel() for p in self.ensemble.base.model.layers.parameters() if not p.requires_grad)
        of_prompt, of_step = (
            product_rate(config.hidden_size, config.intermediate_size, number, self.ensemble.dtype, self.device)
            for number in (rows * PROMPT, rows)
        )
        return 2 * rows * (PROMPT * layers / of_prompt + (head + (tokens - 1) * (layers + head)) / of_step)

    def runs(self) -> dict[str, Callable[[Tensor, dict[str, Any]], object]]:
        """By the names in COLUMNS."""
        ensemble, compiled = self.ensemble, self.compiled
        return {
            "PEFT, one adapter": lambda ids, given: self.one_adapter(0, ids, given | compiled),
            "PEFT, M one by one": lambda ids, given: [self.one_adapter(m, ids, given) for m in range(self.members)],
            "PEFT, mixed batch": self.mixed_batch,
            "one member": lambda ids, given: ensemble.generate(ids, mixture="member", member=0, **given, **compiled),
            "M members, mixed": lambda ids, given: ensemble.generate(ids, **given, **compiled),
            "M members, each own": lambda ids, given: ensemble.generate(ids, mixture="member", **given),
        }

    def one_adapter(self, member: int, ids: Tensor, given: dict[str, Any]) -> None:
        self.peft.set_adapter(f"member_{member}")
        self.peft.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given)

    def mixed_batch(self, ids: Tensor, given: dict[str, Any]) -> None:
        names = [f"member_{m}" for m in range(self.members) for _ in ids]
        rows = ids.repeat(self.members, 1)
        self.peft.generate(input_ids=rows, attention_mask=torch.ones_like(rows), adapter_names=names, **given)


def adapters(base: PreTrainedModel, members: int) -> PeftModel:
    peft = get_peft_model(base, LoraConfig(**LORA), adapter_name="member_0")
    for member in range(1, members):
        peft.add_adapter(f"member_{member}", LoraConfig(**LORA))
    return peft.eval()


if __name__ == "__main__":
    main()
