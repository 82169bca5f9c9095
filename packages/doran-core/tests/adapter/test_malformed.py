"""Every malformed adapter is refused by its own error class, with the file and the key in the message."""

import dataclasses
import shutil

import damage
import made
import pytest
import torch
from damage import drop, edit_config, edit_tensors, poison, set_tensor, unseal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from doran_core import DoranConfig
from doran_core.adapter import read_adapter, write_folded, write_trainable
from doran_core.convert import fold_adapter
from doran_core.errors import (
    AdapterFormatError,
    ConfigError,
    CorruptFileError,
    FormatVersionError,
    MissingKeyError,
    NonFiniteError,
    RankError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)
from doran_core.method.config import NOT_SAVED

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}."
MODEL, SCALE, CONFIG = "adapter_model.safetensors", "doran_scale.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    for name, options in {"generated": {}, "static": {"factors": "static", "experts": True}}.items():
        write_trainable(made.trainable_record(weights, **options)[0], folder / name)
    write_folded(fold_adapter(folder / "static", folder / "base"), folder / "folded")
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    def make(form):
        return shutil.copytree(originals / form, tmp_path / form)

    return make


TRAINABLE = [
    ("generated", drop(f"{KEY}doran_adapter.magnitude"), MissingKeyError, "magnitude"),
    ("generated", drop(f"{KEY}doran_adapter.tau.raw"), MissingKeyError, "tau.raw"),
    ("generated", drop(f"{KEY}doran_adapter.factors.w2_B"), MissingKeyError, "factors.w2_B"),
    ("static", drop(f"{KEY}doran_adapter.factors.A"), MissingKeyError, "factors.A"),
    ("static", drop(f"{KEY}doran_adapter.experts.coefficients"), MissingKeyError, "experts.coefficients"),
    ("generated", set_tensor(f"{KEY}lora_A.weight", torch.zeros(4, 24)), UnexpectedKeyError, "lora_A"),
    ("generated", set_tensor("base_model.model.other.weight", torch.zeros(4)), UnexpectedKeyError, "other.weight"),
    (
        "generated",
        set_tensor(f"{KEY}doran_adapter.experts.coefficients", torch.ones(4)),
        UnexpectedKeyError,
        "experts.coefficients",
    ),
    ("static", set_tensor(f"{KEY}doran_adapter.magnitude", torch.ones(24, 1)), TensorShapeError, "magnitude"),
    ("static", set_tensor(f"{KEY}doran_adapter.tau.raw", torch.ones(2)), TensorShapeError, "tau.raw"),
    ("static", set_tensor(f"{KEY}doran_adapter.factors.B", torch.ones(23, 4)), TensorShapeError, "factors.B"),
    ("static", set_tensor(f"{KEY}doran_adapter.factors.A", torch.ones(3, 24)), RankError, Q),
    ("static", set_tensor(f"{KEY}doran_adapter.experts.coefficients", torch.ones(5)), RankError, Q),
    ("static", set_tensor(f"{KEY}doran_adapter.factors.A", torch.ones(4, 24).int()), TensorDtypeError, "int32"),
    ("generated", poison(f"{KEY}doran_adapter.magnitude", float("nan")), NonFiniteError, "magnitude"),
    ("generated", poison(f"{KEY}doran_adapter.factors.w2_A", float("inf")), NonFiniteError, "factors.w2_A"),
]

COMPILED = [
    (MODEL, drop(f"{KEY}lora_A.weight"), MissingKeyError, "lora_A"),
    (MODEL, drop(f"{KEY}lora_magnitude_vector"), MissingKeyError, "lora_magnitude_vector"),
    (MODEL, set_tensor(f"{KEY}lora_C.weight", torch.zeros(4)), UnexpectedKeyError, "lora_C"),
    (MODEL, set_tensor(f"{KEY}lora_B.weight", torch.zeros(24, 3)), RankError, Q),
    (MODEL, set_tensor(f"{KEY}lora_A.weight", torch.zeros(4)), TensorShapeError, Q),
    (MODEL, set_tensor(f"{KEY}lora_magnitude_vector", torch.ones(23)), TensorShapeError, "lora_magnitude_vector"),
    (MODEL, set_tensor(f"{KEY}lora_A.weight", torch.zeros(4, 24).long()), TensorDtypeError, "int64"),
    (MODEL, poison(f"{KEY}lora_B.weight", float("-inf")), NonFiniteError, "lora_B"),
    (SCALE, drop(Q), MissingKeyError, Q),
    (SCALE, set_tensor("model.other", torch.ones(3)), UnexpectedKeyError, "model.other"),
    (SCALE, set_tensor(Q, torch.ones(23)), TensorShapeError, Q),
    (SCALE, set_tensor(Q, torch.ones(24).bfloat16()), TensorDtypeError, "bfloat16"),
    (SCALE, poison(Q, float("nan")), NonFiniteError, Q),
]


