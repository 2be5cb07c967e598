"""Do three members find three translations that nobody labelled, on a real chat model?

    python benchmarks/translations.py [--model FOLDER] [--data FOLDER] [--seeds 0 1 2] [--runs NAME …]

7,924 verses in three published translations (`../shared/data/translations`). A row's prompt is the reference of a
verse, its completion the verse in one translation; no row says which. A fifth of the chapters are held out, for all
translations. What is compared, on the same rows and steps:

    one            one adapter
    one-3r         one adapter of three times the rank
    dropout        one adapter trained with dropout, as 8 samples (Monte Carlo dropout)
    alpha-0        three members, each fits everything
    by-row         three members, α-Rényi, each row by itself
    gaussian       as by-row, but members are Gaussians, and four draws of each are measured
    by-token       three members, α-Rényi, each token by itself (one α-loss a token)
    by-group       three members, α-Rényi; groups of rows share a responsibility: eight verses in one translation from
                   anywhere (as one annotator's), or the verses of one chapter in one translation (a document)
    told           three adapters, each trained on the rows of one translation
    told-prompt    one adapter whose prompts name the translation: what is known if the source is

Printed of held-out chapters: NLL a token of the mixture and of the mean member, and the Jensen gap, nats; the adjusted
Rand index (ARI) and the purity of the best member and the translation, by document of eight verses and by verse; the
same gap and the effective members on training rows; of what tells members apart, the shares that belong to the
translation and to the verse; the AUROC with which epistemic uncertainty finds the tokens of words at which the three
translations differ (words are aligned by difflib). `--written N` also prints what every member writes for N held-out
references, greedily, beside the translations. `--json FILE` keeps everything, a line a run; `--draw FILE.png` draws
what such a file has, and trains nothing.
"""

import argparse
import csv
import difflib
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import real_model
import torch
from datasets import Dataset, disable_progress_bars
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from transformers import TrainerCallback

from renyi import LoraEnsemble, RenyiSFTTrainer
from renyi.data import Preparation
from renyi.inference import generate, score, token_uncertainty
from renyi.objectives import effective_members, jensen_gap, renyi_loss, responsibilities

SOURCES = ("anderson", "haweis", "twenty")
GIVEN = "twenty"  # with `--prompt text`: the translation that the prompt shows; the others are the sources
SHORTEST, LONGEST = 40, 150  # characters of a verse, in all translations
DOCUMENT = 8  # verses
ONE: dict[str, Any] = {"num_members": 1, "alpha": 0.0}
SYSTEMS: dict[str, dict[str, Any]] = {
    "one": ONE,
    "one-3r": ONE,
    "dropout": real_model.DROPOUT,
    "alpha-0": {"alpha": 0.0},
    "by-row": {},
    "gaussian": real_model.GAUSSIAN,
    "by-token": {"routing_quantity": "token"},
    "by-group": {"routing_group": "group"},
    "told": ONE,
    "told-prompt": ONE,
}
TOLD = {
    "one": "one adapter",
    "one-3r": "one, three times the rank",
    "dropout": "one, with dropout",
    "alpha-0": "three members, α = 0",
    "by-row": "α = 0.8, by verse",
    "gaussian": "Gaussians, by verse",
    "by-token": "α = 0.8, by token",
    "by-group": "α = 0.8, groups of eight",
    "told": "told the translation",
    "told-prompt": "named in the prompt",
}


class Verse(NamedTuple):
    """A verse in the translations that are the sources, and its text in the one that prompts show, if they do."""

    book: str
    chapter: str
    verse: str
    texts: tuple[str, ...]
    given: str = ""

    @property
    def prompt(self) -> str:
        return f"{self.book} {self.chapter}:{self.verse}\n" + (f"{self.given}\n" if self.given else "")

    def named(self, source: int) -> str:
        """The prompt that also says which translation is wanted."""
        return f"{SOURCES[source].capitalize()}, {self.prompt}"


class Row(NamedTuple):
    """A verse in the translation `source`, and the group that it shares a responsibility with, if rows are grouped."""

    verse: Verse
    source: int
    group: str = ""

    def example(self, named: int | None = None) -> dict[str, str]:
        """A row of the dataset, whose prompt names a translation if asked to."""
        v = self.verse
        return {
            "prompt": v.prompt if named is None else v.named(named),
            "completion": v.texts[self.source],
            "group": self.group,
        }


