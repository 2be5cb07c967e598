"""An ensemble in lm-evaluation-harness: its figures against the ensemble's own, on tasks and data in local files."""

import contextlib
import functools
import importlib.metadata
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_ensemble, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from renyi import LoraEnsemble
from renyi.cli.main import main
from renyi.errors import ConfigError
from renyi.inference import generate
from renyi.inference.lm_eval import RenyiLM

QUESTIONS = [
    {"question": f"w{i} w{i + 7}", "choices": ["w1 w2", "w3", f"w{i} w9 w5"], "label": i % 3} for i in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble of two members of unequal weight, on a base with a tokenizer."""
    root = tmp_path_factory.mktemp("harness")
    tiny_model().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    ensemble = LoraEnsemble.from_base(str(root / "base"), 2, tiny_ensemble(1).peft_config)
    other = tiny_ensemble(2)
    for layer, drawn in zip(ensemble.stack.layers.values(), other.stack.layers.values(), strict=True):
        layer.members.load_state_dict(drawn.members.state_dict())
    ensemble.weights.copy_(torch.tensor([0.7, 0.3]))
    ensemble.save(root / "ensemble")
    return root / "ensemble"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions in a json file, asked by three task files: choices, answers, and whole texts."""
    root = tmp_path_factory.mktemp("tasks")
    data = root / "questions.json"
    data.write_text(json.dumps(QUESTIONS), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "label",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"}
    answer = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["w9 "], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    text = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}} {{choices[2]}}"}
    text["metric_list"] = [{"metric": "word_perplexity"}]
    for name, settings in (("tiny_choice", choice), ("tiny_answer", answer), ("tiny_text", text)):
        file = root / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"task": name, **shared, **settings}), encoding="utf-8")
    return root


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


def evaluated(tasks: Path, name: str, **model_args: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = simple_evaluate(
        "renyi", {"device": "cpu", **model_args}, [name], task_manager=manager, bootstrap_iters=0
    )
    return found["results"][name], sorted(found["samples"][name], key=lambda s: s["doc_id"])


def test_multiple_choice_by_the_mixture(folder: Path, tasks: Path) -> None:
    results, samples = evaluated(tasks, "tiny_choice", ensemble=str(folder))
    ensemble, tokenizer = LoraEnsemble.load(folder).eval(), tiny_tokenizer()
    right = 0
    for sample, question in zip(samples, QUESTIONS, strict=True):
        prompt = tokenizer(question["question"])["input_ids"]
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}")["input_ids"]
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            with torch.no_grad():
                ell = ensemble.log_likelihood(torch.tensor([ids]), labels=torch.tensor([labels]))[:, 0]
            scores.append(float((ensemble.weights.log() + ell).logsumexp(0)))
        assert [float(r[0]) for r in sample["filtered_resps"]] == pytest.approx(scores, abs=1e-4)
        right += scores.index(max(scores)) == question["label"]
    assert results["acc,none"] == pytest.approx(right / 12)


def test_generation_by_the_mixture(folder: Path, tasks: Path) -> None:
    _, samples = evaluated(tasks, "tiny_answer", ensemble=str(folder), batch_size=5)
    ensemble, tokenizer = LoraEnsemble.load(folder), tiny_tokenizer()
    prompts = [str(q["question"]) for q in QUESTIONS]
    answers = generate(ensemble, prompts, tokenizer, max_new_tokens=6, do_sample=False)
    said = [sample["filtered_resps"][0] for sample in samples]
    assert said == [answer.text.split("w9 ")[0] for answer in answers]
    assert len(set(said)) > 3


def test_whole_texts(folder: Path, tasks: Path) -> None:
    """Windows of a long text are parts of one sequence, explained by one member from the beginning to the end."""
    results, _ = evaluated(tasks, "tiny_text", ensemble=str(folder))
    ensemble, tokenizer = LoraEnsemble.load(folder).eval(), tiny_tokenizer()
    texts = [f"{q['question']} {q['choices'][2]}" for q in QUESTIONS]  # type: ignore[index]

    def ell(ids: list[int], new: int) -> torch.Tensor:
        labels = [-100] * (len(ids) - new) + ids[len(ids) - new :]
        with torch.no_grad():
            return ensemble.log_likelihood(torch.tensor([ids]), labels=torch.tensor([labels]))[:, 0].double()

    def mixed(of_members: torch.Tensor) -> float:
        return float((ensemble.weights.log() + of_members).logsumexp(0))

    whole = [tokenizer(f"<eos> {text}")["input_ids"] for text in texts]
    nats = sum(mixed(ell(ids, len(ids) - 1)) for ids in whole)
    words = sum(len(text.split()) for text in texts)
    assert results["word_perplexity,none"] == pytest.approx(float(torch.tensor(-nats / words).exp()), rel=1e-4)

    model = RenyiLM(str(folder), max_length=3, device="cpu")
    ids = whole[0]  # <eos> and five words: a window of three, then the last two after the three words before them
    assert len(ids) == 6
    expected = mixed(ell(ids[:4], 3) + ell(ids[2:], 2))
    assert model.loglikelihood_rolling(requests("loglikelihood_rolling", (texts[0],))) == [pytest.approx(expected)]


