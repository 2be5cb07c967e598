"""The time of a preference step: M members against one TRL DPO step, with the reference computed and precomputed.

    python benchmarks/dpo_step.py [--shared ../shared] [--members 1 8] [--gpu]

The same pairs (4 a step, 96 tokens a side) and LoRA (r = 16, all linear layers) on the real small model. Runs take
turns; a figure is the median over all steps but each run's first two. A step ends with the optimizer's.
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

PAIRS, PROMPT, COMPLETION, STEPS, WARMUP = 4, 48, 48, 10, 2


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


def rows(tokenizer) -> Dataset:
    """Pairs of random words of the model's, all of one length."""
    generator = torch.Generator().manual_seed(0)
    words = [token.lstrip("▁") for token in tokenizer.get_vocab() if token.startswith("▁") and token[1:].isalpha()]

    def text(length: int) -> str:
        return " ".join(words[i] for i in torch.randint(len(words), (length,), generator=generator).tolist())

    pairs = [[text(PROMPT), f" {text(COMPLETION)}", f" {text(COMPLETION)}"] for _ in range(4 * PAIRS)]
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])


def seconds_a_step(model_path: Path, members: int | None, precompute: bool, gpu: bool) -> list[float]:
    """Median seconds of a step of our trainer; of TRL's trainer if `members` is None."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16 if gpu else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    clock = Clock()
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": PAIRS, "precompute_ref_log_probs": precompute, "bf16": gpu,
        "use_cpu": not gpu, "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
        "dataloader_pin_memory": False, "logging_steps": STEPS,
    }  # fmt: skip
    given = {"train_dataset": rows(tokenizer), "processing_class": tokenizer, "callbacks": [clock]}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        trainer: DPOTrainer
        if members is None:
            trainer = DPOTrainer(model, args=DPOConfig(folder, **settings), peft_config=lora, **given)
        else:
            own = RenyiDPOConfig(folder, num_members=members, alpha=0.8, alpha_hold_ratio=0.0, **settings)
            trainer = RenyiDPOTrainer(model, own, peft_config=lora, **given)
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    return clock.seconds[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true")
    args = parser.parse_args()
    disable_progress_bars()
    where = torch.cuda.get_device_name() if args.gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}")
    model_path = args.shared / "models" / "tinystories-656k"
    seen: dict[tuple[int | None, bool], list[float]] = defaultdict(list)
    for _ in range(args.rounds):
        for precompute in (False, True):
            for members in (None, *args.members):
                seen[members, precompute] += seconds_a_step(model_path, members, precompute, args.gpu)
    print("                 reference    ms a step  against TRL  per member")
    line = {}
    for (members, precompute), seconds in sorted(seen.items(), key=lambda item: (item[0][1], item[0][0] or 0)):
        name = "TRL DPOTrainer" if members is None else f"{members} member{'s' * (members > 1)}"
        step, baseline = (statistics.median(x) for x in (seconds, seen[None, precompute]))
        ratio = step / baseline
        kind = "precomputed" if precompute else "computed"
        print(f"{name:15}  {kind:11}  {1e3 * step:9.1f}  {ratio:11.2f}  {ratio / (members or 1):10.2f}")
        line[f"{members or 'trl'} {kind}"] = {"ms": 1e3 * step, "against_trl": ratio}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
