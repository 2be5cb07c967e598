"""The pages' Python is run as it stands: the code blocks of a page, in order, in one namespace.

What a page names is there in the working directory: tiny models under the names of real ones, and files of rows.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import lora, pair_rows, scatter_members, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble, runs
from renyi.data import Preparation
from renyi.evaluation import running
from renyi.members import KINDS
from renyi.objectives import renyi_loss

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/ensembles.md"]
# Other pages with Python on them. What needs a server or a GPU is not run. Long answers and whole runs are slow.
NOT_RUN = ("OpenAI(", "litellm", "GRPOTrainer(")
SLOW = ("docs/answers.md", "docs/fine-tuning.md", "docs/powerflow.md")
OTHERS = [
    pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else [])
    for page in sorted(str(f.relative_to(ROOT)) for f in (ROOT / "docs").glob("*.md"))
    if page not in PAGES and "```python" in (ROOT / page).read_text(encoding="utf-8")
]
LONGEST = 6  # lines, without blank ones
CHATS = [
    {"messages": [{"role": "user", "content": f"w{n} w2"}, {"role": "assistant", "content": f"w{n + 3}"}]}
    for n in range(8)
]
QUESTIONS = [{"question": f"w{n} w2", "choices": ["w3", "w4"], "answer": n % 2} for n in range(4)]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A working directory with all that pages name, and the names that they take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"):
        tiny_model().save_pretrained(name)
        tiny_tokenizer().save_pretrained(name)
    pairs = pair_rows(8)
    files = {"my_chats": CHATS, "more_chats": CHATS, "pairs": pairs.to_list(), "questions": QUESTIONS}
    for file, rows in files.items():
        Path(f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = scatter_members(LoraEnsemble.from_base("Qwen/Qwen2.5-0.5B", 2, lora()))
    made.save("made")
    for member, person in enumerate(("alice", "bob")):
        shutil.copytree(f"made/member_{member}", f"adapters/{person}")
    return {
        "LoraConfig": LoraConfig,
        "alpha": 0.8,
        "dataset": Dataset.from_list(CHATS),
        "num_members": 2,
        "num_tokens": 6,
        "pairs": pairs,
        "renyi_loss": renyi_loss,
        "tokenizer": tiny_tokenizer(),
        "torch": torch,
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_pages_code_runs(page: str, world: dict[str, Any]) -> None:
    found = blocks(page)
    assert len(found) >= 5
    for number, block in enumerate(found, start=1):
        if "init_process_group" in block:  # the lines of one of several processes
            continue
        exec(compile(block, f"{page}, block {number}", "exec"), world)
    assert Path("runs/mine/ensemble.json").is_file()
    assert Path("runs/preferred/preference.json").is_file()
    assert world["score"].tokens > 0
    assert len(world["score"].log_likelihood) == 4


@pytest.mark.parametrize("page", OTHERS)
def test_the_code_of_every_other_page_runs(page: str, world: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_REGISTERED", {})  # what a page registers
    kinds = set(KINDS)
    more_of_the_world(world)
    if page == "docs/rewards.md":
        reward_models()
    for number, block in enumerate(blocks(page), start=1):
        if not any(name in block for name in NOT_RUN):
            exec(compile(block, f"{page}, block {number}", "exec"), world)
    for name in KINDS.keys() - kinds:
        del KINDS[name]


def more_of_the_world(world: dict[str, Any]) -> None:
    """What pages name that the first ones do not make: a trained folder, an exported one, and rows of other kinds."""
    made = LoraEnsemble.load("made")
    made.save("runs/mine")
    tiny_tokenizer().save_pretrained("runs/mine")
    Preparation().write(Path("runs/mine"))
    shutil.copytree("made", "exported")
    tiny_tokenizer().save_pretrained("made")
    tiny_model().save_pretrained("gpt2")
    tiny_tokenizer().save_pretrained("gpt2")
    chats = Path("my_chats.jsonl").read_text(encoding="utf-8")
    Path("rows.jsonl").write_text(chats * 10, encoding="utf-8")  # alpha: auto keeps 40 rows for its diagnosis
    thumbs = [{"prompt": f"w{n}", "completion": f" w{n + 1}", "label": n % 2 == 0} for n in range(8)]
    world |= {
        "ensemble": made,
        "inputs": tiny_tokenizer()(["w1 w2"], return_tensors="pt"),
        "keys": {
            "model_name_or_path": "gpt2",
            "dataset_name": "rows.jsonl",
            "output_dir": "swept",
            "test_split_size": 0.5,
        },
        "prompts": Dataset.from_list([{"prompt": f"w{n}"} for n in range(8)]),
        "thumbs": Dataset.from_list(thumbs),
    }


def reward_models() -> None:
    """The folder that the page's first command leaves."""
    keys = {"model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "dataset_name": "pairs.jsonl", "num_members": 2}
    runs.run(runs.Settings.of("reward", **keys, output_dir="runs/rewards", max_steps=1, use_cpu=True))


def test_what_users_need_first_is_short() -> None:
    """Train, prefer, score, generate and evaluate take at most six lines each."""
    for page in PAGES:
        for call in (
            r"runs\.Settings\.of\(\"sft\"|RenyiSFTTrainer\(",
            r"Settings\.of\(\"dpo\"|RenyiDPOTrainer\(",
            r"\.score\(",
        ):
            assert any(re.search(call, block) for block in blocks(page)), (page, call)
        for call in (r"mine\.generate\(", r"mine\.evaluate\("):
            assert any(re.search(call, block) for block in blocks(page)), (page, call)
        for block in blocks(page):
            if re.search(r"Settings\.of|Trainer\(|mine\.", block):
                assert len([line for line in block.splitlines() if line.strip()]) <= LONGEST, block
