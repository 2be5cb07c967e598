"""How good samples are, if right answers are known, and how much they vary: figures with intervals over prompts.

N-grams are of words, not of tokens. Variety is measured by n-grams and self-BLEU, not by embeddings. Read next:
`answer_checks.py`, which decides what is right.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import numpy as np

from renyi.evaluation import bootstrap
from renyi.evaluation.bootstrap import RESAMPLES, Estimate
from renyi.evaluation.metrics import Array

ORDERS = (1, 2, 3)  # of the n-grams that distinct-n counts
ATTEMPTS = (1, 2, 4, 8, 16)  # k of pass@k
QUANTILES = (5, 25, 50, 75, 95)  # of lengths, per cent
BLEU_ORDER = 4

# ---- Right answers ---------------------------------------------------------------------------------------------------


def normalised(text: str) -> str:
    """The form in which answers are compared: NFKC, lower case, single spaces, no quotes around, no .,;:!? at the end.

    Signs, decimal points and everything else inside stay, so −3 is not 3 and 0.5 is not 05.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("−", "-")
    stripped = " ".join(text.split())
    while (shorter := stripped.rstrip(".,;:!? ").strip("\"'“”‘’`« »")) != stripped:
        stripped = shorter
    return stripped


# A number in a text: 3, -3, 3.5, .5, 3,000. It is not part of a longer one (1.3.1, 3/4, 3:30, 3,00) or of a word (w3).
# A minus between two operands is not a sign.
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+])?(?<!\w)(?<!\d[.,/:])(?<!\.)(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w)(?![.,/:]\d)",
    re.ASCII,
)


def contains_answer(text: str, answer: str) -> bool:
    """Whether a text holds an answer, both normalised.

    An answer that is a number is compared by value with every number of the text: "3" is in "It is 3." and in "3.0",
    but not in "13", "3.5", "-3", "3,000" or "3/4". Any other answer must be in the text as whole words.
    """
    wanted, within = normalised(answer), normalised(text)
    if _NUMBER.fullmatch(wanted):
        return any(_value(found[0]) == _value(wanted) for found in _NUMBER.finditer(within))
    # An answer that begins or ends with digits may not continue into a longer number either: "june 3" in "june 3.5".
    before = r"(?<!\w)(?<!\d[.,/:])" if wanted[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,/:]\d)" if wanted[-1:].isdigit() else r"(?!\w)"
    return re.search(f"{before}{re.escape(wanted)}{after}", within) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Probability that one of k samples drawn without replacement is right: 1 − C(n − c, k) / C(n, k).

    The unbiased estimator of pass@k from n samples of which c are right (Chen et al. 2021, arXiv 2107.03374, equation
    1); 1 − (1 − c/n)^k is biased.

    Raises:
        ValueError: not 0 ≤ c ≤ n, or not 1 ≤ k ≤ n.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"{right} right of {samples} samples give no pass@{k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority_accuracy(answers: Sequence[Hashable | None], right: Sequence[bool]) -> float:
    """Probability that the answer most samples give is right (self-consistency, Wang et al. 2022, arXiv 2203.11171).

    If several answers have equally many votes, one is drawn at random, and this is the expectation over the draw. An
    answer of None does not vote; without any vote the probability is 0. If only some samples of an answer are right,
    it counts with their share.

    Args:
        answers: what each of K samples answers.
        right: whether each of them is right.
    """
    votes: dict[Hashable, list[bool]] = defaultdict(list)
    for answer, is_right in zip(answers, right, strict=True):
        if answer is not None:
            votes[answer].append(is_right)
    most = max(map(len, votes.values()), default=0)
    leading = [sum(of) / most for of in votes.values() if len(of) == most]
    return sum(leading) / len(leading) if leading else 0.0


# ---- Variety ---------------------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, which n-grams are made of. Case counts."""
    return re.findall(r"\w+|[^\w\s]", text)


