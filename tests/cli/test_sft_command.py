"""`renyi sft` from the plan it prints to the files it leaves, and what it does when it is run again."""

import contextlib
import logging
import os
import random
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import (
    Ended,
    Settings,
    assert_refused,
    contradicting_rows,
    renyi,
    save_base,
    settings_of,
    steps_in,
    weights_in,
    write_rows,
)
from peft import PeftModel
from processes import kill_once_written, on_a_full_disk
from tiny import CHAT_TEMPLATE, tiny_model

from renyi import LoraEnsemble
from renyi.cli.console import quiet_libraries
from renyi.cli.main import COMMANDS, main
from renyi.training.checkpoints import is_complete

# ---- A run -----------------------------------------------------------------------------------------------------------


def test_it_says_what_it_understood(trained: tuple[Path, Ended], base: Path, rows_file: Path) -> None:
    folder, ended = trained
    assert (ended.code, ended.err) == (0, "")
    member = 2 * 2 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)  # r · layers · (q, o; k, v; gate, up, down)
    for part in [
        f"{base} · 17,568 parameters · float32 on cpu",
        "2 × LoRA rank 2, lora_alpha 32",
        f"{member:,} parameters a member, {2 * member:,} in all",
        "0 until step 1, then rising to 0.8 at step 2",
        f"{rows_file} · prompt-completion",
        "36 examples · 144 tokens, 108 of them trained",
        "12 examples · 48 tokens, 36 of them trained",
        "6, 4 rows each",
        str(folder),
    ]:
        assert part in " ".join(ended.out.replace("│", " ").split()), part


def test_it_shows_which_tokens_are_trained(trained: tuple[Path, Ended], settings: Settings, tmp_path: Path) -> None:
    assert "3 of 4 tokens are trained" in trained[1].out
    assert any("«w" in line and "<eos>»" in line for line in trained[1].out.splitlines())
    file = write_rows(tmp_path / "text.jsonl", [{"text": "w1 w2 w3"}] * 4)
    ended = renyi("sft", "--config", settings(dataset_name=file), "--dry_run")
    assert "3 of 4 tokens are trained" in ended.out  # nothing predicts the first
    assert "w1 «w2 w3 <eos>»" in ended.out
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}] * 2
    file = write_rows(tmp_path / "talk.jsonl", [{"messages": talk}] * 4)
    # A marked block must end with a token: transformers trains all that follows one that ends with a space.
    template = CHAT_TEMPLATE.replace("<eos> {% endgeneration %}", "<eos>{% endgeneration %} ")
    given = {"model_name_or_path": save_base(tmp_path / "base", template=template), "assistant_only_loss": True}
    ended = renyi("sft", "--config", settings(dataset_name=file, **given), "--dry_run")
    assert "<user> w1 <assistant> «w2 <eos>» <user> w1 <assistant> «w2 <eos>»" in ended.out


def test_a_line_for_every_log_without_a_terminal(trained: tuple[Path, Ended]) -> None:
    lines = [line for line in trained[1].out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "held out" not in line] == [f"{n}/6" for n in range(1, 7)]
    assert [line.split()[1] for line in lines if "held out" in line] == ["3/6", "6/6"]
    for name in ("loss", "nll_mixture", "jensen_gap", "effective_members", "alpha", "loads"):
        assert f"  {name} " in lines[0]


def test_a_line_for_the_first_step_says_how_long_the_rest_takes(settings: Settings) -> None:
    ended = renyi("sft", "--config", settings(logging_steps=3))
    lines = [line for line in ended.out.splitlines() if line.startswith("step ") and "held out" not in line]
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "6/6"]
    assert re.fullmatch(r"step 1/6 +0:00:\d\d left", lines[0])


def test_it_leaves_an_ensemble_of_ordinary_adapters(trained: tuple[Path, Ended], base: Path) -> None:
    folder, ended = trained
    assert {f.name for f in folder.iterdir()} >= {"ensemble.json", "member_0", "member_1", "README.md", "training.png"}
    ensemble = LoraEnsemble.load(folder)
    assert (ensemble.num_members, ensemble.alpha) == (2, 0.8)
    plain = PeftModel.from_pretrained(tiny_model(), str(folder / "member_1"))
    key = "model.layers.0.mlp.up_proj"
    expected = plain.base_model.model.get_submodule(key).lora_B["default"].weight
    assert ensemble.adapter(1)[key][1].equal(expected)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for part in ("What each member learned", f"Saved in {folder}", f"renyi info {folder}", f"renyi score {folder}"):
        assert part in ended.out


