"""What a PowerFlow run refuses, before anything is written, and why."""

import pytest
from datasets import Dataset
from tiny import lora, powerflow_trainer_of, prompt_rows, quiet, tiny_ensemble, tiny_model

from renyi import PowerFlowConfig
from renyi.errors import ConfigError, DataError, EnsembleFormatError


def config(tmp_path, **settings) -> PowerFlowConfig:
    return PowerFlowConfig(str(tmp_path), **quiet({"num_generations": 4, **settings}))


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("power", -0.5, "at least 0"),
        ("power", float("inf"), "at least 0"),
        ("power", float("nan"), "at least 0"),
        ("balance", "whole", "length_aware"),
        ("partition", "none", "learned"),
        ("partition_learning_rate", 0.0, "above 0"),
        ("reference_pool", "harmonic", "geometric"),
        ("format_penalty_size", -1.0, "at least 0"),
        ("length_penalty", float("nan"), "at least 0"),
        ("max_prompt_length", 0, "at least 1"),
        ("temperature", 0.9, "samples of the policy"),
        ("top_p", 0.95, "samples of the policy"),
        ("top_k", 50, "samples of the policy"),
        ("min_p", 0.05, "samples of the policy"),
        ("repetition_penalty", 1.1, "samples of the policy"),
        ("generation_kwargs", {"temperature": 0.5}, "changes what is sampled"),
        ("generation_kwargs", {"no_repeat_ngram_size": 2}, "changes what is sampled"),
        ("generation_kwargs", {"stop_strings": ["w3"]}, "changes what is sampled"),
        ("generation_kwargs", {"eos_token_id": 7}, "changes what is sampled"),
        ("beta", 0.04, "KL"),
        ("mask_truncated_completions", True, "trajectories"),
        ("entropy_coef", 0.01, "move the target"),
        ("format_penalty", "(unclosed", "no regular expression"),
        ("format_penalty", "no.such.module:form", "cannot be imported"),
        ("format_penalty", "math:no_such_function", "has no no_such_function"),
        ("format_penalty", "math:pi", "not a function"),
        ("num_members", 3, "multiple of num_members"),
        ("num_generations_eval", 1, "at least 2"),
        ("alpha", 1.5, "between 0 and 1"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_its_name(tmp_path, key, value, why):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **{key: value})
    assert caught.value.where in (key, "num_generations")
    assert why in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("key", "settings", "says"),
    [
        ("num_generations", {"num_generations": 3, "per_device_train_batch_size": 8}, "Give a divisor of 8"),
        ("num_generations", {"num_generations": 1}, "at least 2"),
        ("generation_batch_size", {"generation_batch_size": 12, "per_device_train_batch_size": 8}, "multiple of 8"),
        ("generation_batch_size", {"generation_batch_size": 8, "num_generations": 3}, "multiple of 3"),
        ("steps_per_generation", {"generation_batch_size": 8, "steps_per_generation": 1}, "Leave one of them out"),
        (
            "per_device_eval_batch_size",
            {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 6},
            "a multiple of num_generations_eval (4)",
        ),
        ("auto_find_batch_size", {"auto_find_batch_size": True}, "per_device_train_batch_size"),
    ],
    ids=str,
)
def test_groups_that_do_not_fit_are_refused_in_words_of_powerflow(tmp_path, key, settings, says):
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, **settings)
    assert caught.value.where == key
    assert says in caught.value.hint
    for word in ("GRPO", "reward", "advantage", "generations per prompt", "global"):
        assert word not in str(caught.value)


def test_settings_that_change_nothing_are_not_refused(tmp_path):
    made = config(tmp_path, temperature=1, top_k=0, generation_kwargs={"use_cache": True}, beta=0)
    assert (made.temperature, made.top_k, made.generation_kwargs, made.beta) == (1, 0, {"use_cache": True}, 0)


def test_several_policies_are_refused_where_vllm_serves_one(tmp_path):
    with pytest.raises(ConfigError, match="vLLM serves one") as caught:
        config(tmp_path, use_vllm=True, num_members=2)
    assert caught.value.where == "use_vllm"


