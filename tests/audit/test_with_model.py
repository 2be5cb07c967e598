"""What a model adds to an audit: fit of answers, exchange of prompts, sides; and what is kept of long work."""

import json
import math

import numpy as np
import pytest
from datasets import Dataset
from tiny import tiny_ensemble, tiny_tokenizer

from renyi.audit import audit
from renyi.audit.examples import Examples, draw, examples_of
from renyi.audit.findings import Group, Side
from renyi.audit.judging import probable_errors, same_questions, variation_of_members, variations_along
from renyi.audit.kept import Kept
from renyi.audit.measuring import Alike, Judge, Reading, candidates, read_examples
from renyi.audit.next_step import next_command
from renyi.audit.with_model import judged
from renyi.data import Preparation
from renyi.errors import ConfigError, DataError
from renyi.inference import score


def rows_of(number: int) -> list[dict]:
    return [{"prompt": f"w{i % 7} w{i}", "completion": f" w{(3 * i) % 59}"} for i in range(number)]


def judge_of(unseen, members: int = 2) -> Judge:
    return Judge(tiny_ensemble(members), tiny_tokenizer(), Preparation(), None, unseen)


def reading_of(places, responsibilities=None, nll=None, rivals=None, fit=None) -> Reading:
    n = len(places)
    shares = np.ones((1, n)) if responsibilities is None else np.array(responsibilities)
    zeros = np.zeros(n)
    nll = zeros if nll is None else np.array(nll)
    rivals = np.zeros((2, n)) if rivals is None else np.array(rivals)
    fit = zeros if fit is None else np.array(fit)
    return Reading(list(places), zeros + 1, np.zeros_like(shares), shares, nll, rivals, zeros, fit)


# ---- Examples --------------------------------------------------------------------------------------------------------


def test_an_example_is_the_last_answer_of_a_row_with_everything_before_it():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"},
        {"from": "gpt", "value": "d"},
    ]
    examples = examples_of([{"conversations": turns}], [0])
    assert [m["role"] for m in examples.content[0]["prompt"]] == ["user", "assistant", "user"]
    assert examples.content[0]["completion"] == [{"role": "assistant", "content": "d"}]
    record = {"instruction": "do", "input": "this", "output": "done"}
    assert examples_of([record], [0]).content[0]["prompt"] == [{"role": "user", "content": "do\nthis"}]
    assert examples_of([record], [0], is_chat=False).content == [{"prompt": "do\nthis\n", "completion": "done"}]
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert examples_of([pair], [0]).method == "dpo"
    assert examples_of([record, record | {"output": " "}], [0, 1]).rows == [0]
    with pytest.raises(DataError, match="several forms"):
        examples_of([record, pair], [0, 1])
    with pytest.raises(DataError, match="no row has an answer"):
        examples_of([record | {"output": ""}], [0])


def test_rows_in_a_conflict_are_drawn_first_up_to_half():
    rows = rows_of(100)
    few = Group("duplicate_conflict", 0.1, [], [Side("", [3]), Side("", [97])])
    many = Group("near_duplicate_conflict", 0.1, [], [Side("", list(range(40)))])
    other = Group("cut", 0.1, [], [Side("", list(range(50, 99)))])
    assert draw(rows, [few], 100) == list(range(100))
    drawn = draw(rows, [few, other], 20)
    assert {3, 97} <= set(drawn)
    assert len(drawn) == len(set(drawn)) == 20
    assert sum(i < 40 for i in draw(rows, [many], 20)) >= 10
    assert len(draw(rows, [many], 20)) == 20
    assert draw(rows, [few], 20, seed=1) != draw(rows, [few], 20, seed=2)


def test_a_rival_has_another_prompt():
    rows = [{"prompt": f"w{i % 2}", "completion": f"w{i}"} for i in range(30)]
    examples = examples_of(rows, range(30))
    for turn in examples.rivals(3, seed=0):
        assert all(i % 2 != j % 2 for i, j in enumerate(turn))


# ---- Figures ---------------------------------------------------------------------------------------------------------


