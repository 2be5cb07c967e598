"""`renyi reward` from the plan it prints to the files it leaves, scored, resumed, exported, and refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ended, Settings, assert_refused, flat, renyi, settings_of, steps_in, train, weights_in, write_rows
from peft import AutoPeftModelForSequenceClassification
from tiny import lora, reward_trainer_of, scatter_members, tiny_reward_model
from transformers import AutoModelForSequenceClassification

import renyi as library
from renyi import LoraEnsemble
from renyi.ensemble import KeptReward, read_reward, write_reward
from renyi.objectives import reward_bounds


def pair_rows(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of one word, of whose answers the short one is better."""
    draw = random.Random(seed)
    words = [draw.randrange(8) for _ in range(number)]
    return [{"prompt": f"w{w}", "chosen": f" w{10 + w} w1", "rejected": f" w{30 + w} w2 w3"} for w in words]


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", pair_rows(48))


@pytest.fixture(scope="module")
def tuned(base: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("runs") / "rewards"
    return train("reward", base, pairs_file, folder, max_steps=20, eval_steps=10, save_steps=10, num_members=3)


def reward(config: Path, *flags: object) -> Ended:
    return renyi("reward", "--config", config, *flags)


def test_it_says_what_it_understood_and_what_it_left(tuned: tuple[Path, Ended]) -> None:
    folder, ended = tuned
    assert (ended.code, ended.err) == (0, "")
    for part in [
        "Bradley–Terry, a head of 32 weights a member",
        "36 pairs",
        "rewards are read at the last token",
        "prefers the chosen",
        "reward.json what each member's rewards are centred by",
        "--reward lcb",
    ]:
        assert part in flat(ended.out), (part, flat(ended.out))
    config = json.loads((folder / "member_1" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert "AutoPeftModelForSequenceClassification" in (folder / "README.md").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("eval_accuracy", 0) for row in rows) >= 0.9
    assert (folder / "training.png").stat().st_size > 10_000
    assert renyi("info", folder).code == 0


@pytest.mark.parametrize("kind", ["mean", "lcb"])
def test_a_score_is_the_adapters_rewards_centred(tuned: tuple[Path, Ended], tmp_path: Path, kind: str) -> None:
    folder, _ = tuned
    rows = [{"prompt": r["prompt"], "completion": r[s]} for r in pair_rows(4, 3) for s in ("chosen", "rejected")]
    file, scores = write_rows(tmp_path / "answers.jsonl", rows), tmp_path / "scores.jsonl"
    ended = renyi("score", folder, file, "--output", scores, "--reward", kind, "--lcb_width", 2)
    assert ended.code == 0, ended
    lines = [json.loads(line) for line in scores.read_text().splitlines()]
    center = json.loads((folder / "reward.json").read_text())["center"]
    loaded = library.load(folder)
    for member in range(3):
        alone = AutoPeftModelForSequenceClassification.from_pretrained(folder / f"member_{member}", num_labels=1).eval()
        for line, row in zip(lines, rows, strict=True):
            ids = loaded.tokenizer(row["prompt"] + row["completion"] + "<eos>", return_tensors="pt")["input_ids"]
            expected = alone(input_ids=ids).logits.item() - center[member]
            assert line["rewards"][member] == pytest.approx(expected, abs=1e-4)
    for line in lines:
        mean, std, lcb = reward_bounds(torch.tensor([[r] for r in line["rewards"]]), torch.full((3,), 1 / 3), 2.0)
        assert [line[k] for k in ("mean", "std", "lcb")] == pytest.approx(
            [x.item() for x in (mean, std, lcb)], abs=1e-5
        )
        assert line["reward"] == line[kind]
    assert all(chosen["mean"] > rejected["mean"] for chosen, rejected in zip(lines[::2], lines[1::2], strict=True))
    function = loaded.reward_function(kind, 2.0)
    given = function([r["prompt"] for r in rows], [r["completion"] for r in rows], anything=1)
    assert given == pytest.approx([line["reward"] for line in lines], abs=1e-5)
    assert function.__name__ == f"renyi_{kind}"


def test_pairs_are_evaluated_by_the_rewards_of_their_answers(tuned: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, _ = tuned
    rows = pair_rows(16, 3)
    rows += [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(5, 4)]  # wrong labels
    file, lines = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "lines.jsonl"
    ended = renyi("evaluate", folder, file, "--task", "reward", "--json", "--output", lines, "--lcb_width", 2)
    assert ended.code == 0, ended
    told, loaded = json.loads(ended.out), library.load(folder)
    sides = [
        loaded.score_rewards([{"prompt": r["prompt"], "completion": r[side]} for r in rows], lcb_width=2.0)
        for side in ("chosen", "rejected")
    ]
    for name in ("mean", "lcb"):
        right = [getattr(a, name) > getattr(b, name) for a, b in zip(*sides, strict=True)]
        assert told["rewards"]["accuracy"][name]["value"] == pytest.approx(sum(right) / 21)
    for line, a, b in zip(map(json.loads, lines.read_text().splitlines()), *sides, strict=True):
        assert line["margin"] == pytest.approx([x - y for x, y in zip(a.rewards, b.rewards, strict=True)], abs=1e-5)
        p = torch.tensor(line["margin"]).double().sigmoid()
        assert line["preference"] == pytest.approx(p.mean().item())
    assert told["mixture"]["accuracy"] == pytest.approx(16 / 21)
    out = renyi("evaluate", folder, file, "--task", "reward").out
    for part in (
        "Which reward orders pairs best?",
        "lower bound",
        "ordered wrongly",
        "rank correlation",
        "temperature",
    ):
        assert part in out, out


def test_votes_of_a_pair_are_learned_and_ties_kept(settings: Settings, tmp_path: Path) -> None:
    rows = pair_rows(24)
    rows = [{**r, "votes_chosen": 2, "votes_rejected": i % 2, "votes_tie": int(i % 3 == 0)} for i, r in enumerate(rows)]
    file = write_rows(tmp_path / "votes.jsonl", rows)
    ended = reward(settings(dataset_name=file, max_steps=2, save_strategy="no"))
    assert ended.code == 0, ended
    assert "Bradley–Terry of votes, ties 0.267" in flat(ended.out)
    assert json.loads((tmp_path / "out" / "reward.json").read_text())["tie_strength"] == pytest.approx(2 * 8 / 60)
    told = json.loads(renyi("evaluate", tmp_path / "out", file, "--task", "reward", "--json").out)
    names = ["mixture", "members' mean and variance", "member 0, temperature"]
    assert [votes["name"] for votes in told["votes"]] == names
    assert set(told["rewards"]["finds_split"]) == set(told["rewards"]["finds_wrong"])
    assert_refused(
        reward(settings(dataset_name=file, tie_strength=0, output_dir=tmp_path / "no")),
        "tie_strength",
        "some votes are ties",
    )


def test_draws_have_the_head_and_the_centre_of_their_member(tmp_path: Path) -> None:
    ensemble = LoraEnsemble.from_base(tiny_reward_model(), 2, lora(task_type="SEQ_CLS"), member_kind="gaussian")
    scatter_members(ensemble)
    with torch.no_grad():
        ensemble.stack.head.weight[1] *= -2  # type: ignore[union-attr]
    ids = torch.tensor([[5, 15, 6, 1]])
    ensemble.stack.set_std(0)
    drawn = ensemble.draw(3)
    torch.testing.assert_close(drawn.rewards(ids), ensemble.rewards(ids).repeat_interleave(3, dim=0))
    ensemble.stack.set_std(0.3)
    assert (ensemble.draw(3).rewards(ids)[:3] - ensemble.rewards(ids)[0]).abs().min() > 1e-4
    write_reward(tmp_path, KeptReward(torch.tensor([0.5, -1.0])))
    assert read_reward(tmp_path, drawn).center.tolist() == [0.5] * 3 + [-1.0] * 3


def test_centred_rewards_have_the_mean_0_and_a_constant_changes_nothing(tmp_path: Path) -> None:
    trainer = reward_trainer_of(tmp_path, num_members=2)
    scatter_members(trainer.model)
    rows = trainer.train_dataset
    from renyi.inference import score_rewards

    ids = [*rows["chosen_ids"], *rows["rejected_ids"]]
    scores = score_rewards(trainer.model, ids, trainer.processing_class, trainer.kept)
    means = torch.tensor([s.rewards for s in scores]).mean(dim=0)
    torch.testing.assert_close(means, torch.zeros(2), atol=1e-5, rtol=0)
    assert max(s.std for s in scores) > 1e-3
    assert trainer.kept.center.abs().min() > 1e-3


@pytest.mark.slow  # three runs
@pytest.mark.usefixtures("always_sparse")
def test_a_resumed_run_is_the_uninterrupted_one(settings: Settings, pairs_file: Path, tmp_path: Path) -> None:
    config = settings(dataset_name=pairs_file, routing="sparse", token_budget=64, max_steps=12, save_steps=4)
    assert reward(config, "--output_dir", tmp_path / "whole").code == 0
    short = settings(dataset_name=pairs_file, routing="sparse", token_budget=64, max_steps=12, save_steps=4)
    from renyi.runs.build import build, train
    from renyi.runs.settings import Settings as Keys

    values = {**settings_of(Path(str(json_of(short)["model_name_or_path"])), pairs_file), **json_of(short)}
    run = build(Keys("reward", values))

    class Stop(library.training.trainer.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, [Stop()])
    ended = reward(short)
    assert "resuming from checkpoint-8 of 12" in ended.out
    whole, resumed = weights_in(tmp_path / "whole"), weights_in(tmp_path / "out")
    assert any("score" in name for name in whole)
    assert all(whole[name].equal(resumed[name]) for name in whole)
    kept = [(tmp_path / folder / "reward.json").read_text() for folder in ("whole", "out")]
    assert kept[0] == kept[1]
    assert steps_in(tmp_path / "out") == list(range(1, 13))


def json_of(config: Path) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load(config.read_text()))


@pytest.mark.usefixtures("always_sparse")
def test_routing_in_parts_gives_the_gradients_of_the_whole(tmp_path: Path) -> None:
    from tiny import logged, member_distance

    runs = []
    for name, settings in {"whole": {}, "parts": {"token_budget": 48}, "sparse": {"routing": "sparse"}}.items():
        trainer = reward_trainer_of(
            tmp_path / name, num_members=2, alpha=0.8, alpha_hold_ratio=0.0, routing_threshold=0.0, **settings
        )
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        assert logged(other, "loss") == pytest.approx(logged(runs[0], "loss"), rel=1e-4)
        assert member_distance(runs[0].model, other.model) < 1e-3
        torch.testing.assert_close(runs[0].model.stack.head.weight, other.model.stack.head.weight, atol=1e-4, rtol=1e-3)


def test_members_are_kept_and_dropped_with_their_heads(tuned: tuple[Path, Ended], tmp_path: Path) -> None:
    folder, _ = tuned
    loaded = library.load(folder)
    ids = torch.tensor([[5, 15, 6, 1]])
    before = loaded.ensemble.rewards(ids)
    loaded.ensemble.drop_member(0)
    torch.testing.assert_close(loaded.ensemble.rewards(ids), before[1:])
    with loaded.ensemble.using([1]):
        torch.testing.assert_close(loaded.ensemble.rewards(ids), before[2:])
    loaded.ensemble.add_member(folder / "member_0")
    torch.testing.assert_close(loaded.ensemble.rewards(ids), before[[1, 2, 0]])
    exported = renyi("export", folder, "--format", "merged", "--output", tmp_path / "merged")
    assert exported.code == 0, exported
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "member_0").eval()
    torch.testing.assert_close(plain(input_ids=ids).logits[0], before[0], atol=1e-5, rtol=0)


ROW = {"prompt": "w1", "chosen": " w2 w3", "rejected": " w4"}


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([ROW, {**ROW, "rejected": " w2 w3"}], ["row 2, column rejected: equals chosen"]),
        ([ROW, {**ROW, "rejected": None}], ["row 2, column rejected"]),
        ([{**ROW, "margin": 0.5}, {**ROW, "margin": "much"}], ["row 2, column margin: is 'much', not a number"]),
        ([{**ROW, "margin": 0.5, "votes_chosen": 1}], ["column margin: does not go with votes_chosen"]),
        ([{**ROW, "votes_chosen": 1}, {**ROW, "votes_chosen": -1}], ["row 2, column votes_chosen: is -1"]),
        (
            [ROW, {**ROW, "chosen": " " + " ".join(["w5"] * 40)}],
            ["column chosen: has 42 tokens", "is 32"],
        ),
        ([{"prompt": "w1", "completion": " w2", "label": True}], ["chosen", "columns are completion, label, prompt"]),
    ],
    ids=["equal", "missing", "margin", "votes and margin", "votes", "long", "thumbs"],
)
def test_bad_rows_are_named(settings: Settings, tmp_path: Path, rows: list[dict[str, Any]], parts: list[str]) -> None:
    file = write_rows(tmp_path / "bad.jsonl", rows)
    assert_refused(reward(settings(dataset_name=file, max_length=32)), "bad.jsonl", *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"alpha": "auto"}, ["alpha", "auto"]),
        ({"routing": "raced"}, ["routing", "raced"]),
        ({"center_rewards_coefficient": -1}, ["center_rewards_coefficient"]),
        ({"prior_std": 1.0}, ["prior_std"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_refused_by_key(
    settings: Settings, pairs_file: Path, tmp_path: Path, given: dict[str, Any], parts: list[str]
) -> None:
    assert_refused(reward(settings(dataset_name=pairs_file, **given)), *parts)
    assert not (tmp_path / "out").exists()


def test_what_a_reward_model_cannot_do_is_refused(tuned: tuple[Path, Ended], trained: Any, tmp_path: Path) -> None:
    folder, _ = tuned
    answers = write_rows(tmp_path / "answers.jsonl", [{"prompt": "w1", "completion": " w2"}])
    assert_refused(renyi("generate", folder, "w1"), "reward model")
    assert_refused(renyi("score", folder, answers, "--reward", "max"), "--reward", "mean")
    assert_refused(renyi("score", folder, answers, "--lcb_width", -1), "lcb_width")
    assert_refused(renyi("score", folder, answers, "--max_length", 4), "--max_length")
    with pytest.raises(library.errors.EnsembleFormatError, match="holds no reward models"):
        library.load(trained[0]).reward_function()
