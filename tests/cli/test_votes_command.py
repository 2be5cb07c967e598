"""Votes through the real command line: train on annotations by annotator, and evaluate against a baseline."""

import json

import pytest
from tiny import pair_rows, tiny_model, tiny_tokenizer

from renyi.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("votes")
    base = tiny_model()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    rows = []
    for i, row in enumerate(pair_rows(24)):
        labels = ["chosen", "rejected", "tie"] if i % 3 == 0 else ["chosen", "chosen", "chosen"]
        annotations = [{"annotator": name, "label": label} for name, label in zip("abc", labels, strict=True)]
        rows.append({**row, "annotations": annotations, "topic": f"t{i % 2}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_annotators_are_routed_and_votes_evaluated(world, capsys):
    settings = ["--model_name_or_path", world / "base", "--dataset_name", world / "pairs.jsonl", "--num_members", "2"]
    settings += ["--max_steps", "3", "--use_cpu", "true", "--lora_r", "2", "--output_dir"]
    assert main(["dpo", *map(str, settings), str(world / "grouped"), "--routing_group", "annotator"]) == 0
    kept = json.loads((world / "grouped" / "preference.json").read_text())
    assert kept["tie_strength"] == pytest.approx(2 * 8 / 64)
    assert json.loads((world / "grouped" / "preparation.json").read_text())["routing_group"] == "annotator"
    capsys.readouterr()

    asked = ["--task", "preference", "--json", "--group", "topic", "--output", str(world / "lines.jsonl")]
    asked += ["--baseline", str(world / "grouped")]
    assert main(["evaluate", str(world / "grouped"), str(world / "pairs.jsonl"), *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["mixture", "members' mean and variance", "grouped", "member 0, temperature"]
    assert [v["name"] for v in found["votes"]] == names
    assert found["votes"][0] == {**found["votes"][2], "name": "mixture"}
    assert found["worst_group"] == min(g["accuracy"] for g in found["groups"])
    lines = [json.loads(line) for line in (world / "lines.jsonl").read_text().splitlines()]
    assert [line["votes"] for line in lines[:2]] == [[1, 1, 1], [3, 0, 0]]
    assert len(lines) == 24  # a row a pair, not a label


def test_a_bad_annotation_is_named_by_file_and_row(world, capsys):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    rows[4]["annotations"][1] = {"annotator": "a", "label": "rejected"}
    (world / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["--model_name_or_path", str(world / "base"), "--dataset_name", str(world / "bad.jsonl")]
    assert main(["dpo", *settings, "--output_dir", str(world / "out"), "--use_cpu", "true"]) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert "bad.jsonl, row 5, column annotations" in said
    assert not (world / "out").exists()


def test_a_diagnosis_measures_whole_groups(world, capsys):
    rows = [{**row, "annotator": f"a{i % 48}"} for i, row in enumerate(pair_rows(144))]
    (world / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--num_directions", "4", "--max_examples", "126", "--output", str(world / "diagnosed.jsonl"), "--json"]
    assert main(["diagnose", str(world / "grouped"), str(world / "named.jsonl"), *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["groups"], found["examples"]) == (21, 63)  # half of 42 groups of three rows
    lines = [json.loads(line) for line in (world / "diagnosed.jsonl").read_text().splitlines()]
    by_group: dict[str, set[float]] = {}
    for line in lines:
        assert line["group"] == rows[line["index"]]["annotator"]
        by_group.setdefault(line["group"], set()).add(line["group_loading"])
    assert all(len(loadings) == 1 for loadings in by_group.values())
    assert main(["diagnose", str(world / "grouped"), str(world / "pairs.jsonl"), "--num_directions", "4"]) != 0
    assert "a row for each annotation" in " ".join(capsys.readouterr().err.split())