def test_the_fit_of_an_answer_is_its_likelihood_after_its_own_prompt_against_others():
    rows = rows_of(70)  # more than one block
    examples, judge = examples_of(rows, range(70)), judge_of(range(70))
    reading = read_examples(judge, examples, range(70), Kept(None, {}), "0", 5, lambda done: None)

    def nll(asked: list[dict]) -> np.ndarray:
        prepared = judge.preparation.prepare(Dataset.from_list(asked), judge.tokenizer)
        return np.array([s.mixture_nll for s in score(judge.ensemble, prepared)])

    own = nll(rows)
    turns = [
        [{"prompt": rows[j]["prompt"], "completion": row["completion"]} for j, row in zip(turn, rows, strict=True)]
        for turn in examples.rivals(2, 5)
    ]
    mean = np.mean([np.exp(-nll(turn)) for turn in turns], axis=0)
    np.testing.assert_allclose(reading.nll, own, rtol=1e-4)
    np.testing.assert_allclose(reading.fit, np.exp(-own) / (np.exp(-own) + mean), rtol=1e-3)
    assert reading.log_likelihood.shape == (2, 70)


def test_texts_without_a_prompt_have_no_fit_and_are_no_errors():
    examples = examples_of([{"text": f"w{i} w{i + 1}"} for i in range(8)], range(8))
    read = read_examples(judge_of(range(8)), examples, range(8), Kept(None, {}), "0", 0, lambda done: None)
    assert all(map(math.isnan, read.fit))
    assert not probable_errors(examples, read)
    assert not candidates(examples)


def test_what_was_measured_is_read_back_and_not_measured_again(tmp_path):
    file, calls = tmp_path / "kept.jsonl", []

    def compute() -> list[float]:
        calls.append(1)
        return [0.1, math.inf]

    assert Kept(file, {"rows": 1}).get("a", compute) == [0.1, math.inf]
    assert Kept(file, {"rows": 1}).get("a", compute) == [0.1, math.inf]
    assert len(calls) == 1
    with file.open("a") as cut:
        cut.write('{"key": "b", "val')
    again = Kept(file, {"rows": 1})
    assert "a" in again
    assert "b" not in again
    again.get("b", compute)
    assert "b" in Kept(file, {"rows": 1})
    assert "a" not in Kept(file, {"rows": 2})
    assert len(file.read_text().splitlines()) == 1


