"""What a PowerFlow run does besides reaching its target: whose rollouts they are, how they are scored, what is kept."""

import json
import math

import pandas
import pytest
import torch
from datasets import Dataset
from enumerable import tiny_llama
from powered import language, policies, trainer_in
from tiny import (
    logged,
    lora,
    member_distance,
    powerflow_trainer_of,
    prompt_rows,
    scatter_members,
    tiny_ensemble,
    tiny_model,
    tiny_tokenizer,
)
from torch import Tensor

from renyi import LoraEnsemble
from renyi.ensemble import BaseScore
from renyi.errors import TrainingDivergedError
from renyi.objectives import effective_members, renyi_loss, responsibilities, trajectory_balance
from renyi.training.rollouts import Rollouts, by_member, merged_parameters

COUPLED = {"alpha_hold_ratio": 0.0, "alpha_ramp_ratio": 0.0}


class Seen:
    """What a trainer's rollouts were, and what was made of them."""

    def __init__(self, trainer):
        self.rollouts: list[Rollouts] = []
        self.scored: list[dict[str, Tensor]] = []
        score = trainer.score_rollouts

        def watched(rollouts, group_size):
            self.rollouts.append(rollouts)
            self.scored.append(score(rollouts, group_size))
            return self.scored[-1]

        trainer.score_rollouts = watched


def rows_of(prompts: list[str], each: int) -> list[dict[str, str]]:
    return [{"prompt": prompt} for prompt in prompts for _ in range(each)]


def answering_ensemble() -> LoraEnsemble:
    """Two policies that now and then end before they are cut."""
    return scatter_members(LoraEnsemble.from_base(tiny_model(initializer_range=0.1), 2, lora(), seed=7))


def scored_batch(trainer, prompts: int = 4) -> dict[str, Tensor]:
    """Rollouts of the first prompts, scored; the trainer is left as it is in its first step."""
    trainer.state.max_steps = 1
    trainer.model.train()
    rows = rows_of(trainer.train_dataset["prompt"][:prompts], trainer.num_generations)
    return trainer._generate_and_score_completions(rows)


# ---- Whose rollouts they are -----------------------------------------------------------------------------------------


def frequencies(written: list[list[int]], known) -> Tensor:
    """Share of each sequence of a language among answers."""
    number = {tuple(t for t in row if t >= 0): i for i, row in enumerate(known.sequences.tolist())}
    return torch.tensor([number[tuple(ids)] for ids in written]).bincount(minlength=len(number)) / len(written)


def distance(p: Tensor, q: Tensor) -> float:
    return 0.5 * float((p - q).abs().sum())


def test_rollouts_are_samples_of_the_policies_that_write_them(tmp_path):
    """Whatever the base's own generation settings say: here they would choose greedily and forbid repetition."""
    model = tiny_llama(4, 0, 0.15)
    settings = {"temperature": 0.4, "top_k": 2, "top_p": 0.5, "repetition_penalty": 1.8, "suppress_tokens": [1]}
    model.generation_config.update(**settings, do_sample=True)
    ensemble = scatter_members(LoraEnsemble.from_base(model, 2, lora()), 0.2)
    trainer = trainer_in(tmp_path, ensemble, 3, num_members=2)
    known = language(4, 3)
    log_policy_MS = policies(ensemble, known)
    written, _ = trainer._generate_single_turn([[1, 2]] * 40_000, None, None, 4)
    for m in (0, 1):
        found = frequencies(written[m::2], known)
        assert distance(found, log_policy_MS[m].exp()) < 0.02
        assert distance(found, log_policy_MS[1 - m].exp()) > 0.1
    assert model.generation_config.temperature == 0.4  # which stays as it was