def test_one_member_is_the_harness_on_its_merged_model(folder: Path) -> None:
    """Likelihoods, greediness, rolling likelihoods and greedy text of the harness's own transformers backend."""
    merged = LoraEnsemble.load(folder).merged(1)
    theirs = HFLM(pretrained=merged, tokenizer=tiny_tokenizer(), batch_size=2, device="cpu", max_length=8)
    ours = RenyiLM(str(folder), member=1, device="cpu", max_length=8, batch_size=3)
    greedy_text = ours.generate_until(requests("generate_until", ("w5 w6", {"max_gen_toks": 2})))[0]
    pairs = [("w1 w2", " w3 w4"), ("", "w7 w8"), ("w5 w6", f" {greedy_text}"), (" ".join(["w1"] * 20), " w2")]
    for found, expected in zip(
        ours.loglikelihood(requests("loglikelihood", *pairs)),
        theirs.loglikelihood(requests("loglikelihood", *pairs)),
        strict=True,
    ):
        assert found[0] == pytest.approx(expected[0], abs=1e-4)
        assert found[1] == expected[1]
    assert ours.loglikelihood(requests("loglikelihood", pairs[2]))[0][1]
    texts = [("w1 w2 w3",), (" ".join(f"w{i}" for i in range(19)),)]
    rolling = [model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for model in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], abs=1e-4)
    asked = [(f"w{i} w{i + 1}", {"until": ["w2"], "max_gen_toks": 5}) for i in range(5)]
    assert ours.generate_until(requests("generate_until", *asked)) == theirs.generate_until(
        requests("generate_until", *asked)
    )


def test_an_adapters_folder_is_an_ensemble_of_one(folder: Path) -> None:
    pairs = requests("loglikelihood", ("w1 w2", " w3 w4"), ("w5", " w6"))
    bare, again, member, other = (
        RenyiLM(str(path), member=m, device="cpu").loglikelihood(pairs)
        for path, m in ((folder / "member_1", None), (folder / "member_1", 0), (folder, 1), (folder, 0))
    )
    assert bare == again == member
    assert bare != other
    with pytest.raises(ConfigError, match="no member 1"):
        RenyiLM(str(folder / "member_1"), member=1)


def test_settings_of_a_task(folder: Path) -> None:
    model = RenyiLM(str(folder), device="cpu", max_length=16, seed=3)
    sampled = ("w1", {"max_new_tokens": 8, "do_sample": True, "temperature": 1.5, "top_p": 0.9})
    greedy = ("w1", {"max_tokens": 8, "temperature": 0.0})
    by_chance, again, best = (
        model.generate_until(requests("generate_until", a))[0] for a in (sampled, sampled, greedy)
    )
    assert by_chance == again != best
    mixed = model.generate_until(requests("generate_until", sampled, greedy, sampled))
    assert mixed[1] == best
    assert mixed[0] != best
    with pytest.raises(ConfigError, match="max_gen_toks"):
        model.generate_until(requests("generate_until", ("w1", {"max_gen_toks": 16})))
    with pytest.raises(ConfigError, match="max_length"):
        model.loglikelihood(requests("loglikelihood", ("w1", " w2" * 17)))
    with pytest.raises(ConfigError, match="no member 2"):
        RenyiLM(str(folder), member=2)
    chat = [{"role": "user", "content": "w1"}]
    assert model.apply_chat_template(chat) == "<user> w1 <assistant> "


def test_the_command_line(folder: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`renyi lm_eval` is the harness's own command line; its successors find us by an entry point."""
    # Its own thousands of tasks take ten seconds to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    argv = ["--model", "renyi", "--model_args", f"ensemble={folder}", "--tasks", "tiny_choice"]
    argv += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--batch_size", "4"]
    with contextlib.redirect_stdout(out := io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["lm_eval", *argv]) == 0
    assert "|tiny_choice|" in out.getvalue()
    written = json.loads(next(tmp_path.rglob("results*.json")).read_text(encoding="utf-8"))
    assert written["config"]["model"] == "renyi"
    points = importlib.metadata.entry_points(group="lm_eval.models")
    if "renyi" in points.names:  # not where the package was installed before it had any
        assert points["renyi"].load() is RenyiLM
