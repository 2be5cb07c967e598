"""`renyi.load`: an ensemble's folder as a whole gives what the commands give, and what training saw."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import lora, scatter_members, tiny_model, tiny_tokenizer

import renyi
from renyi import LoraEnsemble
from renyi.cli.main import main
from renyi.data import Preparation, prepare
from renyi.errors import ConfigError, DataError, EnsembleFormatError
from renyi.inference import generate, score
from renyi.runs.export import export_merged

TALK = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
QUESTIONS = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 0}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scattered members with dropout, whose training scored the assistant's words only."""
    root = tmp_path_factory.mktemp("load")
    tiny_model().save_pretrained(root / "base")
    tiny_tokenizer().save_pretrained(root / "base")
    ensemble = LoraEnsemble.from_base(str(root / "base"), 3, lora(lora_dropout=0.5), seed=1)
    scatter_members(ensemble).save(root / "ensemble")
    tiny_tokenizer().save_pretrained(root / "ensemble")
    Preparation(assistant_only_loss=True).write(root / "ensemble")
    return root / "ensemble"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> "renyi.runs.load.Loaded":
    return renyi.load(folder)


def test_a_folder_is_loaded_in_evaluation_mode(folder: Path, loaded) -> None:
    assert not any(module.training for module in loaded.ensemble.modules())
    assert loaded.folder == loaded.ensemble.folder == folder
    assert renyi.load(str(folder)).preparation == loaded.preparation == Preparation(assistant_only_loss=True)
    assert loaded.abstention is None


