"""`renyi powerflow` from the plan it prints to the files it leaves, run again, from an ensemble, and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, Settings, assert_refused, flags_of, flat, renyi, save_base, steps_in, weights_in, write_rows
from peft import PeftModel
from processes import kill_once_written
from tiny import tiny_ensemble, tiny_model, tiny_tokenizer
from torch import Tensor

from renyi import LoraEnsemble, PowerFlowConfig, data
from renyi.ensemble import BaseScore
from renyi.inference.policies import summarise_policies
from renyi.training.target import target_in_words
from renyi.zoo.base import base_path

PROMPTS = [{"prompt": f"w{i} w{i + 20}"} for i in range(12)]
QUICK = {
    "num_members": ...,
    "lora_dropout": ...,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "max_completion_length": 6,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "prompts.jsonl", PROMPTS)


@pytest.fixture
def quick(settings: Settings, prompts_file: Path) -> Settings:
    """Writes a config file of six quick steps of one policy."""
    return lambda **given: settings(**{"dataset_name": prompts_file, **QUICK, **given})


@pytest.fixture(scope="module")
def tuned(base: Path, prompts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """The folder of a policy that was tuned to the end on nine of the prompts, and what the command said."""
    folder = tmp_path_factory.mktemp("runs") / "tuned"
    values = {"model_name_or_path": base, "dataset_name": prompts_file, "output_dir": folder, "test_split_size": 0.25}
    values |= {"lora_r": 2, "max_steps": 6, "save_steps": 2, "logging_steps": 1, "eval_strategy": "steps"}
    values |= {"eval_steps": 3, "per_device_eval_batch_size": 4, "bf16": False, "gradient_checkpointing": False}
    return folder, renyi("powerflow", *flags_of({**values, "use_cpu": True, **QUICK}))


def powerflow(config: Path, *flags: object) -> Ended:
    return renyi("powerflow", "--config", config, *flags)


def in_plan(config: Path, *flags: object) -> str:
    ended = powerflow(config, *flags, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    return flat(ended.out)


# ---- A run -----------------------------------------------------------------------------------------------------------


def test_it_says_what_it_understood(tuned: tuple[Path, Ended], base: Path, prompts_file: Path) -> None:
    folder, ended = tuned
    assert (ended.code, ended.err) == (0, "")
    for part in [
        f"{base} · 17,568 parameters · float32 on cpu",
        "policies 1 × LoRA rank 2, lora_alpha 32",
        "parameters a policy",
        "target p^4 of the base, tilted in length: log π = 4·log p − λ·tokens",
        "partition log Z' of a prompt is the mean over its 4 rollouts",
        "rollouts 2 prompts × 4 a step, each of at most 6 tokens, by transformers",
        f"{prompts_file} · prompts, plain text",
        "train 9 prompts · 18 tokens, the longest has 2",
        "held out 3 prompts · 6 tokens, the longest has 2",
        "6, 8 rollouts each",
        str(folder),
    ]:
        assert part in flat(ended.out), part
    assert "alpha 0" not in flat(ended.out).partition("target")[0]  # one policy couples with nobody
    assert "member" not in ended.out.partition("Saved in")[0]


def test_a_line_for_every_log_without_a_terminal(tuned: tuple[Path, Ended]) -> None:
    lines = [line for line in tuned[1].out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines if "held out" not in line] == [f"{n}/6" for n in range(1, 7)]
    assert [line.split()[1] for line in lines if "held out" in line] == ["3/6", "6/6"]
    for name in ("loss", "log_partition", "logps/base", "logps/policy", "completions/mean_length"):
        assert all(f"  {name} " in line for line in lines)
    assert "loads" not in lines[0]  # of one policy that is no news
    assert steps_in(tuned[0]) == [1, 2, 3, 4, 5, 6]
    assert steps_in(tuned[0], "eval_log_partition") == [3, 6]


def test_it_leaves_an_ordinary_adapter(tuned: tuple[Path, Ended]) -> None:
    folder, ended = tuned
    ensemble = LoraEnsemble.load(folder)
    assert (ensemble.num_members, ensemble.alpha, ensemble.peft_config.lora_dropout) == (1, 0.0, 0.0)
    plain = PeftModel.from_pretrained(tiny_model(), str(folder / "member_0"))
    key = "model.layers.0.mlp.up_proj"
    expected = plain.base_model.model.get_submodule(key).lora_B["default"].weight
    assert expected.any()
    assert ensemble.adapter(0)[key][1].equal(expected)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    for part in (f"Saved in {folder}", f"renyi generate {folder}", "--temperature 1", f"renyi info {folder}"):
        assert part in ended.out


def test_the_model_card_says_what_it_is(tuned: tuple[Path, Ended]) -> None:
    card = (tuned[0] / "README.md").read_text("utf-8")
    last = [json.loads(line) for line in (tuned[0] / "metrics.jsonl").open(encoding="utf-8")]
    trained = next(row for row in reversed(last) if "logps/base" in row)
    held_out = next(row for row in reversed(last) if "eval_logps/base" in row)
    for part in (
        "A LoRA adapter on ",
        "arxiv.org/abs/2603.18363",
        "p^4 of the base, tilted in length",
        "| power | 4 |",
        "| reference | the base |",
        f"nats a token | {trained['logps/base']:.4f} | {held_out['eval_logps/base']:.4f} |",
        f"| log Z', nats a token | {trained['log_partition']:.4f} | {held_out['eval_log_partition']:.4f} |",
    ):
        assert part in card, part
    for wrong in ("Jensen", "routed", "alpha |", "α-Rényi"):
        assert wrong not in card, wrong


def test_what_the_policy_learned_is_counted_again_from_the_files(tuned: tuple[Path, Ended], prompts_file: Path) -> None:
    folder, ended = tuned
    ensemble = LoraEnsemble.load(folder)
    held_out = data.load_splits(str(prompts_file))["train"].train_test_split(test_size=3, seed=42)["test"]
    prompts = [tiny_tokenizer()(text)["input_ids"] for text in held_out["prompt"]]
    found = summarise_policies(ensemble, prompts, tiny_tokenizer(), BaseScore(ensemble), max_new_tokens=6, seed=42)
    table = ended.out.partition("What the policy learned")[2]
    assert "8 fresh rollouts of each of 3 held-out prompts" in table
    assert "4 at the target" in table
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.startswith(("base", "policy"))}
    for name, policy in zip(("base", "policy"), found, strict=True):
        figures = (f"{policy.log_base:.3f}", f"{policy.log_policy:.3f}", f"{policy.slope:.2f}")
        assert rows[name] == [*figures, f"{policy.mean_length:.1f}", f"{policy.truncated:.0%}"]
    shown = [line.strip() for line in table.splitlines() if line.startswith(("  base", "  policy"))]
    assert shown == [
        f"{name:6}  {p.first[i]}".strip() for i in range(3) for name, p in zip(("base", "policy"), found, strict=True)
    ]


def test_what_reads_an_ensemble_reads_a_policy(tuned: tuple[Path, Ended], tmp_path: Path) -> None:
    folder = tuned[0]
    ended = renyi("info", folder)
    assert (ended.code, ended.err) == (0, "")
    assert "1 × LoRA rank 2" in ended.out
    assert "alpha" not in ended.out.replace("lora_alpha", "")
    assert "other members" not in ended.out
    ended = renyi("generate", folder, "w1 w2", "--plain", "--temperature", 1, "--seed", 0, "--max_new_tokens", 4)
    assert (ended.code, ended.err) == (0, "")
    ended = renyi("export", folder, "--format", "merged", "--output", tmp_path / "merged")
    assert ended.code == 0, ended.err
    assert (tmp_path / "merged" / "member_0" / "model.safetensors").is_file()


# ---- What a policy writes --------------------------------------------------------------------------------------------


def test_a_fresh_policy_writes_what_the_base_does() -> None:
    ensemble, prompts = tiny_ensemble(2, scattered=False), [[5, 6], [7, 8, 9], [10]]
    base, *policies = summarise_policies(ensemble, prompts, tiny_tokenizer(), BaseScore(ensemble), max_new_tokens=6)
    assert base.log_policy == pytest.approx(base.log_base, abs=1e-5)
    assert base.slope == pytest.approx(1, abs=1e-4)
    assert len(base.first) == 3
    assert [p.first for p in policies] == [base.first] * 2
    for policy in policies:
        assert policy[:5] == pytest.approx(base[:5], abs=1e-4)


def test_the_slope_is_the_power_whatever_each_prompt_pays_for_length() -> None:
    """A base of which the policies are exactly the length-aware power, with another λ for every prompt."""
    ensemble, power = tiny_ensemble(2), 4.0
    prompts = [[5, 6], [7, 8, 9], [10]]
    tilt = {5: 1.5, 7: -0.3, 10: 0.0}

    def base_score(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        tokens = (labels != -100).sum(dim=1)
        owed = torch.tensor([tilt[int(ids[0])] for ids in input_ids]) * tokens
        return (ensemble.log_likelihood(input_ids, attention_mask, labels) + owed) / power

    _, *policies = summarise_policies(ensemble, prompts, tiny_tokenizer(), base_score, max_new_tokens=6)
    assert [policy.slope for policy in policies] == pytest.approx([power, power], rel=1e-4)


def test_cut_rollouts_are_counted() -> None:
    ensemble = tiny_ensemble(1)
    (base, policy) = summarise_policies(ensemble, [[5]], tiny_tokenizer(), BaseScore(ensemble), max_new_tokens=1)
    assert (base.mean_length, policy.mean_length) == (1, 1)
    longer = summarise_policies(ensemble, [[5]], tiny_tokenizer(), BaseScore(ensemble), max_new_tokens=60)
    assert longer[1].truncated < policy.truncated


# ---- The plan --------------------------------------------------------------------------------------------------------


def test_steps_that_use_rollouts_again_say_nothing_of_lengths(quick: Settings, tmp_path: Path) -> None:
    ended = powerflow(quick(num_iterations=3))
    assert (ended.code, ended.err) == (0, "")
    assert steps_in(tmp_path / "out", "completions/mean_length") == [1, 4]
    assert steps_in(tmp_path / "out", "log_partition") == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "out" / "training.png").exists()


def test_a_dry_run_writes_nothing_and_shows_a_prompt(quick: Settings, tmp_path: Path) -> None:
    config = quick(output_dir=tmp_path / "runs" / "deep" / "out")
    before = sorted(tmp_path.rglob("*"))
    ended = powerflow(config, "--dry_run")
    assert (ended.code, ended.err) == (0, "")
    assert "│ w0 w20 «…»" in ended.out
    assert "first prompt · 2 tokens" in ended.out
    assert "nothing was written" in ended.out
    assert sorted(tmp_path.rglob("*")) == before


def test_conversations_open_an_answer(quick: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "where is mira from ?"}]}] * 4)
    given = {"model_name_or_path": base_path(), "dataset_name": file}
    out = in_plan(quick(**given))
    assert "prompts, conversational" in out
    assert "<user> where is mira from ? <assistant> «…»" in out
    ended = powerflow(quick(**given, max_steps=2))
    assert (ended.code, ended.err) == (0, "")
    assert "from lisbon ." in ended.out.partition("What the policy learned")[2]


def test_a_terminal_sees_colours_and_a_bar(quick: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    ended = powerflow(quick(max_steps=2))
    assert ended.code == 0
    assert "\x1b[32m…" in ended.out
    assert "«" not in ended.out
    for part in ("training", "2/2", "log_partition", "logps/base"):
        assert part in ended.err
    assert "trained 2 steps in 0:00:0" in ended.out


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"power": 0.5}, "p^0.5 of the base, tilted in length: log π = 0.5·log p − λ·tokens"),
        ({"power": 1}, "target the base itself"),
        ({"power": 0}, "target power 0: every next token alike"),
        ({"balance": "trajectory"}, "p^4 of the base, made to sum to one"),
        ({"balance": "token_mean"}, "for comparison: it favours what is long"),
        ({"partition": "learned"}, "log Z' of a prompt from a linear head, learning rate 0.01"),
        ({"format_penalty": r"w\d+$"}, r"ψ, nats −1 a token without a match of w\d+$"),
        ({"format_penalty": "math:dist"}, "ψ, nats of math:dist"),
        ({"length_penalty": 0.5}, "ψ, nats −0.5 a token if cut at the longest length"),
        ({"num_iterations": 2}, "2 prompts × 4 for every 2 steps"),
        ({"steps_per_generation": 2}, "4 prompts × 4 for every 2 steps"),
        ({"gradient_accumulation_steps": 2}, "4 prompts × 4 a step"),
        ({"num_members": 2}, "alpha 0: every policy fits everything"),
        ({"num_members": 2, "alpha": 0.5}, "0 until step 1, then rising to 0.5 at step 2"),
        ({"alpha": 0.5}, "alpha without effect: there is one policy"),
    ],
)
def test_the_plan_says_it_in_words(given: dict[str, Any], part: str, quick: Settings) -> None:
    assert part in in_plan(quick(**given))


def test_a_flag_overrides_the_file_and_the_file_the_default(quick: Settings) -> None:
    assert "p^4 of the base" in in_plan(quick())
    assert "p^2 of the base" in in_plan(quick(power=2))
    assert "p^0.25 of the base" in in_plan(quick(power=2), "--power", 0.25)


def test_the_help_page_is_about_policies() -> None:
    ended = renyi("powerflow", "--help")
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines() if line.startswith("  ") and line.strip()]
    shown = {words[0]: words[1:] for words in lines}
    defaults = {"power": "4.0", "num_members": "1", "alpha": "0.0", "lora_dropout": "0.0", "reference": "start"}
    defaults |= {"num_generations": "8", "balance": "length_aware", "partition": "group", "use_vllm": "False"}
    assert {key: shown[key][0] for key in defaults} == defaults
    for key in ("format_penalty", "max_completion_length", "num_iterations", "reference_pool", "max_prompt_length"):
        assert key in shown
    assert "without labels or rewards" in ended.out
    assert "Policies" in [line.strip() for line in ended.out.splitlines()]
    assert "α-Rényi LoRA ensemble" not in ended.out
    assert "TRL's GRPOConfig" in ended.out


# ---- Several policies, and other references --------------------------------------------------------------------------


def test_several_policies(quick: Settings, tmp_path: Path) -> None:
    ended = powerflow(quick(num_members=2, alpha=0.5, max_steps=3))
    assert (ended.code, ended.err) == (0, "")
    assert "loads 0." in ended.out
    table = ended.out.partition("What each policy learned")[2]
    assert [line.split()[:2] for line in table.splitlines() if line.startswith("policy")] == [
        ["policy", "0"],
        ["policy", "1"],
    ]
    assert LoraEnsemble.load(tmp_path / "out").num_members == 2


def test_from_an_ensemble_that_was_trained_with_dropout(
    base: Path, rows_file: Path, settings: Settings, quick: Settings, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    assert renyi("sft", "--config", settings(output_dir=start, lora_dropout=0.05, max_steps=2)).code == 0
    config = quick(model_name_or_path=start, lora_r=..., num_members=..., max_steps=2)
    out = in_plan(config)
    assert f"going on from {start}" in out
    assert "p^4 of the mixture of the 2 policies as training began" in out
    ended = powerflow(config)
    assert (ended.code, ended.err) == (0, "")
    ensemble = LoraEnsemble.load(tmp_path / "out")
    assert (ensemble.num_members, ensemble.peft_config.lora_dropout) == (2, 0.0)
    assert "p^4 of the base" in in_plan(
        quick(model_name_or_path=start, lora_r=..., reference="base", output_dir=tmp_path / "b")
    )


def test_an_ensemble_as_the_reference(trained: tuple[Path, Ended], quick: Settings) -> None:
    start = trained[0]
    assert f"target the mixture of the 2 members of {start} itself" in in_plan(quick(reference=start, power=1))
    assert f"p^2 of the geometric mean of the 2 members of {start}" in in_plan(
        quick(reference=start, power=2, reference_pool="geometric")
    )
    assert f"p^4 of each policy's own one of the 2 members of {start}" in in_plan(
        quick(reference=start, num_members=2, reference_pool="member")
    )
    assert_refused(powerflow(quick(reference=start, reference_pool="member")), "reference_pool: ", "num_members to 2")


def test_a_score_of_ones_own_is_said() -> None:
    args = PowerFlowConfig("unused", power=3.0, report_to="none", bf16=False, per_device_train_batch_size=8)
    assert target_in_words(args, lambda *rows: rows[0]).startswith("p^3 of a score of your own, tilted")


# ---- The same command again ------------------------------------------------------------------------------------------


@pytest.mark.slow  # two whole runs and a fresh process; tests/invariant/test_powerflow_resume.py kills in this one
def test_a_killed_run_goes_on_and_a_finished_one_does_not(quick: Settings, tmp_path: Path) -> None:
    config = quick(max_steps=40, save_steps=10, logging_steps=5)
    assert powerflow(config, "--output_dir", tmp_path / "whole").code == 0
    kill_once_written(tmp_path / "out" / "checkpoint-20" / "complete.json", "powerflow", "--config", config)
    killed_at = max(int(f.parent.name.split("-")[1]) for f in (tmp_path / "out").glob("checkpoint-*/complete.json"))
    assert killed_at < 40

    ended = powerflow(config)
    assert (ended.code, ended.err) == (0, "")
    assert f"resuming from checkpoint-{killed_at} of 40" in ended.out
    assert steps_in(tmp_path / "out") == list(range(5, 41, 5))
    whole, resumed = weights_in(tmp_path / "whole"), weights_in(tmp_path / "out")
    assert whole.keys() == resumed.keys() != set()
    assert all(whole[name].equal(resumed[name]) for name in whole)

    again = powerflow(config)
    assert (again.code, again.err) == (0, "")
    assert "already finished: checkpoint-40 is the last" in again.out
    learned = [out.partition("What the policy learned")[2] for out in (ended.out, again.out)]
    assert learned[0] == learned[1] != ""


# ---- Refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"powr": 2}, ["powr (", "config.yaml, line", "there is no such key", "nearest known one is power"]),
        ({"partitions": "group"}, ["partitions (", "nearest known one is partition"]),
        ({"packing": True}, ["packing (", "there is no such key"]),  # of SFT only
        ({"power": -1}, ["power (", "-1.0 is not allowed", "at least 0"]),
        ({"power": "four"}, ["power (", "'four' is not a number"]),
        (
            {"temperature": 0.7},
            ["temperature (", "0.7 is not allowed", "samples of the policy itself", "Leave it at 1"],
        ),
        ({"top_p": 0.9}, ["top_p (", "0.9 is not allowed"]),
        ({"beta": 0.04}, ["beta (", "0.04 is not allowed", "KL"]),
        ({"lora_dropout": 0.1}, ["lora_dropout: 0.1 is not allowed", "not the one that wrote", "Set it to 0"]),
        ({"partition": "mean"}, ["partition (", "'mean' is none of group, learned"]),
        ({"balance": "length"}, ["balance (", "is none of length_aware", "Did you mean length_aware?"]),
        ({"reference": "there"}, ["there"]),
        ({"format_penalty": "("}, ["format_penalty (", "is no regular expression"]),
        ({"format_penalty": "math:no"}, ["format_penalty (", "math has no no"]),
        ({"num_members": 3}, ["num_generations", "4 is not allowed", "a multiple of num_members (3)"]),
        ({"alpha": 2}, ["alpha (", "2.0 is not allowed"]),
        ({"max_completion_length": 4096}, ["max_completion_length: 4096 tokens leave no room for a prompt"]),
        ({"max_prompt_length": 1}, ["prompts.jsonl", "row 1, column prompt: has 2 tokens", "the longest allowed is 1"]),
        ({"dataset_name": "no.jsonl"}, ["no.jsonl: there is no such file"]),
        ({"pad_token": "<nothing>"}, ["pad_token"]),
    ],
)
def test_refused_settings(given: dict[str, Any], parts: list[str], quick: Settings, tmp_path: Path) -> None:
    assert_refused(powerflow(quick(**given)), *parts)
    assert not (tmp_path / "out").exists()


USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([*PROMPTS, {"prompt": ""}], ["row 13, column prompt: is empty", "remove the row"]),
        ([*PROMPTS, {"prompt": None}], ["row 13, column prompt: is empty"]),
        ([{"prompt": []}], ["row 1, column prompt: is empty"]),
        ([{"question": "w1"}], ["the columns are question", "a column `prompt`"]),
        ([{"prompt": [USER, ANSWER]}], ["row 1, column prompt: ends with the assistant's turn"]),
        ([*PROMPTS, {"prompt": "w1 " * 300}], ["row 13, column prompt: has 300 tokens", "Shorten or remove the row"]),
    ],
)
def test_refused_prompts(rows: list[dict[str, Any]], parts: list[str], quick: Settings, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows)
    assert_refused(powerflow(quick(dataset_name=file, max_prompt_length=200)), f"{file}", *parts)
    assert not (tmp_path / "out").exists()


def test_a_chat_without_a_template(quick: Settings, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    file = write_rows(tmp_path / "chats.jsonl", [{"prompt": [USER]}] * 4)
    ended = powerflow(quick(model_name_or_path=base, dataset_name=file))
    assert_refused(ended, "has no chat template", "--chat_template_path")
    assert not (tmp_path / "out").exists()
