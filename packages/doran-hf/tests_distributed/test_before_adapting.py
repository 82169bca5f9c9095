"""Bases that are in parts already when they are adapted: tensor parallel plans, and DeepSpeed's zero.Init."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Adaptation, Model, adapted, train
from processes import Pair, RemoteError
from strategies import Options, deepspeed_config
from test_matrix import EXACT, alone, distances


def adapt_under_a_plan(folder: str, method: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    adapted(Adaptation(method), model=model, targets=["q_proj", "o_proj"])


@pytest.mark.parametrize("method", ["core", "hf"])
def test_a_tensor_parallel_plan_is_refused(pair: Pair, tmp_path: Path, method: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    ).save_pretrained(tmp_path / "base")
    with pytest.raises(RemoteError, match=r"does not adapt models under a tensor parallel plan \(tp_plan\)") as caught:
        pair.run(adapt_under_a_plan, str(tmp_path / "base"), method)
    assert caught.value.kind == "TargetError"


def made_in_zero_init(how: Adaptation, options: Options) -> Any:
    import deepspeed

    torch.manual_seed(0)
    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(options)):
        model = Model()
    return adapted(how, model=model)


def adapted_in_zero_init(how: Adaptation, options: Options) -> Any:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=deepspeed_config(options)):
        return adapted(how)


@pytest.mark.parametrize("method", ["core", "hf"])
def test_zero_init_then_adapt_is_one_process(pair: Pair, method: str) -> None:
    how = Adaptation(method, {"factors": "generated"})
    found = distances(pair.run(train, how, Options("zero3"), None, made_in_zero_init), alone((method, "generated")))
    assert max(found) < EXACT, found


@pytest.mark.parametrize("method", ["core", "hf"])
def test_inside_zero_init_is_refused(pair: Pair, method: str) -> None:
    with pytest.raises(RemoteError, match="adapt it after the context") as caught:
        pair.run(train, Adaptation(method), Options("zero3"), None, adapted_in_zero_init)
    assert caught.value.kind == "TargetError"