def test_in_half_precision_the_policy_that_writes_is_the_one_that_is_trained(tmp_path):
    """The first update's importance weight is 1; so must be the ratio of what the sampler drew from to what is trained.

    Recomputed from the sampler's own logits. Both passes round some 16 values in a row to bfloat16, each by 2^-9 of its
    size, so a token's log-ratio is off by about √32 2^-9 of a logit's size, and a rollout's by √tokens times that. What
    is drawn in float32 is off by more.
    """
    policies = scatter_members(LoraEnsemble.from_base(tiny_model(initializer_range=0.3), 2, lora(), seed=7), 0.3)
    settings = {"num_members": 2, "max_completion_length": 24, "num_generations": 8, "reference": "base"}
    trainer = powerflow_trainer_of(tmp_path, model=policies, bf16=True, **settings)
    trainer.state.max_steps = 1
    trainer.model.train()
    generate, drawn = trainer.model.base.generate, []

    def watched(**inputs: Tensor) -> Tensor:
        out = generate(**inputs, return_dict_in_generate=True, output_logits=True)
        tokens = out.sequences[:, inputs["input_ids"].shape[1] :]
        logits = torch.stack(out.logits, dim=1).float()
        drawn.append((logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0], logits.std()))
        return out.sequences

    trainer.model.base.generate = watched
    seen = Seen(trainer)
    scored = trainer._generate_and_score_completions(rows_of(prompt_rows(8)["prompt"], 8))
    (log_prob_of_token, size), tokens = drawn[0], seen.rollouts[0].tokens
    at = torch.arange(len(tokens))
    sampled = torch.zeros(len(tokens))
    for place, row in enumerate(by_member(len(tokens), 2)):
        sampled[row] = log_prob_of_token[place, : tokens[row]].sum()
    batch = (scored["input_ids"], scored["attention_mask"], scored["labels"])
    with torch.no_grad(), trainer.accelerator.autocast():
        trained_MN = trainer.model(*batch).log_probs.sum(-1)
    deviation = (trained_MN[at % 2, at] - sampled) / tokens.sqrt()
    rounding = math.sqrt(32) * 2**-9 * size
    assert deviation.square().mean().sqrt() < rounding
    # What the loss divides by is what is trained, to the last bit: the first update weighs every rollout by 1.
    behaviour = torch.logsumexp(trained_MN, dim=0) - math.log(2)
    torch.testing.assert_close(scored["log_behaviour"], behaviour, rtol=0, atol=0)
    with torch.no_grad():
        in_float32_MN = trainer.model(*batch).log_probs.sum(-1)
    off = (trained_MN - in_float32_MN)[at % 2, at] / tokens.sqrt()
    assert off.square().mean().sqrt() > 1.5 * rounding


