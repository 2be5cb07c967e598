"""Every bad input ends as one clear message and exit code 2, and leaves nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Ended, Settings, assert_refused, contradicting_rows, renyi, save_base, write_rows
from tiny import tiny_model, tiny_tokenizer

from renyi.cli.main import COMMANDS

MESSAGES = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
NO_MARKERS = "{% for message in messages %}{{ message.content }} {% endfor %}"
OTHER_MARKERS = (
    "{% for message in messages %}{% if message.role == 'model' %}{% generation %}{{ message.content }} "
    "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
)


def refused_data(settings: Settings, file: Path, *parts: str, **given: Any) -> None:
    """`renyi sft` refuses the data, and leaves no output folder."""
    assert_refused(renyi("sft", "--config", settings(dataset_name=file, **given)), *parts)
    assert not (file.parent / "out").exists()


# ---- The data --------------------------------------------------------------------------------------------------------


def test_missing_file(settings: Settings, tmp_path: Path) -> None:
    refused_data(settings, tmp_path / "rows.jsonl", "rows.jsonl: there is no such file", f"Looked in {tmp_path}")


@pytest.mark.parametrize(("name", "text"), [("a.jsonl", ""), ("b.json", "[]"), ("c.csv", "prompt,completion\n")])
def test_empty_dataset(name: str, text: str, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    refused_data(settings, tmp_path / name, f"{name}: the dataset is empty", "at least one row")


def test_a_line_that_is_no_json(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2"}\n{"text": "w1\n', encoding="utf-8")
    refused_data(settings, tmp_path / "rows.jsonl", "rows.jsonl, line 2: could not be loaded")


def test_wrong_column_names(settings: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "w1", "answer": "w2"}])
    refused_data(settings, file, "rows.jsonl: the columns are answer, question", "`prompt` + `completion`", "rename")


def test_a_row_with_an_empty_completion(settings: Settings, tmp_path: Path) -> None:
    rows = contradicting_rows(20)
    rows[16]["completion"] = " "
    # The row of the file is named, though rows are held out at random.
    for share in (..., 0.5):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        refused_data(
            settings, file, "rows.jsonl, row 17, column completion: is empty", "Remove the row", test_split_size=share
        )


@pytest.mark.parametrize("first", ["text", "pair"])
def test_mixed_forms(first: str, settings: Settings, tmp_path: Path) -> None:
    text, pair = {"text": "w1 w2"}, {"prompt": "w1", "completion": " w2"}
    file = write_rows(tmp_path / "rows.jsonl", [text, pair] if first == "text" else [pair, text])
    row = 1 if first == "text" else 2
    refused_data(settings, file, f"row {row}, column prompt: is missing", "this row has text", "same form")


def test_mixed_text_and_messages(settings: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES}, {"messages": [{"role": "", "content": "w1"}]}])
    refused_data(settings, file, "row 2, column messages: has no role in message 1")


def test_a_record_that_leaves_no_trained_token(settings: Settings, tmp_path: Path) -> None:
    rows = contradicting_rows(20)
    rows[11]["prompt"] = " ".join(["w1"] * 30)
    for share in (..., 0.5):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        refused_data(
            settings,
            file,
            "rows.jsonl, ",
            "row 12: no trained token is left",
            "max_length 16",
            max_length=16,
            test_split_size=share,
        )


@pytest.mark.parametrize("template", [NO_MARKERS, OTHER_MARKERS])
def test_assistant_mask_of_zeros(template: str, settings: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES}] * 8)
    base = save_base(tmp_path / "base", template=template)
    refused_data(
        settings,
        file,
        "assistant_only_loss: the chat template marks no assistant tokens",
        "generation",
        model_name_or_path=base,
        assistant_only_loss=True,
    )


def test_conversations_without_a_chat_template(settings: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES}] * 8)
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    refused_data(settings, file, "has no chat template", "--chat_template_path", model_name_or_path=base)


def test_evaluation_without_a_test_split(settings: Settings, rows_file: Path, tmp_path: Path) -> None:
    ended = renyi("sft", "--config", settings(eval_strategy="steps", eval_steps=2))
    assert_refused(ended, "dataset_test_split", "has no split 'test'", "--test_split_size 0.05")
    ended = renyi("sft", "--config", settings(), "--test_split_size", "0.001")
    assert_refused(ended, "test_split_size: 0.001 of 48 rows is 0 rows")
    ended = renyi("sft", "--config", settings(), "--dataset_train_split", "training")
    assert_refused(ended, "dataset_train_split", "has no split 'training'", "Its splits are 'train'")


# ---- The tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pad_token", "why"), [(None, "tokenizer has none of its own"), ("<eos>", "pad token <eos> also ends a text")]
)
def test_padding_is_settled_and_said(pad_token: str | None, why: str, settings: Settings, tmp_path: Path) -> None:
    config = settings(model_name_or_path=save_base(tmp_path / "base", pad_token=pad_token))
    ended = renyi("sft", "--config", config, "--dry_run")
    assert ended.code == 0, ended
    assert "padding" in ended.out
    assert f"<unk>, because the {why}" in ended.out
    assert "<pad>, because " in renyi("sft", "--config", config, "--pad_token", "<pad>", "--dry_run").out
    assert_refused(renyi("sft", "--config", config, "--pad_token", "<hole>"), "pad_token: '<hole>' is not in the voc")
    assert_refused(renyi("sft", "--config", config, "--pad_token", "w3"), "pad_token: 'w3' is a word like any other")
    assert not (tmp_path / "out").exists()


# ---- The settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"learning_rat": 1e-3}, ["learning_rat (", "config.yaml, line", "nearest known one is learning_rate"]),
        ({"num_members": "four"}, ["num_members (", "config.yaml, line", "'four' is not an integer"]),
        ({"alpha": -0.1}, ["alpha (", "-0.1 is not allowed", "between 0 and 1"]),
        ({"alpha": float("nan")}, ["alpha (", "nan is not allowed", "between 0 and 1"]),
        ({"num_members": 0}, ["num_members (", "0 is not allowed", "at least 1"]),
        ({"lora_r": 0}, ["lora_r (", "config.yaml, line", "0 is not allowed", "at least 1"]),
        ({"lora_target_modules": ["query"]}, ["query", "fits no layer of LlamaForCausalLM", "q_proj", "all-linear"]),
        ({"lora_target_modules": ["lm_head"]}, ["lm_head", "lora_target_modules"]),
        ({"use_dora": True}, ["use_dora is set", "not a low-rank update"]),
        ({"use_peft": False}, ["use_peft", "Members are LoRA adapters"]),
        ({"eval_strategy": "step"}, ["eval_strategy (", "'step' is none of no, steps, epoch", "Did you mean steps?"]),
        ({"test_split_size": 1.5}, ["test_split_size (", "between 0 and 1"]),
        ({"model_name_or_path": ...}, ["model_name_or_path: is not set", "--model_name_or_path"]),
        ({"dataset_name": ...}, ["dataset_name: is not set", "jsonl"]),
        ({"output_dir": ...}, ["output_dir: is not set"]),
        ({"model_name_or_path": "./nowhere"}, ["model_name_or_path: there is no folder ./nowhere"]),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end (", "config.yaml, line", "eval strategy to match"]),
        ({"padding_free": True}, ["padding_free (", "config.yaml, line", "`max_length` is not enforced"]),
    ],
)
def test_refused_settings(given: dict[str, Any], parts: list[str], settings: Settings, tmp_path: Path) -> None:
    assert_refused(renyi("sft", "--config", settings(**given)), *parts)
    assert not (tmp_path / "out").exists()


def test_refused_flags(settings: Settings, tmp_path: Path) -> None:
    assert_refused(renyi("sft", "--config", settings(), "--alpha", "2"), "--alpha: 2.0 is not allowed")
    assert_refused(renyi("sft", "--config", settings(), "--members", "2"), "--members", "Write num_members")
    assert_refused(renyi("sft", "--config", tmp_path / "no.yaml"), "no.yaml: there is no such file")
    assert_refused(renyi("sft", "--config"), "--config: expected one argument")
    assert_refused(renyi("trian"), "there is no command 'trian'", ", ".join(COMMANDS))


# ---- The output folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def copy(trained: tuple[Path, Ended], tmp_path: Path) -> Path:
    """A copy of a trained ensemble, to be spoiled."""
    return Path(shutil.copytree(trained[0], tmp_path / "copy"))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_output_folder_of_another_run(settings: Settings, base: Path, copy: Path, tmp_path: Path) -> None:
    (copy / "run.json").unlink()  # as earlier versions left it; `test_reruns.py` has those with one
    before = tree(copy)
    other = save_base(tmp_path / "other-llama", seed=1)
    refused = [
        ({"model_name_or_path": other}, f"base model {base}, and this run has {other}"),
        ({"num_members": 3}, "num_members 2, and this run has 3"),
        ({"lora_r": 4}, "lora_r 2, and this run has 4"),
        (
            {"lora_target_modules": ["q_proj"]},
            "lora_target_modules down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, "
            "and this run has q_proj",
        ),
    ]
    for given, part in refused:
        ended = renyi("sft", "--config", settings(output_dir=copy, **given))
        assert_refused(ended, f"output_dir: {copy}/checkpoint-6 holds an ensemble with", part, "another output_dir")
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    ended = renyi("sft", "--config", settings(output_dir=copy))
    assert_refused(ended, f"{copy} holds a trained ensemble and no checkpoint to go on from", "another output_dir")
    (tmp_path / "a-file").touch()
    assert_refused(renyi("sft", "--config", settings(output_dir=tmp_path / "a-file")), "a-file is a file")
    after = tree(copy)
    assert all(before[name] == content for name, content in after.items())


# ---- A spoiled ensemble ----------------------------------------------------------------------------------------------


def corrupt_manifest(folder: Path) -> None:
    (folder / "ensemble.json").write_text('{"base_model": "x", ', encoding="utf-8")


def mismatched_manifest(folder: Path) -> None:
    manifest = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
    (folder / "ensemble.json").write_text(json.dumps({**manifest, "weights": [1.0]}), encoding="utf-8")


def no_manifest(folder: Path) -> None:
    (folder / "ensemble.json").unlink()


def truncated_weights(folder: Path) -> None:
    file = folder / "member_1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def missing_member(folder: Path) -> None:
    shutil.rmtree(folder / "member_1")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (corrupt_manifest, ["ensemble.json: cannot be read", "Restore it"]),
        (mismatched_manifest, ["ensemble.json: cannot be read", "weights"]),
        (no_manifest, ["copy: there is no ensemble.json", "saving was interrupted"]),
        (truncated_weights, ["member_1/adapter_model.safetensors: is damaged or cut short", "Copy it again"]),
        (missing_member, ["ensemble.json: names member_1, but there is no such folder", "Copy the whole"]),
    ],
)
def test_spoiled_ensemble(
    spoil: Callable[[Path], None], parts: list[str], copy: Path, rows_file: Path, tmp_path: Path
) -> None:
    spoil(copy)
    before = tree(copy)
    assert_refused(renyi("info", copy), *parts)
    ended = renyi("score", copy, rows_file, "--output", tmp_path / "scores.jsonl")
    assert_refused(ended, *parts)
    assert ended.out == ""
    assert [f.name for f in tmp_path.iterdir()] == ["copy"]
    assert tree(copy) == before


def test_a_corrupt_manifest_stops_training_too(settings: Settings, copy: Path) -> None:
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    corrupt_manifest(copy)
    assert_refused(renyi("sft", "--config", settings(output_dir=copy)), "ensemble.json: cannot be read")


def test_score_without_ensemble_or_data(trained: tuple[Path, Ended], rows_file: Path, tmp_path: Path) -> None:
    assert_refused(renyi("score", tmp_path / "a" / "b", rows_file), "there is no such folder")
    assert_refused(renyi("score", trained[0], tmp_path / "rows.jsonl"), "rows.jsonl: there is no such file")
    assert_refused(renyi("score", trained[0]), "required: DATA", "renyi score --help")
    output = tmp_path / "nowhere" / "scores.jsonl"
    assert_refused(renyi("score", trained[0], rows_file, "--output", output), "--output: there is no folder")
    assert_refused(renyi("score", trained[0], rows_file, "--max_length", "x"), "--max_length: 'x' is not an integer")
    assert_refused(renyi("info", trained[0], "--jason"), "--jason: there is no such key", "nearest known one is json")


def test_score_names_the_bad_row(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    rows = contradicting_rows(5)
    rows[3]["completion"] = ""
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert_refused(renyi("score", trained[0], file), "rows.jsonl, row 4, column completion: is empty")


# ---- Training that goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number(settings: Settings, tmp_path: Path) -> None:
    ended = renyi("sft", "--config", settings(learning_rate=1e30, save_steps=4))
    assert_refused(ended, "step 2, batch of 4", "not a finite number", "Lower learning_rate")
    left = sorted(f.name for f in (tmp_path / "out").iterdir())
    assert left == ["metrics.jsonl", "run.json", "training.png"]  # of the one step that was sound
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").open()] == [1]


# ---- Text that the terminal must not obey ----------------------------------------------------------------------------


def test_names_of_files_are_text(settings: Settings, tmp_path: Path) -> None:
    """Brackets and `:smile:` in paths are no markup, and control characters are shown as escapes."""
    out_dir = tmp_path / "out[bold]x[/] :smile: \x1b[31m\u202e"
    data = write_rows(tmp_path / "set.jsonl", contradicting_rows(12))
    ended = renyi("sft", "--config", settings(dataset_name=data), "--output_dir", out_dir, "--max_steps", 1)
    assert (ended.code, ended.err) == (0, "")
    shown = "".join(ended.out.split())
    assert r"out[bold]x[/]:smile:\x1b[31m\u202e" in shown
    assert "set.jsonl" in shown
    assert not {"\x1b", "\u202e"} & set(ended.out)
    assert (out_dir / "ensemble.json").is_file()
    ended = renyi("sft", "--config", settings(dataset_name=tmp_path / "no[/]\x1b[2J.jsonl"))
    assert_refused(ended, r"no[/]\x1b[2J.jsonl: there is no such file")


def test_words_of_the_data_are_text(settings: Settings, tmp_path: Path) -> None:
    rows = [{"prompt": "w1 [red] \x1b[31m", "completion": " [/] w2 \x9b2J \u202e"}] * 12
    base = save_base(tmp_path / "base", additional_special_tokens=["[red]", "[/]", "\x1b[31m", "\x9b2J", "\u202e"])
    tiny_model(vocab_size=80).save_pretrained(base)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    ended = renyi("sft", "--config", settings(dataset_name=data, model_name_or_path=base), "--dry_run")
    assert "[red]" in ended.out + ended.err
    assert not {"\x1b", "\x9b", "\u202e"} & set(ended.out + ended.err)


# ---- A tokenizer with more tokens than the base has embeddings -------------------------------------------------------


@pytest.mark.parametrize("use", ["template", "eos_token", "pad_token", "row", "nothing"])
def test_a_token_without_an_embedding_is_refused_by_its_name(
    use: str, settings: Settings, rows_file: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>", "<end>"]})
    new = tokenizer.convert_tokens_to_ids("<end>")
    if use == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<end>")
    elif use.endswith("_token"):
        setattr(tokenizer, use, "<end>")
    tokenizer.save_pretrained(base)
    file = rows_file
    if use == "row":
        file = write_rows(
            tmp_path / "rows.jsonl", [*contradicting_rows(3), {"prompt": "w1", "completion": " w2 <end>"}]
        )
    ended = renyi("sft", "--config", settings(model_name_or_path=base, dataset_name=file), "--dry_run")
    if use == "nothing":
        assert ended.code == 0, ended
        return
    where = {"template": "tokenizer, the chat template's", "row": "row 4"}.get(use, f"tokenizer, {use}")
    assert_refused(ended, where, "'<end>'", str(new), f"{new} embeddings")
    assert not (tmp_path / "out").exists()
