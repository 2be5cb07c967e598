"""What multiple choice costs with eight members against one. It also shows that a model of stories is at chance.

    python benchmarks/mmlu.py [--questions 20] [--repeats 3]

The first questions of every subject in ../shared/data/mmlu, by letter, on ../shared/models/tinystories-656k. Members
are random directions around the base, because training is not measured here. Seconds are medians of whole passes.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from peft import LoraConfig
from transformers import AutoTokenizer

from renyi import LoraEnsemble
from renyi.data import Question, load_splits, read_questions
from renyi.evaluation import ChoiceEvaluation, Opinion, evaluate_choice
from renyi.inference import choice_log_probs, score_choices

SHARED = Path(__file__).resolve().parents[2] / "shared"
MODEL, MMLU = SHARED / "models" / "tinystories-656k", SHARED / "data" / "mmlu"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, help="of each subject")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    disable_progress_bars()
    questions: list[Question] = []
    subjects: list[str] = []
    for file in sorted(MMLU.glob("*_test.csv")):
        rows = load_splits(str(file))["train"]
        read = read_questions(rows.select(range(min(args.questions, len(rows)))), file.name)
        questions += read
        subjects += [file.stem.removesuffix("_test")] * len(read)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(questions)} questions")

    eight, one = scattered(8), scattered(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    seconds: dict[int, list[float]] = {8: [], 1: []}
    found: dict[int, ChoiceEvaluation] = {}
    for _ in range(args.repeats):
        for ensemble in (eight, one):
            start = time.perf_counter()
            scores = score_choices(ensemble, questions, tokenizer)
            seconds[ensemble.num_members].append(time.perf_counter() - start)
            opinion = Opinion(choice_log_probs(scores), ensemble.weights)
            found[ensemble.num_members] = evaluate_choice(opinion, [q.answer for q in questions], groups=subjects)

    print(f"{scores.cut} prompts cut to the model's context of {one.config.max_position_embeddings} tokens")
    print(f"\n{'subject':30} questions  M = 8 accuracy    ECE  M = 1 accuracy    ECE")
    for a, b in zip(found[8].groups or [], found[1].groups or [], strict=True):
        print(f"{a.group:30} {a.questions:9} {a.accuracy:15.1%} {a.ece:6.3f} {b.accuracy:15.1%} {b.ece:6.3f}")
    for members, evaluation in found.items():
        s = evaluation.systems[0]
        print(
            f"M = {members}: accuracy {s.accuracy.value:.1%} [{s.accuracy.low:.1%}, {s.accuracy.high:.1%}], NLL "
            f"{s.nll.value:.3f}, ECE {s.ece.value:.3f}, adaptive {s.adaptive_ece.value:.3f}, AUROC of errors "
            f"{s.detection['total'].auroc.value:.3f}"
        )
    medians = {members: statistics.median(times) for members, times in seconds.items()}
    for members, median in medians.items():
        print(f"M = {members}: {1000 * median / len(questions):.1f} s per 1,000 questions")
    print(f"eight members cost {medians[8] / medians[1]:.2f} × one (eight passes of one: 8)")


def scattered(members: int) -> LoraEnsemble:
    """Members of which every B is drawn at random."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    ensemble = LoraEnsemble.from_base(MODEL, members, config, seed=0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ensemble.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return ensemble


if __name__ == "__main__":
    main()
