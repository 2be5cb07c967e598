"""Monte Carlo dropout beside an ensemble: what a pass is, and its row in the tables of tasks."""

import json
import math

import pytest
import torch
from conftest import assert_refused, renyi, write_rows
from datasets import Dataset
from tiny import lora, padded_batch, scatter_members, tiny_model, tiny_tokenizer

from renyi import LoraEnsemble
from renyi.data import PairPreparation, Preparation, Question
from renyi.ensemble import Reference, write_preference
from renyi.inference import choice_log_probs, score, score_choices, score_pairs
from renyi.objectives import PreferenceLoss

QUESTIONS = [{"question": f"w{i}", "choices": ["w1", "w2", "w3"], "answer": i % 3} for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mc") / "ensemble"
    base = folder.with_name("base")
    tiny_model().save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    ensemble = scatter_members(LoraEnsemble.from_base(str(base), 2, lora(lora_dropout=0.3)), std=0.5)
    ensemble.save(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_a_pass_drops_inputs_of_the_updates_and_nothing_else():
    ensemble, batch = scatter_members(LoraEnsemble.from_base(tiny_model(), 2, lora()), std=0.5), padded_batch()
    plain = ensemble.log_likelihood(*batch)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with ensemble.dropping(0.3):
            found.append(ensemble.log_likelihood(*batch))
            with ensemble.using(()):
                base = ensemble.log_likelihood(*batch)
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().min() > 1e-4
    assert torch.equal(ensemble.log_likelihood(*batch), plain)
    with ensemble.using(()):
        assert torch.equal(ensemble.log_likelihood(*batch), base)
    with ensemble.dropping(1 - 1e-7):  # nothing is left of the updates
        torch.testing.assert_close(ensemble.log_likelihood(*batch), base.expand(2, -1), rtol=1e-4, atol=1e-3)


def test_the_table_has_a_row_of_the_mean_of_passes(folder, tmp_path):
    file = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    flags = ("--task", "choice", "--choice_by", "text", "--mc_dropout", 3, "--calibration", 0, "--json")
    ended = renyi("evaluate", folder, file, *flags)
    assert ended.code == 0, ended.err
    systems = {system["name"]: system for system in json.loads(ended.out)["systems"]}
    assert list(systems) == ["mixture", "member 0", "member 1", "member 0, MC dropout"]
    ensemble = LoraEnsemble.load(folder)
    questions = [Question(q["question"], q["choices"], q["answer"]) for q in QUESTIONS]
    passes = []
    for number in range(3):
        torch.manual_seed(number)
        with ensemble.dropping(0.3):
            scores = score_choices(ensemble, questions, tiny_tokenizer(), "text")
        passes.append(choice_log_probs(scores, "text")[0].exp())
    right = torch.stack(passes).mean(0)[range(9), [i % 3 for i in range(9)]]
    assert systems["member 0, MC dropout"]["nll"]["value"] == pytest.approx(-right.log().mean().item(), rel=1e-5)


def test_passes_of_pairs_and_of_text_are_mixed(folder, tmp_path):
    """The mean probability over passes of the first member; the reference of margins has no dropout."""
    ensemble, tokenizer = LoraEnsemble.load(folder), tiny_tokenizer()
    rows = [{"prompt": f"w{i}", "chosen": " w3 w4", "rejected": " w5"} for i in range(6)]
    moved = scatter_members(LoraEnsemble.load(folder), std=0.3, seed=5)
    start = Reference(moved, moved.snapshot())
    pairs, loss = PairPreparation().prepare(Dataset.from_list(rows), tokenizer), PreferenceLoss(beta=2.0)
    still, passes, nats = None, [], []
    for number in range(3):
        torch.manual_seed(number)
        with moved.dropping(0.3):
            found = score_pairs(moved, pairs, loss, start, PairPreparation())
        passes.append(torch.tensor([s.margin[0] for s in found]).double())
        batch = {"input_ids": torch.tensor([[6, 8, 9, 1]]), "attention_mask": None, "completion_mask": torch.ones(1, 4)}
        with moved.dropping(0.3):
            again = start.log_probs(batch)
        assert still is None or torch.equal(again, still)
        still = again
    assert (passes[0] - passes[1]).abs().max() > 1e-3

    copy = tmp_path / "tuned"
    moved.save(copy)
    tokenizer.save_pretrained(copy)
    write_preference(copy, loss, start)
    flags = ("--mc_dropout", 3, "--json")
    ended = renyi("evaluate", copy, write_rows(tmp_path / "pairs.jsonl", rows), "--task", "preference", *flags)
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)["baselines"]
    assert list(told) == ["member 0, MC dropout", "member 0, temperature"]
    nll = -torch.stack(passes).sigmoid().mean(0).log().mean()
    assert told["member 0, MC dropout"]["nll"] == pytest.approx(nll.item(), rel=1e-4)

    text = Preparation().prepare(Dataset.from_list([{"text": "w3 w4 w5"}, {"text": "w6 w7"}]), tokenizer)
    for number in range(3):
        torch.manual_seed(number)
        with ensemble.dropping(0.3):
            nats.append([s.log_likelihood[0] for s in score(ensemble, text)])
    file = write_rows(tmp_path / "text.jsonl", [{"text": "w3 w4 w5"}, {"text": "w6 w7"}])
    ended = renyi("evaluate", folder, file, "--task", "perplexity", *flags)
    assert ended.code == 0, ended.err
    systems = {system["name"]: system for system in json.loads(ended.out)["systems"]}
    expected = -(torch.tensor(nats).double().logsumexp(0) - math.log(3)).sum() / 5  # a first token is not trained
    assert systems["member 0, MC dropout"]["nll"]["value"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_dropout_to_go_by_it_is_refused(folder, tmp_path):
    file = write_rows(tmp_path / "questions.jsonl", QUESTIONS)
    plain = scatter_members(LoraEnsemble.from_base(str(folder.with_name("base")), 2, lora()), std=0.5)
    plain.save(tmp_path / "plain")
    tiny_tokenizer().save_pretrained(tmp_path / "plain")
    flags = ("--task", "choice", "--choice_by", "text", "--mc_dropout", 2, "--json")
    assert_refused(renyi("evaluate", tmp_path / "plain", file, *flags), "--mc_dropout", "--mc_dropout_rate")
    assert renyi("evaluate", tmp_path / "plain", file, *flags, "--mc_dropout_rate", 0.2).code == 0
    assert_refused(renyi("evaluate", folder, file, *flags, "--mc_dropout_rate", 1.5), "--mc_dropout_rate")
