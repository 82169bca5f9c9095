"""Adapters that format version 1 wrote, kept as files: each form still gives the weights that it gave then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from doran_core.adapter import TrainableAdapter, read_adapter, write_trainable
from doran_core.merge import merge_checkpoint

KEPT = Path(__file__).parent / "version_1"
FORMS = ["trainable", "trainable_model_sharing", "trainable_static", "compiled", "peft_dora"]


def merged(adapter, tmp_path):
    merge_checkpoint(KEPT / "base", adapter, tmp_path / "merged", dtype=torch.float64)
    return load_file(tmp_path / "merged" / "model.safetensors")


def expected(form):
    base = {key: value.double() for key, value in load_file(KEPT / "base" / "model.safetensors").items()}
    kept = load_file(KEPT / "expected.safetensors")
    changed = {key.removeprefix(f"{form}/"): value for key, value in kept.items() if key.startswith(f"{form}/")}
    assert len(changed) >= 4
    return base | changed


@pytest.mark.parametrize("form", FORMS)
def test_an_old_adapter_merges_to_what_it_was(tmp_path, form):
    found, wanted = merged(KEPT / form, tmp_path), expected(form)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.allclose(found[key], value, rtol=1e-12, atol=1e-12), key


@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("trainable")])
def test_an_old_adapter_written_anew_is_the_same_function(tmp_path, form):
    record = read_adapter(KEPT / form)
    assert isinstance(record, TrainableAdapter)
    write_trainable(record, tmp_path / "anew")
    found, wanted = merged(tmp_path / "anew", tmp_path), expected(form)
    assert all(torch.allclose(found[key], value, rtol=1e-12, atol=1e-12) for key, value in wanted.items())
