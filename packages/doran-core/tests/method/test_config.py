"""DoranConfig: a bad value names field and value; patterns choose rank and scaling; to_dict round-trips."""

import math

import pytest

from doran_core.errors import ConfigError
from doran_core.method.config import DoranConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", 4.0),
        ("rank", True),
        ("alpha", math.nan),
        ("alpha", "16"),
        ("dropout", 1.0),
        ("expert_dropout", -0.1),
        ("tau_kind", "noisy"),
        ("tau_granularity", "column"),
        ("tau_init", -1.0),
        ("norm_grad", True),
        ("norm_method", "fast"),
        ("factors", "dynamic"),
        ("sharing", "head"),
        ("activation", "swish"),
        ("depth", 0),
        ("hidden_dim", -3),
        ("head_dim", 0),
        ("factor_penalty", -1.0),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "big"}),
        ("alpha_pattern", {"q_proj[": 1.0}),
        ("block_pattern", "layer("),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value(field, value):
    with pytest.raises(ConfigError) as error:
        DoranConfig(**{field: value})
    assert field in str(error.value)
    if not isinstance(value, dict):
        assert repr(value) in str(error.value)


def test_options_that_exclude_each_other():
    with pytest.raises(ConfigError, match="expert_mask='expert' needs experts=True"):
        DoranConfig(expert_mask="expert")
    for options in ({"factors": "static"}, {"sharing": "none"}):
        with pytest.raises(ConfigError, match="share_output=True needs"):
            DoranConfig(share_output=True, **options)


def test_patterns_match_in_full_or_from_a_dot():
    config = DoranConfig(
        rank=8,
        alpha=16,
        rank_pattern={"v_proj": 4, r"model\.layers\.0\.q_proj": 2},
        alpha_pattern={"v_proj": 32},
    )
    assert config.rank_for("model.layers.7.v_proj") == 4
    assert config.rank_for("model.layers.7.rev_proj") == 8
    assert config.rank_for("model.layers.0.q_proj") == 2
    assert config.scaling_for("model.layers.7.v_proj") == 8.0
    assert config.scaling_for("model.layers.1.q_proj") == 2.0
    assert DoranConfig(rank=16, alpha=16, use_rslora=True).scaling_for("x") == 4.0


def test_dict_round_trip_and_unknown_field():
    config = DoranConfig(rank=3, target_modules=["q"], rank_pattern={"q": 2}, tau_kind="gaussian")
    assert DoranConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"unknown field\(s\) \['lora_alpha'\]"):
        DoranConfig.from_dict({"lora_alpha": 3})
