"""Members split over two processes against all in one: are they equal, what is exchanged, what does a step cost?

    python benchmarks/member_parallel.py [--shared ../shared] [--members 8] [--examples 4 16] [--rounds 2]
        [--routing raced]

The same examples (64 tokens) and LoRA (r = 16, all linear layers) on the real small model, in float32 and with one
thread a process; the two processes talk over gloo. Both kinds of run take turns; a figure in milliseconds is the median
over all steps but each run's first two. Bytes are those of every collective's result in one process, from one
optimizer step to the next; with routing, where steps differ, those of the step that exchanges most.
"""

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch.multiprocessing import get_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PrinterCallback, ProgressCallback, TrainerCallback, logging

from renyi import LoraEnsemble, RenyiSFTConfig, RenyiSFTTrainer

STEPS, WARMUP, LENGTH = 8, 2, 64


class Traffic(TorchDispatchMode):
    """Counts the bytes of what collectives leave in this process."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.bytes += sum(x.nbytes for x in tree_leaves(args[0]) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


class Watch(TrainerCallback):
    """The time, and the bytes so far, after each step."""

    def __init__(self, traffic: Traffic):
        self.traffic = traffic
        self.seen: list[tuple[float, int]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append((time.perf_counter(), self.traffic.bytes))


def train(rank: int, processes: int, port: int, folder: Path, settings: dict[str, Any], model_path: Path) -> None:
    """Train M members in `processes` processes; the first writes them and what it saw into `folder`."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update({name: str(value) for name, value in place.items()} if processes > 1 else {})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    disable_progress_bars()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, model.config.vocab_size, (64, LENGTH), generator=generator).tolist()
    with Traffic() as traffic:
        watch = Watch(traffic)
        trainer = RenyiSFTTrainer(
            model,
            RenyiSFTConfig(
                str(folder), member_parallel=processes, ddp_backend="gloo" if processes > 1 else None, max_steps=STEPS,
                learning_rate=1e-3, alpha=0.8, alpha_hold_ratio=0.2, bf16=False, use_cpu=True, save_strategy="no",
                gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False, logging_steps=STEPS,
                **settings,
            ),
            Dataset.from_dict({"input_ids": rows, "labels": rows}),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[watch],
        )  # fmt: skip
        for noisy in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(noisy)
        trainer.train()
    trainer.save_model()
    if rank == 0:
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(watch.seen, watch.seen[1:], strict=False)]
        adapters = sum(p.nbytes for p in trainer.trained_parameters())
        found = {"steps": steps[WARMUP - 1 :], "loss": trainer.state.log_history[0]["loss"], "adapter_bytes": adapters}
        (folder / "found.json").write_text(json.dumps(found))
    if processes > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def found(processes: int, folder: Path, settings: dict[str, Any], model_path: Path) -> dict[str, Any]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    arguments = (processes, port, folder, settings, model_path)
    children = [get_context("spawn").Process(target=train, args=(rank, *arguments)) for rank in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return json.loads((folder / "found.json").read_text())


def greatest_difference(first: LoraEnsemble, second: LoraEnsemble) -> float:
    """Over members, ‖φ − φ'‖ / ‖φ'‖."""

    def flat(ensemble: LoraEnsemble, member: int) -> torch.Tensor:
        return torch.cat([x.detach().flatten() for pair in ensemble.adapter(member).values() for x in pair]).double()

    pairs = [(flat(first, m), flat(second, m)) for m in range(first.num_members)]
    return max(float((one - two).norm() / two.norm()) for one, two in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(__file__).parents[2] / "shared")
    parser.add_argument("--members", type=int, default=8)
    parser.add_argument("--examples", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--routing", default="dense")
    args = parser.parse_args()
    model_path = args.shared / "models" / "tinystories-656k"
    print(f"torch {torch.__version__}, CPU, 1 thread a process, {os.cpu_count()} cores; float32")
    print(f"{args.members} members, {args.routing}")
    print("examples   loss differs  members differ   bytes a step  4·M·B   rest   ms, 1 process  2 processes  ratio")
    line = {}
    for examples in args.examples:
        settings = {"num_members": args.members, "per_device_train_batch_size": examples, "routing": args.routing}
        with tempfile.TemporaryDirectory() as name:
            folders = [Path(name) / "one", Path(name) / "two"]
            for folder in folders:
                folder.mkdir()
            runs: list[list[dict[str, Any]]] = [[], []]
            for _ in range(args.rounds):
                for processes, folder in enumerate(folders, 1):
                    runs[processes - 1].append(found(processes, folder, settings, model_path))
            one, two = runs[0][-1], runs[1][-1]
            ensembles = [LoraEnsemble.load(f, AutoModelForCausalLM.from_pretrained(model_path)) for f in folders]
        apart, loss = greatest_difference(*ensembles), abs(one["loss"] - two["loss"])
        exchanged = {count for run in runs[1] for _, count in run["steps"]}
        assert len(exchanged) == 1 or args.routing != "dense", exchanged
        count, floats = max(exchanged), 4 * args.members * examples
        ms = [1e3 * statistics.median(seconds for run in kind for seconds, _ in run["steps"]) for kind in runs]
        print(
            f"{examples:8}  {loss:13.1e}  {apart:14.1e}  {count:13}  {floats:5}  {count - floats:5}  {ms[0]:14.0f}  "
            f"{ms[1]:11.0f}  {ms[1] / ms[0]:5.2f}"
        )
        line[str(examples)] = {
            "members_differ": apart, "loss_differs": loss, "bytes_a_step": count, "of_log_likelihoods": floats,
            "ms_one": ms[0], "ms_two": ms[1], "ratio": ms[1] / ms[0],
            "adapter_bytes_one": one["adapter_bytes"], "adapter_bytes_two": two["adapter_bytes"],
        }  # fmt: skip
    print(f"adapters: {one['adapter_bytes']:,} bytes in one process, {two['adapter_bytes']:,} in each of two")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
