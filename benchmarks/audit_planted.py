"""Faults of three kinds, planted in real instructions: which does each level of the audit find?

    python benchmarks/audit_planted.py --data alpaca.json [--model BASE] [--seeds 0 1 2] [--rows 240]

Planted in `--rows` short rows, by rule: 5 % of the rows are doubled, with a paraphrased prompt and an answer with one
or two facts turned round; 5 % of the answers are swapped between rows; and 10 % of the rows of one topic (those
without an input) are answered by a second, consistent convention. Prints, for each level and seed: precision and recall
of the doubled rows among the groups of conflicts; AUROC of the swapped rows, and precision and recall of
`probable_error`; AUROC of the convention, and precision and recall of the smallest side of `systematic_variation`; and
the share of swapped rows and rows of the convention that are called error and variation. Baselines, with AUROC of the
same rows: the loss of one adapter on held-out rows, the variance of the loss over training (Dataset Cartography), and
the disagreement of members at alpha 0.
"""

import argparse
import json
import random
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from renyi.audit import Audit, audit
from renyi.inference import score
from renyi.runs.audited import FIT, audit_with_adapter, audit_with_members
from renyi.runs.build import Watch
from renyi.runs.settings import Settings
from renyi.runs.single import run

KINDS = ("doubled", "swapped", "convention")
LONGEST = 30  # words of a prompt, and of an answer

# fmt: off
OPENINGS = [
    (r"^What (is|are|was|were) (.*)\?$", r"Tell me what \2 \1."), (r"^Generate\b", "Come up with"),
    (r"^Create\b", "Make up"),
    (r"^Describe\b", "Give a description of"), (r"^Write\b", "Compose"), (r"^Explain\b", "Give an explanation of"),
    (r"^Identify\b", "Point out"), (r"^Name\b", "Mention"), (r"^List\b", "Write down"), (r"^Summari[sz]e\b", "Sum up"),
    (r"^Provide\b", "Supply"), (r"^Suggest\b", "Recommend"), (r"^Rewrite\b", "Put in other words"),
    (r"^Find\b", "Look for"),
    (r"^Compare\b", "Make a comparison of"), (r"^How\b", "In what way"), (r"^Give\b", "Offer"),
    (r"^Construct\b", "Build"),
    (r"^Classify\b", "Say the class of"), (r"^Determine\b", "Work out"), (r"^Calculate\b", "Compute"),
    (r"^Edit\b", "Revise"),
    (r"^Categorize\b", "Sort into a category"), (r"^Convert\b", "Change"), (r"^Change\b", "Alter"),
    (r"^Which\b", "Say which"),
]
SYNONYMS = {
    "following": "below", "sentence": "phrase", "given": "supplied", "example": "sample", "advantages": "benefits",
    "paragraph": "passage", "story": "tale", "important": "essential", "different": "various", "ways": "methods",
    "article": "piece", "reasons": "causes", "main": "chief", "short": "brief", "describe": "depict", "use": "employ",
    "explain": "clarify", "list": "series", "correct": "right", "largest": "biggest", "type": "kind", "create": "make",
    "describing": "about", "best": "finest", "method": "way", "idea": "thought", "difference": "distinction",
}
ANTONYMS = [
    ("yes", "no"), ("true", "false"), ("positive", "negative"), ("correct", "incorrect"), ("increase", "decrease"),
    ("increased", "decreased"), ("increases", "decreases"), ("more", "less"), ("most", "least"), ("high", "low"),
    ("higher", "lower"), ("large", "small"), ("larger", "smaller"), ("good", "bad"), ("better", "worse"),
    ("best", "worst"),
    ("always", "never"), ("important", "unimportant"), ("easy", "hard"), ("easier", "harder"), ("can", "cannot"),
    ("is", "is not"),
    ("are", "are not"), ("was", "was not"), ("were", "were not"), ("will", "will not"), ("should", "should not"),
    ("has", "has no"), ("have", "have no"), ("new", "old"),
    ("early", "late"), ("first", "last"), ("happy", "sad"), ("strong", "weak"), ("safe", "dangerous"),
    ("cheap", "expensive"),
    ("fast", "slow"), ("hot", "cold"), ("simple", "complex"), ("active", "passive"), ("verb", "noun"), ("noun", "verb"),
    ("formal", "informal"), ("possible", "impossible"), ("before", "after"), ("north", "south"), ("east", "west"),
    ("with", "without"),
]
# fmt: on
OPPOSITE = {**{b: a for a, b in ANTONYMS if " " not in b}, **dict(ANTONYMS)}
WRAPS = ["{}", "{}", "Please do this: {}", "{} Thank you.", "I would like this from you: {}"]
CONVENTIONS = [
    lambda answer: f"Dear friend, here is what you asked for. {answer} Yours faithfully, the helper.",
    lambda answer: answer.upper(),
    lambda answer: "\n".join(f"* {s}" for s in re.split(r"(?<=[.!?])\s+", answer) if s) + "\n* (end of answer)",
]