def test_rows_are_scored_as_training_trained_them(folder: Path, loaded, tmp_path: Path) -> None:
    """By the object and by the function below it: nobody can lose the preparation that the folder keeps."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    as_trained = prepare(Dataset.from_list([{"messages": TALK}]), tiny_tokenizer(), loaded.preparation)
    expected = score(loaded.ensemble, as_trained)
    assert [s.tokens for s in expected] == [2]  # w3 <eos>
    for rows in (file, str(file), [{"messages": TALK}], Dataset.from_list([{"messages": TALK}]), as_trained):
        assert loaded.score(rows) == expected
    assert score(loaded.ensemble, Dataset.from_list([{"messages": TALK}]), tiny_tokenizer()) == expected
    assert [s.tokens for s in loaded.score(file, assistant_only_loss=False)] == [5]

    fresh = LoraEnsemble.from_base(tiny_model(), 2, lora())
    rows = Dataset.from_list([{"text": "w1 w2 w3"}])
    with pytest.raises(ConfigError, match="preparation: is missing"):
        score(fresh, rows, tiny_tokenizer())
    with pytest.raises(ConfigError, match="tokenizer: is missing"):
        score(fresh, rows, preparation=Preparation())
    assert [s.tokens for s in score(fresh, rows, tiny_tokenizer(), Preparation())] == [3]


def test_rows_are_cut_at_what_the_base_can_read(caplog: pytest.LogCaptureFixture) -> None:
    ensemble = LoraEnsemble.from_base(tiny_model("gpt2", n_positions=12), 2, lora(target_modules=["c_attn"]))
    rows = Dataset.from_list([{"text": "w1 w2"}, {"text": " ".join(["w3"] * 20)}])
    assert [s.tokens for s in score(ensemble, rows, tiny_tokenizer(), Preparation())] == [2, 11]
    assert "1 row cut at the 12 positions of the base" in caplog.text
    caplog.clear()
    assert [s.tokens for s in score(ensemble, rows, tiny_tokenizer(), Preparation(max_length=8))] == [2, 7]
    assert "1 row cut at max_length 8" in caplog.text
    prepared = Dataset.from_list([{"input_ids": [6] * 13, "labels": [6] * 13}])
    with pytest.raises(DataError, match="row 1: has 13 tokens, and the base reads 12"):
        score(ensemble, prepared)


def test_a_merged_member_ends_where_the_ensemble_does(folder: Path, tmp_path: Path) -> None:
    """The base ends texts with one token; fine-tuning closed turns with another."""
    chatty = Path(shutil.copytree(folder, tmp_path / "chatty"))
    tiny_tokenizer(eos_token="<user>").save_pretrained(chatty)
    export_merged(chatty, tmp_path / "merged", [0])
    config = json.loads((tmp_path / "merged" / "member_0" / "generation_config.json").read_text(encoding="utf-8"))
    tokenizer = tiny_tokenizer()
    assert set(config["eos_token_id"]) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<user>")}


def test_a_temperature_means_sampling(folder: Path, loaded) -> None:
    """Where it did not, a temperature was ignored without a word."""
    ensemble, tokenizer = loaded.ensemble, loaded.tokenizer
    for how in ({"temperature": 1.5}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.01}):
        sampled = [a.token_ids for a in loaded.generate("w1", seed=4, max_new_tokens=8, do_sample=True, **how)]
        assert [a.token_ids for a in loaded.generate("w1", seed=4, max_new_tokens=8, **how)] == sampled
    hot = [generate(ensemble, ["w1"], tokenizer, temperature=1.5, seed=s, max_new_tokens=8) for s in range(4)]
    assert len({tuple(answer.token_ids) for (answer,) in hot}) > 1
    ids = torch.tensor([[6, 7]])
    drawn = [ensemble.generate(ids, temperature=1.5, seed=s, max_new_tokens=8).sequences for s in range(4)]
    assert any(not torch.equal(drawn[0], other) for other in drawn)
    greedy = generate(ensemble, ["w1"], tokenizer, max_new_tokens=8)
    assert generate(ensemble, ["w1"], tokenizer, max_new_tokens=8, temperature=0, top_p=0.9) == greedy
    with pytest.raises(ConfigError, match=r"do_sample: is False, but a temperature of 1\.5"):
        generate(ensemble, ["w1"], tokenizer, do_sample=False, temperature=1.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_p", 1.5),
        ("top_p", 0.0),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("num_return_sequences", 2),
    ],
)
def test_settings_out_of_range_are_refused_by_name(loaded, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name):
        loaded.generate("w1", **{name: value})


def test_text_opens_a_chat_and_a_chat_is_one_prompt(loaded) -> None:
    chat = [{"role": "user", "content": "w1 w2"}]
    how = {"max_new_tokens": 4}
    opened = generate(loaded.ensemble, [chat], loaded.tokenizer, **how)
    assert loaded.generate("w1 w2", **how) == loaded.generate(["w1 w2"], **how) == opened
    assert loaded.generate(chat, **how) == loaded.generate([chat], **how) == opened
    assert loaded.generate("w1 w2", plain=True, **how) == generate(loaded.ensemble, ["w1 w2"], loaded.tokenizer, **how)
    ruled = [[{"role": "system", "content": "w9"}, *chat]]
    assert loaded.generate("w1 w2", system="w9", **how) == generate(loaded.ensemble, ruled, loaded.tokenizer, **how)
    with pytest.raises(ConfigError, match="system message of its own"):
        loaded.generate(ruled, system="w9")
    with pytest.raises(DataError, match="prompt 2: ends with the assistant's turn"):
        loaded.generate(["w1", TALK])
    with pytest.raises(ConfigError, match="batch_size"):
        loaded.generate("w1", batch_size=0)


def test_pieces_come_as_the_answer_does(loaded) -> None:
    heard: list[tuple[str, float]] = []
    (answer,) = loaded.generate("w1", max_new_tokens=6, on_piece=lambda *piece: heard.append(piece))
    assert [piece for piece, _ in heard] == answer.tokens
    assert [epistemic for _, epistemic in heard] == pytest.approx(answer.epistemic)
    assert "".join(answer.tokens) == answer.text
    with pytest.raises(ConfigError, match="on_piece"):
        loaded.generate(["w1", "w2"], on_piece=print)


def test_choices_are_those_of_the_options(loaded) -> None:
    (choice,) = loaded.choices(QUESTIONS, "text")
    assert (choice.index, choice.tokens) == (0, [1, 2])
    assert [len(of_member) for of_member in choice.log_likelihood] == [2, 2, 2]
    ell = torch.tensor(choice.log_likelihood, dtype=torch.float64)
    assert choice.probabilities == pytest.approx(ell.softmax(-1).mean(0).tolist())
    assert choice.choice == max(range(2), key=choice.probabilities.__getitem__)
    assert choice.uncertainty["total"] == pytest.approx(-sum(p * math.log(p) for p in choice.probabilities))


def test_an_evaluation_is_the_commands(
    folder: Path, loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**QUESTIONS[0], "answer": n % 2} for n in range(6)]
    file = tmp_path / "quiz.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = loaded.evaluate("choice", rows, resamples=20)
    assert main(["evaluate", str(folder), str(file), "--task", "choice", "--resamples", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found.result
    with pytest.raises(ConfigError, match="resample"):
        loaded.evaluate("choice", rows, resample=20)


def test_an_ordinary_adapter_is_an_ensemble_of_one(folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    alone = renyi.load(tmp_path / "adapter", base=folder.parent / "base")
    assert alone.ensemble.num_members == 1
    assert [s.tokens for s in alone.score([{"text": "w1 w2 w3"}])] == [3]
    of_ensemble = renyi.load(folder / "member_2", base=folder.parent / "base").score([{"text": "w1 w2 w3"}])
    assert of_ensemble[0].mixture_nll == pytest.approx(-of_ensemble[0].log_likelihood[0])


def test_what_is_no_ensemble_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EnsembleFormatError, match=r"is a whole model \(LlamaForCausalLM\)"):
        renyi.load(folder.parent / "base")
    for architecture in ("LlavaForConditionalGeneration", "BertModel"):
        other = tmp_path / architecture
        other.mkdir()
        (other / "config.json").write_text(json.dumps({"architectures": [architecture]}), encoding="utf-8")
        with pytest.raises(EnsembleFormatError, match=architecture):
            renyi.load(other)
    with pytest.raises(EnsembleFormatError, match="no such folder"):
        renyi.load(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(ConfigError, match="device: is 'cudo'"):
        renyi.load(folder, device="cudo")
    with pytest.raises(DataError, match="rows: is a int"):
        renyi.load(folder).score(3)


def test_a_member_that_gives_no_numbers_is_named(folder: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    loaded = renyi.load(broken)
    with torch.no_grad():
        for A, _ in loaded.ensemble.adapter(1).values():
            A.fill_(math.nan)
    for how in ({}, {"temperature": 1.0, "seed": 0}, {"mixture": "token"}):
        with pytest.raises(EnsembleFormatError, match="member 1 gives logits that are not numbers"):
            loaded.generate("w1", max_new_tokens=3, **how)
    (fine,) = loaded.generate("w1", max_new_tokens=3, mixture="member", member=0)
    assert math.isfinite(fine.mixture_nll)
