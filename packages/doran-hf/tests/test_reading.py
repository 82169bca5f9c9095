"""Loading by PEFT is as strict as the format's page: complete configurations, no pickles, files, patterns in time."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_saving import edit_config

from doran_core.errors import AdapterFormatError, ConfigError, CorruptFileError, DoranError, MissingKeyError
from doran_hf import DoranConfig, hotswap_adapter

TENSORS = "adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    get_peft_model(make_llama(), DoranConfig(rank=2)).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def load(folder: Path) -> Any:
    return PeftModel.from_pretrained(make_llama(), folder)


def without(folder: Path, name: str) -> None:
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text())
    del fields[name], fields["digest"]
    file.write_text(json.dumps(fields))


@pytest.mark.parametrize("name", ["alpha", "rank", "tau_kind", "sharing", "use_rslora"])
def test_a_missing_option_is_not_filled_in(saved: Path, name: str) -> None:
    without(saved, name)
    with pytest.raises(MissingKeyError, match=rf"adapter_config\.json: no field '{name}'"):
        load(saved)


def test_a_misspelt_option_is_named(saved: Path) -> None:
    without(saved, "alpha")
    edit_config(saved, alhpa=3.0)
    with pytest.raises(MissingKeyError, match=r"unknown field 'alhpa', nearest is 'alpha'"):
        load(saved)


@pytest.mark.parametrize(
    "name", ["use_rslora", "experts", "tau_init_relative", "inference_mode", "ensure_weight_tying"]
)
def test_words_are_no_booleans(saved: Path, name: str) -> None:
    edit_config(saved, **{name: "false"})
    with pytest.raises(ConfigError, match=rf"{name}: expected true or false, got 'false'"):
        load(saved)


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


USES = {
    "load": lambda model, folder: load(folder),
    "load with a configuration": lambda model, folder: PeftModel.from_pretrained(
        make_llama(), folder, config=model.peft_config["default"]
    ),
    "load from a subfolder": lambda model, folder: PeftModel.from_pretrained(
        make_llama(), folder.parent, subfolder=folder.name, config=model.peft_config["default"]
    ),
    "load beside": lambda model, folder: model.load_adapter(folder, "second"),
    "load again": lambda model, folder: model.load_adapter(folder, "default"),
    "hotswap": lambda model, folder: hotswap_adapter(model, str(folder)),
}


@pytest.mark.parametrize("use", USES)
def test_a_pickle_is_never_opened(saved: Path, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(saved)
    as_pickle(saved)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(MissingKeyError, match=r"adapter_model\.bin is a pickle, which doran never opens"):
        USES[use](model, saved)


def on_the_hub(saved: Path, cache: Path) -> None:
    """The adapter as huggingface_hub keeps what it has downloaded of the repository me/adapter."""
    repository = cache / "models--me--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    saved.rename(repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("with_config", [False, True])
def test_a_pickle_from_the_hub_is_not_opened(saved: Path, tmp_path: Path, with_config: bool) -> None:
    config = load(saved).peft_config["default"]
    as_pickle(saved)
    on_the_hub(saved, tmp_path / "cache")
    with pytest.raises(MissingKeyError, match=r"me/adapter: has no adapter_model\.safetensors"):
        PeftModel.from_pretrained(
            make_llama(), "me/adapter", config=config if with_config else None, cache_dir=tmp_path / "cache"
        )


def test_an_adapter_from_the_hub_is_checked(saved: Path, tmp_path: Path) -> None:
    on_the_hub(saved, tmp_path / "cache")
    PeftModel.from_pretrained(make_llama(), "me/adapter", cache_dir=tmp_path / "cache")
    file = next(tmp_path.rglob(TENSORS))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptFileError, match="have the digest"):
        PeftModel.from_pretrained(make_llama(), "me/adapter", cache_dir=tmp_path / "cache")


def test_a_pipe_is_not_waited_for(saved: Path) -> None:
    (saved / TENSORS).unlink()
    os.mkfifo(saved / TENSORS)
    with pytest.raises(CorruptFileError, match=rf"{TENSORS}: is a pipe"):
        load(saved)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": "x"},
        {"layer_replication": [["a", 1]]},
        {"target_modules": 5},
        {"rank_pattern": [1]},
        {"layers_pattern": "(a+)+"},
        {"task_type": "NONSENSE"},
        {"bias": []},
        {"block_pattern": "("},
        {"module_kinds": 3},
    ],
)
def test_what_is_wrong_is_named_with_the_file(saved: Path, values: dict[str, Any]) -> None:
    edit_config(saved, **values)
    with pytest.raises(DoranError, match=r"adapter_config\.json: "):
        load(saved)


EVIL = "([a-z._0-9]+)+!"


@pytest.mark.parametrize(
    "values",
    [
        {"rank_pattern": {EVIL: 2}},
        {"alpha_pattern": {EVIL: 2.0}},
        {"target_modules": EVIL},
        {"exclude_modules": EVIL},
        {"modules_to_save": [EVIL]},
        {"block_pattern": EVIL},
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_pattern_takes_no_time(saved: Path, values: dict[str, Any]) -> None:
    edit_config(saved, **values)
    start = time.monotonic()
    try:
        load(saved)
    except (DoranError, ValueError):  # PEFT: no target module was found
        assert "rank_pattern" not in values
        assert "alpha_pattern" not in values
    assert time.monotonic() - start < 5


def test_regexes_choose_the_modules_that_they_chose() -> None:
    model = get_peft_model(
        make_llama(), DoranConfig(target_modules=r".*\.(q|k)_proj", exclude_modules=r".*layers\.0\..*k_proj", rank=2)
    )
    adapted = {key.partition(".doran_adapter")[0] for key in model.state_dict() if "doran_adapter" in key}
    assert {name.rpartition("layers.")[2] for name in adapted} == {
        "0.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.self_attn.k_proj",
        "2.self_attn.q_proj",
        "2.self_attn.k_proj",
    }


def test_a_pattern_that_matches_nothing_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern: \['zzz'\] match no adapted module"):
        get_peft_model(make_llama(), DoranConfig(rank_pattern={"zzz": 3, "q_proj": 2}))


def test_the_error_is_an_adapter_format_error(saved: Path) -> None:
    (saved / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json"):
        DoranConfig.from_pretrained(str(saved))