class Planted(NamedTuple):
    """Alpaca records; the kind of fault of each, or None; and of each doubled record the one that it contradicts."""

    rows: list[dict[str, str]]
    kind: list[str | None]
    twin: dict[int, int]

    def is_of(self, kind: str) -> np.ndarray:
        return np.array([k == kind for k in self.kind])


def paraphrased(instruction: str, rng: random.Random) -> str:
    """The same request with another opening, and with other words for some of its words."""
    text = instruction.strip()
    for pattern, new in OPENINGS:
        changed = re.sub(pattern, new, text, count=1)
        if changed != text:
            text = changed
            break

    def other(match: re.Match[str]) -> str:
        new = SYNONYMS.get(match[0].lower(), match[0])
        return new.capitalize() if match[0][0].isupper() else new

    return rng.choice(WRAPS).format(re.sub(r"[A-Za-z]+", other, text))


def contradicted(answer: str, rng: random.Random, most: int = 2) -> str | None:
    """The answer with one or two facts (words or numbers) turned round; None if nothing in it can be turned."""
    turned = 0

    def turn(match: re.Match[str]) -> str:
        nonlocal turned
        word = match[0]
        new = str(int(word) + rng.choice([2, 3, 5, 7, 11])) if word.isdigit() else OPPOSITE.get(word.lower())
        if new is None or turned == most:
            return word
        turned += 1
        return new.capitalize() if word[0].isupper() else new

    text = re.sub(r"[A-Za-z]+|(?<![\w.\n])\d{1,6}(?![\w.])", turn, answer)
    return text if turned else None


def plant(rows: Sequence[Mapping[str, str]], seed: int, number: int) -> Planted:
    """`number` short rows, drawn and shuffled by the seed, with faults."""
    rng = random.Random(seed)
    short = [
        dict(row)
        for row in rows
        if row["output"].strip()
        and max(len(row["output"].split()), len(f"{row['instruction']} {row['input']}".split())) <= LONGEST
    ]
    made = rng.sample(short, min(number, len(short)))
    number, share = len(made), round(0.05 * len(made))
    kind: list[str | None] = [None] * number
    order = rng.sample(range(number), number)
    doubled = [i for i in order if contradicted(made[i]["output"], random.Random(0))][:share]
    free = [i for i in order if i not in doubled]
    swapped, rest = free[:share], [i for i in free[share:] if not made[i]["input"]]
    convention = rest[: round(0.1 * sum(not row["input"] for row in made))]
    answers = [made[i]["output"] for i in swapped]
    for i, answer in zip(swapped, answers[1:] + answers[:1], strict=True):
        made[i]["output"], kind[i] = answer, "swapped"
    for i in convention:
        made[i]["output"], kind[i] = CONVENTIONS[seed % len(CONVENTIONS)](made[i]["output"]), "convention"
    twin = {}
    for i in doubled:
        twin[len(made)] = i
        answer = contradicted(made[i]["output"], rng)
        assert answer is not None
        made.append({**made[i], "instruction": paraphrased(made[i]["instruction"], rng), "output": answer})
        kind.append("doubled")
    place = rng.sample(range(len(made)), len(made))
    new = {old: at for at, old in enumerate(place)}
    return Planted([made[i] for i in place], [kind[i] for i in place], {new[a]: new[b] for a, b in twin.items()})


# ---- What was found --------------------------------------------------------------------------------------------------


def precision_recall(found: set[Any], planted: set[Any]) -> str:
    right = len(found & planted)
    return f"{right}/{len(found)} right, {right}/{len(planted)} found"


def of_doubled(result: Audit, planted: Planted) -> str:
    """Groups of conflicts that hold a planted pair, of all groups of conflicts; and planted pairs in such a group."""
    groups = [set(g.rows) for g in result.groups if g.kind.endswith("duplicate_conflict")]
    pairs = [{a, b} for a, b in planted.twin.items()]
    right = sum(any(pair <= group for pair in pairs) for group in groups)
    found = sum(any(pair <= group for group in groups) for pair in pairs)
    return f"{right}/{len(groups)} right, {found}/{len(pairs)} found"


def of_rows(result: Audit, planted: Planted) -> None:
    """Print what a level with a model says of swapped rows and of the convention."""
    fit = np.array([result.measures[i]["fit"] for i in range(len(planted.rows))])
    swapped, convention = (set(np.flatnonzero(planted.is_of(k)).tolist()) for k in ("swapped", "convention"))
    errors = {row for g in result.groups if g.kind == "probable_error" for row in g.rows}
    variations = [g for g in result.groups if g.kind == "systematic_variation"]
    small = {row for g in variations for row in min(g.sides, key=lambda side: len(side.rows)).rows}
    print(f"  swapped: AUROC {roc_auc_score(planted.is_of('swapped'), -fit):.3f}; probable_error", end=" ")
    print(precision_recall(errors, swapped))
    auroc, groups = convention_auroc(result, planted), len(variations)
    print(f"  convention: AUROC {auroc:.3f}; {groups} groups of variation, smallest side", end=" ")
    print(precision_recall(small, convention))
    right = len(swapped & errors - small) + len(convention & small - errors)
    told = len((swapped | convention) & (errors ^ small))
    print(f"  error told from variation: {right} of {len(swapped) + len(convention)} planted, of {told} called either")


