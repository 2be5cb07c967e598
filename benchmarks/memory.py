"""How much memory does a training step of M members take, with equally many examples a step?

    python benchmarks/memory.py [--members 1 8] [--examples 8] [--tokens 128] [--gpu]

A random Llama of 134 million parameters (8B-shaped with --gpu) in the precision that this machine computes fastest,
LoRA r = 16 on all linear layers, AdamW, `RenyiSFTTrainer` on rows of one length. Each run is a process of its own: the
peak is that of the process on a CPU, of tensors on a GPU. `token_budget` is one member's batch, and in the last line
nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from joint_step import LORA, model, precisions
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, ProgressCallback, logging
from trl import SFTConfig, SFTTrainer

from renyi import RenyiSFTConfig, RenyiSFTTrainer
from renyi.training.steps import peak_memory


def run(members: int, examples: int, tokens: int, budget: int | None, shape: str, device: str) -> dict[str, int]:
    """Train two steps. Bytes of the base, of the members with their optimizer state, and of the peak.

    The second step has optimizer state. Without members it is TRL's trainer with one adapter.
    """
    disable_progress_bars()
    logging.set_verbosity_error()
    dtype = getattr(torch, precisions(device)[0])
    base = model(shape, dtype, device)
    words = {f"w{i}": i for i in range(100)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w1", eos_token="w2"
    )
    rows = torch.randint(3, 100, (4 * examples, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": 2,
            "bf16": dtype == torch.bfloat16,
            "use_cpu": device == "cpu",
            "per_device_train_batch_size": examples,
            "max_length": tokens,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        data = Dataset.from_dict({"input_ids": rows.tolist()})
        given = {"train_dataset": data, "peft_config": LoraConfig(**LORA), "processing_class": tokenizer}
        if members:
            settings |= {"num_members": members, "token_budget": budget}
            settings |= {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}
            trainer = RenyiSFTTrainer(base, RenyiSFTConfig(**settings), **given)
        else:
            trainer = SFTTrainer(base, SFTConfig(**settings), **given)
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    of_base = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    return {
        "base": of_base,
        "state": 4 * trained,  # of members: themselves, gradients and two moments
        "peak": peak_memory(torch.device(device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        shape, device = ("8B", "cuda") if args.gpu else ("134M", "cpu")
        print(json.dumps(run(args.one, args.examples, args.tokens, args.budget, shape, device)))
        return
    print(f"torch {torch.__version__}; {args.examples} examples of {args.tokens} tokens a step")
    print("members  token budget    base  members + state    peak  of the first, GB")
    first, rows = None, []
    one_batch = args.examples * args.tokens
    for members, budget in [*((m, one_batch) for m in args.members), (args.members[-1], 10**9)]:
        command = [sys.executable, __file__, "--one", members, "--budget", budget, "--examples", args.examples]
        command += ["--tokens", args.tokens, *(["--gpu"] if args.gpu else [])]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found["peak"]
        name = "none" if budget == 10**9 else f"{budget:,}"
        sizes = (found["base"], found["state"], found["peak"])
        print(f"{members:7}  {name:>12}  {sizes[0] / 1e9:6.2f}  {sizes[1] / 1e9:15.2f}  {sizes[2] / 1e9:6.2f}  "
              f"{found['peak'] / first:8.2f} ×", flush=True)  # fmt: skip
        rows.append({"members": members, "budget": budget, **found, "of_first": found["peak"] / first})
    print(json.dumps({"benchmark": "memory", "rows": rows}))


if __name__ == "__main__":
    main()
