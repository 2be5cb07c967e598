"""`renyi export`: what it writes is what PEFT and transformers load, whole or not at all."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import Ended, assert_refused, renyi
from peft import PeftModel
from tiny import lora, padded_batch, tiny_ensemble, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from renyi import LoraEnsemble
from renyi.errors import SaveError
from renyi.runs.export import export_adapters, export_merged


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    ids, mask = padded_batch()
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[mask.bool()]


def ensemble_log_probs(folder: Path) -> torch.Tensor:
    ids, mask = padded_batch()
    with torch.no_grad():
        return LoraEnsemble.load(folder).eval().logits(ids, mask).log_softmax(-1)[:, mask.bool()]


def test_adapters_are_what_peft_loads(trained: tuple[Path, Ended], base: Path, tmp_path: Path) -> None:
    ended = renyi("export", trained[0], "--format", "adapters", "--output", tmp_path / "new" / "out")
    assert ended.code == 0, ended.err
    assert ended.out == ""
    assert "2 members in" in ended.err
    out = tmp_path / "new" / "out"
    expected = ensemble_log_probs(trained[0])
    for m in range(2):
        loaded = AutoModelForCausalLM.from_pretrained(base)
        model = PeftModel.from_pretrained(loaded, str(out / f"member_{m}")).eval()
        torch.testing.assert_close(log_probs(model), expected[m], rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tiny_tokenizer().get_vocab()
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["out"]
    facts = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert (facts["format"], facts["weights"], facts["base_model"]) == ("adapters", [0.5, 0.5], str(base))


def test_merged_members_are_plain_models(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = renyi("export", trained[0], "--format", "merged", "--output", out, "--member", "1", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["members"] == [str(out / "member_1")]
    assert json.loads(ended.out)["weights"] == [1.0]
    assert not (out / "member_0").exists()
    model = AutoModelForCausalLM.from_pretrained(out / "member_1").eval()
    assert not any("lora" in name for name in model.state_dict())
    expected = ensemble_log_probs(trained[0])
    torch.testing.assert_close(log_probs(model), expected[1], rtol=0, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    tokenizer = AutoTokenizer.from_pretrained(out / "member_1")
    assert (tokenizer.chat_template, tokenizer.pad_token) == (tiny_tokenizer().chat_template, "<pad>")


def test_the_command_line_for_vllm(trained: tuple[Path, Ended], base: Path, tmp_path: Path) -> None:
    """Of the ensemble's own folder, printed alone on stdout; rank 2 fits into vLLM's 8."""
    ended = renyi("export", trained[0], "--format", "vllm")
    members = [f"member_{m}={trained[0]}/member_{m}" for m in range(2)]
    layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]  # and no lm_head
    flags = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-target-modules", *layers]
    flags += ["--lora-modules", *members]
    assert shlex.split(ended.out) == ["vllm", "serve", str(base), "--tokenizer", str(trained[0]), *flags]
    assert ended.out.count("\n") == 1
    mixed = shlex.split(renyi("export", trained[0], "--format", "vllm", "--mixture").out)
    plugin = ["--logits-processors", "renyi.vllm.processor:MixtureProcessor", "--no-async-scheduling"]
    plugin += ["--scheduler-cls", "renyi.vllm.scheduler.WholeGroups", "--no-enable-chunked-prefill"]
    assert sorted(mixed) == sorted([*shlex.split(ended.out), *plugin])
    assert mixed[-2:] == members
    one = renyi("export", trained[0], "--format", "vllm", "--member", "1", "--base", "org/model").out
    assert shlex.split(one)[2] == "org/model"
    assert shlex.split(one)[-2:] == ["--lora-modules", members[1]]


def test_a_folder_for_vllm_serves_from_wherever_it_is(
    trained: tuple[Path, Ended], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serve.sh` runs with a vllm that prints what it is given, in the folder that it would read."""
    out = tmp_path / "out with a space"
    ended = renyi("export", trained[0], "--format", "vllm", "--output", out, "--pad_rank")
    assert ended.code == 0, ended.err
    assert shlex.split(ended.out)[-2:] == [f"member_{m}={out}/member_{m}" for m in range(2)]
    assert json.loads((out / "member_0" / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 8
    moved = out.rename(tmp_path / "moved")
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\npwd\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    said = subprocess.run([moved / "serve.sh"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:3] == [str(moved), "serve", str(base)]
    assert said[-2:] == ["member_0=./member_0", "member_1=./member_1"]
    more = subprocess.run([moved / "serve.sh", "--port", "9"], capture_output=True, text=True, check=True)
    assert more.stdout.splitlines() == [*said, "--port", "9"]


def test_several_scalings_are_refused_for_vllm_unless_padded(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ensemble"
    tiny_ensemble(2, rank_pattern={"q_proj": 2}).save(folder)
    assert_refused(renyi("export", folder, "--format", "vllm", "--base", base), "rank_pattern", "--pad_rank")
    ended = renyi("export", folder, "--format", "adapters", "--output", tmp_path / "peft", "--base", base)
    assert ended.code == 0
    assert "vLLM cannot serve these" in ended.err
    assert not (tmp_path / "peft" / "serve.sh").exists()
    ended = renyi("export", folder, "--format", "vllm", "--output", tmp_path / "vllm", "--base", base, "--pad_rank")
    assert ended.code == 0, ended.err
    config = json.loads((tmp_path / "vllm" / "member_0" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (8, 32, {})


def test_only_an_earlier_export_is_replaced(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export = ["export", trained[0], "--format", "adapters", "--output", out]
    assert renyi(*export).code == 0  # an empty folder is free
    assert renyi(*export, "--member", "1").code == 0
    assert sorted(f.name for f in out.glob("member_*")) == ["member_1"]
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    assert_refused(renyi(*export), str(out), "not replaced")
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert_refused(renyi("export", trained[0], "--format", "merged", "--output", trained[0]), "not replaced")
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert_refused(renyi("export", trained[0], "--format", "adapters", "--output", file), "not replaced")


def test_what_fails_leaves_everything_as_it_was(
    trained: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export_adapters(trained[0], out, [0])

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("renyi.runs.export.write_adapter", full)
        with pytest.raises(SaveError, match="No space left"):
            export_adapters(trained[0], out)
    with monkeypatch.context() as patched:
        patched.setattr("renyi.runs.export.write_adapter", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export_adapters(trained[0], out)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert [f.name for f in out.glob("member_*")] == ["member_0"]


def test_flags_that_do_not_fit(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    export = ["export", trained[0]]
    out = ["--output", tmp_path / "out"]
    assert_refused(renyi(*export), "--format")
    assert_refused(renyi(*export, "--format", "gguf"), "gguf", "adapters, merged, vllm")
    assert_refused(renyi(*export, "--format", "merged"), "--output")
    assert_refused(renyi(*export, "--format", "merged", "--pad_rank", *out), "--pad_rank", "no rank")
    assert_refused(renyi(*export, "--format", "vllm", "--pad_rank"), "--pad_rank", "--output")
    assert_refused(renyi(*export, "--format", "adapters", "--output", tmp_path / "a", "--mixture"), "--format vllm")
    assert_refused(renyi(*export, "--format", "vllm", "--member", "2"), "no member 2", "0 to 1")
    assert_refused(renyi(*export, "--format", "vllm", "--member", "0", "0"), "twice")
    assert_refused(renyi(*export, "--format", "vllm", "--member", "-1"), "--member")
    assert_refused(renyi(*export, "--format", "vllm", "--member", "one"), "'one'")
    assert_refused(renyi(*export, "--format", "merged", "--base", tmp_path / "gone", *out), str(tmp_path / "gone"))
    assert_refused(renyi("export", tmp_path, "--format", "vllm"), "ensemble.json")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_an_export_that_was_killed_are_in_nobodys_way(trained: tuple[Path, Ended], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for leftover in (".out.old", ".out.partial", ".out.old-x", ".out.partial-x"):
        (tmp_path / leftover / "member_0").mkdir(parents=True)
    for _ in range(2):
        assert len(export_adapters(trained[0], out).members) == 2
    assert sorted(f.name for f in out.iterdir() if f.is_dir()) == ["member_0", "member_1"]


def test_a_base_that_looks_like_an_option_never_reaches_a_command_line(trained: tuple[Path, Ended]) -> None:
    for how in (["--base=--trust-remote-code"], ["--base=-x"]):
        assert_refused(renyi("export", trained[0], "--format", "vllm", *how), "--base", "option")


def test_a_merged_member_ends_where_its_base_or_its_tokenizer_ends(base: Path, tmp_path: Path) -> None:
    """The tokenizer of a chat model closes turns with another token than its base does texts."""
    ensemble = LoraEnsemble.from_base(str(base), 1, lora())
    ensemble.save(tmp_path / "ensemble")
    turns = AutoTokenizer.from_pretrained(base)
    of_base, of_turn = turns.eos_token_id, turns.convert_tokens_to_ids("<assistant>")
    turns.eos_token = "<assistant>"
    turns.save_pretrained(tmp_path / "ensemble")
    export_merged(tmp_path / "ensemble", tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out" / "member_0")
    assert kept.eos_token_id == [of_base, of_turn]


def test_a_merged_member_ends_at_the_ends_of_base_tokenizer_and_turn(tmp_path: Path) -> None:
    tiny_model(eos_token_id=20).save_pretrained(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<user>")
    tokenizer.save_pretrained(tmp_path / "base")
    LoraEnsemble.from_base(str(tmp_path / "base"), 1, lora()).save(tmp_path / "ensemble")
    export_merged(tmp_path / "ensemble", tmp_path / "out")
    kept = GenerationConfig.from_pretrained(tmp_path / "out" / "member_0")
    assert kept.eos_token_id == [20, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<user>")]
