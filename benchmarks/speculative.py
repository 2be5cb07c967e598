"""Would speculative decoding pay for a mixture? One member or the base drafts k tokens; all members check them at once.

    python benchmarks/speculative.py ENSEMBLE --prompts FILE.jsonl [--number 12] [--new_tokens 32] [--repeats 15]

Measured on a folder's own members: the seconds of a drafted token, the seconds of a pass of all members over k + 1
tokens beside a cache of 64, and how often the draft is accepted along the mixture's greedy answers. Greedily that is
the share of tokens of which both find the same one likeliest; sampled, with the usual rule of acceptance, it is the
overlap of the two distributions, Σ min(p, q). From these follow the tokens of a round, (1 − aᵏ⁺¹) / (1 − a), and the
speed beside plain decoding. Above 1 it would pay. Tokens are the same in both ways, because the rule is exact.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

import renyi
from renyi import LoraEnsemble

PREFIX = 64
MOST = 6  # drafted tokens


@torch.inference_mode()
def seconds_of(ensemble: LoraEnsemble, members: tuple[int, ...], tokens: int, repeats: int) -> float:
    """Median seconds of a pass of some members over a few tokens beside a cache. No members: the base alone."""
    rows = max(1, len(members))
    found = []
    with ensemble.using(members):
        for number in range(repeats + 2):
            cache = DynamicCache(config=ensemble.base.config)
            given = {ensemble.cache_name: cache, "use_cache": True}
            ensemble.base(torch.full((rows, PREFIX), 100), **given)
            began = time.perf_counter()
            ensemble.base(torch.full((rows, tokens), 100), **given)
            if number > 1:
                found.append(time.perf_counter() - began)
    return statistics.median(found)


@torch.inference_mode()
def acceptance(ensemble: LoraEnsemble, prompts: list[Tensor], new_tokens: int) -> dict[str, tuple[float, float]]:
    """Of each draft: the share of tokens accepted greedily, and sampled."""
    same: dict[str, list[Tensor]] = {"one member": [], "the base": []}
    overlap: dict[str, list[Tensor]] = {"one member": [], "the base": []}
    for ids_1T in prompts:
        answer = ensemble.generate(ids_1T, do_sample=False, max_new_tokens=new_tokens)
        whole, start = answer.sequences, ids_1T.shape[1] - 1
        members = ensemble.logits(whole, torch.ones_like(whole))[:, 0, start:-1].double().softmax(-1)
        mixed = torch.einsum("kn,knv->nv", answer.weights[:, 0], members)
        with ensemble.using(()):
            base = ensemble.base(whole).logits[0, start:-1].double().softmax(-1)
        for name, draft in (("one member", members[0]), ("the base", base)):
            same[name].append((draft.argmax(-1) == mixed.argmax(-1)).double())
            overlap[name].append(torch.minimum(draft, mixed).sum(-1))
    return {name: (float(torch.cat(same[name]).mean()), float(torch.cat(overlap[name]).mean())) for name in same}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ensemble", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="a jsonl file with `messages` or `prompt`")
    parser.add_argument("--number", type=int, default=12, help="prompts")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    model = renyi.load(args.ensemble)
    ensemble, tokenizer = model.ensemble, model.tokenizer
    lines = args.prompts.read_text(encoding="utf-8").splitlines()[: args.number]
    rows = [json.loads(line) for line in lines]
    prompts = []
    for row in rows:
        text = row.get("prompt")
        if text is None:
            text = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, return_tensors="pt")["input_ids"])
    members = tuple(range(ensemble.num_members))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(members)} members")
    checks = [seconds_of(ensemble, members, k + 1, args.repeats) for k in range(MOST + 1)]
    drafts = {
        "one member": seconds_of(ensemble, (0,), 1, args.repeats),
        "the base": seconds_of(ensemble, (), 1, args.repeats),
    }
    print("all members, ms for 1 to 7 tokens: " + " ".join(f"{1000 * s:.0f}" for s in checks))
    accepted = acceptance(ensemble, prompts, args.new_tokens)
    for name, seconds in drafts.items():
        print(f"draft: {name}, {1000 * seconds:.0f} ms a token")
        for way, a in zip(("greedy", "sampled"), accepted[name], strict=True):
            speeds = []
            for k in range(1, MOST + 1):
                tokens = (1 - a ** (k + 1)) / (1 - a) if a < 1 else k + 1
                speeds.append(tokens * checks[0] / (k * seconds + checks[k]))
            print(f"  {way}: {a:.3f} accepted; speed with 1 to 6 drafted: " + " ".join(f"{s:.2f}" for s in speeds))


if __name__ == "__main__":
    main()
