"""An adapter that format version 1 saved through PEFT, kept as files: it loads, merges and is saved anew as it was."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import doran_hf  # noqa: F401
from doran_core.errors import CorruptFileError
from doran_core.merge import merge_checkpoint

KEPT = Path(__file__).parent / "version_1"
TOKENS = torch.arange(10)[None]


def base(folder=KEPT / "base"):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


@pytest.fixture
def expected():
    found = load_file(KEPT / "expected.safetensors")["logits"]
    assert not torch.allclose(found, logits(base()), atol=1e-3)
    return found


def test_it_loads(expected):
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), KEPT / "saved_by_peft")), expected, atol=1e-5)


def test_it_merges(tmp_path, expected):
    merge_checkpoint(KEPT / "base", KEPT / "saved_by_peft", tmp_path / "merged")
    assert torch.allclose(logits(base(tmp_path / "merged")), expected, atol=1e-5)


def test_saved_anew_it_is_of_the_present_version_and_sealed(tmp_path, expected):
    PeftModel.from_pretrained(base(), KEPT / "saved_by_peft").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["format_version"] == 2
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), tmp_path)), expected, atol=1e-5)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        good = (tmp_path / name).read_bytes()
        bad = bytearray(good)
        bad[-20] ^= 1
        (tmp_path / name).write_bytes(bad)
        with pytest.raises((CorruptFileError, ValueError)):
            PeftModel.from_pretrained(base(), tmp_path)
        (tmp_path / name).write_bytes(good)