class Voice(NamedTuple):
    """An ensemble and the translation that its prompts name, if they do: its members' likelihoods of a row.

    Of an adapter with dropout several passes are measured.
    """

    ensemble: LoraEnsemble
    named: int | None = None
    passes: int = 1


# ---- Data ------------------------------------------------------------------------------------------------------------


def read_verses(folder: Path, prompt: str) -> list[Verse]:
    """The verses whose length is between the bounds in every translation."""
    columns: dict[str, list[dict[str, str]]] = {}
    for source in SOURCES:
        with (folder / f"{source}.csv").open(encoding="utf-8", newline="") as lines:
            columns[source] = list(csv.DictReader(lines))
    verses = []
    for number, first in enumerate(columns[SOURCES[0]]):
        texts = {source: rows[number]["text"].strip() for source, rows in columns.items()}
        if all(SHORTEST <= len(text) <= LONGEST for text in texts.values()):
            given = texts.pop(GIVEN) if prompt == "text" else ""
            verses.append(Verse(first["book"], first["chapter"], first["verse"], tuple(texts.values()), given))
    return verses


def split(verses: Sequence[Verse], seed: int) -> tuple[list[list[Verse]], list[list[Verse]]]:
    """Chapters to train on, and a fifth of all chapters that is held out, in random order."""
    chapters: dict[tuple[str, str], list[Verse]] = defaultdict(list)
    for v in verses:
        chapters[v.book, v.chapter].append(v)
    order = list(chapters.values())
    random.Random(seed).shuffle(order)
    held_out = len(order) // 5
    return order[held_out:], order[:held_out]


def training_rows(chapters: Sequence[Sequence[Verse]], args: argparse.Namespace, seed: int) -> list[Row]:
    """About `args.rows` rows of whole chapters, in random order, with their groups."""
    rng, rows = random.Random(seed), list[Row]()
    for chapter in chapters:
        if len(rows) >= args.rows:
            break
        mixed, sources = rng.sample(list(chapter), len(chapter)), len(chapter[0].texts)
        if args.each == "thrice":
            rows += [Row(v, s) for v in mixed for s in range(sources)]
        else:
            first = rng.randrange(sources)
            rows += [Row(v, (first + i) % sources) for i, v in enumerate(mixed)]
    rng.shuffle(rows)
    if args.group == "document":
        return [row._replace(group=f"{row.verse.book} {row.verse.chapter}, {row.source}") for row in rows]
    so_far: dict[int, int] = defaultdict(int)
    grouped = []
    for row in rows:
        grouped.append(row._replace(group=f"annotator {so_far[row.source] // args.group_size} of {row.source}"))
        so_far[row.source] += 1
    return grouped


def documents(chapters: Sequence[Sequence[Verse]], number: int) -> list[list[Verse]]:
    """At most `number` runs of eight verses of a chapter."""
    found = [list(c[i : i + DOCUMENT]) for c in chapters for i in range(0, len(c) - DOCUMENT + 1, DOCUMENT)]
    return found[:number]


# ---- Training --------------------------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace, rows: Sequence[Row], seed: int, callbacks: Sequence[TrainerCallback] = (), **settings: Any
) -> RenyiSFTTrainer:
    """Train an ensemble on rows; `settings` are the config's, and `rank`, `named` and `start`."""
    named = settings.pop("named", False)
    given = {
        "rank": args.rank,
        "lora_alpha": args.lora_alpha,
        "dropout": args.dropout,
        "attention": args.attention,
        "num_members": len(rows[0].verse.texts),
        "alpha": args.alpha,
        "alpha_hold_ratio": args.hold,
        "alpha_ramp_ratio": args.ramp,
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": args.scheduler,
        "warmup_steps": args.warmup,
        "torch_compile": args.torch_compile,
        **settings,
    }
    examples = [row.example(row.source if named else None) for row in rows]
    return real_model.train(args.model, examples, seed, callbacks=callbacks, **given)