def test_dropout_is_refused_wherever_it_is(tmp_path):
    with pytest.raises(ConfigError, match="drops at random") as caught:
        powerflow_trainer_of(tmp_path, peft_config=lora(lora_dropout=0.05))
    assert caught.value.where == "lora_dropout"
    with pytest.raises(ConfigError) as caught:
        powerflow_trainer_of(tmp_path, model=tiny_model(attention_dropout=0.1))
    assert caught.value.where == "attention_dropout"
    with pytest.raises(ConfigError) as caught:
        powerflow_trainer_of(tmp_path, model=tiny_model("gpt2", resid_pdrop=0.1))
    assert caught.value.where == "resid_pdrop"
    assert not any(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, on Conv1D
def test_dropout_that_a_language_model_does_not_have_is_not_refused(tmp_path):
    """GPT-2's config speaks of the dropout of a classifier's head, which is not there."""
    model = tiny_model("gpt2")
    assert model.config.summary_first_dropout > 0
    trainer = powerflow_trainer_of(tmp_path, model=model, max_steps=1, power=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-10)


@pytest.mark.parametrize("name", ["reward_funcs", "tools", "environment_factory", "rollout_func"])
def test_what_has_no_part_is_refused(tmp_path, name):
    from renyi import PowerFlowTrainer

    with pytest.raises(ConfigError, match="no part in this loss") as caught:
        PowerFlowTrainer(tiny_model(), config(tmp_path), prompt_rows(), **{name: [len]})
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("prompts", "what", "where"),
    [
        (["w1 w2", ""], "is empty", "row 2, column prompt"),
        (["w1 w2", " \n"], "is empty", "row 2, column prompt"),
        (["w1", None], "is empty", "row 2, column prompt"),
        ([[{"role": "user", "content": "w1"}], []], "is empty", "row 2, column prompt"),
        (
            [[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]],
            "assistant's turn",
            "row 1, column prompt",
        ),
        ([[{"role": "user"}]], "empty message 1", "row 1, column prompt"),
        (["w1"] * 3 + ["w2 " * 300], "300 tokens", "row 4, column prompt"),
        ([1.5, 2.5], "is 1.5", "row 1, column prompt"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_bad_prompt_is_refused_with_its_row(tmp_path, prompts, what, where):
    settings = {"model": tiny_model(max_position_embeddings=256)}
    for split in ("train", "eval"):
        given = {"eval_dataset": Dataset.from_dict({"prompt": prompts})} if split == "eval" else {}
        dataset = None if given else Dataset.from_dict({"prompt": prompts})
        settings["model"] = tiny_model(max_position_embeddings=256)
        with pytest.raises(DataError) as caught:
            powerflow_trainer_of(tmp_path, dataset, **settings, **given)
        assert what in str(caught.value)
        assert where in caught.value.where
        assert split in caught.value.where
    assert not any(tmp_path.iterdir())


def test_the_longest_prompt_is_what_answers_leave_of_the_context(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["w1 " * 20]})
    for context in (25, 26):
        model = tiny_model(max_position_embeddings=context)
        if context == 26:
            powerflow_trainer_of(tmp_path, dataset, model=model)
        else:
            with pytest.raises(DataError, match="longest allowed is 19"):
                powerflow_trainer_of(tmp_path, dataset, model=model)
    with pytest.raises(ConfigError, match="leave no room") as caught:
        powerflow_trainer_of(tmp_path, model=tiny_model(max_position_embeddings=6))
    assert caught.value.where == "max_completion_length"
    with pytest.raises(DataError, match="longest allowed is 5"):
        powerflow_trainer_of(tmp_path, dataset, max_prompt_length=5)


def test_data_without_prompts_are_refused(tmp_path):
    for dataset in (Dataset.from_dict({"text": ["w1"]}), Dataset.from_dict({"prompt": []})):
        with pytest.raises(DataError):
            powerflow_trainer_of(tmp_path, dataset)


def raises(prompt: str, completion: str) -> float:
    raise KeyError("answer")


def is_nan(prompt: str, completion: str) -> float:
    return float("nan")


def is_text(prompt: str, completion: str) -> str:
    return "fine"


def takes_one(completion: str) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (raises, "raised KeyError ('answer')"),
        (is_nan, "gave nan"),
        (is_text, "raised ValueError"),
        (takes_one, "raised TypeError"),
    ],
)
def test_a_bad_format_function_is_told_with_the_completion(tmp_path, function, what):
    trainer = powerflow_trainer_of(tmp_path, format_penalty=f"{__name__}:{function.__name__}", max_steps=1)
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert what in str(caught.value)
    assert caught.value.where.startswith("format_penalty, of the completion ")
    assert caught.value.hint


def fits(prompt: str, completion: str) -> float:
    return -0.25 * len(prompt.split()) * ("w1" in completion)


def test_a_format_function_sees_prompt_and_completion(tmp_path):
    trainer = powerflow_trainer_of(tmp_path, format_penalty=f"{__name__}:fits")
    rows = [{"prompt": prompt} for prompt in ("w3", "w3 w4 w5") for _ in range(40)]
    scored = trainer._generate_and_score_completions(rows)
    given = scored["penalty"].view(2, 40)
    assert set(given[0].tolist()) == {0.0, -0.25}
    assert set(given[1].tolist()) == {0.0, -0.75}


def test_a_wrong_reference_is_refused(tmp_path):
    with pytest.raises(EnsembleFormatError):
        powerflow_trainer_of(tmp_path / "run", reference=str(tmp_path / "nothing"))
    tiny_ensemble(2, r=8).save(tmp_path / "other_rank")
    with pytest.raises(EnsembleFormatError, match="8"):
        powerflow_trainer_of(tmp_path / "run", reference=str(tmp_path / "other_rank"))
    tiny_ensemble(3).save(tmp_path / "three")
    with pytest.raises(ConfigError, match="one member per policy") as caught:
        powerflow_trainer_of(
            tmp_path / "run", reference=str(tmp_path / "three"), reference_pool="member", num_members=2
        )
    assert caught.value.where == "reference_pool"
    assert not list((tmp_path / "run").glob("*"))


def test_an_ensemble_of_another_number_of_policies_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has 3 members"):
        powerflow_trainer_of(tmp_path, model=tiny_ensemble(3), num_members=2)