def test_metrics_hold_every_step_once(trained: tuple[Path, Ended]) -> None:
    assert steps_in(trained[0]) == [1, 2, 3, 4, 5, 6]
    assert steps_in(trained[0], "eval_nll_mixture") == [3, 6]
    assert steps_in(trained[0], "train_runtime") == [6]


def test_what_members_learned_sums_up_the_held_out_examples(trained: tuple[Path, Ended]) -> None:
    lines = trained[1].out.partition("What each member learned")[2].splitlines()
    assert "from 12 held-out examples" in lines[1]
    rows = [line.split() for line in lines[3:5]]
    assert [row[0] for row in rows] == ["0", "1"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(1)
    assert sum(float(row[2].rstrip("%")) for row in rows) == pytest.approx(100, abs=0.2)
    assert sum(int(row[3]) for row in rows) == 12


def test_a_terminal_sees_colours_and_a_bar(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ended = renyi("sft", "--config", settings())
    assert ended.code == 0
    assert "in green" in ended.out
    assert "\x1b[32m" in ended.out
    assert "«" not in ended.out
    assert "\nstep " not in ended.out
    for part in ("training", "6/6", "effective_members", "loads"):
        assert part in ended.err
    assert "trained 6 steps in 0:00:0" in ended.out


def test_a_dry_run_writes_nothing(settings: Settings, tmp_path: Path) -> None:
    config = settings(output_dir=tmp_path / "runs" / "deep" / "out")
    before = sorted(tmp_path.rglob("*"))
    ended = renyi("sft", "--config", config, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert "48 examples" in ended.out
    assert "nothing was written" in ended.out
    assert "\nstep " not in ended.out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flag_overrides_the_file(settings: Settings) -> None:
    flags = ["--num_members", "3", "--lora_target_modules", "q_proj", "v_proj", "--alpha", "0", "--dry_run"]
    out = renyi("sft", "--config", settings(num_members=2, max_length=None), *flags).out
    assert "3 × LoRA rank 2, lora_alpha 32, on q_proj, v_proj" in out
    assert "0: every member fits everything" in out


def test_defaults_run_on_a_machine_without_bf16(settings: Settings) -> None:
    ended = renyi("sft", "--config", settings(bf16=..., use_cpu=..., gradient_checkpointing=...))
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("half", [False, True])
def test_the_plan_says_where_attention_is_by_matrix_products(settings: Settings, half: bool) -> None:
    ended = renyi("sft", "--config", settings(bf16=half, use_cpu=True), "--dry_run")
    assert ended.code == 0, ended.err
    assert ("attention by matrix products in rows of up to 128 tokens" in " ".join(ended.out.split())) is half


def test_one_target_by_name(settings: Settings) -> None:
    out = renyi("sft", "--config", settings(lora_target_modules="down_proj"), "--dry_run").out
    assert "lora_alpha 32, on down_proj" in out


def test_an_ensemble_is_trained_further(trained: tuple[Path, Ended], base: Path, settings: Settings) -> None:
    config = settings(model_name_or_path=trained[0], num_members=..., lora_r=...)
    ended = renyi("sft", "--config", config, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    out = " ".join(ended.out.replace("│", " ").split())
    assert f"base {base} · " in out
    assert "members 2 × LoRA rank 2, lora_alpha 32, on " in out
    assert f"going on from {trained[0]} trainable" in out
    ended = renyi("sft", "--config", config, "--num_members", "4")  # the default, but it was given
    assert_refused(ended, "num_members: 4 was given, and the ensemble to start from has 2")


def test_packing_counts_examples_not_rows(settings: Settings) -> None:
    ended = renyi("sft", "--config", settings(packing=True, max_length=16), "--dry_run")
    assert ended.code == 0, ended.err
    assert "48 examples packed in 12 rows · 192 tokens, 144 of them trained" in ended.out


def test_a_test_split_of_its_own(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "schools").mkdir()
    write_rows(tmp_path / "schools" / "train.jsonl", contradicting_rows(24))
    write_rows(tmp_path / "schools" / "test.jsonl", contradicting_rows(8, seed=1))
    config = settings(dataset_name=tmp_path / "schools", eval_strategy="steps", eval_steps=3)
    ended = renyi("sft", "--config", config, "--dry_run")
    assert ended.code == 0, ended.err
    assert "24 examples" in ended.out
    assert "8 examples · 32 tokens" in ended.out
    ended = renyi("sft", "--config", config, "--test_split_size", "0.5")
    assert ended.code == 2
    assert "has a split 'test' already" in ended.err


def test_the_end_says_whether_members_split_their_memory(settings: Settings, tmp_path: Path) -> None:
    """Rows with nothing to learn but the rows themselves, each seen twenty times; half of them are held out."""
    draw = random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(59)}" for _ in range(12))} for _ in range(64)]
    length = {"max_steps": 80, "logging_steps": 8, "save_strategy": "no", "per_device_train_batch_size": 8, "lora_r": 4}
    evaluated = {"test_split_size": 0.5, "eval_strategy": "steps", "eval_steps": 40}
    file = write_rows(tmp_path / "noise.jsonl", rows)
    ended = renyi("sft", "--config", settings(dataset_name=file, **length, **evaluated))
    assert ended.code == 0
    assert ended.err.count("members part on rows that they were trained on") == 1  # the warning
    assert ended.err.startswith("warning: After step")
    assert "members part on rows that they were trained on" in " ".join(ended.out.split())  # the end


def test_our_warnings_are_shown_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_libraries():
        logging.getLogger("renyi.training.trainer").warning("Member %d starves.", 1)
        logging.getLogger("transformers.trainer").warning("noise")
        logging.getLogger("trl").warning("noise")
        warnings.warn("noise", FutureWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: Member 1 starves.\n"


# ---- The same command again ------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(settings: Settings, tmp_path: Path) -> None:
    config = settings()
    assert renyi("sft", "--config", config).code == 0
    before = weights_in(tmp_path / "out")
    metrics = (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8")
    ended = renyi("sft", "--config", config)
    assert (ended.code, ended.err) == (0, "")
    assert "already finished: checkpoint-6 is the last" in ended.out
    assert "What each member learned" in ended.out
    assert all(weights_in(tmp_path / "out")[name].equal(tensor) for name, tensor in before.items())
    assert (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8") == metrics


def test_a_run_that_stopped_early_is_finished(settings: Settings) -> None:
    given = {"load_best_model_at_end": True, "metric_for_best_model": "eval_nll_mixture", "early_stopping_patience": 1}
    given |= {"eval_strategy": "steps", "eval_steps": 2, "test_split_size": 0.25, "learning_rate": 5.0}
    config = settings(max_steps=40, **given)
    ended = renyi("sft", "--config", config)
    assert ended.code == 0, ended.err
    assert ", at step " in ended.out.partition("stopped early")[2]
    assert "the best by eval_nll_mixture" in ended.out
    again = renyi("sft", "--config", config).out
    assert "already finished" in again
    assert again.partition("stopped early")[2] == ended.out.partition("stopped early")[2]


def test_a_killed_run_goes_on_from_its_newest_complete_checkpoint(
    settings: Settings, base: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = settings(max_steps=60, save_steps=10, logging_steps=5)
    assert renyi("sft", "--config", config, "--output_dir", tmp_path / "whole").code == 0
    kill_once_written(tmp_path / "out" / "checkpoint-20" / "complete.json", "sft", "--config", config)
    killed_at = max(int(f.parent.name.split("-")[1]) for f in (tmp_path / "out").glob("checkpoint-*/complete.json"))
    assert killed_at < 60
    half_written = tmp_path / "out" / f"checkpoint-{killed_at + 10}"
    half_written.mkdir(exist_ok=True)

    ended = renyi("sft", "--config", config)
    assert (ended.code, ended.err) == (0, "")
    assert f"resuming from checkpoint-{killed_at} of 60; ignoring half-written {half_written.name}" in ended.out
    assert steps_in(tmp_path / "out") == list(range(5, 61, 5))
    whole, resumed = weights_in(tmp_path / "whole"), weights_in(tmp_path / "out")
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)


def test_a_full_disk_leaves_the_checkpoint_before(settings: Settings, tmp_path: Path) -> None:
    config = settings(lora_r=16, max_steps=4)
    assert renyi("sft", "--config", config).code == 0
    sizes = {f.name: f.stat().st_size for f in (tmp_path / "out" / "checkpoint-4").rglob("*") if f.is_file()}
    limit = (sizes["adapter_model.safetensors"] + sizes["optimizer.pt"]) // 2
    before = weights_in(tmp_path / "out" / "checkpoint-4")

    code, said = on_a_full_disk(limit, "sft", "--config", config, "--max_steps", "8")
    assert code == 2, said
    for part in ("error: ", "checkpoint-6: the checkpoint could not be written", "checkpoint-4 is untouched", "Free"):
        assert part in said
    assert "Traceback" not in said
    assert sorted(f.name for f in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert all(weights_in(tmp_path / "out" / "checkpoint-4")[name].equal(before[name]) for name in before)

    ended = renyi("sft", "--config", config, "--max_steps", "8")
    assert ended.code == 0, ended.err
    assert "resuming from checkpoint-4 of 8" in ended.out
    assert steps_in(tmp_path / "out") == list(range(1, 9))


def test_a_run_shorter_than_a_log_still_draws_its_curves(settings: Settings, tmp_path: Path) -> None:
    ended = renyi("sft", "--config", settings(max_steps=2, logging_steps=10))
    assert (ended.code, ended.err) == (0, "")
    assert steps_in(tmp_path / "out", "train_loss") == [2]
    assert (tmp_path / "out" / "training.png").exists()


@pytest.mark.slow  # a launcher and two fresh processes; tests/invariant has the same truth of forked ones
def test_two_processes_equal_one(settings: Settings, tmp_path: Path) -> None:
    config = str(settings(max_steps=4, save_steps=2, per_device_train_batch_size=4, lora_dropout=0.0, use_cpu=True))
    assert renyi("sft", "--config", config, "--output_dir", str(tmp_path / "one")).code == 0
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "renyi"]
    command = [sys.executable, *launch, "sft", "--config", config, "--per_device_train_batch_size", "2"]
    command += ["--output_dir", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("What each member learned") == 1  # one process speaks for both
    one, two = weights_in(tmp_path / "one"), weights_in(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).norm() <= 1e-4 * one[name].norm(), name
    assert all(is_complete(tmp_path / "two" / f"checkpoint-{step}") for step in (2, 4))


def test_an_interrupted_run_says_what_comes_next(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from renyi.training import RenyiSFTTrainer

    loss_of = RenyiSFTTrainer.compute_loss

    def interrupted(self: RenyiSFTTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return loss_of(self, *args, **kwargs)

    config = settings()
    with monkeypatch.context() as patch:
        patch.setattr(RenyiSFTTrainer, "compute_loss", interrupted)
        ended = renyi("sft", "--config", config)
    assert ended.code == 130
    assert ended.err.strip() == "interrupted: the same command goes on from checkpoint-2"
    assert (tmp_path / "out" / "training.png").exists()
    assert "resuming from checkpoint-2 of 6" in renyi("sft", "--config", config).out


# ---- The command itself ----------------------------------------------------------------------------------------------


def test_help_and_version_need_no_library() -> None:
    code = "import sys; from renyi.cli.main import main; main([sys.argv[1]]); print('torch' in sys.modules)"
    for flag, part in (("--help", "renyi sft"), ("--version", "renyi 0.")):
        ended = subprocess.run([sys.executable, "-c", code, flag], capture_output=True, text=True, check=True)
        assert part in ended.stdout
        assert ended.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("name", "given", "then"),
    [
        ("OMP_WAIT_POLICY", None, "passive"),
        ("OMP_WAIT_POLICY", "active", "active"),
        ("THP_MEM_ALLOC_ENABLE", None, "1"),
        ("THP_MEM_ALLOC_ENABLE", "0", "0"),
    ],
)
def test_what_torch_reads_once_is_set_before_a_command_is_imported(
    name: str, given: str | None, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of a run wait without spinning, and large tensors begin at a page. What the user has set stays."""
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    seen = []
    command = SimpleNamespace(run=lambda rest: 0)
    monkeypatch.setattr("renyi.cli.main.import_module", lambda module: (seen.append(os.environ[name]), command)[1])
    assert main(["info"]) == 0
    assert seen == [then]


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch reads the variable on Linux only")
def test_large_tensors_of_a_command_begin_at_a_page() -> None:
    """PyTorch still reads the variable: gaps between tensors cost gigabytes."""
    code = (
        "import sys, types; from renyi.cli import main as cli\n"
        "def run(rest):\n"
        "    import torch; print([torch.empty(1_000_000 + 1000 * n).data_ptr() % 4096 for n in range(8)]); return 0\n"
        "cli.import_module = lambda name: types.SimpleNamespace(run=run)\n"
        "sys.exit(cli.main(['info']))"
    )
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ended.stdout.splitlines()[-1] == str([0] * 8)


def test_the_installed_command(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("renyi")), "sft", "--config", "no.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"error: no.yaml: there is no such file\nLooked in {tmp_path}.\n"


def test_every_command_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with contextlib.suppress(SystemExit):  # argparse leaves after its help page
            main([command, "--help"])
        assert f"renyi {command}" in capsys.readouterr().out


def test_env_of_the_file_reaches_the_process(base: Path, rows_file: Path, tmp_path: Path) -> None:
    values = {**settings_of(base, rows_file), "output_dir": str(tmp_path / "out"), "env": {"RENYI_SEEN": "yes"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    assert "RENYI_SEEN" not in os.environ
    assert main(["sft", "--config", str(tmp_path / "config.yaml"), "--dry_run"]) == 0
    assert os.environ.pop("RENYI_SEEN") == "yes"