@pytest.mark.parametrize(("form", "change", "error", "key"), TRAINABLE)
def test_trainable_tensors(copy, form, change, error, key):
    folder = copy(form)
    edit_tensors(folder / MODEL, change)
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert str(folder / MODEL) in str(caught.value)
    assert key in str(caught.value)


@pytest.mark.parametrize(("file", "change", "error", "key"), COMPILED)
def test_folded_tensors(copy, file, change, error, key):
    folder = copy("folded")
    edit_tensors(folder / file, change)
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert str(folder / file) in str(caught.value)
    assert key in str(caught.value)


def drop_all(end):
    def change(tensors):
        for key in [key for key in tensors if key.endswith(end)]:
            del tensors[key]

    return change


def test_generated_factors_without_any_output_layer(copy):
    folder = copy("generated")
    edit_tensors(folder / MODEL, drop_all("w2_A"))
    edit_tensors(folder / MODEL, drop_all("w2_B"))
    with pytest.raises(MissingKeyError, match=rf"{MODEL}.*factors\.w2_A"):
        read_adapter(folder)


@pytest.mark.parametrize("end", ["trunk.A.embedding", "trunk.B.embedding", "trunk.output_B.12"])
def test_a_group_without_its_trunk(tmp_path, end):
    record, _ = made.trainable_record(made.base_weights(), share_output=True)
    write_trainable(record, tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter" / MODEL, drop(f"{KEY}doran_adapter.factors.{end}"))
    with pytest.raises(MissingKeyError, match=rf"{MODEL}.*factors\.{end}.*q_proj"):
        read_adapter(tmp_path / "adapter")


def test_other_shared_parts_are_checked_when_rebuilt(copy, originals):
    folder = copy("generated")
    edit_tensors(folder / MODEL, drop(f"{KEY}doran_adapter.factors.trunk.A.weights.0"))
    unseal(folder)
    with pytest.raises(AdapterFormatError, match=r"trunk\.A\.weights\.0"):
        fold_adapter(folder, originals / "base")


def test_head_dim_that_does_not_divide_the_rows(tmp_path):
    record, _ = made.trainable_record(made.base_weights(), tau_granularity="head", head_dim=6, factors="static")
    write_trainable(record, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", head_dim=7)
    with pytest.raises(AdapterFormatError, match=rf"{MODEL}: {Q}: .*head_dim=7"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("form", ["generated", "folded"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(copy, form, keep):
    folder = copy(form)
    data = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(data[:keep])
    with pytest.raises(CorruptFileError, match="truncated") as caught:
        read_adapter(folder)
    assert MODEL in str(caught.value)


def test_longer_than_its_header_says(copy):
    folder = copy("generated")
    with (folder / MODEL).open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(CorruptFileError, match="too long"):
        read_adapter(folder)


@pytest.mark.parametrize("save", [damage.torch_save, damage.old_torch_save, damage.pickled])
def test_pickle_in_disguise(copy, save):
    folder = copy("generated")
    save(folder / MODEL)
    with pytest.raises(CorruptFileError, match="pickle"):
        read_adapter(folder)


def test_pickle_by_its_name(copy):
    folder = copy("generated")
    (folder / MODEL).unlink()
    damage.torch_save(folder / "adapter_model.bin")
    with pytest.raises(MissingKeyError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff\xfe"])
def test_config_that_is_not_a_json_object(copy, text):
    folder = copy("generated")
    (folder / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptFileError, match="JSON"):
        read_adapter(folder)


def test_no_such_directory(tmp_path):
    with pytest.raises(MissingKeyError, match="no such adapter directory"):
        read_adapter(tmp_path / "nowhere")


@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_missing_file(copy, name):
    folder = copy("generated")
    (folder / name).unlink()
    with pytest.raises(MissingKeyError, match=name):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"peft_type": ...}, MissingKeyError, "peft_type"),
        ({"peft_type": "IA3"}, AdapterFormatError, "'IA3'"),
        ({"format_version": ...}, MissingKeyError, "format_version"),
        ({"format_version": 3}, FormatVersionError, "upgrade doran-core"),
        ({"format_version": "one"}, FormatVersionError, "'one'"),
        ({"alpha": ...}, MissingKeyError, "no field 'alpha'"),
        ({"tau_kind": ..., "tau_knd": "zero"}, MissingKeyError, "unknown field 'tau_knd', nearest is 'tau_kind'"),
        ({"tau_knd": "zero"}, UnexpectedKeyError, "unknown field 'tau_knd', nearest is 'tau_kind'"),
        ({"an_option_of_tomorrow": None}, UnexpectedKeyError, "an_option_of_tomorrow"),
        ({"rank": -3}, ConfigError, "rank"),
        ({"tau_kind": "wavy"}, ConfigError, "wavy"),
        ({"rank": 5}, RankError, "rank"),
        ({"base_fingerprint": 7}, CorruptFileError, "base_fingerprint"),
        ({"module_kinds": {"a": "bilinear"}}, CorruptFileError, "module_kinds"),
    ],
)
def test_config_fields(copy, changes, error, words):
    folder = copy("static")
    edit_config(folder, **changes)
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("field", sorted({field.name for field in dataclasses.fields(DoranConfig)} - NOT_SAVED))
def test_every_option_must_be_there(copy, field):
    folder = copy("static")
    edit_config(folder, **{field: ...})
    with pytest.raises(MissingKeyError, match=f"{CONFIG}: no field '{field}'$"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"use_dora": False}, MissingKeyError, "lora_magnitude_vector"),
        ({"lora_alpha": 8}, AdapterFormatError, "lora_alpha equal to r"),
        ({"r": 0}, RankError, "rank 0"),
        ({"lora_alpha": "many"}, AdapterFormatError, "many"),
        ({"rank_pattern": [1]}, AdapterFormatError, "rank_pattern"),
        ({"rank_pattern": {"(": 1}}, AdapterFormatError, "regular expression"),
        ({"lora_bias": True}, AdapterFormatError, "lora_bias"),
        ({"init_lora_weights": "pissa"}, AdapterFormatError, "pissa"),
        ({"layer_replication": [[0, 2]]}, AdapterFormatError, "layer_replication"),
        ({"trainable_token_indices": [5]}, AdapterFormatError, "trainable_token_indices"),
        ({"an_option_of_tomorrow": 1}, AdapterFormatError, "an_option_of_tomorrow"),
    ],
)
def test_peft_options(copy, changes, error, words):
    folder = copy("folded")
    edit_config(folder, **changes)
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)


