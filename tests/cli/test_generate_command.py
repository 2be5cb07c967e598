"""`renyi generate`: answers of the ensemble itself, in every form it can show them."""

import io
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import Ended, assert_refused, renyi, save_base, write_rows
from safetensors.torch import load_file, save_file
from tiny import lora, scatter_members, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.cli import generate as command
from renyi.cli.reading import write_lines
from renyi.inference import Answer, generate

OF_DRAWS = ("within_members", "between_members")  # only of members that are distributions
ANSWER = [name for name in Answer._fields if not name.endswith(OF_DRAWS)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of three scattered members on a tiny base with a chat template."""
    folder = tmp_path_factory.mktemp("generate")
    base = save_base(folder / "base")
    scatter_members(LoraEnsemble.from_base(str(base), 3, lora(), seed=1)).save(folder / "ensemble")
    return folder / "ensemble"


def answers_of(folder: Path, prompts: list, **settings) -> list:
    settings = {"max_new_tokens": 5, **settings}
    return generate(LoraEnsemble.load(folder).eval(), prompts, tiny_tokenizer(), **settings)


def chat(text: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": text}]


def lines(ended: Ended) -> list[dict]:
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def test_text_is_the_answer_of_the_mixture_to_the_chat(saved: Path) -> None:
    ended = renyi("generate", saved, "w1 w2", "--max_new_tokens", 5)
    (answer,) = answers_of(saved, [chat("w1 w2")])
    assert (ended.code, ended.out.strip()) == (0, answer.text)
    assert ended.err == ""
    (plain,) = answers_of(saved, ["w1 w2"])
    assert renyi("generate", saved, "w1 w2", "--plain", "--max_new_tokens", 5).out.strip() == plain.text
    (ruled,) = answers_of(saved, [chat("w1 w2", "w9")])
    assert renyi("generate", saved, "w1 w2", "--system", "w9", "--max_new_tokens", 5).out.strip() == ruled.text
    assert len({answer.text, plain.text, ruled.text}) == 3
    both = renyi("generate", saved, "w1 w2", "w3", "--max_new_tokens", 5).out.splitlines()
    assert [line.strip() for line in both] == ["w1 w2", answer.text, "w3", answers_of(saved, [chat("w3")])[0].text]


def test_one_json_object_a_prompt(saved: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "w1 w2"}, {"prompt": chat("w3")}, {"prompt": chat("w4")}])
    rows = lines(renyi("generate", saved, "--input", file, "--json", "--max_new_tokens", 5))
    assert [list(row) for row in rows] == [["index", "prompt", *ANSWER]] * 3
    expected = answers_of(saved, [chat("w1 w2"), chat("w3"), chat("w4")])
    for row, answer in zip(rows, expected, strict=True):
        for name in ANSWER:
            value = getattr(answer, name)
            close = [pytest.approx(of_token) for of_token in value] if name == "weights" else pytest.approx(value)
            assert row[name] == (value if name in ("text", "token_ids", "tokens") else close)
    to_file = renyi("generate", saved, "--input", file, "--output", tmp_path / "out.jsonl", "--max_new_tokens", 5)
    assert (to_file.code, to_file.out) == (0, "")
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()] == rows


def test_members_side_by_side(saved: Path) -> None:
    (of_members,) = answers_of(saved, [chat("w1")], mixture="member")
    (row,) = lines(renyi("generate", saved, "w1", "--members", "--json", "--max_new_tokens", 5))
    assert [m["text"] for m in row["members"]] == [a.text for a in of_members]
    shown = renyi("generate", saved, "w1", "--members", "--max_new_tokens", 5).out
    for m, answer in enumerate(of_members):
        assert f"member {m}" in shown
        assert answer.text in shown
    one = renyi("generate", saved, "w1", "--member", "2", "--max_new_tokens", 5).out
    assert one.strip() == of_members[2].text


def test_settings_are_transformers_own(saved: Path) -> None:
    (sampled,) = answers_of(saved, [chat("w1")], do_sample=True, temperature=1.5, top_k=9, seed=4)
    flags = ("--temperature", 1.5, "--top_k", 9, "--seed", 4, "--max_new_tokens", 5)
    assert lines(renyi("generate", saved, "w1", "--json", *flags))[0]["token_ids"] == sampled.token_ids
    (token,) = answers_of(saved, [chat("w1")], mixture="token", repetition_penalty=3.0)
    flags = ("--temperature", 0, "--mixture", "token", "--repetition_penalty", 3, "--max_new_tokens", 5)
    assert lines(renyi("generate", saved, "w1", "--json", *flags))[0]["token_ids"] == token.token_ids


def test_stdin_is_a_prompt(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2\n"))
    from_stdin = renyi("generate", saved, "--max_new_tokens", 5)
    assert from_stdin.out == renyi("generate", saved, "w1 w2", "--max_new_tokens", 5).out


def test_uncertain_answers_are_marked_or_withheld(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    assert_refused(renyi("generate", folder, "w1", "--withhold"), "--withhold", "no abstention.json", "--target_risk")
    prompts = [f"w{i}" for i in range(6)]
    answers = answers_of(saved, [chat(p) for p in prompts])
    for score, of in (("mean_epistemic", lambda a: a.mean_epistemic), ("total", lambda a: max(a.total))):
        values = sorted(map(of, answers))
        kept = {"score": score, "threshold": (values[2] + values[3]) / 2, "risk": 0.05}
        (folder / "abstention.json").write_text(json.dumps(kept), encoding="utf-8")
        above = [of(a) > kept["threshold"] for a in answers]
        assert sum(above) == 3

        rows = lines(renyi("generate", folder, *prompts, "--json", "--withhold", "--max_new_tokens", 5))
        assert [row["above_threshold"] for row in rows] == above
        assert [row["text"] for row in rows] == [None if a else x.text for a, x in zip(above, answers, strict=True)]
        assert all(row["text"] for row in lines(renyi("generate", folder, *prompts, "--json", "--max_new_tokens", 5)))

        marked = renyi("generate", folder, *prompts, "--max_new_tokens", 5).out
        assert marked.count(f"not sure: {score}") == 3
        withheld = renyi("generate", folder, *prompts, "--withhold", "--max_new_tokens", 5).out
        assert withheld.count("I do not know") == 3
        for answer, hidden, line in zip(answers, above, withheld.splitlines()[1::2], strict=True):
            assert answer.text in marked
            assert line.startswith("I do not know (") if hidden else line == answer.text

    (folder / "abstention.json").write_text('{"score": "max_probability", "threshold": 1}', encoding="utf-8")
    warned = renyi("generate", folder, "w1", "--max_new_tokens", 2)
    assert warned.code == 0
    assert "warning: answers are not scored by max_probability" in warned.err
    assert_refused(renyi("generate", folder, "w1", "--withhold"), "--withhold", "max_probability")
    (folder / "abstention.json").write_text("{}", encoding="utf-8")
    assert_refused(renyi("generate", folder, "w1"), "abstention.json", "cannot be read")


def test_colours_follow_the_scale() -> None:
    assert [command._colour(x) for x in (0.0, 0.05, 0.2, 0.5, 1.9)] == [c for _, c in command.SCALE]
    legend = command._legend().plain
    assert "≤ 0.02" in legend
    assert "> 0.6" in legend


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("w1", "--tempreature", "1"), ("--tempreature", "nearest known one is temperature")),
        (("w1", "--max_new_tokens", "many"), ("--max_new_tokens", "'many'", "an integer")),
        (("w1", "--max_new_tokens", "0"), ("max_new_tokens",)),
        (("w1", "--temperature", "-1"), ("temperature",)),
        (("w1", "--mixture", "logits"), ("--mixture", "'logits'", "sequence")),
        (("w1", "--mixture", "token", "--members"), ("--mixture", "members answer alone")),
        (("w1", "--member", "7"), ("member", "there is no member 7 of 3")),
        (("w1", "--batch_size", "0"), ("--batch_size",)),
        (("w1", "--output", "nowhere/out.jsonl"), ("--output", "no folder nowhere")),
        (("w1", "--input", "prompts.jsonl"), ("--input", "cannot be combined with PROMPT")),
        (("--input", "prompts.jsonl"), ("prompts.jsonl", "there is no such file")),
        ((" ",), ("prompt 1", "is empty")),
        (("w1", "--top_p", "1.5"), ("--top_p", "1.5", "at most 1")),
        (("w1", "--seed", "soon"), ("--seed", "'soon'")),
        (("w1", "--output", "."), ("--output", "is a folder")),
        (("w1", "--device", "cudo"), ("--device", "cudo")),
        (("w1", "--plain", "--system", "w2"), ("--system",)),
    ],
)
def test_what_cannot_be_is_refused(saved: Path, flags: tuple[str, ...], parts: tuple[str, ...]) -> None:
    assert_refused(renyi("generate", saved, *flags), *parts)


def test_a_bad_row_is_refused_by_its_place(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    for text, place, part in (
        ('{"prompt": "w1"}\n{"text": "w2"}\n', "row 2", "is empty"),
        ('{"prompt": "w1"}\n{\n', "line 2", "JSON"),
        ('{"text": "w1"}\n', "", "a column `prompt`"),
    ):
        file.write_text(text, encoding="utf-8")
        assert_refused(renyi("generate", saved, "--input", file), str(file), place, part)
    file.write_text("\n", encoding="utf-8")
    assert_refused(renyi("generate", saved, "--input", file), str(file), "at least one row")


def test_prompts_may_be_messages_or_a_table(saved: Path, tmp_path: Path) -> None:
    expected = renyi("generate", saved, "w1", "w2", "--json", "--max_new_tokens", 2)
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": chat("w1")}, {"messages": chat("w2")}])
    of_chats = lines(renyi("generate", saved, "--input", file, "--json", "--max_new_tokens", 2))
    assert [row["token_ids"] for row in of_chats] == [row["token_ids"] for row in lines(expected)]
    table = tmp_path / "prompts.csv"
    table.write_text("prompt\nw1\nw2\n", encoding="utf-8")
    assert renyi("generate", saved, "--input", table, "--json", "--max_new_tokens", 2).out == expected.out


def test_flags_may_stand_anywhere(saved: Path) -> None:
    """`renyi generate ENSEMBLE --max_new_tokens 5 "text"` is what everybody types."""
    expected = renyi("generate", saved, "w1", "w2", "--max_new_tokens", 5)
    assert expected.code == 0
    for argv in ((saved, "--max_new_tokens", 5, "w1", "w2"), ("--max_new_tokens", 5, saved, "w1", "w2")):
        assert renyi("generate", *argv) == expected
    assert renyi("generate", saved, "w1", "--max_new_tokens", 5, "w2") == expected
    assert_refused(renyi("generate", saved, "--max_new_token", 5, "w1"), "--max_new_token", "max_new_tokens")


def test_lines_end_at_line_feeds_only(saved: Path, tmp_path: Path) -> None:
    """U+2028, U+0085 and a form feed are characters of a JSON text; a byte order mark is none."""
    file = tmp_path / "prompts.jsonl"
    text = "\ufeff" + "".join(json.dumps({"prompt": f"w1 {c} w2"}, ensure_ascii=False) + "\r\n" for c in "\u2028\x85")
    file.write_bytes(text.encode("utf-8"))
    rows = lines(renyi("generate", saved, "--input", file, "--json", "--max_new_tokens", 2))
    assert [row["prompt"] for row in rows] == ["w1 \u2028 w2", "w1 \x85 w2"]


def test_the_cases_of_real_users(saved: Path) -> None:
    cases = Path(__file__).parents[2].parent / "shared" / "cases" / "prompts"
    if not cases.is_dir():
        pytest.skip("the shared cases are not beside this checkout")
    assert len(lines(renyi("generate", saved, "--input", cases / "u2028.jsonl", "--json", "--max_new_tokens", 2))) == 2
    ended = renyi("generate", saved, "--input", cases / "ends_with_the_assistant.jsonl")
    assert_refused(ended, "ends_with_the_assistant.jsonl", "ends with the assistant's turn")


def test_a_system_message_is_given_once(saved: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "ruled.jsonl", [{"prompt": chat("w1", "w9")}])
    assert renyi("generate", saved, "--input", file, "--max_new_tokens", 2).code == 0
    assert_refused(renyi("generate", saved, "--input", file, "--system", "w8"), "--system", "system message of its own")


def test_a_broken_member_is_named_and_no_line_is_written(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    file = folder / "member_1" / "adapter_model.safetensors"
    save_file({name: torch.full_like(x, torch.nan) for name, x in load_file(file).items()}, file)
    for how in (("--json",), ("--temperature", 1, "--json"), ()):
        ended = renyi("generate", folder, "w1", "--max_new_tokens", 3, *how)
        assert_refused(ended, "member 1")
        assert "NaN" not in ended.out
    assert_refused(renyi("generate", folder, "w1", "--output", tmp_path / "out.jsonl"), "member 1")
    assert not (tmp_path / "out.jsonl").exists()


def test_lines_are_json_whatever_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    write_lines([{"a": math.nan, "b": [math.inf, {"c": (1.0, -math.inf)}], "d": "NaN"}], None)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, {"c": [1.0, None]}],
        "d": "NaN",
    }
