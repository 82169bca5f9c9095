"""DoRAN on routers, against an oracle that materialises W' in float64, and through files."""

import pytest
import torch
from moe_bases import EXPERTS, FAMILIES, make_moe, tokens, train
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from doran_core.adapter import read_adapter
from doran_core.convert import fold_adapter
from doran_core.errors import TargetError
from doran_core.merge import merge_checkpoint
from doran_hf import DoranConfig
from doran_hf.layer import doran_layers
from doran_hf.router_layers import RouterDoranLayer

ROUTER = {"mixtral": "gate", "qwen3_moe": "gate", "olmoe": "gate", "gpt_oss": "router"}


def adapted(family, dtype=torch.float32, **options):
    fields = {"rank": 2, "target_modules": [ROUTER[family]], "task_type": "CAUSAL_LM"} | options
    return get_peft_model(make_moe(family, "eager", dtype), DoranConfig(**fields))


def loss(logits):
    return (logits * torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype).view(logits.shape)).sum()


def materialised(layer):
    """W' in float64 and differentiable, from the formulas."""
    adapter = layer.adapter("default")
    A, B = (factor.double() for factor in adapter.factor_pair())
    V = layer.original_weight().double() + adapter.scaling * B @ A
    tau = nn.functional.softplus(adapter.tau.raw.double())
    return (adapter.magnitude.double() / (V.square().sum(1).sqrt() + tau))[:, None] * V


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_to_the_last_bit(family, dtype):
    model = adapted(family, dtype)
    assert [type(layer) for layer in doran_layers(model)] == [RouterDoranLayer] * 2
    assert torch.equal(model(tokens()).logits, make_moe(family, "eager", dtype)(tokens()).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"factors": "static", "tau_granularity": "row"}], ids=["generated", "static"])
def test_one_steps_gradients_equal_the_oracle(family, options):
    model = train(adapted(family, torch.float64, **options))
    logits = model(tokens()).logits
    loss(logits).backward()
    mine = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    weights = {layer.parameter_name: materialised(layer) for layer in doran_layers(model)}
    expected = functional_call(make_moe(family, "eager", torch.float64), weights, (tokens(),)).logits
    loss(expected).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerged_reloaded_merged_folded_and_the_merged_checkpoint_agree(family, tmp_path):
    model = train(adapted(family, target_modules=[ROUTER[family], "q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    base = make_moe(family)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected = model(tokens()).logits
        assert (expected - base(tokens()).logits).abs().max() > 1e-2
        again = PeftModel.from_pretrained(make_moe(family, "eager"), tmp_path / "adapter")
        torch.testing.assert_close(again(tokens()).logits, expected, rtol=0, atol=1e-6)
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert {key.split(".")[-2] for key in changed} == {ROUTER[family], "q_proj"}
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(merged(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
        assert folded.modules.keys() == read_adapter(tmp_path / "adapter").modules.keys()
        model.merge_adapter()
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(tokens()).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, make_moe(family, "eager")(tokens()).logits)
        plain = model.merge_and_unload()
        torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    assert type(plain) is type(base)


def test_target_parameters_mean_what_pefts_lora_means():
    """A router's weight there is the router's adapter; "all-linear" leaves routers out."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight", "experts.down_proj"])
    model = get_peft_model(make_moe("mixtral"), lora)
    theirs = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    wanted = {name.removeprefix("base_model.model.").rpartition(".")[2] for name in theirs}
    assert wanted >= {"q_proj", "gate"}
    mine = get_peft_model(make_moe("mixtral"), DoranConfig.from_lora(lora))
    found = {layer.name.split(".", 3)[3] for layer in doran_layers(mine)}
    assert found == {"self_attn.q_proj", "mlp.gate", "mlp.experts.down_proj"}
    everything = get_peft_model(make_moe("mixtral"), DoranConfig(rank=2, target_modules="all-linear"))
    assert not any(isinstance(layer, RouterDoranLayer) for layer in doran_layers(everything))
    both = DoranConfig(rank=2, target_modules=r".*\.q_proj", target_parameters=["gate.weight"])
    found = {layer.name.rpartition(".")[2] for layer in doran_layers(get_peft_model(make_moe("mixtral"), both))}
    assert found == {"q_proj", "gate"}


def test_two_adapters_add_up_their_changes():
    model = train(adapted("mixtral"))
    with torch.no_grad():
        first = [layer.adapter("default").merged_weight(layer.original_weight()) for layer in doran_layers(model)]
        model.add_adapter("other", DoranConfig(rank=2, target_modules=["gate"], task_type="CAUSAL_LM"))
        for layer in doran_layers(model):
            layer.adapter("other").magnitude.mul_(1.5)
        model.base_model.set_adapter(["default", "other"])
        weights = {}
        for layer, one in zip(doran_layers(model), first, strict=True):
            W0 = layer.original_weight()
            other = layer.adapter("other").merged_weight(W0)
            weights[f"{layer.name}.weight"] = (one + other - W0).float()
        expected = functional_call(make_moe("mixtral", "eager"), weights, (tokens(),)).logits
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_router_that_computes_in_float32():
    torch.manual_seed(0)
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    config = DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=EXPERTS, num_experts_per_tok=2,
        n_group=1, topk_group=1, first_k_dense_replace=1, **sizes,
    )  # fmt: skip
    base = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    nn.init.normal_(base.model.layers[1].mlp.gate.weight, std=0.2)
    expected = base(tokens()).logits
    model = get_peft_model(base, DoranConfig(rank=2, target_modules=["mlp.gate"], task_type="CAUSAL_LM"))
    assert torch.equal(model(tokens()).logits, expected)
    train(model)
    (layer,) = doran_layers(model)
    seen = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    model(tokens())
    x, output = seen[0]
    wanted = x.double().view(-1, 32) @ materialised(layer).T
    # W0 is bfloat16, the arithmetic float32, and the low-rank part's factors are cast to x's dtype there.
    torch.testing.assert_close(
        (output[0] if isinstance(output, tuple) else output).double(), wanted, rtol=1e-5, atol=1e-5
    )


def test_a_replaced_forward_is_refused_by_name():
    model = adapted("mixtral")
    router = next(iter(doran_layers(model))).base_layer
    router.forward = router.forward
    with pytest.raises(TargetError, match=r"model\.layers\.0\.mlp\.gate: MixtralTopKRouter\.forward has been replaced"):
        model(tokens())
