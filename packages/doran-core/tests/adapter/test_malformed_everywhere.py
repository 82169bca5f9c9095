"""Whatever is done with a malformed adapter of any form, a named error says what is wrong and where."""

import shutil

import damage
import made
import pytest
import torch
from damage import drop, edit_config, edit_tensors, poison, set_tensor
from torch import nn

from doran_core import load
from doran_core.adapter import read_adapter, write_folded
from doran_core.convert import fold_adapter, to_peft_dora
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import (
    BaseMismatchError,
    CheckpointError,
    CorruptFileError,
    MissingKeyError,
    NonFiniteError,
    RankError,
    TensorDtypeError,
    TensorShapeError,
    UnexpectedKeyError,
)
from doran_core.merge import merge_checkpoint

CONFIG, TENSORS, SCALES = "adapter_config.json", "adapter_model.safetensors", "doran_scale.safetensors"
MODULE = "model.layers.0.self_attn.q_proj"
A, B, MAGNITUDE = (  # the same tensor in the trainable form and in those that PEFT reads
    {"trainable": f"{MODULE}.doran_adapter.{trainable}", "folded": f"{MODULE}.{peft}", "peft": f"{MODULE}.{peft}"}
    for trainable, peft in (
        ("factors.A", "lora_A.weight"),
        ("factors.B", "lora_B.weight"),
        ("magnitude", "lora_magnitude_vector"),
    )
)
FORMS = ("trainable", "folded", "peft")


def tensors(change):
    return lambda folder, form: edit_tensors(folder / TENSORS, change(form))


def key(names, form):
    return f"base_model.model.{names[form]}"


def truncated(folder, form):
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[: len(data) // 2])


CASES = {
    "missing key": (tensors(lambda form: drop(key(MAGNITUDE, form))), MissingKeyError, TENSORS, "magnitude"),
    "missing file": (lambda folder, form: (folder / TENSORS).unlink(), MissingKeyError, TENSORS, ""),
    "extra key": (
        tensors(lambda form: set_tensor("base_model.model.other.weight", torch.ones(2))),
        UnexpectedKeyError,
        TENSORS,
        "other.weight",
    ),
    "wrong shape": (
        tensors(lambda form: set_tensor(key(MAGNITUDE, form), torch.ones(23))),
        TensorShapeError,
        TENSORS,
        MODULE,
    ),
    "wrong dtype": (
        tensors(lambda form: set_tensor(key(B, form), torch.ones(24, 4, dtype=torch.int8))),
        TensorDtypeError,
        TENSORS,
        MODULE,
    ),
    "NaN": (tensors(lambda form: poison(key(B, form), float("nan"))), NonFiniteError, TENSORS, MODULE),
    "wrong rank": (tensors(lambda form: set_tensor(key(A, form), torch.ones(3, 24))), RankError, TENSORS, MODULE),
    "truncated": (truncated, CorruptFileError, TENSORS, "truncated"),
    "not JSON": (lambda folder, form: (folder / CONFIG).write_text("rank: 4"), CorruptFileError, CONFIG, "JSON"),
    "a pickle": (lambda folder, form: damage.torch_save(folder / TENSORS), CorruptFileError, TENSORS, "pickle"),
}


def model():
    """The adapted modules of the made base, live."""
    root = nn.Module()
    for name, weight in made.base_weights().items():
        if name.removesuffix(".weight") in made.TARGETS:
            *path, last = name.removesuffix(".weight").split(".")
            parent = root
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.weight = nn.Parameter(weight)
            parent.add_module(last, layer)
    return root


ACTIONS = {
    "read": lambda folder, base, out: read_adapter(folder),
    "load": lambda folder, base, out: load(model(), folder),
    "merge": lambda folder, base, out: merge_checkpoint(base, folder, out),
    "convert": lambda folder, base, out: write_folded(fold_adapter(folder, base), out),
    "inspect": lambda folder, base, out: inspect_adapter(folder),
    "inspect with its base": lambda folder, base, out: inspect_adapter(folder, base),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    made.write_base(folder / "same sizes", {name: 2 * weight for name, weight in weights.items()})
    smaller = {name: weight[:, :20] if weight.dim() == 2 else weight for name, weight in weights.items()}
    made.write_base(folder / "other sizes", {name: weight.contiguous() for name, weight in smaller.items()})
    made.write_adapter(folder / "trainable", weights, factors="static")
    folded = fold_adapter(folder / "trainable", folder / "base")
    write_folded(folded, folder / "folded")
    to_peft_dora(folded, folder / "peft")
    return folder


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_refused(originals, tmp_path, case, form, action):
    spoil, error, file, words = CASES[case]
    folder = shutil.copytree(originals / form, tmp_path / "adapter")
    spoil(folder, form)
    with pytest.raises(error) as caught:
        ACTIONS[action](folder, originals / "base", tmp_path / "out")
    assert type(caught.value) is error
    assert str(folder / file) in str(caught.value)
    assert words in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


USES_BASE = ("merge", "convert", "inspect with its base")


@pytest.mark.parametrize("action", USES_BASE)
@pytest.mark.parametrize("form", ["trainable", "folded"])
def test_another_base_of_the_same_sizes(originals, tmp_path, form, action):
    with pytest.raises(BaseMismatchError) as caught:
        ACTIONS[action](originals / form, originals / "same sizes", tmp_path / "out")
    assert str(caught.value).count("sha256:") == 2
    assert str(originals / form) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", USES_BASE)
@pytest.mark.parametrize("form", FORMS)
def test_another_base_of_other_sizes(originals, tmp_path, form, action):
    """PEFT records no fingerprint, so sizes are all that can be told there."""
    with pytest.raises(CheckpointError, match=rf"safetensors: {MODULE}.weight.*does not fit"):
        ACTIONS[action](originals / form, originals / "other sizes", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_base_in_memory(originals):
    other = model()
    with torch.no_grad():
        other.get_submodule(MODULE).weight.mul_(2)
    with pytest.raises(BaseMismatchError) as caught:
        load(other, originals / "trainable")
    assert str(caught.value).count("sha256:") == 2


@pytest.mark.parametrize("action", ["read", "merge", "convert", "inspect"])
@pytest.mark.parametrize(
    ("case", "change", "error"),
    [
        ("missing key", drop(MODULE), MissingKeyError),
        ("extra key", set_tensor("other", torch.ones(2)), UnexpectedKeyError),
        ("wrong shape", set_tensor(MODULE, torch.ones(23)), TensorShapeError),
        ("wrong dtype", set_tensor(MODULE, torch.ones(24).half()), TensorDtypeError),
        ("NaN", poison(MODULE, float("nan")), NonFiniteError),
    ],
)
def test_scales_beside_a_compiled_adapter(originals, tmp_path, case, change, error, action):
    folder = shutil.copytree(originals / "folded", tmp_path / "adapter")
    edit_tensors(folder / SCALES, change)
    with pytest.raises(error) as caught:
        ACTIONS[action](folder, originals / "base", tmp_path / "out")
    assert str(folder / SCALES) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_wrong_rank_in_the_configuration(originals, tmp_path, form, action):
    folder = shutil.copytree(originals / form, tmp_path / "adapter")
    edit_config(folder, **{"rank" if form == "trainable" else "r": 7})
    with pytest.raises(RankError, match="7 in the configuration"):
        ACTIONS[action](folder, originals / "base", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