def edit_metadata(folder, **changes):
    with safe_open(folder / SCALE, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / SCALE)
    save_file(tensors, folder / SCALE, metadata={k: v for k, v in (metadata | changes).items() if v is not None})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"format_version": "3"}, FormatVersionError, "upgrade doran-core"),
        ({"format_version": "x"}, FormatVersionError, "'x'"),
        ({"format_version": None}, MissingKeyError, "format_version"),
        ({"form": "half"}, CorruptFileError, "half"),
        ({"adapter_model_sha256": "0" * 64}, CorruptFileError, "belongs to another"),
        ({"adapter_model_sha256": None}, MissingKeyError, "adapter_model_sha256"),
        ({"module_kinds": "{"}, CorruptFileError, "module_kinds"),
    ],
)
def test_scale_metadata(copy, changes, error, words):
    folder = copy("folded")
    edit_metadata(folder, **changes)
    with pytest.raises(error) as caught:
        read_adapter(folder)
    assert words in str(caught.value)
    assert str(folder / SCALE) in str(caught.value)


def test_a_scale_file_of_another_adapter(copy, originals, tmp_path):
    folder = copy("folded")
    write_folded(fold_adapter(originals / "generated", originals / "base"), tmp_path / "second")
    shutil.copy(tmp_path / "second" / SCALE, folder / SCALE)
    with pytest.raises(CorruptFileError, match="belongs to another"):
        read_adapter(folder)
