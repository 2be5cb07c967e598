"""The parts of `gpu.py`: each gives rows of figures beside their goals, on a GPU or, with tiny sizes, on a CPU.

A part runs in a process of its own, and imports what it needs. Sizes and goals are at the end, in `PARTS`.
"""

import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEMBERS = 8
EQUAL = "of the peer's error"  # the unit of the rows that say whether something is right, and not how fast it is


def shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class Row(NamedTuple):
    """One figure. `goal` has its bound and `met` says whether it was reached; without a goal both are None."""

    what: str
    value: float
    unit: str
    goal: str | None = None
    met: bool | None = None
    more: dict[str, Any] | None = None  # for the file alone

    def at_least(self, bound: float) -> "Row":
        return self._replace(goal=f"≥ {shown(bound)}", met=self.value >= bound)

    def at_most(self, bound: float) -> "Row":
        return self._replace(goal=f"≤ {shown(bound)}", met=self.value <= bound)


class Machine(NamedTuple):
    """Where a part runs, and what the first part measured: 0 where it did not."""

    device: str
    products: float = 0.0  # operations a second, bfloat16
    copies: float = 0.0  # bytes a second, read and written


def machine(where: Machine, size: int, megabytes: int) -> Iterator[Row]:
    """What the machine can do at most. These two figures are what `Machine` holds."""
    import torch
    from joint_step import measure

    def seconds(step: Callable[[], object]) -> float:
        """Of one of ten in a row, so that it is not the start of a kernel that is measured."""
        return measure({"step": step}, 5, where.device, 10)["step"]

    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=where.device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / seconds(lambda a=a, b=b: a @ b)
        yield Row(f"products, {str(dtype)[6:]}", rate / 1e12, "TFLOP/s")
    source = torch.randn(megabytes * 250_000, device=where.device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    yield Row("copies, read and written", rate / 1e9, "GB/s")


def equality(where: Machine) -> Iterator[Row]:
    """Errors against float64: ours at most twice the peer's, or below what float32 tells apart."""
    import torch
    from gpu_checks import every_case

    for dtype in (torch.float32, torch.bfloat16):
        for case in every_case(where.device, dtype):
            yield _compared(case, dtype)


def joint(where: Machine, shape: str, tokens: Sequence[int], goal: float, rounds: int, backend: str) -> Iterator[Row]:
    """Forward and backward of M members at once, against M times one adapter; of the longest rows compiled, too."""
    import torch
    from joint_step import matrix_entries, measure, steps

    operations = 4 * matrix_entries(shape)  # a token: forward, and backward to activations
    longest = max(tokens)

    def seconds(name: str, many: int) -> float:
        _free()
        return measure(
            steps(shape, torch.bfloat16, where.device, MEMBERS, many, [name], backend), rounds, where.device
        )[name]

    alone = {many: seconds("one adapter", many) for many in tokens}
    for name, many in [*(("joint", many) for many in tokens), ("joint, compiled", longest)]:
        took = seconds(name, many)
        what = f"{shape}, {many:,} tokens a member{name.removeprefix('joint')}"
        speed = Row(what, MEMBERS * many / took, "member-tokens/s", more={"seconds": took, "alone": alone[many]})
        yield speed.at_least(goal) if many == longest else speed
        if where.products:
            yield Row(what, operations * speed.value / where.products, "of the products' rate").at_least(0.5)
        ratio = Row(what, took / (MEMBERS * alone[many]), f"of {MEMBERS} × one adapter")
        yield ratio.at_most(0.333 if many <= 512 else 0.95)


def head(where: Machine, rows: int, features: int, words: int, rounds: int) -> Iterator[Row]:
    from head import measure

    for dtype in ("bfloat16", "float32"):
        found = {row["way"]: row for row in measure(rows, features, words, dtype, where.device, rounds)}
        ours = Row(f"{dtype}, {rows:,} rows", found["ours"]["of_faster_peer"], "of the faster peer", more=found)
        yield ours.at_most(0.75)
        yield Row(f"{dtype}, memory", found["ours"]["of_naive"], "of naive logits'")
        yield Row(f"{dtype}, greatest error", found["ours"]["error"], "nats").at_most(2 * found["naive"]["error"])


def decoding(where: Machine, shape: str, batches: Sequence[int], tokens: int, static_cache: bool) -> Iterator[Row]:
    import torch
    from decoding import Peers
    from joint_step import matrix_entries, model

    peers = Peers(lambda: model(shape, torch.bfloat16, where.device), MEMBERS, where.device, static_cache)
    columns = ("PEFT, one adapter", "one member", "M members, mixed")
    for batch in batches:
        answers, steps = peers.measure(batch, tokens, 2, columns)
        what = f"{shape}, batch {batch}{', static cache' if static_cache else ''}"
        one, mixed = answers["PEFT, one adapter"], answers["M members, mixed"]
        more = {"answers": answers, "steps": steps, "tokens": tokens}
        yield Row(what, mixed / one, "of one PEFT adapter", more=more).at_most(1.5 if batch == 1 else 2.0)
        step = steps["M members, mixed"]
        yield Row(f"{what}, a token", 1e3 * step, "ms")
        if where.copies:
            floor = 2 * matrix_entries(shape) / where.copies
            yield Row(f"{what}, reading the base once", floor / step, "of a token's time")


def scoring(where: Machine, shape: str, tokens: int) -> Iterator[Row]:
    """`renyi score`'s precision: a base in bfloat16, adapters rounded to it; beside training and float32."""
    import torch
    from joint_step import model
    from scoring import measure, members_of

    found = measure(members_of(model(shape, torch.bfloat16, where.device), 4), tokens, 3)
    what = f"{shape}, M = 4, 16 rows of {tokens} tokens"
    yield Row(what, found["scoring"], "tokens/s", more=found)
    yield Row(what, found["scoring"] / found["training"], "of training's tokens/s").at_least(2.5)
    yield Row(what, found["of_rate"], "of the products' rate").at_least(0.5)
    yield Row(f"{what}, mean error", found["error_scoring"], "nats a token").at_most(0.01)


def memory(where: Machine, shape: str, examples: int, tokens: int) -> Iterator[Row]:
    """Peaks of whole training steps; TRL's trainer with one adapter first."""
    import torch
    from memory import run

    peaks = []
    for members in (0, MEMBERS):
        _free()
        kept = 0
        if where.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            kept = torch.cuda.memory_allocated()
        found = run(members, examples, tokens, examples * tokens, shape, where.device)
        peaks.append(found["peak"] - kept)
        name = f"M = {members}" if members else "TRL, one adapter"
        yield Row(f"{shape}, {examples} × {tokens} tokens, {name}", peaks[-1] / 1e9, "GB", more={**found, "kept": kept})
    yield Row(f"{shape}, M = {MEMBERS}", peaks[1] / peaks[0], "of TRL's one").at_most(1.3)


def compiled(where: Machine, shape: str, lengths: Sequence[int], backend: str) -> Iterator[Row]:
    """Compiled blocks: equal, how long the first step takes, and whether batches of new lengths are compiled anew."""
    import torch
    from gpu_checks import joint_forward
    from joint_step import LORA, model
    from peft import LoraConfig
    from torch._dynamo.utils import counters

    from renyi import LoraEnsemble

    for case in joint_forward(where.device, torch.float32, backend=backend):
        yield _compared(case, torch.float32)
    torch.compiler.reset()
    counters.clear()
    ensemble = LoraEnsemble.from_base(model(shape, torch.bfloat16, where.device), MEMBERS, LoraConfig(**LORA))
    ensemble.to(torch.bfloat16).train().compile(backend=backend)
    seen = []
    for number, length in enumerate(lengths):
        began = time.perf_counter()
        ensemble(torch.randint(5, 1000, (2, length), device=where.device)).log_probs.sum().backward()
        if where.device == "cuda":
            torch.cuda.synchronize()
        if number == 0:
            yield Row(f"{shape}, the first step", time.perf_counter() - began, "s").at_most(60)
        seen.append(counters["stats"]["unique_graphs"])
    new = seen[-1] - seen[2]
    yield Row(f"{shape}, graphs for {len(lengths) - 3} more lengths", new, "graphs", more={"seen": seen}).at_most(1)


def real_run(where: Machine, model: str | None, steps: int) -> Iterator[Row]:
    """`renyi sft`, `renyi score` and `renyi generate` as a user types them; by default on the zoo's base and world."""
    from renyi.cli.main import main
    from renyi.zoo import World, base_path

    def command(*argv: object) -> float:
        began = time.perf_counter()
        if code := main([str(arg) for arg in argv]):
            raise SystemExit(f"renyi {argv[0]} ended with exit code {code}")  # after its own message
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, number, seed in (("train", 32 * steps, 0), ("held_out", 64, 1)):
            lines = (json.dumps({"messages": record.messages}) for record in World().records(number, seed))
            (folder / f"{name}.jsonl").write_text("\n".join(lines))
        flags = {
            "model_name_or_path": model or base_path(),
            "dataset_name": folder / "train.jsonl",
            "output_dir": folder / "ensemble",
            "num_members": 4,
            "max_steps": steps,
            "learning_rate": 3e-3 if model is None else 2e-4,
            "per_device_train_batch_size": 32,
            "bf16": True,
            "use_cpu": where.device == "cpu",
            "logging_steps": 1,
        }
        seconds = command("sft", *(part for key, value in flags.items() for part in (f"--{key}", value)))
        yield Row(f"sft, M = 4, {steps} steps of 32 records", seconds, "s")
        logs = [json.loads(line) for line in (folder / "ensemble/metrics.jsonl").read_text().splitlines()]
        nll = [row["nll_mixture"] for row in logs if "nll_mixture" in row]
        yield Row("sft, mixture NLL, last by first step", nll[-1] / nll[0], "of the first").at_most(0.95)
        seconds = command("score", folder / "ensemble", folder / "held_out.jsonl", "--output", folder / "scores.jsonl")
        scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
        held_out = sum(row["mixture_nll"] for row in scores) / sum(row["tokens"] for row in scores)
        yield Row("score, 64 held-out records", seconds, "s")
        yield Row("score, mixture NLL held out", held_out / nll[0], "of the first step's").at_most(0.95)
        yield Row(
            "generate, one answer", command("generate", folder / "ensemble", "Where?", "--max_new_tokens", 8), "s"
        )


class Part(NamedTuple):
    """What runs, seconds that it may take on a GPU, and its sizes there and in a rehearsal."""

    run: Callable[..., Iterator[Row]]
    seconds: int
    sizes: dict[str, Any]
    rehearsed: dict[str, Any]


def _joint(shape: str, seconds: int, tokens: list[int], goal: float) -> Part:
    sizes = {"shape": shape, "tokens": tokens, "goal": goal, "rounds": 5, "backend": "inductor"}
    return Part(joint, seconds, sizes, {**sizes, "shape": "tiny", "tokens": [8, 16], "rounds": 1, "backend": "eager"})


def _decoding(seconds: int, batches: list[int], static_cache: bool) -> Part:
    sizes = {"batches": batches, "static_cache": static_cache}
    return Part(decoding, seconds, {"shape": "8B", "tokens": 32, **sizes}, {"shape": "tiny", "tokens": 4, **sizes})


# In this order, so that what matters most has run if time runs out.
PARTS = {
    "machine": Part(machine, 60, {"size": 8192, "megabytes": 4000}, {"size": 128, "megabytes": 8}),
    "equality": Part(equality, 120, {}, {}),
    "joint 8B": _joint("8B", 100, [256, 512], 15_400),
    "decoding 8B": _decoding(90, [1, 8], static_cache=False),
    "joint 1B": _joint("1B", 70, [256, 1024], 100_000),
    "joint 0.5B": _joint("0.5B", 70, [256, 2048], 200_000),
    "memory 8B": Part(
        memory,
        90,
        {"shape": "8B", "examples": 8, "tokens": 128},
        {"shape": "tiny", "examples": 2, "tokens": 8},
    ),
    "real run": Part(real_run, 90, {"steps": 60}, {"steps": 6}),
    "head": Part(
        head,
        60,
        {"rows": 8192, "features": 4096, "words": 128_256, "rounds": 5},
        {"rows": 64, "features": 32, "words": 512, "rounds": 1},
    ),
    "scoring 1B": Part(scoring, 60, {"shape": "1B", "tokens": 256}, {"shape": "tiny", "tokens": 16}),
    "compile": Part(
        compiled,
        90,
        {"shape": "0.5B", "lengths": [65, 97, 129, 161, 193, 257], "backend": "inductor"},
        {"shape": "tiny", "lengths": [5, 7, 9, 11, 13], "backend": "eager"},
    ),
    "decoding 8B, compiled": _decoding(150, [1], static_cache=True),
}


def _compared(case: Any, dtype: Any) -> Row:
    ours, peer = case.errors()
    holds = ours <= max(2 * peer, 1e-7)  # False for NaN
    more = {"ours": ours, "peer": peer}
    return Row(f"{case.what}, {str(dtype)[6:]}", ours / max(peer, 1e-300), EQUAL, "≤ 2", holds, more)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
