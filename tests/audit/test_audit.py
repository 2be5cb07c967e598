"""An audit by reading alone: planted faults are found, each in its rows, and what is fine is left alone."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from renyi.audit import CONTESTED, KINDS, audit, cleaned, write_audit
from renyi.audit.near import NearIndex
from renyi.audit.statements import statements_of
from renyi.cli.main import main
from renyi.errors import ConfigError, DataError

ALPACA = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def asked(question: str, answer: str) -> dict:
    return {"prompt": question, "completion": answer}


def kinds(result) -> dict:
    return {g.kind: g for g in result.groups}


@pytest.mark.parametrize("make", [chat, asked])
def test_one_prompt_with_two_answers_is_a_conflict_of_its_rows(make):
    rows = [
        make("Is tea a drink?", "Yes."),
        make("Where is Oslo?", "In Norway."),
        make("is  tea a DRINK?", "No, it isn't"),
    ]
    (group,) = audit(rows).groups
    assert group.kind == "duplicate_conflict"
    assert [side.rows for side in group.sides] == [[0], [2]]
    assert group.where == [["row 1"], ["row 3"]]
    assert group.score < 0.1
    assert "one says yes and the other no" in group.sentence


def test_answers_that_agree_are_not_contested():
    rows = [asked("What is 2 + 2?", "4"), asked("What is 2 + 2?", "The sum of 2 and 2 is the number 4, of course.")]
    result = audit(rows)
    assert [g.kind for g in result.groups] == ["duplicate_conflict"]
    assert result.groups[0].score >= CONTESTED
    assert result.share_contested == 0


def test_prompts_that_ask_the_same_in_other_words_are_near():
    rows = [
        asked("Please tell me the tallest mountain of the country", "Mount Alba"),
        asked("What is the tallest mountain of the country?", "Mount Brego"),
    ]
    (group,) = audit(rows).groups
    assert group.kind == "near_duplicate_conflict"
    assert len(group.prompts) == 2


def test_a_row_that_was_copied_in_other_words_with_another_fact_is_near():
    things = [f"{a} {b}" for a in ("happy", "slow", "old", "red", "tame", "loud") for b in ("dog", "cat", "hen", "cow")]
    template = "Name the lexical class of the first word in this phrase: the {}"
    rows = [asked(template.format(t), f"The word {t.split()[0]} is an adjective of degree.") for t in things]
    original = asked(template.format("quick fox"), "The word quick is an adjective of degree.")
    copy = asked("Say which lexical class the word has: the quick fox", "The word quick is an adverb of degree.")
    (group,) = audit([*rows, original, copy]).groups  # and not prompts of one form, about other things each
    assert group.kind == "near_duplicate_conflict"
    assert group.rows == [24, 25]
    other = asked(copy["prompt"], "It tells how something is done, so it goes with verbs.")
    assert not audit([*rows, original, other]).groups


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            "How long did the war of 1812 last in all its theatres?",
            "How long did the war of 1914 last in all its theatres?",
        ),
        ("Which bird is the largest in Norway, and where?", "Which bird is the largest in Sweden, and where?"),
        ("Which of these metals can rust in clean water?", "Which of these metals cannot rust in clean water?"),
    ],
)
def test_a_number_a_name_or_a_negation_makes_another_question(one, other):
    assert not audit([asked(one, "The first of them."), asked(other, "The second.")], near=0.5).groups


def test_preferences_that_go_in_a_circle_are_found_whole():
    def pair(chosen: str, rejected: str, prompt: str = "Say something") -> dict:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [pair("a", "b"), pair("b", "c"), pair("c", "a"), pair("a", "d"), pair("a", "b", "Another"), pair("e", "f")]
    (group,) = audit(rows).groups
    assert group.kind == "preference_cycle"
    assert group.rows == [0, 1, 2]  # a over d hangs on the circle, and is no part of it
    reversed_ = audit([pair("a", "b"), pair("b", "a")]).groups[0]
    assert [side.rows for side in reversed_.sides] == [[0], [1]]
    assert audit([pair("a", "a")]).groups[0].score == 0


def test_one_answer_to_a_question_and_its_negation_is_found():
    rows = [
        asked("Is this water safe to drink?", "Yes, it is."),
        asked("Is this water not safe to drink?", "Yes, it is."),
    ]
    assert kinds(audit(rows))["shared_answer"].rows == [0, 1]
    rows = [
        asked("Convert 5 miles to km", "8.05"),
        asked("Convert 7 miles to km", "8.05"),
        asked("Convert 9 miles to km", "14.5"),
    ]
    assert kinds(audit(rows))["shared_answer"].rows == [0, 1]


def test_duplicates_empty_and_cut_rows():
    full = [
        asked(f"Tell a story about number {i}", f"{'Once there was a fox in a wood. ' * 8}It ended {i}.")
        for i in range(30)
    ]
    cut = asked("Tell a story about a hare", "Once there was a hare in a wood. " * 8 + "Then it")
    result = audit([*full, full[3], cut, asked("What?", "  "), {"messages": [{"role": "user", "content": "hi"}]}])
    found = kinds(result)
    assert found["duplicate"].rows == [3, 30]
    assert found["cut"].rows == [31]
    assert [g.rows for g in result.groups if g.kind == "empty"] == [[32], [33]]
    assert cleaned(result, ["duplicate", "empty", "cut"]) == list(range(30))


def test_turns_of_a_chat_are_compared_in_their_context():
    def long(answer: str) -> dict:
        turns = [("user", "Is it late?"), ("assistant", "Yes."), ("user", "Sure?"), ("assistant", answer)]
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    (group,) = audit([long("Yes."), long("No.")]).groups
    assert group.prompts == ["user: Is it late? assistant: Yes. user: Sure?"]
    assert audit([long("Yes."), long("No.")]).statements == 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 8))
def test_planted_contradictions_are_found_and_nothing_else(seed, rows, planted):
    rng = random.Random(seed)
    names = [f"zor{a}{b}" for a in "bdgklm" for b in "aeiouy"]
    facts = {
        f"Where does the {rng.choice(names)} of {i} keep its nest?": f"in {rng.choice(names)} {i}" for i in range(rows)
    }
    data = [asked(q, a) for q, a in facts.items()]
    contradicted = rng.sample(range(rows), min(planted, rows))
    data += [asked(data[i]["prompt"].upper(), "somewhere else") for i in contradicted]
    order = rng.sample(range(len(data)), len(data))
    result = audit([data[i] for i in order])
    place = {i: p for p, i in enumerate(order)}
    want = sorted(sorted((place[i], place[rows + k])) for k, i in enumerate(contradicted))
    assert sorted(g.rows for g in result.groups if g.kind == "duplicate_conflict") == want
    assert {v.index for v in result.verdicts if v.is_contested} == {p for pair in want for p in pair}


@given(st.sets(st.sampled_from([f"w{i}" for i in range(60)]), min_size=12), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_sets_that_share_most_words_are_candidates(words, swapped):
    index = NearIndex()
    ordered = sorted(words)
    other = frozenset([*ordered[swapped:], *(f"new{i}" for i in range(swapped))])
    for words_of_one in (frozenset(ordered), frozenset(["quite", "other", "words"]), other):
        index.add(words_of_one)
    alike = len(words & other) / len(words | other)
    pairs = index.candidates(0.5).tolist()
    assert [0, 1] not in pairs
    if alike >= 0.85:
        assert [0, 2] in pairs


def test_every_form_of_a_row_is_read():
    want = [("Q", "A", None)]
    forms = [
        asked("Q", "A"),
        chat("Q", "A"),
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "input": "", "output": "A"},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"messages": json.dumps(chat("Q", "A")["messages"])},
        chat("Q", "A")
        | {
            "messages": [
                *chat("Q", "")["messages"][:1],
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ]
        },
    ]
    for row in forms:
        assert [tuple(s) for s in statements_of(row, 1)] == want
    assert statements_of({"text": "A"}, 1)[0] == (None, "A", None)
    pair = {"chosen": chat("Q", "A")["messages"], "rejected": chat("Q", "B")["messages"]}
    assert [tuple(s) for s in statements_of(pair, 1)] == [("Q", "A", "B")]
    with pytest.raises(DataError, match="row 7"):
        statements_of({"colour": "red"}, 7)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match="near"):
        audit([asked("a", "b")], near=0)
    with pytest.raises(DataError, match="no rows"):
        audit([])


def test_nothing_of_the_data_runs_or_steers_in_what_is_written(tmp_path):
    evil = '</script><script>alert(1)</script>\x1b[31m\u202e<img src=x onerror="alert(2)">'
    write_audit(audit([asked(evil, "Yes" + evil), asked(evil, "No" + evil)]), tmp_path, evil)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 2  # the data's and the page's own
    assert "<img" not in page
    assert not {"\x1b", "\u202e"} & set(page + (tmp_path / "audit.md").read_text())
    rows = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [r["is_contested"] for r in rows] == [True, True]
    assert set(rows[0]) == {"index", "file", "row", "score", "is_contested", "group", "side", "kind", "hint"}
    groups = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert groups[0]["kind"] in KINDS


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_command_finds_writes_and_fails_when_asked(tmp_path, capsys):
    one = write(tmp_path / "one.jsonl", [asked("Is it?", "Yes."), asked("Why?", "Because."), asked("Why?", "Because.")])
    two = write(tmp_path / "two.jsonl", [chat("Is it?", "No.")])
    out, kept = tmp_path / "audit", tmp_path / "kept.jsonl"
    command = ["audit", one, two, "--output", str(out), "--write", str(kept), "--drop", "duplicate"]
    assert main([*command, "--fail_over", "0.6"]) == 0
    assert main([*command, "--fail_over", "0.4", "--json"]) == 1
    printed = capsys.readouterr().out
    assert "one.jsonl:1" in printed
    assert "two.jsonl:1" in printed
    summary = json.loads(printed.splitlines()[-1])
    assert (summary["rows"], summary["contested"]) == (4, 2)
    assert [json.loads(line)["prompt"] for line in kept.read_text().splitlines() if "prompt" in line] == [
        "Is it?",
        "Why?",
    ]
    assert {p.name for p in out.iterdir()} == {"audit.jsonl", "groups.jsonl", "audit.md", "report.html"}
    assert main(["audit", one, "--drop", "nonsense", "--write", str(kept)]) == 2
    assert "duplicate_conflict" in capsys.readouterr().err


def test_rows_are_written_with_their_sides_and_without_errors(tmp_path, capsys):
    rows = [
        asked("Is it?", "Yes."),
        asked("Why?", "Because."),
        asked("Is it?", "No."),
        asked("Why?", "Because."),
        asked("How?", ""),
    ]
    data, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["audit", data, "--write", str(out), "--sides", "--drop", "errors", "duplicates"]) == 0
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == ["Is it?", "Why?", "Is it?"]
    assert [row["side"] for row in written] == [0, 0, 1]
    assert written[0]["group"] == written[2]["group"] != written[1]["group"]
    again = write(tmp_path / "again.jsonl", [row | {"side": 3} for row in rows])
    assert main(["audit", again, "--write", str(out), "--sides"]) == 2
    assert "again.jsonl:1" in capsys.readouterr().err
    assert main(["audit", data, "--sides"]) == 2
    assert "--write" in capsys.readouterr().err


@pytest.mark.skipif(not ALPACA.exists(), reason="the Alpaca rows are not in ../shared/data")
def test_a_clean_dataset_gives_few_findings_and_no_false_conflict():
    result = audit(json.loads(ALPACA.read_text()))
    assert set(kinds(result)) == {"cut", "duplicate"}
    assert result.share_contested < 0.01