def run(args: argparse.Namespace, name: str, rows: Sequence[Row], seed: int) -> tuple[list[Voice], RenyiSFTTrainer]:
    """Train one of the `SYSTEMS`."""
    sources, settings = len(rows[0].verse.texts), SYSTEMS[name]
    if name == "told":
        trainers = [train(args, [r for r in rows if r.source == s], seed, **settings) for s in range(sources)]
        return [Voice(t.model) for t in trainers], trainers[0]
    if name == "told-prompt":
        trainer = train(args, rows, seed, **settings, named=True)
        return [Voice(trainer.model, s) for s in range(sources)], trainer
    rank = {"rank": sources * args.rank} if name == "one-3r" else {}
    trainer = train(args, rows, seed, **settings, **rank)
    return [Voice(trainer.model)], trainer


# ---- Measures --------------------------------------------------------------------------------------------------------


def log_likelihood(voices: Sequence[Voice], rows: Sequence[Row], trainer: RenyiSFTTrainer) -> tuple[Any, Any]:
    """ℓ of rows under the members of all voices [M, N], nats, and the rows' trained tokens [N]."""
    found, tokens = [], []
    for voice in voices:
        examples = [row.example(voice.named) for row in rows]
        data = Dataset.from_list([{k: e[k] for k in ("prompt", "completion")} for e in examples])
        passes = []
        for _ in range(voice.passes):
            with trainer.accelerator.autocast():
                scores = score(
                    voice.ensemble, data, trainer.processing_class, Preparation(max_length=160), tokens_per_batch=6144
                )
            passes.append(torch.tensor([s.log_likelihood for s in scores], dtype=torch.float64).T)
        found.append(real_model.of_members(passes, voice.ensemble.num_draws))
        tokens = [s.tokens for s in scores]
    return torch.cat(found), torch.tensor(tokens, dtype=torch.float64)


def agreement(ell_MN: Any, source_N: Sequence[int]) -> tuple[float, float]:
    """Adjusted Rand index and purity of the best member and the translation."""
    best_N = ell_MN.argmax(0).tolist()
    counts = np.zeros((len(ell_MN), max(source_N) + 1))
    np.add.at(counts, (best_N, list(source_N)), 1)
    return float(adjusted_rand_score(list(source_N), best_N)), float(counts.max(axis=1).sum() / counts.sum())


def _table(ell_MN: Any, source_N: Sequence[int]) -> list[list[int]]:
    """How many rows of each translation every member explains best, [M][S]."""
    best_N, of_N = ell_MN.argmax(0), torch.tensor(source_N)
    return [[int(((best_N == m) & (of_N == s)).sum()) for s in of_N.unique()] for m in range(len(ell_MN))]


def shares(ell_MVS: Any, tokens_VS: Any) -> dict[str, float]:
    """Of the variance of what tells members apart (ℓ a token, less the members' mean): which parts belong to what.

    A two-way analysis of variance of verses and translations. What is left belongs to single rows.
    """
    x = ell_MVS / tokens_VS
    x = x - x.mean(0, keepdim=True)
    x = x - x.mean((1, 2), keepdim=True)
    total = x.square().sum().item() or 1.0
    of_source, of_verse = x.mean(1, keepdim=True), x.mean(2, keepdim=True)
    return {
        "translation": (of_source.expand_as(x).square().sum() / total).item(),
        "verse": (of_verse.expand_as(x).square().sum() / total).item(),
    }


def parted(ell_MN: Any, tokens_N: Any, alpha: float) -> dict[str, float]:
    """How far members part on rows."""
    gap = jensen_gap(ell_MN)
    return {
        "gap": (gap.sum() / tokens_N.sum()).item(),
        "effective": effective_members(responsibilities(ell_MN, alpha)).mean().item(),
        "mixture": (renyi_loss(ell_MN, 1.0).sum() / tokens_N.sum()).item(),
        "members": (renyi_loss(ell_MN, 0.0).sum() / tokens_N.sum()).item(),
    }


