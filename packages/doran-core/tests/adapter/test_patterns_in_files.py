"""Regular expressions and option types in adapter files: no pattern takes the process, no word is true."""

import shutil
import time

import made
import pytest
from damage import edit_config, unseal

from doran_core import adapt
from doran_core.adapter import read_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import AdapterFormatError, ConfigError, DoranError
from doran_core.merge import merge_checkpoint
from doran_core.method.config import DoranConfig

FIELDS = ["rank_pattern", "alpha_pattern", "block_pattern", "target_modules", "exclude_modules"]
EVIL = ["([a-z._0-9]+)+!", "(a|a|[a-z.])*!", "(.*)*(.*)*!", ".*.*.*.*.*.*.*.*!"]
LONG = "model.layers.0." + "a" * 60 + ".q_proj"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    weights = made.base_weights()
    weights[f"{LONG}.weight"] = weights[f"{made.TARGETS[0]}.weight"].clone()
    made.write_base(folder / "base", weights)
    made.write_adapter(folder / "trainable", weights, targets=[LONG], fingerprint=False)
    unseal(folder / "trainable")
    made.write_peft(folder / "peft", made.lora_tensors(LONG, 24, 24))
    return folder


@pytest.mark.parametrize("pattern", EVIL)
@pytest.mark.parametrize(
    "field", ["rank_pattern", "alpha_pattern", "block_pattern", "target_modules", "exclude_modules"]
)
@pytest.mark.parametrize("form", ["trainable", "peft"])
def test_a_pattern_from_a_file_takes_no_time(originals, tmp_path, form, field, pattern):
    folder = shutil.copytree(originals / form, tmp_path / "adapter")
    edit_config(folder, **{field: {pattern: 2} if field in FIELDS[:2] else pattern})
    start = time.monotonic()
    for use in (
        lambda: read_adapter(folder),
        lambda: inspect_adapter(folder),
        lambda: merge_checkpoint(originals / "base", folder, tmp_path / "out"),
    ):
        try:
            use()
        except DoranError:
            assert field == "block_pattern"  # an option that a PEFT adapter does not have
    assert time.monotonic() - start < 5


@pytest.mark.filterwarnings("ignore:rank_pattern")
def test_a_pattern_in_memory_takes_no_time():
    import torch
    from torch import nn

    model = nn.ModuleDict({"a" * 60: nn.Linear(4, 4)})
    start = time.monotonic()
    for options in ({"target_modules": "([a-z]+)+!"}, {"rank_pattern": {"([a-z]+)+!": 2}}, {"block_pattern": "(a+)+!"}):
        try:
            adapt(model, DoranConfig(**({"target_modules": ["a" * 60]} | options))).remove()
        except DoranError:
            assert "target_modules" in options
    assert time.monotonic() - start < 5
    assert torch.is_tensor(model["a" * 60].weight)


@pytest.mark.parametrize("pattern", ["q{99999999999}", "(?i)v", "(", r"(a)\1"])
@pytest.mark.parametrize(("form", "error"), [("trainable", ConfigError), ("peft", AdapterFormatError)])
def test_what_is_no_name_pattern_is_named(originals, tmp_path, form, error, pattern):
    folder = shutil.copytree(originals / form, tmp_path / "adapter")
    edit_config(folder, rank_pattern={pattern: 2})
    with pytest.raises(error, match=r"adapter_config\.json: .*rank_pattern"):
        read_adapter(folder)


@pytest.mark.parametrize("value", ["false", "true", 0, 1, [], None])
@pytest.mark.parametrize("name", ["use_rslora", "experts", "tau_init_relative", "tau_learn_sigma", "share_output"])
def test_words_are_no_booleans(originals, tmp_path, name, value):
    with pytest.raises(ConfigError, match=f"{name}: expected true or false"):
        DoranConfig(**{name: value})
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    edit_config(folder, **{name: value})
    with pytest.raises(ConfigError, match=rf"adapter_config\.json: .*{name}"):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["use_dora", "use_rslora", "fan_in_fan_out"])
def test_words_are_no_booleans_in_files_of_peft_either(originals, tmp_path, name):
    folder = shutil.copytree(originals / "peft", tmp_path / "adapter")
    edit_config(folder, **{name: "false"})
    with pytest.raises(AdapterFormatError, match=rf"adapter_config\.json: {name}='false'"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 10**400},
        {"alpha": 1e400},
        {"hidden_dim": 2**62},
        {"rank": 2**40},
        {"embedding_dim": 2**33},
        {"depth": 2**31},
        {"rank_pattern": {"q_proj": 2**40}},
        {"format_version": 10**19},
        {"tau_init": 10**400},
    ],
)
def test_huge_numbers(originals, tmp_path, values):
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    edit_config(folder, **values)
    with pytest.raises(DoranError, match=r"adapter_config\.json"):
        read_adapter(folder)