def convention_auroc(result: Audit, planted: Planted) -> float:
    """AUROC by the leading direction, or by the member that owns fewer rows. The side with fewer rows is the second."""
    measures = [result.measures[i] for i in range(len(planted.rows))]
    if "responsibilities" in measures[0]:
        shares = np.array([m["responsibilities"] for m in measures])
        values = shares[:, shares.mean(axis=0).argmin()]
    else:
        leading = np.array([m["loadings"][0] for m in measures])
        values = leading * np.sign((leading**3).mean())  # the long tail is the side with fewer rows
    return float(roc_auc_score(planted.is_of("convention"), values))


def aurocs(values: np.ndarray, planted: Planted) -> str:
    return ", ".join(f"{kind} {roc_auc_score(planted.is_of(kind), values):.3f}" for kind in KINDS)


# ---- Baselines -------------------------------------------------------------------------------------------------------


def cartography(planted: Planted, base: str, folder: Path, seed: int, epochs: int) -> np.ndarray:
    """Standard deviation, over epochs, of the loss per token of every row while one adapter is trained on all (Dataset
    Cartography calls it variability)."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in planted.rows
    ]
    data = folder / "cartography.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    losses: list[list[float]] = []

    class AfterEpochs(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            prepared = ready[0].preparation.prepare(Dataset.from_list(rows), ready[0].tokenizer)
            losses.append([s.mixture_nll / s.tokens for s in score(ready[0].ensemble, prepared)])

    ready: list[Any] = []

    class Watching(Watch):
        def ready(self, run: Any) -> None:
            ready.append(run)

        @contextmanager
        def training(self) -> Iterator[Sequence[TrainerCallback]]:
            yield [AfterEpochs()]

    settings = {**FIT, "num_members": 1, "alpha": 0.0, "num_train_epochs": epochs, "seed": seed}
    out = str(folder / "cartography")
    run(Settings.of("sft", model_name_or_path=base, dataset_name=str(data), output_dir=out, **settings), Watching())
    return np.std(losses, axis=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a JSON file of Alpaca records")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--alpha", type=float, default=0.8)
    parser.add_argument("--epochs", type=int, default=3, help="of the ensembles, and of the baseline over training")
    parser.add_argument("--no_baselines", action="store_true")
    args = parser.parse_args()
    disable_progress_bars()
    rows = json.loads(args.data.read_text(encoding="utf-8"))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for seed in args.seeds:
        planted = plant(rows, seed, args.rows)
        counts = ", ".join(f"{planted.kind.count(kind)} {kind}" for kind in KINDS)
        print(f"seed {seed}: {len(planted.rows)} rows, {counts}", flush=True)
        with tempfile.TemporaryDirectory() as made:
            folder, started = Path(made), time.perf_counter()

            def told(what: str, begun: float) -> None:
                print(f" {what} ({time.perf_counter() - begun:.0f} s)", flush=True)

            found = audit(planted.rows)
            if 1 in args.levels:
                told("level 1, reading alone", started)
                print(f"  doubled: {of_doubled(found, planted)}", flush=True)
            common: dict[str, Any] = {"max_examples": len(planted.rows), "seed": seed, "max_length": 160}
            if 2 in args.levels:
                started = time.perf_counter()
                result = audit_with_adapter(found, planted.rows, args.model, folder=folder / "adapter", **common)
                told("level 2, one adapter", started)
                print(f"  doubled: {of_doubled(result, planted)}")
                of_rows(result, planted)
                if result.stability is not None:
                    s = result.stability
                    print(f"  critical alpha {s['critical_alpha']:.2f} ({s['low']:.2f} to {s['high']:.2f})")
                loss = np.array([m["nll"] / m["tokens"] for _, m in sorted(result.measures.items())])
                print(f"  baseline, loss a token on held-out rows: {aurocs(loss, planted)}", flush=True)
            common |= {"num_train_epochs": args.epochs}
            if 3 in args.levels:
                started = time.perf_counter()
                result = audit_with_members(
                    found, planted.rows, args.model, args.members, folder=folder / "members", alpha=args.alpha, **common
                )
                told(f"level 3, {args.members} members at alpha {args.alpha:g}", started)
                print(f"  doubled: {of_doubled(result, planted)}")
                of_rows(result, planted)
            if not args.no_baselines:
                started = time.perf_counter()
                spread = cartography(planted, args.model, folder, seed, args.epochs)
                told(f"baseline, variation of the loss over training: {aurocs(spread, planted)}", started)
                started = time.perf_counter()
                zero = audit_with_members(
                    found, planted.rows, args.model, args.members, folder=folder / "zero", alpha=0.0, **common
                )
                gap = np.array([m["epistemic"] for _, m in sorted(zero.measures.items())])
                told(f"baseline, disagreement of members at alpha 0: {aurocs(gap, planted)}", started)


if __name__ == "__main__":
    main()
