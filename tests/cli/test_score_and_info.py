"""`renyi score` and `renyi info`: their figures against the ensemble itself, and their forms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Ended, renyi, save_base, write_rows
from datasets import Dataset
from peft import PeftModel
from tiny import lora, tiny_ensemble, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.data import Preparation, prepare
from renyi.inference import Score, score, summarise_members
from renyi.objectives import jensen_gap, renyi_loss, responsibilities

KEYS = ["index", "tokens", "log_likelihood", "responsibilities", "mixture_nll", "jensen_gap"]


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_line_for_every_example_in_order(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    ended = renyi("score", trained[0], rows_file)
    assert ended.code == 0, ended.err
    rows = lines(ended.out)
    assert [list(row) for row in rows] == [KEYS] * 48
    assert [row["index"] for row in rows] == list(range(48))
    assert "What the members make of it" in ended.err
    assert "48 examples, 144 tokens" in ended.err

    to_file = renyi("score", trained[0], rows_file, "--output", tmp_path / "scores.jsonl")
    assert (to_file.code, to_file.out) == (0, "")
    assert (tmp_path / "scores.jsonl").read_text(encoding="utf-8") == ended.out
    assert [f.name for f in tmp_path.iterdir()] == ["scores.jsonl"]


def test_scores_are_the_ensembles_own(trained: tuple[Path, Ended], rows_file: Path) -> None:
    ensemble = LoraEnsemble.load(trained[0]).eval()
    tokenizer = tiny_tokenizer()
    rows = lines(rows_file.read_text(encoding="utf-8"))
    for row, line in zip(rows, lines(renyi("score", trained[0], rows_file).out), strict=True):
        ids = tokenizer(f"{row['prompt']}{row['completion']} <eos>")["input_ids"]
        labels = torch.tensor([[-100, *ids[1:]]])
        ell = ensemble.log_likelihood(torch.tensor([ids]), labels=labels)[:, 0]
        assert line["tokens"] == 3
        assert line["log_likelihood"] == pytest.approx(ell.tolist(), rel=1e-5)
        assert line["responsibilities"] == pytest.approx(responsibilities(ell, 0.8).tolist(), rel=1e-4)
        assert line["mixture_nll"] == pytest.approx(renyi_loss(ell, 1.0).item(), rel=1e-5)
        assert line["jensen_gap"] == pytest.approx(jensen_gap(ell).item(), abs=1e-5)


def test_json_is_one_object_beside_the_lines(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    ended = renyi("score", trained[0], rows_file, "--output", tmp_path / "scores.jsonl", "--json")
    summary = json.loads(ended.out)
    assert ended.err == ""
    assert (summary["examples"], summary["tokens"], summary["alpha"]) == (48, 144, 0.8)
    scores = lines((tmp_path / "scores.jsonl").read_text(encoding="utf-8"))
    assert summary["mixture_nll_per_token"] == pytest.approx(sum(s["mixture_nll"] for s in scores) / 144)  # type: ignore[misc]
    assert sum(m["leads"] for m in summary["members"]) == 48
    beside = renyi("score", trained[0], rows_file, "--json")
    assert json.loads(beside.err) == summary
    assert len(lines(beside.out)) == 48


def test_rows_are_prepared_as_in_training(base: Path, trained: tuple[Path, Ended], tmp_path: Path) -> None:
    """The folder keeps how training prepared rows, and a flag departs from it."""
    folder = Path(shutil.copytree(trained[0], tmp_path / "copy"))
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    file = write_rows(tmp_path / "talk.jsonl", [{"messages": talk}])
    assert Preparation.read(folder) == Preparation()
    assert lines(renyi("score", folder, file).out)[0]["tokens"] == 5  # <user> w1 w2 <assistant> w3 <eos>, but the first
    Preparation(assistant_only_loss=True).write(folder)
    assert lines(renyi("score", folder, file).out)[0]["tokens"] == 2
    assert lines(renyi("score", folder, file, "--assistant_only_loss", "no").out)[0]["tokens"] == 5
    assert lines(renyi("score", folder, file, "--assistant_only_loss", "no", "--max_length", "4").out)[0]["tokens"] == 3


def test_a_base_that_moved(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "copy"))
    manifest = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
    (folder / "ensemble.json").write_text(json.dumps({**manifest, "base_model": "/nowhere/base"}), encoding="utf-8")
    ended = renyi("score", folder, rows_file)
    assert ended.code == 2
    assert "/nowhere/base: the base model could not be loaded" in ended.err
    moved = renyi("score", folder, rows_file, "--base", save_base(tmp_path / "moved"))
    assert moved.out == renyi("score", trained[0], rows_file).out


# ---- Scores in Python ------------------------------------------------------------------------------------------------


def test_batches_do_not_change_scores() -> None:
    ensemble = tiny_ensemble(3)
    texts = [" ".join(f"w{(i * j) % 50}" for j in range(2 + i % 7)) for i in range(20)]
    prepared = prepare(Dataset.from_dict({"text": texts}), tiny_tokenizer(), Preparation())
    done: list[int] = []
    one_by_one = score(ensemble, prepared, tokens_per_batch=1, progress=done.append)
    assert done == list(range(1, 21))
    at_once = score(ensemble, prepared)
    assert [s.index for s in at_once] == list(range(20))
    for one, other in zip(one_by_one, at_once, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=1e-5)
        assert one.tokens == other.tokens == len(texts[one.index].split())


def test_length_normalised_routing_uses_the_mean_per_token() -> None:
    ensemble = tiny_ensemble(2)
    ensemble.alpha, ensemble.routing_quantity = 0.6, "length_normalised"
    (made,) = score(ensemble, Dataset.from_dict({"text": ["w1 w2 w3"]}), tiny_tokenizer(), Preparation())
    expected = responsibilities(torch.tensor(made.log_likelihood) / 3, 0.6)
    assert made.responsibilities == pytest.approx(expected.tolist(), rel=1e-5)


def test_training_mode_is_left_as_it_was() -> None:
    ensemble = tiny_ensemble(2, lora_dropout=0.5).train()
    rows = Dataset.from_dict({"text": ["w1 w2 w3"] * 2})
    first, second = score(ensemble, rows, tiny_tokenizer(), Preparation())
    assert first.log_likelihood == pytest.approx(second.log_likelihood)  # no dropout
    assert ensemble.training


def made_score(index: int, tokens: int, ell: list[float]) -> Score:
    r = responsibilities(torch.tensor(ell), 1.0)
    return Score(index, tokens, ell, r.tolist(), renyi_loss(torch.tensor(ell), 1.0).item(), 0.0)


def test_members_are_summed_up() -> None:
    ells = [[-1.0, -9.0], [-2.0, -4.0], [-6.0, -3.0]]
    scores = [made_score(i, 2, ell) for i, ell in enumerate(ells)]
    first, second = summarise_members(scores, torch.tensor([0.5, 0.5]))
    assert (first.leads, first.nll_led, first.nll_others, first.clearest) == (2, 3 / 4, 6 / 2, 0)
    assert (second.leads, second.nll_led, second.nll_others, second.clearest) == (1, 3 / 2, 13 / 4, 2)
    assert first.load == pytest.approx(sum(s.responsibilities[0] for s in scores) / 3)
    # A weight of next to nothing leads no example.
    _, starved = summarise_members(scores, torch.tensor([1 - 1e-6, 1e-6]))
    assert (starved.leads, starved.nll_led, starved.clearest) == (0, None, None)
    (alone,) = summarise_members([made_score(0, 1, [-3.0]), made_score(1, 4, [-4.0])], torch.tensor([1.0]))
    assert (alone.leads, alone.load, alone.nll_others, alone.clearest) == (2, 1.0, None, 1)


# ---- Info ------------------------------------------------------------------------------------------------------------


def test_info_measures_the_updates(tmp_path: Path) -> None:
    """Norms, distances and cosines equal those of the updates themselves, as PEFT forms them."""
    ensemble = tiny_ensemble(3, use_rslora=True)
    ensemble.save(tmp_path / "saved")
    told = json.loads(renyi("info", tmp_path / "saved", "--json").out)
    updates = []
    for m in range(3):
        model = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "saved" / f"member_{m}"))
        layers = [layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")]
        updates.append(torch.cat([layer.get_delta_weight("default").flatten() for layer in layers]).double())
    for m in range(3):
        assert told["update_norm"][m] == pytest.approx(updates[m].norm().item(), rel=1e-5)
        for n in range(3):
            distance = (updates[m] - updates[n]).norm().item()
            cosine = torch.nn.functional.cosine_similarity(updates[m], updates[n], dim=0).item()
            assert told["update_distance"][m][n] == pytest.approx(distance, rel=1e-4, abs=1e-9)
            assert told["update_cosine"][m][n] == pytest.approx(cosine, abs=1e-6)


def test_info_of_fresh_members_divides_by_no_zero(tmp_path: Path) -> None:
    LoraEnsemble.from_base(tiny_model(), 2, lora()).save(tmp_path / "fresh")
    told = json.loads(renyi("info", tmp_path / "fresh", "--json").out)
    assert told["update_norm"] == [0, 0]
    assert told["update_cosine"] == [[0, 0], [0, 0]]


def test_info_needs_no_base(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained[0], tmp_path / "copy"))
    manifest = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
    (folder / "ensemble.json").write_text(json.dumps({**manifest, "base_model": "/nowhere/base"}), encoding="utf-8")
    told = json.loads(renyi("info", folder, "--json").out)
    assert (told["base_model"], told["num_members"], told["lora_r"], told["layers"]) == ("/nowhere/base", 2, 2, 14)
    assert told["weights"] == [0.5, 0.5]
    assert told["bytes"] == sum(f.stat().st_size for f in folder.glob("member_*/*"))
    ended = renyi("info", folder)
    assert (ended.code, ended.err) == (0, "")
    for part in ("/nowhere/base", "2 × LoRA rank 2", "0.8, sequence routed", "Members' updates"):
        assert part in ended.out


def test_options_of_questions_are_scored(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    rows = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 0}, {"question": "w6", "choices": ["w7"] * 2}]
    file = write_rows(tmp_path / "quiz.jsonl", [{"answer": 1, **row} for row in rows])
    out = tmp_path / "options.jsonl"
    ended = renyi("score", trained[0], file, "--choice_by", "text", "--output", out, "--device", "cpu")
    assert ended.code == 0, ended.err
    first, second = (json.loads(line) for line in out.read_text("utf-8").splitlines())
    assert (first["index"], first["tokens"]) == (0, [1, 2])
    assert [len(options) for options in first["log_likelihood"]] == [2, 2]
    assert sum(first["probabilities"]) == pytest.approx(1)
    assert second["probabilities"] == pytest.approx([0.5, 0.5])
    assert second["epistemic"] == pytest.approx(0, abs=1e-9)
    assert renyi("score", trained[0], file, "--choice_by", "number").code == 2
