"""Settings: TRL's and ours, checked when they are given, each refusal naming the key and what to give instead."""

import math

import pytest
from tiny import sft_config
from trl import DPOConfig, SFTConfig

from renyi import RenyiDPOConfig, RenyiSFTConfig
from renyi.errors import ConfigError


def test_the_defaults_are_the_promised_ones(tmp_path):
    config = RenyiSFTConfig(str(tmp_path), bf16=False)
    assert (config.num_members, config.alpha) == (4, 0.8)
    assert (config.alpha_hold_ratio, config.alpha_ramp_ratio) == (0.2, 0.2)
    assert (config.routing_quantity, config.mixture_weights, config.prior_std) == ("sequence", "uniform", None)
    assert config.learning_rate == 2e-4
    assert isinstance(config, SFTConfig)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_members", 0),
        ("num_members", -1),
        ("alpha", -0.1),
        ("alpha", 1.5),
        ("alpha", math.nan),
        ("alpha", math.inf),
        ("alpha_hold_ratio", -0.1),
        ("alpha_hold_ratio", 1.1),
        ("alpha_hold_ratio", math.nan),
        ("alpha_ramp_ratio", -0.1),
        ("alpha_ramp_ratio", 0.9),  # with the hold of 0.2 more than the whole
        ("alpha_ramp_ratio", math.nan),
        ("routing_quantity", "word"),
        ("mixture_weights", "random"),
        ("mixture_weights_rate", 0.0),
        ("mixture_weights_rate", 1.5),
        ("mixture_weights_rate", math.nan),
        ("prior_std", 0.0),
        ("prior_std", -1.0),
        ("prior_std", math.nan),
        ("prior_std", math.inf),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
        ("early_stopping_patience", 0),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_name(tmp_path, key, value):
    with pytest.raises(ConfigError) as caught:
        sft_config(tmp_path, **{key: value})
    assert caught.value.where == key
    assert repr(value) in str(caught.value)
    assert caught.value.hint.startswith("Give ")
    assert isinstance(caught.value, ValueError)


def test_wrapped_packing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="wrapped") as caught:
        sft_config(tmp_path, packing=True, packing_strategy="wrapped")
    assert "bfd" in caught.value.hint
    sft_config(tmp_path, packing=True, packing_strategy="bfd_split")


@pytest.mark.parametrize(("hold", "ramp"), [(0, 0), (1, 0), (0, 1), (0.9, 0.1), (0.7, 0.3), (0.8, 0.2), (0.4, 0.6)])
def test_hold_and_ramp_may_fill_the_whole_run(tmp_path, hold, ramp):
    """Even where floats say that 1 − 0.9 is less than 0.1."""
    config = sft_config(tmp_path, alpha_hold_ratio=hold, alpha_ramp_ratio=ramp)
    assert config.alpha_ramp_ratio == ramp


def test_early_stopping_needs_evaluations(tmp_path):
    with pytest.raises(ConfigError) as caught:
        sft_config(tmp_path, early_stopping_patience=2)
    assert caught.value.where == "early_stopping_patience"
    assert "eval_strategy" in caught.value.hint


@pytest.mark.parametrize("metric", ["nll_mixture", "eval_nll_mixture", "eval_nll_members", "loss", "eval_loss"])
def test_a_smaller_nll_is_the_better_one(tmp_path, metric):
    """transformers takes every metric that is not called a loss for one that should grow."""
    config = sft_config(tmp_path, eval_strategy="epoch", metric_for_best_model=metric)
    assert config.greater_is_better is False
    assert sft_config(tmp_path, metric_for_best_model="mean_token_accuracy").greater_is_better is True
    assert sft_config(tmp_path, metric_for_best_model=metric, greater_is_better=True).greater_is_better is True


def test_early_stopping_watches_the_loss_unless_told_otherwise(tmp_path):
    config = sft_config(tmp_path, eval_strategy="epoch", early_stopping_patience=2)
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)
    config = sft_config(tmp_path, eval_strategy="epoch", early_stopping_patience=2, metric_for_best_model="nll_mixture")
    assert config.metric_for_best_model == "nll_mixture"


@pytest.mark.parametrize(("config", "plain"), [(RenyiSFTConfig, SFTConfig), (RenyiDPOConfig, DPOConfig)])
def test_every_field_says_what_it_is_for(config, plain):
    """`renyi sft --help` and `renyi dpo --help` show these."""
    own = config.__dataclass_fields__.keys() - plain.__dataclass_fields__.keys()
    assert len(own) >= 9
    for name in own:
        assert config.__dataclass_fields__[name].metadata.get("help"), name
        assert any(f"{name}: " in (base.__doc__ or "") for base in config.__mro__ if "renyi" in base.__module__)