@pytest.mark.parametrize("members", [1, 2, 4])
def test_every_policy_writes_its_share_of_the_rollouts_of_every_prompt(members):
    order = by_member(24, members)
    writer = {row: i * members // 24 for i, row in enumerate(order)}
    for prompt in range(0, 24, 4):
        assert [writer[row] for row in range(prompt, prompt + 4)] == [i % members for i in range(4)]


def test_the_policies_trained_are_those_that_write(tmp_path):
    """Not the base, nor the policies as training began."""
    model = tiny_llama(4, 0, 0.15)
    trainer = trainer_in(tmp_path, model, 3, power=4.0, max_steps=10, num_generations=64, learning_rate=5e-3)
    known = language(4, 3)
    (before,) = policies(trainer.model, known).exp()
    trainer.train()
    (after,) = policies(trainer.model, known).exp()
    written, _ = trainer._generate_single_turn([[1, 2]] * 20_000, None, None, 4)
    assert distance(frequencies(written, known), after) < 0.02
    assert distance(before, after) > 0.1


def test_an_answer_ends_with_its_first_end_and_is_cut_without_one(tmp_path):
    trainer = trainer_in(tmp_path, tiny_llama(4, 0, 0.15), 3, num_generations=64)
    seen = Seen(trainer)
    scored_batch(trainer, prompts=1)
    (rollouts,) = seen.rollouts
    share = rollouts.is_truncated.float().mean().item()
    assert 0 < share < 1
    for ids, labels, n, cut in zip(rollouts.input_ids, rollouts.labels, *rollouts[3:6:2], strict=True):
        answer = ids[labels != -100].tolist()
        assert len(answer) == n
        assert 0 not in answer[:-1]
        assert (answer[-1] == 0) != bool(cut)
        assert len(answer) == 3 or not cut
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [pytest.approx(share)]


def test_an_answer_ends_where_the_base_the_tokenizer_or_a_turn_ends(tmp_path):
    """Three tokens: the base's own, the tokenizer's end of text, and what the chat template closes a turn with."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("<eos>", "<user>")
    of_turn = tokenizer.convert_tokens_to_ids("<user>")
    settings = {"num_generations": 128, "per_device_train_batch_size": 128, "max_completion_length": 24}
    model = tiny_model(initializer_range=0.02, eos_token_id=20)
    trainer = powerflow_trainer_of(tmp_path, model=model, processing_class=tokenizer, **settings)
    seen = Seen(trainer)
    scored_batch(trainer, prompts=1)
    (rollouts,) = seen.rollouts
    ends = {20, tokenizer.eos_token_id, of_turn}
    last = set()
    for ids, labels, cut in zip(rollouts.input_ids, rollouts.labels, rollouts.is_truncated, strict=True):
        answer = ids[labels != -100].tolist()
        assert not ends & set(answer[:-1])
        assert (answer[-1] in ends) != bool(cut)
        assert len(answer) == 24 or not cut
        last.add(answer[-1])
    assert ends <= last


# ---- How they are scored ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["group", "learned"])
def test_rows_are_scored_as_they_are_alone(tmp_path, partition):
    """Prompts and answers of many lengths, in batches of 3: nothing depends on what stands beside or pads a row."""
    ensemble = answering_ensemble()
    settings = {"num_members": 2, "reference": "base", "partition": partition, "power": 3.0}
    batch = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    trainer = powerflow_trainer_of(tmp_path, model=ensemble, **settings, **batch)
    seen = Seen(trainer)
    scored_batch(trainer, prompts=6)
    (rollouts,), (scored,) = seen.rollouts, seen.scored
    assert len(rollouts.prompt_tokens.unique()) > 2
    assert len(rollouts.tokens.unique()) > 2
    alone, base, states = [], [], []
    for ids, mask, labels, n in zip(*rollouts[:3], rollouts.prompt_tokens, strict=True):
        row, label = ids[mask == 1][None], labels[mask == 1][None]
        alone.append(ensemble.log_likelihood(row, labels=label)[:, 0])
        with ensemble.using(()):
            base.append(ensemble.log_likelihood(row, labels=label)[0])
            states.append(ensemble.hidden_states(row[:, :n])[0, 0].mean(0))
    log_policy, log_base = torch.stack(alone, dim=1), torch.cat(base)
    mixture = log_policy.logsumexp(0) - torch.tensor(2.0).log()
    torch.testing.assert_close(scored["log_base"][:, 0], log_base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored["log_behaviour"], mixture, rtol=1e-5, atol=1e-5)
    assert ((log_policy - scored["log_behaviour"]).exp() < 2 + 1e-4).all()  # a ratio is at most M
    residual = (log_policy - 3.0 * log_base) / rollouts.tokens
    if partition == "group":
        expected = -residual.unflatten(1, (6, 4)).mean(2).repeat_interleave(4, dim=1)
        torch.testing.assert_close(scored["log_partition"].T, expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(scored["prompt_state"], torch.stack(states), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ensemble.partition.bias[:, 0], -residual.mean(1), rtol=1e-5, atol=1e-5)


def test_a_learned_partition_starts_where_residuals_have_mean_zero_and_then_learns(tmp_path):
    trainer = powerflow_trainer_of(tmp_path, partition="learned", partition_learning_rate=0.03, power=3.0, max_steps=3)
    seen = Seen(trainer)
    trainer.train()
    tokens = seen.rollouts[0].tokens
    mean = (seen.scored[0]["log_base"][:, 0] / tokens).mean().item()
    assert logged(trainer, "log_partition")[0] == pytest.approx((3.0 - 1.0) * mean, rel=1e-4)
    assert logged(trainer, "residual/mean")[0] == pytest.approx(0.0, abs=1e-5)
    assert trainer.model.partition.weight.abs().max() > 0
    groups = {group["initial_lr"]: group["params"] for group in trainer.optimizer.param_groups if group["params"]}
    assert groups.keys() == {trainer.args.learning_rate, 0.03}
    assert {id(p) for p in groups[0.03]} == {id(p) for p in trainer.model.partition.parameters()}
    assert {id(p) for p in groups[trainer.args.learning_rate]} == {id(p) for p in trainer.trained_parameters()}


def test_a_prior_pulls_policies_back_and_leaves_the_partition_alone(tmp_path):
    settings = {"partition": "learned", "num_members": 2, "max_steps": 4, "learning_rate": 5e-2, "num_iterations": 4}
    moved = []
    for std in (None, 1e-3):
        trainer = powerflow_trainer_of(tmp_path / str(std), prior_std=std, **settings)
        trainer.train()
        moved.append(sum(float(b.detach().square().sum()) for _, b in trainer.model.adapter(0).values()))
        first = logged(trainer, "loss")[0]
        assert first == pytest.approx(logged(trainer, "residual/variance")[0], rel=1e-4)  # they stand where they began
    assert moved[1] < 0.5 * moved[0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_gradient_is_weighted_by_responsibilities(tmp_path, alpha):
    settings = {"num_members": 2, "alpha": alpha, "reference": "base", "power": 3.0, **COUPLED}
    settings |= {"epsilon": 0.4, "epsilon_high": 0.7}
    trainer = powerflow_trainer_of(tmp_path, model=tiny_ensemble(2), per_device_train_batch_size=16, **settings)
    inputs = scored_batch(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    coupled = [p.grad.clone() for p in trainer.trained_parameters()]
    trainer.model.zero_grad()

    output = trainer.model(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    log_policy, tokens = output.log_probs.sum(-1), output.label_mask.sum(-1)
    weight = (log_policy.detach() - inputs["log_behaviour"]).exp().clamp(0.6, 1.7)
    assert weight.min() == pytest.approx(0.6)
    assert weight.max() == pytest.approx(1.7)
    terms = (log_policy, inputs["log_base"].T, tokens, inputs["log_partition"].T, 3.0)
    losses = trajectory_balance(*terms, weight=weight)
    r = responsibilities(-losses.detach(), alpha)
    assert alpha == 0 or (r - 0.5).abs().max() > 1e-3
    torch.testing.assert_close(loss, renyi_loss(-losses, alpha).mean())
    (2 * (r * losses).sum() / losses.shape[1]).backward()  # M times: a policy learns as fast as it would alone
    for ours, weighted in zip(coupled, trainer.trained_parameters(), strict=True):
        torch.testing.assert_close(ours, weighted.grad, rtol=1e-4, atol=1e-6)


def test_how_a_batch_is_cut_up_does_not_matter(tmp_path):
    settings = {"num_members": 2, "alpha": 0.5, "optim": "sgd", "learning_rate": 0.05, "max_steps": 4, **COUPLED}
    trainers, rollouts = [], []
    for size, accumulation in ((16, 1), (8, 2)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainers.append(powerflow_trainer_of(tmp_path / str(size), **batch, **settings))
        seen = Seen(trainers[-1])
        trainers[-1].train()
        rollouts.append(torch.cat([r.input_ids.flatten() for r in seen.rollouts]))
    assert torch.equal(*rollouts)  # drawn from equal random states, as long as the policies stay equal
    whole, parts = trainers
    assert member_distance(whole.model, parts.model) <= 1e-5
    for name in ("loss", "grad_norm", "log_partition", "residual/variance", "slope/length", "completions/mean_length"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-3), name


def test_recomputing_activations_changes_nothing(tmp_path):
    losses = []
    for recompute in (False, True):
        trainer = powerflow_trainer_of(tmp_path / str(recompute), gradient_checkpointing=recompute, max_steps=3)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_rollouts_are_used_again_with_clipped_ratios(tmp_path):
    settings = {"num_iterations": 3, "learning_rate": 5e-2, "epsilon": 0.05, "epsilon_high": 0.1, "max_steps": 6}
    trainer = powerflow_trainer_of(tmp_path, **settings)
    seen = Seen(trainer)
    trainer.train()
    assert len(seen.rollouts) == 2
    clipped = logged(trainer, "clip_fraction")
    assert clipped[0] == clipped[3] == 0
    assert min(clipped[1], clipped[2], clipped[4], clipped[5]) > 0.3


# ---- What is logged and kept -----------------------------------------------------------------------------------------


def test_what_is_logged_is_what_the_policies_say(tmp_path):
    settings = {"num_members": 2, "alpha": 0.7, "reference": "base", "power": 3.0, "max_steps": 1, **COUPLED}
    form = {"format_penalty": r"w[1-4]", "format_penalty_size": 0.5, "length_penalty": 0.25}
    batch = {"per_device_train_batch_size": 32}
    trainer = powerflow_trainer_of(tmp_path, model=answering_ensemble(), **settings, **form, **batch)
    seen = Seen(trainer)
    start = trainer.model.snapshot()
    trainer.train()
    (row, *_), (rollouts,), (scored,) = trainer.state.log_history, seen.rollouts, seen.scored
    with trainer.model.acting_as(start):
        output = trainer.model(*rollouts[:3])
    log_policy, n = output.log_probs.sum(-1), rollouts.tokens
    base = scored["log_base"].T
    wanted = torch.tensor([any(f"w{i}" in completion for i in (1, 2, 3, 4)) for completion in rollouts.completions])
    penalty = -0.5 * (~wanted) - 0.25 * rollouts.is_truncated
    assert 0 < wanted.float().mean() < 1
    assert rollouts.is_truncated.any()
    torch.testing.assert_close(scored["penalty"], penalty)
    at_zero = log_policy / n - 3.0 * (base / n + penalty)
    log_partition = -at_zero.unflatten(1, (8, 4)).mean(2).repeat_interleave(4, dim=1)
    residual = at_zero + log_partition
    weight = (log_policy - scored["log_behaviour"]).exp().clamp(0.8, 1.2)
    loss = weight * residual**2
    r = responsibilities(-loss, 0.7)
    x, y, lengths = base.expand(2, -1).flatten().double(), log_policy.flatten().double(), n.repeat(2).double()
    by_prompt = torch.block_diag(*lengths.view(16, 4, 1))  # each policy has a slope on the length for each prompt
    design = torch.cat([x[:, None], by_prompt], dim=1)
    slope, *of_length = torch.linalg.lstsq(design, y[:, None]).solution[:, 0]
    left = y - design @ torch.stack([slope, *of_length])
    squares = lengths.square().view(16, 4).sum(1)
    expected = {
        "loss": renyi_loss(-loss, 0.7).mean(),
        "log_partition": log_partition.mean(),
        "log_partition/std": log_partition.std(unbiased=False),
        "residual/mean": torch.zeros(()),
        "residual/variance": residual.var(unbiased=False),
        "logps/policy": log_policy.sum() / (2 * n.sum()),
        "logps/base": base.sum() / n.sum(),
        "entropy": output.entropy.sum() / (2 * n.sum()),
        "clip_fraction": ((log_policy - scored["log_behaviour"]).exp() != weight).float().mean(),
        "slope/log_base": slope,
        "slope/length": (torch.stack(of_length) * squares).sum() / squares.sum(),
        "slope/r2": 1 - left.square().mean() / y.var(unbiased=False),
        "format_rate": wanted.float().mean(),
        "effective_members": effective_members(r).mean(),
        **{f"member_load/{m}": r[m].mean() for m in range(2)},
        "completions/mean_length": n.float().mean(),
        "completions/clipped_ratio": rollouts.is_truncated.float().mean(),
    }
    for name, value in expected.items():
        assert row[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-5), name


def test_held_out_prompts_are_evaluated_with_rollouts_of_their_own(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 8}
    trainer = powerflow_trainer_of(tmp_path, eval_dataset=prompt_rows(6, seed=4), **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(rows) == 2
    assert {"eval_residual/variance", "eval_log_partition", "eval_completions/mean_length"} <= rows[0].keys()
    assert len(logged(trainer, "loss")) == 4


@pytest.mark.parametrize("which", ["start", "base", "folder", "score"])
def test_the_reference_is_chosen(tmp_path, which):
    ensemble, other = tiny_ensemble(2), scatter_members(tiny_ensemble(3), seed=9)
    other.save(tmp_path / "other")
    start = ensemble.snapshot()
    settings = {"num_members": 2, "power": 1.0, "max_steps": 2}
    if which != "score":
        settings["reference"] = str(tmp_path / "other") if which == "folder" else which
    else:
        settings["base_score"] = lambda ids, mask, labels: torch.zeros(1, len(ids))
    trainer = powerflow_trainer_of(tmp_path / "run", model=ensemble, **settings)
    seen = Seen(trainer)
    trainer.train()
    rollouts, scored = seen.rollouts[-1], seen.scored[-1]  # training has not moved it
    rows = rollouts[:3]
    third = torch.full((3,), 1 / 3)[:, None].log()
    expected = {
        "base": BaseScore(ensemble)(*rows),
        "start": BaseScore(ensemble, start)(*rows),
        "folder": (other(*rows).log_probs.sum(-1).detach() + third).logsumexp(0, keepdim=True),
        "score": torch.zeros(1, len(rollouts.tokens)),
    }
    torch.testing.assert_close(scored["log_base"].T, expected[which], rtol=1e-5, atol=1e-5)
    assert all(distance(value, expected["folder"]) > 1 for name, value in expected.items() if name != "folder")


def test_fresh_policies_begin_at_the_base(tmp_path):
    assert powerflow_trainer_of(tmp_path).base_score.members is None


def test_a_saved_policy_is_an_ordinary_ensemble(tmp_path):
    trainer = powerflow_trainer_of(tmp_path, partition="learned", max_steps=2, learning_rate=5e-2)
    trainer.train()
    trainer.save_model()
    assert member_distance(LoraEnsemble.load(tmp_path, base=tiny_model()), trainer.model) == 0
    trainer.create_model_card()
    assert "PowerFlow" in (tmp_path / "README.md").read_text()


def test_messages_and_streamed_prompts_train(tmp_path):
    messages = [[{"role": "user", "content": prompt}] for prompt in prompt_rows()["prompt"]]
    trainer = powerflow_trainer_of(tmp_path / "messages", Dataset.from_dict({"prompt": messages}), max_steps=2)
    seen = Seen(trainer)
    trainer.train()
    ids = seen.rollouts[0].input_ids[0]
    assert ids[0] == 3  # <user>
    assert 4 in ids  # <assistant>, where the answer begins
    streamed = powerflow_trainer_of(tmp_path / "streamed", prompt_rows().to_iterable_dataset(), max_steps=2)
    streamed.train()
    assert len(logged(streamed, "loss")) == 2


def test_completions_can_be_looked_at(tmp_path, capsys):
    trainer = powerflow_trainer_of(tmp_path, max_steps=2, log_completions=True)
    trainer.train()
    assert len(list((tmp_path / "completions").glob("*.parquet"))) == 2
    shown = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert len(shown) == 8
    for _, group in shown.groupby("prompt"):
        assert group["advantage"].sum() == pytest.approx(0.0, abs=1e-4)
    assert shown["completion"][0] in capsys.readouterr().out


def test_the_curves_are_drawn(tmp_path):
    trainer = powerflow_trainer_of(tmp_path, max_steps=2)
    trainer.train()
    trainer.draw(tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000
    json.dumps(trainer.state.log_history)


def test_a_diverging_run_says_where(tmp_path):
    ensemble = tiny_ensemble(2)
    trainer = powerflow_trainer_of(
        tmp_path, model=ensemble, num_members=2, base_score=lambda ids, *_: torch.full((1, len(ids)), math.nan)
    )
    with pytest.raises(TrainingDivergedError) as caught:
        trainer.train()
    assert "step 1" in caught.value.where


# ---- vLLM's weights --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "neox"])
def test_what_vllm_would_be_given_is_pefts_merge(kind):
    """Names and values; qwen2 has biases, gpt2 transposed weights, llama a tied head."""
    ensemble = tiny_ensemble(1, kind)
    expected = dict(ensemble.merged(0).named_parameters())
    found = dict(merged_parameters(ensemble, lambda name: name))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.data, rtol=1e-5, atol=1e-6)
    plain = dict(tiny_model(kind).named_parameters())
    assert sum(bool((found[name] != plain[name]).any()) for name in plain) == len(ensemble.adapter(0))