def test_judges_read_every_example_once_and_killed_reading_goes_on(tmp_path):
    rows = rows_of(70)
    examples, found = examples_of(rows, range(70)), audit(rows)
    halves = [list(range(35)), list(range(35, 70))]
    judges = [judge_of(half, members=1) for half in halves]
    kept = Kept(tmp_path / "kept.jsonl", {})
    whole = judged(found, examples, judges, kept=kept)
    assert sorted(whole.measures) == list(range(70))
    lines = (tmp_path / "kept.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines[:2]))
    resumed = judged(found, examples, judges, kept=Kept(tmp_path / "kept.jsonl", {}))
    assert resumed.measures == whole.measures
    assert [g.sentence for g in resumed.groups] == [g.sentence for g in whole.groups]
    with pytest.raises(ConfigError, match="judges"):
        judged(found, examples, judges[:1])


# ---- Groups ----------------------------------------------------------------------------------------------------------


def test_an_answer_that_fits_other_prompts_better_is_a_probable_error_of_its_row():
    examples = examples_of(rows_of(12), range(2, 12))
    rivals = [[-30.0, -8.0, *[-30.0] * 8], [-31.0, -9.0, *[-29.0] * 8]]
    (group,) = probable_errors(examples, reading_of(range(10), nll=np.full(10, 9.0), rivals=rivals))
    assert group.kind == "probable_error"
    assert group.rows == [3]
    assert group.score == 0.25  # half the share of mismatched answers that would gain less, which is a half
    assert "0.5 nats likelier after prompts of other rows" in group.sentence


def test_a_pair_whose_label_is_not_foreseen_is_a_probable_error():
    pairs = [{"prompt": f"w{i}", "chosen": "w1", "rejected": "w2"} for i in range(12)]
    examples = examples_of(pairs, range(2, 12))
    (group,) = probable_errors(examples, reading_of(range(10), fit=[0.9, 0.2, *[0.7] * 8]))
    assert group.rows == [3]
    assert group.score == 0.2


def test_prompts_whose_answers_can_be_exchanged_are_one_conflict():
    rows = [
        {"prompt": "Name the capital of France", "completion": "Paris"},
        {"prompt": "Which town governs the French?", "completion": "Lyon"},
        {"prompt": "Name a fruit", "completion": "An apple"},
    ]
    examples = examples_of(rows, range(3))
    (group,) = same_questions(examples, [Alike(0, 1, 0.9), Alike(0, 2, 0.3)], [])
    assert group.kind == "near_duplicate_conflict"
    assert [side.rows for side in group.sides] == [[0], [1]]
    assert group.score < 0.5
    assert not same_questions(examples, [Alike(0, 1, 0.9)], [group])
    agreeing = Examples(examples.rows, [t._replace(answer="Paris") for t in examples.texts], examples.content, "sft")
    assert not same_questions(agreeing, [Alike(0, 1, 0.9)], [])


@pytest.mark.parametrize("seed", range(3))
def test_a_minority_and_a_balanced_split_are_variations_and_scattered_rows_are_none(seed):
    rng = np.random.default_rng(seed)
    noise = rng.normal(0, 0.3, (200, 4))
    noise[7, 0] = 30  # one row that stands out is no side
    assert not variations_along(noise)
    minority = np.array(noise)
    minority[:10, 1] += 4
    (found,) = variations_along(minority)
    assert found.sides[1] == list(range(10))
    assert found.direction == 1
    assert found.strength[:10].min() > found.strength[10:].max()
    balanced = np.array(noise)
    balanced[:, 2] += np.where(np.arange(200) % 2, 2, -2)
    (found,) = variations_along(balanced)
    assert {tuple(i % 2 for i in side) for side in found.sides} == {(0,) * 100, (1,) * 100}
    assert not variations_along(minority[:3])


def test_members_that_took_enough_rows_are_the_sides():
    shares = np.full((3, 100), 0.02)
    shares[0, :60], shares[1, 60:98], shares[2, 98:] = 0.96, 0.96, 0.96
    found = variation_of_members(reading_of(range(100), shares))
    assert found.sides == [list(range(60)), list(range(60, 98))]  # two rows that one member takes alone are no side
    assert variation_of_members(reading_of(range(100), np.full((2, 100), 0.5))) is None


def test_the_next_command_has_the_members_and_the_alpha_that_were_found():
    rows = [{"prompt": "Is it?", "completion": c} for c in ("Yes.", "No.")]
    found = audit(rows)
    assert "--num_members 2 --alpha auto" in next_command(found, rows[0], ["my data.jsonl"])
    assert "'my data.jsonl'" in next_command(found, rows[0], ["my data.jsonl"])
    found.stability = {"contradicted": True, "members": 3, "alpha": 0.65}
    assert "--num_members 3 --alpha 0.65" in next_command(found, rows[0], ["x.jsonl"])
    assert "--num_members 1 --alpha 0 " in next_command(audit(rows[:1]), rows[0], ["x.jsonl"])
    assert next_command(found, {"instruction": "a", "output": "b"}, ["x.json"]) is None
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert next_command(audit([pair]), pair, ["x.jsonl"]).startswith("renyi dpo")


def test_lines_carry_what_was_measured(tmp_path):
    from renyi.audit import write_audit

    rows = rows_of(20)
    examples = examples_of(rows, range(0, 20, 2))
    result = judged(audit(rows), examples, [judge_of(range(10))])
    result.settings.update(model="tiny", drawn="some")
    write_audit(result, tmp_path, "rows")
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(lines[0]["responsibilities"]) == 2
    assert lines[0]["owner"] in (0, 1)
    assert 0 <= lines[0]["fit"] <= 1
    assert "fit" not in lines[1]
    assert "tiny" in (tmp_path / "audit.md").read_text()
