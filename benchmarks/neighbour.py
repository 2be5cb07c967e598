"""What two runs on one machine cost each other, by how OpenMP's threads wait.

    python benchmarks/neighbour.py [--steps 10] [--members 4]

Every run is a process that takes joint training steps on a random Llama of 15 million parameters, with as many threads
as the machine has cores. Each is run alone and beside a second one like it, with threads that spin while they wait
(OpenMP's default) and with threads that sleep (`OMP_WAIT_POLICY=passive`, which `renyi` sets for its commands).
Fair sharing makes two runs together take twice the time of one: a ratio of 2.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

POLICIES = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "passive"}}


def run(steps: int, members: int) -> None:
    """Take the steps and print the median seconds of one."""
    import torch
    from peft import LoraConfig
    from transformers import LlamaConfig, LlamaForCausalLM

    from renyi import LoraEnsemble

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=16_384, num_key_value_heads=2, tie_word_embeddings=True, **shape))
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ensemble = LoraEnsemble.from_base(base, members, lora).train()
    ids = torch.randint(5, 1000, (4, 33))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        (-ensemble(ids).log_probs.sum()).backward()
        seconds.append(time.perf_counter() - start)
    print(statistics.median(seconds[1:]))


def step_seconds(together: int, policy: str, steps: int, members: int) -> float:
    """Median seconds of a step of runs that go side by side, averaged over the runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | POLICIES[policy]
    command = [sys.executable, __file__, "--run", "--steps", str(steps), "--members", str(members)]
    runs = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(together)]
    return statistics.mean(float(each.communicate()[0]) for each in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--run", action="store_true", help="be one of the runs that are timed")
    args = parser.parse_args()
    if args.run:
        run(args.steps, args.members)
        return
    result = {}
    print(f"{'threads that wait':>18} {'alone s':>9} {'beside another s':>17} {'ratio':>7}")
    for policy in POLICIES:
        alone, beside = (step_seconds(n, policy, args.steps, args.members) for n in (1, 2))
        result[policy] = {"alone": alone, "beside": beside, "ratio": beside / alone}
        print(f"{policy:>18} {alone:>9.3f} {beside:>17.3f} {beside / alone:>7.2f}", flush=True)
    print(json.dumps({"benchmark": "neighbour", "machine": platform.processor(), "cores": os.cpu_count(), **result}))


if __name__ == "__main__":
    main()