def differing(texts: Sequence[str], source: int) -> list[tuple[int, int, bool]]:
    """Start and end of each word of a translation, and whether it differs from another one there."""
    words = [text.split() for text in texts]
    plain = [["".join(ch for ch in word.lower() if ch.isalnum()) for word in of] for of in words]
    agreeing = set(range(len(words[source])))
    for other in range(len(texts)):
        if other != source:
            match = difflib.SequenceMatcher(None, plain[source], plain[other], autojunk=False)
            agreeing &= {b.a + i for b in match.get_matching_blocks() for i in range(b.size)}
    found, at = [], 0
    for number, word in enumerate(words[source]):
        start = texts[source].index(word, at)
        at = start + len(word)
        found.append((start, at, number not in agreeing))
    return found


def token_aurocs(voices: Sequence[Voice], rows: Sequence[Row], trainer: RenyiSFTTrainer) -> dict[str, float]:
    """How well uncertainty at a token tells words at which translations differ from words at which they agree.

    Of every word the first token counts; the others mostly follow from it.
    """
    tokenizer: Any = trainer.processing_class
    epistemic, total, differs = list[float](), list[float](), list[bool]()
    for row in rows:
        text = row.verse.texts[row.source]
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = coded["input_ids"], coded["offset_mapping"]
        log_p = []
        for voice in voices:
            prompt = tokenizer(row.example(voice.named)["prompt"], add_special_tokens=False)["input_ids"]
            log_p.append(real_model.next_token_log_probs(trainer, voice.ensemble, prompt, ids, voice.passes))
        log_p_MTV = torch.cat(log_p)
        w = real_model.running_weights(log_p_MTV, ids)
        words = differing(row.verse.texts, row.source)
        first = {next((i for i, (a, b) in enumerate(offsets) if b > start), None): d for start, _, d in words}
        chosen = [t for t in range(len(ids)) if t in first]
        uncertainty = token_uncertainty(log_p_MTV[:, chosen], w[:, chosen])
        epistemic += uncertainty.epistemic.tolist()
        total += uncertainty.total.tolist()
        differs += [first[t] for t in chosen]
    share = np.array(epistemic) / np.maximum(total, 1e-9)
    return {
        "epistemic": float(roc_auc_score(differs, epistemic)) if max(epistemic) > 0 else 0.5,
        "share": float(roc_auc_score(differs, share)) if max(epistemic) > 0 else 0.5,
        "total": float(roc_auc_score(differs, total)),
        "tokens": len(differs),
        "differing": float(np.mean(differs)),
    }


def written(voices: Sequence[Voice], verses: Sequence[Verse], trainer: RenyiSFTTrainer) -> list[list[str]]:
    """What each member writes for each verse's reference, greedily."""
    found: list[list[str]] = [[] for _ in verses]
    for voice in voices:
        prompts = [Row(v, 0).example(voice.named)["prompt"] for v in verses]
        with trainer.accelerator.autocast():
            said = generate(
                voice.ensemble,
                prompts,
                trainer.processing_class,
                mixture="member",
                max_new_tokens=40,
                do_sample=False,
            )
        for of_verse, answers in zip(found, said, strict=True):
            of_verse += [answer.text.strip() for answer in answers]
    return found