def distinct_n(samples: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of samples; NaN if none has n words (Li et al. 2016, arXiv 1510.03055).

    It is 1 if no n-gram occurs twice. Li et al. divide by the number of words; then only n = 1 can reach 1.
    """
    grams = [tuple(sample[i : i + n]) for sample in samples for i in range(len(sample) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def self_bleu(samples: Sequence[Sequence[str]]) -> float:
    """Mean BLEU of each sample with the others as its references, 0 to 1: 1 for equal ones (Zhu et al. 2018).

    BLEU-4 by torchmetrics, without smoothing (arXiv 1802.01886). For a sample of fewer than four words, n-grams up to
    its own length are compared; otherwise equal short answers would have BLEU 0. A sample without words has no BLEU and
    is only a reference.

    Args:
        samples: K samples as words.

    Returns:
        NaN with fewer than two samples, or if all are empty.
    """
    texts = [" ".join(sample) for sample in samples]
    of_text: dict[str, float] = {}  # equal samples have equal BLEU
    if len(samples) < 2:
        return math.nan
    from torchmetrics.functional.text import bleu_score  # imported here because torchmetrics imports transformers

    for i, (text, sample) in enumerate(zip(texts, samples, strict=True)):
        if sample and text not in of_text:
            # If two references are equally near in length, the brevity penalty takes the first. BLEU wants the shorter.
            others = sorted(texts[:i] + texts[i + 1 :], key=lambda other: other.count(" "))
            of_text[text] = float(bleu_score([text], [others], n_gram=min(BLEU_ORDER, len(sample))))
    found = [of_text[text] for text in texts if text]
    return sum(found) / len(found) if found else math.nan


# ---- The figures -----------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One sample of a prompt.

    Attributes:
        text: its text.
        tokens: its number of tokens.
        base_log_prob: its log-probability under the base, nats.
        log_prob: the same under what drew it; None if that is not known.
        entropy: Σ over its tokens of the entropy of what each was drawn from, nats; None if that is not known.
        truncated: whether it was cut; None if that is not known.
        answer: what it votes for, and by what it differs from others; None if it gives no answer.
        right: whether it is right; None if right answers are not known.
    """

    text: str
    tokens: int
    base_log_prob: float
    log_prob: float | None = None
    entropy: float | None = None
    truncated: bool | None = None
    answer: str | None = None
    right: bool | None = None


class Lengths(NamedTuple):
    """Lengths of samples in tokens, and the share of them that were cut (None if that is not known)."""

    mean: float
    sd: float
    quantiles: dict[int, float]
    truncated: float | None


class SamplingQuality(NamedTuple):
    """One model's K samples of each prompt. A figure that is not defined is NaN; intervals are over prompts.

    Attributes:
        name: of the model.
        samples: K.
        accuracy: of single samples, avg@K. It and the next two are None if right answers are not known.
        majority: accuracy of the answer that most of K samples give, maj@K.
        pass_at: by k, the probability that one of k samples is right.
        distinct: for n = 1, 2, 3 distinct-n among the samples of a prompt, mean over prompts.
        distinct_all: the same among the samples of all prompts.
        self_bleu: among the samples of a prompt, mean over prompts.
        unique: different answers over samples of a prompt, mean over prompts.
        lengths: in tokens.
        base_log_prob_per_token, log_prob_per_token: Σ log p / Σ tokens under the base and under what was sampled from;
            −log_prob_per_token is the Monte Carlo estimate of the entropy per token.
        entropy_per_token: mean over sampled steps of the exact entropy of what the token was drawn from.
        base_log_prob, log_prob: per sample.
    """

    name: str
    samples: int
    accuracy: Estimate | None
    majority: Estimate | None
    pass_at: dict[int, Estimate] | None
    distinct: dict[int, Estimate]
    distinct_all: dict[int, float]
    self_bleu: Estimate
    unique: Estimate
    lengths: Lengths
    base_log_prob_per_token: Estimate
    log_prob_per_token: Estimate
    entropy_per_token: Estimate
    base_log_prob: Estimate
    log_prob: Estimate


class SamplingEvaluation(NamedTuple):
    """What `evaluate_sampling` finds: every model's figures, and the prompts on which the first model varies most.

    `most_varied` has the positions of all prompts, sorted: the most different answers first, then the smallest
    self-BLEU.
    """

    prompts: int
    systems: list[SamplingQuality]
    most_varied: list[int]


def evaluate_sampling(
    systems: Mapping[str, Sequence[Sequence[Sample]]], *, resamples: int = RESAMPLES, seed: int = 0
) -> SamplingEvaluation:
    """Evaluate the samples of models.

    Args:
        systems: by name of the model, its samples of P ≥ 1 prompts, [P][K].
        resamples: draws of prompts for the intervals.
        seed: of the draws.

    Raises:
        ValueError: there is no model, prompt or sample, or models or prompts differ in their numbers.
    """
    sizes = {len(of_prompts) for of_prompts in systems.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError(f"models have samples of {sorted(sizes)} prompts")
    (prompts,) = sizes
    bleu = {name: [_self_bleu(samples) for samples in of_prompts] for name, of_prompts in systems.items()}
    found = [_quality(name, systems[name], bleu[name], resamples, seed) for name in systems]
    first = next(iter(systems))
    varied = [(-_unique(s), np.nan_to_num(b)) for s, b in zip(systems[first], bleu[first], strict=True)]
    return SamplingEvaluation(prompts, found, sorted(range(prompts), key=varied.__getitem__))


def _quality(
    name: str, of_prompts: Sequence[Sequence[Sample]], self_bleu_P: Sequence[float], resamples: int, seed: int
) -> SamplingQuality:
    numbers = {len(samples) for samples in of_prompts}
    if len(numbers) != 1 or 0 in numbers:
        raise ValueError(f"{name} has {sorted(numbers)} samples of prompts")
    (many,) = numbers
    every = [sample for samples in of_prompts for sample in samples]
    is_checked = all(sample.right is not None for sample in every)
    ones_P, tokens_P = np.ones(len(of_prompts)), _sums(of_prompts, "tokens")
    split = [[words(sample.text) for sample in samples] for samples in of_prompts]

    def mean(values: Sequence[float] | Array) -> tuple[Array, Array]:
        return np.asarray(values, np.float64), ones_P

    ratios = {
        **{f"distinct {n}": mean([distinct_n(samples, n) for samples in split]) for n in ORDERS},
        "self_bleu": mean(self_bleu_P),
        "unique": mean([_unique(samples) for samples in of_prompts]),
    }
    for column in ("base_log_prob", "log_prob", "entropy"):
        of_column = _sums(of_prompts, column)
        ratios |= {f"{column}_per_token": (of_column, tokens_P), column: mean(of_column / many)}
    ks = [k for k in ATTEMPTS if k <= many]
    if is_checked:
        right_P = [sum(bool(sample.right) for sample in samples) for samples in of_prompts]
        ratios |= {"accuracy": mean([c / many for c in right_P]), "majority": mean(list(map(_majority, of_prompts)))}
        ratios |= {f"pass {k}": mean([pass_at_k(many, c, k) for c in right_P]) for k in ks}
    figures = _estimates(ratios, resamples, seed)
    return SamplingQuality(
        name=name,
        samples=many,
        accuracy=figures.get("accuracy"),
        majority=figures.get("majority"),
        pass_at={k: figures[f"pass {k}"] for k in ks} if is_checked else None,
        distinct={n: figures[f"distinct {n}"] for n in ORDERS},
        distinct_all={n: distinct_n([sample for samples in split for sample in samples], n) for n in ORDERS},
        self_bleu=figures["self_bleu"],
        unique=figures["unique"],
        lengths=_lengths(every),
        base_log_prob_per_token=figures["base_log_prob_per_token"],
        log_prob_per_token=figures["log_prob_per_token"],
        entropy_per_token=figures["entropy_per_token"],
        base_log_prob=figures["base_log_prob"],
        log_prob=figures["log_prob"],
    )


def _estimates(ratios: Mapping[str, tuple[Array, Array]], resamples: int, seed: int) -> dict[str, Estimate]:
    """Σ numerator / Σ denominator over prompts with a known numerator, each with its interval."""
    values, statistics = {}, {}
    for name, (numerator_P, denominator_P) in ratios.items():
        known = np.isfinite(numerator_P)
        above, below = np.where(known, numerator_P, 0.0), np.where(known, denominator_P, 0.0)
        values[name] = float(above.sum() / below.sum()) if below.sum() else math.nan
        statistics[name] = bootstrap.ratio(above, below)
    with np.errstate(invalid="ignore", divide="ignore"):  # some draws have no prompt with a known figure
        return bootstrap.intervals(values, statistics, len(ratios["unique"][0]), resamples, seed)


def _sums(of_prompts: Sequence[Sequence[Sample]], column: str) -> Array:
    """Σ over the samples of each prompt; NaN if a value is not known."""
    rows = [[getattr(sample, column) for sample in samples] for samples in of_prompts]
    return np.array([sum(math.nan if value is None else value for value in row) for row in rows], np.float64)


def _unique(samples: Sequence[Sample]) -> float:
    return len({sample.answer for sample in samples}) / len(samples)


def _self_bleu(samples: Sequence[Sample]) -> float:
    return self_bleu([words(sample.text) for sample in samples])


def _majority(samples: Sequence[Sample]) -> float:
    return majority_accuracy([sample.answer for sample in samples], [bool(sample.right) for sample in samples])


def _lengths(every: Sequence[Sample]) -> Lengths:
    tokens = np.array([sample.tokens for sample in every], np.float64)
    cut = Counter(sample.truncated for sample in every)
    return Lengths(
        mean=float(tokens.mean()),
        sd=float(tokens.std()),
        quantiles={q: float(np.percentile(tokens, q)) for q in QUANTILES},
        truncated=None if cut[None] else cut[True] / len(every),
    )
