"""The time of a preference step: M members against one TRL DPO step, with the reference computed and precomputed.

    python benchmarks/dpo_step.py [--shared ../shared] [--members 1 8] [--rounds 5] [--steps 8] [--gpu]
        [--model HuggingFaceTB/SmolLM2-135M-Instruct --data dpo.json] [--compile]

The same pairs (4 a step) and LoRA (r = 16, all linear layers) for all, and no gradient checkpointing. Without --model
the real small model learns pairs of random words, 96 tokens a side. With it, real pairs of at most 96 tokens a side: a
JSON file of records with `conversations`, `chosen` and `rejected`. With --compile ours compile their blocks, and TRL's
do not. Runs take turns; a figure is the median over all steps but each run's first two, which have a column of their
own. A step ends with the optimizer's.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, ProgressCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from renyi import RenyiDPOConfig, RenyiDPOTrainer
from renyi.machine import bf16_pays

PAIRS, PROMPT, COMPLETION, WARM_UP = 4, 48, 48, 2


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._wait()
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._wait()
        self.seconds.append(time.perf_counter() - self.began)

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def real_pairs(file: Path, tokenizer) -> Dataset:
    """Pairs whose prompt leaves room for a completion."""
    texts = [[r["conversations"][-1]["value"] + "\n", r["chosen"]["value"], r["rejected"]["value"]] for r in
             json.loads(file.read_text(encoding="utf-8"))]  # fmt: skip
    return pairs_of([text for text in texts if len(tokenizer(text[0])["input_ids"]) <= PROMPT])


def random_pairs(tokenizer) -> Dataset:
    """Pairs of random words of the model's, all of one length."""
    generator = torch.Generator().manual_seed(0)
    words = [token.lstrip("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha()]

    def text(length: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    return pairs_of([[text(PROMPT), f" {text(COMPLETION)}", f" {text(COMPLETION)}"] for _ in range(4 * PAIRS)])


def pairs_of(texts: list[list[str]]) -> Dataset:
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in texts])


def seconds_a_step(args: argparse.Namespace, members: int | None, precompute: bool) -> list[float]:
    """The seconds of each step of our trainer, warm-up included; of TRL's trainer if `members` is None."""
    torch.compiler.reset()
    path = args.model or args.shared / "models" / "tinystories-656k"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if args.gpu else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = real_pairs(args.data, tokenizer) if args.data else random_pairs(tokenizer)
    clock = Clock()
    settings = {
        "max_steps": args.steps + WARM_UP, "per_device_train_batch_size": PAIRS, "max_length": PROMPT + COMPLETION,
        "precompute_ref_log_probs": precompute, "bf16": args.gpu or (args.model is not None and bf16_pays()),
        "use_cpu": not args.gpu, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "logging_steps": args.steps,
    }  # fmt: skip
    given = {"train_dataset": rows, "processing_class": tokenizer, "callbacks": [clock]}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer: DPOTrainer
        if members is None:
            trainer = DPOTrainer(model, args=DPOConfig(folder, **settings), peft_config=lora, **given)
        else:
            own = RenyiDPOConfig(
                folder, num_members=members, alpha=0.8, alpha_hold_ratio=0.0, torch_compile=args.compile, **settings
            )
            trainer = RenyiDPOTrainer(model, own, peft_config=lora, **given)
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model", help="a folder, or a name on the hub")
    parser.add_argument("--data", type=Path, help="a JSON file of pairs")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model and --data go together")
    disable_progress_bars()
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    seen: dict[tuple[int | None, bool], list[float]] = defaultdict(list)
    first: dict[tuple[int | None, bool], float] = {}
    for _ in range(args.rounds):
        for precompute in (False, True):
            for members in (None, *args.members):
                seconds = seconds_a_step(args, members, precompute)
                seen[members, precompute] += seconds[WARM_UP:]
                first.setdefault((members, precompute), sum(seconds[:WARM_UP]))
    print("                 reference    ms a step  against TRL  per member  first two s")
    line = {}
    for (members, precompute), seconds in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0] or 0)):
        name = "TRL DPOTrainer" if members is None else f"{members} member{'s' * (members > 1)}"
        step, baseline = (statistics.median(x) for x in (seconds, seen[None, precompute]))
        ratio = step / baseline
        kind = "precomputed" if precompute else "computed"
        print(f"{name:15}  {kind:11}  {1e3 * step:9.1f}  {ratio:11.2f}  {ratio / (members or 1):10.2f}  "
              f"{first[members, precompute]:11.1f}")  # fmt: skip
        line[f"{members or 'trl'} {kind}"] = {"ms": 1e3 * step, "against_trl": ratio}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