def measure(
    voices: Sequence[Voice],
    trainer: RenyiSFTTrainer,
    seen: Sequence[Row],
    held_out: Sequence[Sequence[Verse]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that is printed of a run; `held_out` are documents of eight verses."""
    alpha = max(trainer.args.alpha, 0.8) if isinstance(trainer.args.alpha, float) else 0.8
    verses = [v for document in held_out for v in document]
    sources = len(verses[0].texts)
    rows = [Row(v, s) for v in verses for s in range(sources)]
    ell_MN, tokens_N = log_likelihood(voices, rows, trainer)
    source_N = [row.source for row in rows]
    ell_MVS, tokens_VS = ell_MN.unflatten(1, (-1, sources)), tokens_N.unflatten(0, (-1, sources))
    ell_MDS = ell_MVS.unflatten(1, (-1, DOCUMENT)).sum(2)
    of_documents = agreement(ell_MDS.flatten(1), list(range(sources)) * len(held_out))
    of_verses = agreement(ell_MN, source_N)
    books = [row.verse.book for row in rows]
    result: dict[str, Any] = {
        "held_out": parted(ell_MN, tokens_N, alpha),
        "ari_document": of_documents[0],
        "purity_document": of_documents[1],
        "ari_verse": of_verses[0],
        "purity_verse": of_verses[1],
        "ari_book": float(adjusted_rand_score(books, ell_MN.argmax(0).tolist())),
        "shares": shares(ell_MVS, tokens_VS) if len(ell_MN) > 1 else None,
        "load": np.bincount(ell_MN.argmax(0), minlength=len(ell_MN)).tolist(),
        "table": _table(ell_MN, source_N),
    }
    some = list(seen)[: len(rows) // 2]
    ell_MN, tokens_N = log_likelihood(voices, some, trainer)
    result["seen"] = parted(ell_MN, tokens_N, alpha)
    result["seen_ari_verse"] = agreement(ell_MN, [row.source for row in some])[0]
    if args.token_rows and sum(voice.passes * voice.ensemble.num_members for voice in voices) > 1:
        chosen = random.Random(0).sample(rows, min(args.token_rows, len(rows)))
        result["auroc"] = token_aurocs(voices, chosen, trainer)
    if args.written:
        chosen = random.Random(1).sample(verses, min(args.written, len(verses)))
        members = written(voices, chosen, trainer)
        result["written"] = [
            {"verse": v.prompt.strip(), "texts": v.texts, "members": of} for v, of in zip(chosen, members, strict=True)
        ]
    return result


# ---- The command -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(__file__).parents[2] / "shared"
    made.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a hub id or a folder")
    made.add_argument("--data", type=Path, default=shared / "data" / "translations")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--runs", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    made.add_argument("--prompt", choices=["reference", "text"], default="reference", help="what a prompt shows")
    made.add_argument("--rows", type=int, default=1600, help="training rows")
    made.add_argument("--each", choices=["once", "thrice"], default="once", help="how often a verse is in the rows")
    made.add_argument(
        "--group",
        choices=["document", "annotator"],
        default="annotator",
        help="the rows of a group: a chapter's in one translation, or rows of one translation from anywhere",
    )
    made.add_argument("--group_size", type=int, default=8, help="rows of an annotator")
    made.add_argument("--epochs", type=float, default=1.0)
    made.add_argument("--batch", type=int, default=16)
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--lora_alpha", type=int, default=2, help="divided by the rank")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--learning_rate", type=float, default=2e-3)
    made.add_argument("--scheduler", default="linear")
    made.add_argument("--warmup", type=float, default=0.05)
    made.add_argument("--alpha", type=float, default=0.8)
    made.add_argument("--hold", type=float, default=0.2)
    made.add_argument("--ramp", type=float, default=0.2)
    made.add_argument("--torch_compile", action="store_true", default=None)
    made.add_argument("--attention", default="sdpa", help="attn_implementation")
    made.add_argument(
        "--documents", type=int, default=24, help="held-out documents of eight verses, of each translation"
    )
    made.add_argument("--token_rows", type=int, default=60, help="held-out verses whose tokens are looked at")
    made.add_argument("--written", type=int, default=0, help="held-out references for which members write")
    made.add_argument("--json", type=Path, help="a file to which a line is added for each run")
    made.add_argument("--draw", type=Path, help="draw the runs in --json into this file, and train nothing")
    return made


def lines(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    verses = read_verses(args.data, args.prompt)
    for seed in args.seeds:
        train_chapters, test_chapters = split(verses, seed)
        rows = training_rows(train_chapters, args, seed)
        held_out = documents(test_chapters, args.documents)
        for name in args.runs:
            started = time.perf_counter()
            voices, trainer = run(args, name, rows, seed)
            seconds = time.perf_counter() - started
            with real_model.measured(trainer.model, SYSTEMS[name]) as (points, passes):
                measured = [
                    v._replace(ensemble=points, passes=passes) if v.ensemble is trainer.model else v for v in voices
                ]
                found = measure(measured, trainer, rows, held_out, args)
            settings = {k: v for k, v in vars(args).items() if k not in ("seeds", "runs", "json", "model", "data")}
            yield {
                "run": name,
                "seed": seed,
                "train_rows": len(rows),
                "test_rows": len(held_out[0][0].texts) * DOCUMENT * len(held_out),
                "seconds": seconds,
                "measure_seconds": time.perf_counter() - started - seconds,
                **found,
                "settings": settings,
                "logs": trainer.state.log_history,
            }


COLUMNS = (
    ("", "run         seed"),
    ("held out, nats a token", "mixture members gap   "),
    ("ARI", "8 verses verse"),
    ("purity", "8 verses verse"),
    ("Jensen gap, eff. members", "seen   held   seen  held "),
    ("apart by", "transl verse"),
    ("AUROC of a token's", "epist. share  total  "),
    ("", "seconds"),
)


def told(line: dict[str, Any]) -> str:
    """A run's line of the table, and what its members wrote, if asked for."""
    texts = [
        f"\n  {of['verse']}"
        + "".join(f"\n    {name:9} {text}" for name, text in zip(SOURCES, of["texts"], strict=False))
        + "".join(f"\n    member {m:<2} {text}" for m, text in enumerate(of["members"]))
        for of in line.get("written", ())
    ]
    held, seen, parts, auroc = line["held_out"], line["seen"], line["shares"], line.get("auroc")
    return " | ".join(
        (
            f"{line['run']:11} {line['seed']:4}",
            f"{held['mixture']:.4f}  {held['members']:.4f}  {held['gap']:.4f}",
            f"{line['ari_document']:8.3f} {line['ari_verse']:5.3f}",
            f"{line['purity_document']:8.3f} {line['purity_verse']:5.3f}",
            f"{seen['gap']:.4f} {held['gap']:.4f} {seen['effective']:.2f}  {held['effective']:.2f} ",
            f"{parts['translation']:6.3f} {parts['verse']:5.3f}" if parts else "     –     –",
            f"{auroc['epistemic']:6.3f} {auroc['share']:.3f}  {auroc['total']:.3f}  " if auroc else " " * 21,
            f"{line['seconds']:.0f}",
        )
    ) + "".join(texts)


def draw(kept: Path, figure: Path) -> None:
    """Draw kept runs: the index of each kind of run, and which member explains which translation, seed by seed."""
    from matplotlib import pyplot as plt

    found = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    names = [name for name in SYSTEMS if any(line["run"] == name for line in found)]
    grouped = sorted((line for line in found if line["run"] == "by-group"), key=lambda line: line["seed"])
    shape = {"width_ratios": [1.6, *[1] * len(grouped)]}
    fig, axes = plt.subplots(1, 1 + len(grouped), figsize=(4 + 2.4 * len(grouped), 2.9), gridspec_kw=shape)
    for place, name in enumerate(names):
        values = [line["ari_document"] for line in found if line["run"] == name]
        axes[0].plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.7)
    axes[0].set_yticks(range(len(names)), [TOLD.get(name, name) for name in names])
    axes[0].set(xlim=(-0.1, 1), xlabel="adjusted Rand index, eight verses", title="Are translations found?")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    for axis, line in zip(axes[1:], grouped, strict=True):
        table = np.array(line["table"])
        axis.imshow(table / table.sum(axis=0), cmap="Blues", vmin=0, vmax=1)
        for (m, s), number in np.ndenumerate(table):
            axis.text(
                s, m, number, ha="center", va="center", color="white" if number > table[:, s].sum() / 2 else "black"
            )
        axis.set_xticks(range(len(SOURCES)), SOURCES, rotation=30, ha="right")
        axis.set_yticks(range(len(table)), [f"member {m}" if axis is axes[1] else "" for m in range(len(table))])
        axis.set_title(f"seed {line['seed']}")
    axes[1].set_ylabel("verses explained best\n(groups of eight)")
    fig.tight_layout()
    fig.savefig(figure, dpi=150)


def main() -> None:
    args = parser().parse_args()
    if args.draw:
        draw(args.json, args.draw)
        return
    disable_progress_bars()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for level in (0, 1):
        print(" | ".join(f"{column[level]:{len(column[1])}}" for column in COLUMNS))
    real_model.keep(lines(args), told, args.json)


if __name__ == "__main__":
    main()
