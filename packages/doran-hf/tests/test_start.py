"""An adapter that was just made leaves the model as it is: for every option, family and dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MAKERS, disturb, logits, make_llama
from peft import PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from doran_core.errors import ConfigError
from doran_hf import DoranConfig, refresh
from doran_hf.layer import doran_layers

OPTIONS: list[dict[str, Any]] = [
    {},
    {"target_modules": "all-linear"},
    {"factors": "static"},
    {"sharing": "model"},
    {"sharing": "none", "depth": 3},
    {"share_output": True, "target_modules": "all-linear"},
    {"tau_kind": "fixed"},
    {"tau_kind": "zero"},
    {"tau_kind": "gaussian", "tau_learn_sigma": True},
    {"tau_granularity": "row"},
    {"tau_granularity": "head"},
    {"norm_grad": "detached", "norm_method": "direct"},
    {"experts": True, "expert_mask": "expert", "expert_dropout": 0.3},
    {"use_rslora": True, "tau_init_relative": False, "tau_init": 0.5},
    {"target_modules": ["embed_tokens", "q_proj"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_starts_at_the_base_model(options: dict[str, Any]) -> None:
    model = make_llama()
    expected = logits(model)
    wrapped = get_peft_model(model, DoranConfig(task_type="CAUSAL_LM", **options))
    assert (logits(wrapped) - expected).abs().max() < 1e-5
    disturb(wrapped)
    assert (logits(wrapped) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", MAKERS)
@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_every_family_starts_at_the_base_model(family: str, targets: str | None) -> None:
    model = MAKERS[family]()
    expected = logits(model, family)
    wrapped = get_peft_model(model, DoranConfig(target_modules=targets))
    assert (logits(wrapped, family) - expected).abs().max() < 1e-5
    disturb(wrapped)
    assert (logits(wrapped, family) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("autocast", [True, False])  # False is TRL's choice under ZeRO-3
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", MAKERS)
def test_half_precision_base_starts_equal_to_the_bit(family: str, dtype: torch.dtype, autocast: bool) -> None:
    model = MAKERS[family](dtype)
    expected = logits(model, family)
    wrapped = get_peft_model(model, DoranConfig(target_modules="all-linear"), autocast_adapter_dtype=autocast)
    assert torch.equal(logits(wrapped, family), expected)
    for layer in doran_layers(wrapped):
        assert all(tensor.dtype == torch.float32 for tensor in layer.doran_adapter.parameters())


def test_adapter_stays_float32_when_the_model_is_cast() -> None:
    model = get_peft_model(make_llama(), DoranConfig())
    reference = logits(make_llama(torch.bfloat16))
    model.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "doran_" in n)
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize("factors", ["generated", "static"])
def test_a_trained_adapter_is_not_rounded_when_the_model_is_cast(factors: str) -> None:
    config = {"target_modules": "all-linear", "factors": factors}
    model = get_peft_model(make_llama(), DoranConfig(**config), autocast_adapter_dtype=False)
    disturb(model)
    before = {name: p.clone() for name, p in model.named_parameters() if "doran_" in name}
    on_half = get_peft_model(make_llama(torch.bfloat16), DoranConfig(**config), autocast_adapter_dtype=False)
    for name, parameter in on_half.named_parameters():
        if name in before:
            parameter.data.copy_(before[name])
    model.to(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "doran_" not in name} == {torch.bfloat16}
    for name, parameter in model.named_parameters():
        assert name not in before or (parameter.dtype == torch.float32 and torch.equal(parameter, before[name]))
    assert torch.equal(logits(model), logits(on_half))  # and ||W0||^2 is that of the rounded weight


def test_weights_written_to_unseen_are_taken_anew() -> None:
    config = {"target_modules": "all-linear"}
    changed = make_llama()
    for parameter in changed.parameters():
        parameter.data.mul_(2)
    expected = get_peft_model(changed, DoranConfig(**config))
    model = get_peft_model(make_llama(), DoranConfig(**config))
    disturb(model)
    disturb(expected)
    values = dict(model.named_parameters())
    for name, parameter in expected.named_parameters():
        if "doran_" in name:
            parameter.data.copy_(values[name])
        else:
            values[name].data.copy_(parameter)
    assert (logits(model) - logits(expected)).abs().max() > 1e-3  # its norms are those of the former weights
    refresh(model)
    assert torch.equal(logits(model), logits(expected))
    with pytest.raises(ConfigError, match="has no DoRAN adapter"):
        refresh(make_llama())


class Products(TorchDispatchMode):
    """Collects the shapes of the operands of all matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "mv", "matmul", "linear", "dot", "einsum")):
            self.operands |= {tuple(arg.shape) for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("factors", ["generated", "static"])
def test_neither_start_nor_loading_multiplies_with_a_base_weight(factors: str, tmp_path: Path) -> None:
    weights = {tuple(p.shape) for p in make_llama().parameters() if p.dim() == 2}
    weights |= {shape[::-1] for shape in weights}
    with Products() as start:
        model = get_peft_model(make_llama(), DoranConfig(target_modules="all-linear", rank=3, factors=factors))
    disturb(model)
    model.save_pretrained(tmp_path)
    with Products() as loading:
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path)
    assert not (start.operands | loading.operands) & weights
    with Products() as forward:
        logits(loaded)
    assert forward.operands & weights
