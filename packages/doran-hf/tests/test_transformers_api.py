"""transformers' own adapter calls: add_adapter, load_adapter, set_adapter, disable, delete, save, from_pretrained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import disturb, logits, make_llama
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from doran_hf import DoranConfig, tau_by_layer


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits: transformers' loader takes the tensors of the file as they lie, and sums over
    unaligned memory are taken in another order. PEFT's loader gives the same bits, see test_saving."""
    bound = 1e-5 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def test_add_switch_disable_delete() -> None:
    model = make_llama()
    base = logits(model)
    model.add_adapter(DoranConfig(), "one")
    disturb(model, "one")
    one = logits(model)
    model.add_adapter(DoranConfig(target_modules="all-linear"), "two")
    assert torch.equal(logits(model), base)
    disturb(model, "two")
    two = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    assert set(tau_by_layer(model)) == {f"model.layers.{i}.self_attn.{p}_proj" for i in range(3) for p in "qv"}
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"target_modules": "all-linear", "sharing": "model"}], ids=str)
def test_saved_by_either_loads_by_either(dtype: torch.dtype, options: dict[str, str], tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")

    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)

    native = base()
    native.add_adapter(DoranConfig(**options), "mine")
    disturb(native, "mine")
    expected = logits(native)
    native.save_pretrained(tmp_path / "native")
    wrapped = PeftModel.from_pretrained(base(), tmp_path / "native", adapter_name="second")
    assert torch.equal(logits(wrapped), expected)
    wrapped.save_pretrained(tmp_path / "peft")

    loaded = base()
    loaded.load_adapter(str(tmp_path / "peft" / "second"), adapter_name="third")
    assert_same(logits(loaded), expected)
    assert all(p.dtype == torch.float32 for n, p in loaded.named_parameters() if "doran_" in n)


def test_from_pretrained_on_an_adapter_directory(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), DoranConfig())
    disturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
