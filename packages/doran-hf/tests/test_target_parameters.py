"""DoRAN on stacked expert weights, against an oracle that materialises W' of every expert in float64."""

import copy
import gc
import math
import warnings

import pytest
import torch
from moe_bases import EXPERTS, FAMILIES, IMPLEMENTATIONS, make_moe, tokens, train
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from doran_core.errors import ConfigError, TargetError
from doran_hf import DoranConfig, layer_states
from doran_hf.expert_layers import DoranExperts, DoranStack
from doran_hf.layer import doran_layers

TARGETS = ["experts.gate_up_proj", "experts.down_proj"]


def config(**options):
    return DoranConfig(
        **({"rank": 3, "target_modules": [], "target_parameters": TARGETS, "task_type": "CAUSAL_LM"} | options)
    )


def adapted(family, implementation="grouped_mm", dtype=torch.float32, **options):
    return get_peft_model(make_moe(family, implementation, dtype), config(**options))


def loss(logits):
    """Of all logits, none of them alike."""
    weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype).view(logits.shape)
    return (logits * weights).sum() / math.sqrt(logits.numel())


def materialised(stack, adapter_name="default"):
    """W' as the module stores it, in float64 and differentiable, from the formulas."""
    adapter = stack.adapter(adapter_name)
    A, B = (factor.double() for factor in adapter.factor_pair())
    raw = adapter.tau.raw.double()
    weight = stack.original_weight().double()
    tau = nn.functional.softplus(raw)
    if raw.numel() > 1:
        tau = tau.reshape(EXPERTS, -1)
    experts = []
    for e in range(EXPERTS):
        V = weight[e] + adapter.scaling * B[e] @ A[e]
        own = tau[e] if tau.dim() == 2 else tau
        experts.append((adapter.magnitude[e].double() / (V.square().sum(1).sqrt() + own))[:, None] * V)
    whole = torch.stack(experts)
    return whole.mT if stack.view.transposed else whole


def oracle_logits(family, model):
    base = make_moe(family, "eager", torch.float64)
    weights = {layer.name: materialised(layer) for layer in doran_layers(model)}
    return functional_call(base, weights, (tokens(),)).logits


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base_to_the_last_bit(family, implementation, dtype):
    base = make_moe(family, implementation, dtype)
    expected = base(tokens()).logits
    model = get_peft_model(base, config())
    assert torch.equal(model(tokens()).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
        assert torch.equal(model(tokens(1, 1)).logits, make_moe(family, implementation, dtype)(tokens(1, 1)).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{}, {"factors": "static", "tau_granularity": "expert"}], ids=["generated", "static"]
)
def test_one_steps_gradients_equal_the_oracle(family, implementation, options):
    exact = implementation != "grouped_mm"  # torch's grouped product has no float64
    model = train(adapted(family, implementation, torch.float64 if exact else torch.float32, **options))
    logits = model(tokens()).logits
    loss(logits).backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    expected = oracle_logits(family, model)
    loss(expected).backward()
    tolerance = 1e-9 if exact else 2e-5
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            size = parameter.grad.abs().max()
            assert size > 0, name
            assert (mine[name] - parameter.grad).abs().max() <= max(tolerance, 1e-8) * 10 * size, name


@pytest.mark.parametrize("family", FAMILIES)
def test_unmerged_reloaded_merged_and_unloaded_agree(family, tmp_path):
    model = train(adapted(family, tau_granularity="row"))
    with torch.no_grad():
        unmerged = model(tokens()).logits
        assert (unmerged - make_moe(family)(tokens()).logits).abs().max() > 1e-2
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make_moe(family), tmp_path)
        torch.testing.assert_close(again(tokens()).logits, unmerged, rtol=0, atol=1e-6)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens()).logits, unmerged, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert torch.equal(model(tokens()).logits, unmerged)
        with model.disable_adapter():
            assert torch.equal(model(tokens()).logits, make_moe(family)(tokens()).logits)
        plain = again.merge_and_unload()
        torch.testing.assert_close(plain(tokens()).logits, unmerged, rtol=1e-5, atol=1e-5)
    assert type(plain) is type(make_moe(family))
    assert plain.state_dict().keys() == make_moe(family).state_dict().keys()


def test_another_base_is_refused(tmp_path):
    adapted("mixtral").save_pretrained(tmp_path)
    other = make_moe("mixtral")
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.add_(0.1)
    with pytest.raises(Exception, match="made for the base weights"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_attention_and_experts_together(family, tmp_path):
    model = train(adapted(family, target_modules=["q_proj"], rank_pattern={"down_proj": 2}))
    assert {layer.name.rpartition(".")[2] for layer in doran_layers(model)} == {"q_proj", "gate_up_proj", "down_proj"}
    loss(model(tokens()).logits).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens()).logits
        again = PeftModel.from_pretrained(make_moe(family), tmp_path)
        torch.testing.assert_close(again(tokens()).logits, expected, rtol=0, atol=1e-6)


def test_two_adapters_switch_and_add_up():
    model = train(adapted("mixtral"))
    with torch.no_grad():
        first = model(tokens()).logits
        model.add_adapter("other", config(rank=2, factors="static"))
        model.set_adapter("other")
        train(model, seed=5)
        second = model(tokens()).logits
        assert not torch.allclose(first, second, atol=1e-3)
        model.base_model.set_adapter(["default", "other"])
        both = model(tokens()).logits
        model.base_model.merge_adapter()
        torch.testing.assert_close(model(tokens()).logits, both, rtol=1e-4, atol=1e-4)
        model.base_model.unmerge_adapter()
        model.delete_adapter("other")
        model.set_adapter("default")
        assert torch.equal(model(tokens()).logits, first)


def test_kept_weight_sides_follow_every_change():
    model = train(adapted("qwen3_moe"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    with torch.no_grad():
        before = model(tokens()).logits
    loss(model(tokens()).logits).backward()
    optimizer.step()
    with torch.no_grad():
        after = model(tokens()).logits
    assert not torch.allclose(before, after, atol=1e-4)
    torch.testing.assert_close(after, model(tokens()).logits.detach(), rtol=0, atol=1e-6)
    assert copy.deepcopy(model)(tokens()).logits.equal(model(tokens()).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_without_tokens_take_no_norm_and_get_no_gradient(implementation, monkeypatch):
    model = train(adapted("qwen3_moe", implementation, factors="static"))
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, DoranExperts))
    monkeypatch.setattr(
        type(layer),
        "_chosen",
        lambda self, inputs, own=DoranExperts._chosen: seen.append(own(self, inputs)) or seen[-1],
    )
    loss(model(tokens(1, 1)).logits).backward()
    chosen = seen[0]
    assert len(chosen) == 2
    unseen = [e for e in range(EXPERTS) if e not in chosen.tolist()]
    for stack in layer.stacks().values():
        for parameter in (stack.adapter("default").magnitude, stack.adapter("default").factors.B):
            assert not parameter.grad[unseen].any()
            assert parameter.grad[chosen].any()
    expected = model(tokens(1, 1)).logits.detach()
    monkeypatch.setattr(type(layer), "_chosen", lambda self, inputs: None)
    torch.testing.assert_close(model(tokens(1, 1)).logits.detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tensor_of_a_stacks_size_is_made(implementation):
    """Neither W' nor B A of all experts: the forward and backward passes allocate nothing as large as a stack."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        def __init__(self, limit):
            super().__init__()
            self.limit, self.found = limit, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.numel() >= self.limit and result.is_floating_point():
                storage = result.untyped_storage().data_ptr()
                if all(not isinstance(a, torch.Tensor) or a.untyped_storage().data_ptr() != storage for a in args):
                    self.found.append((func, tuple(result.shape)))
            return result

    model = train(adapted("mixtral", implementation))
    stacks = [layer for layer in doran_layers(model) if isinstance(layer, DoranStack)]
    limit = min(stack.view.weight().numel() for stack in stacks)
    few = tokens(1, 3) if implementation == "batched_mm" else tokens(1, 6)  # batched_mm itself copies W0 for each token
    model(few)
    gc.collect()
    with Largest(limit if implementation != "batched_mm" else 3 * 2 * limit) as mode:
        loss(model(few).logits).backward()
    assert not mode.found


def test_generation_uses_the_kept_weight_side():
    model = train(adapted("olmoe"))
    out = model.generate(input_ids=tokens(1, 4), max_new_tokens=6, do_sample=False)
    merged = copy.deepcopy(model).merge_and_unload()
    assert out.tolist() == merged.generate(input_ids=tokens(1, 4), max_new_tokens=6, do_sample=False).tolist()


def test_all_linear_means_experts_too():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*expert")
        model = get_peft_model(make_moe("mixtral"), config(target_modules="all-linear", target_parameters=None))
    endings = {layer.name.rpartition(".")[2] for layer in doran_layers(model)}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"} <= endings
    assert "lm_head" not in endings


def test_from_lora_takes_target_parameters():
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    ours = DoranConfig.from_lora(lora)
    assert ours.target_parameters == {"experts.down_proj"}
    model = get_peft_model(make_moe("qwen3_moe"), ours)
    assert {layer.name.rpartition(".")[2] for layer in doran_layers(model)} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_parameters": ["experts.down_prj"]}, TargetError, "did you mean 'down_proj'"),
        ({"target_parameters": ["norm.weight"]}, TargetError, "is neither a stack of expert weights"),
        ({"target_parameters": ["q_proj.weight"]}, TargetError, "name ordinary layers in target_modules"),
        ({"target_parameters": "experts.down_proj"}, ConfigError, "expected a list of names"),
        ({"target_parameters": []}, ConfigError, "target_parameters alone, and none are given"),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, ConfigError, "is for target_modules"),
        ({"share_output": True}, ConfigError, "share_output"),
        ({"tau_granularity": "head"}, ConfigError, "stacked expert weights"),
        ({"experts": True}, ConfigError, "rank-one experts"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_stays_as_it_was(options, error, message):
    base = make_moe("mixtral")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(base, config(**options))
    assert [name for name, _ in base.named_modules()] == names


def test_a_replaced_forward_is_refused():
    model = adapted("mixtral")
    experts = next(module for module in model.modules() if isinstance(module, DoranExperts))
    experts.base_layer.forward = experts.base_layer.forward
    with pytest.raises(TargetError, match="has been replaced"):
        model(tokens())
    base = make_moe("mixtral")
    base.model.layers[0].mlp.experts.forward = base.model.layers[0].mlp.experts.forward
    with pytest.raises(TargetError, match="has been replaced"):
        get_peft_model(base, config())


def test_an_operation_that_is_not_known_is_refused():
    model = train(adapted("mixtral"))
    stack = next(iter(doran_layers(model)))
    stand_in = stack.stand_in(None)
    with pytest.raises(TargetError, match="calls einsum"):
        torch.einsum("eoi,ti->eto", stand_in, torch.randn(3, 32))
    with pytest.raises(TargetError, match="their layout is not the one that is_transposed"):
        torch.randn(3, 96) @ stand_in[0]
    with pytest.raises(AttributeError, match="set_experts_implementation"):
        stand_in.requires_grad_(True)


def test_rows_of_a_batch_with_different_adapters_are_refused():
    model = adapted("mixtral")
    with pytest.raises(ConfigError, match="adapter_names: an adapter of expert weights"):
        model(tokens(), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_the_same(reentrant):
    model = train(adapted("qwen3_moe")).train()
    results = []
    for _ in range(2):
        model.zero_grad()
        loss(model(input_ids=tokens()).logits).backward()
        results.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    for first, again in zip(*results, strict=True):  # a shared network's gradients add up in another order
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-6 * float(first.abs().max()))


def test_layer_states_have_a_row_for_each_stack():
    model = train(adapted("mixtral"))
    states = layer_states(model, 3)
    assert [state.layer for state in states] == [layer.name for layer in doran_layers(model)]
    assert all(1.0 <= state.effective_rank <= 3.0 and state.norm > 0 for state in states)


def test_adapters_of_experts_are_not_combined():
    model = train(adapted("mixtral"))
    with pytest.raises(ConfigError, match="adapts expert weights"):
        model.add_weighted_adapter(["default"], [0.5], "half", combination_type="cat")
    assert list(model.peft_config) == ["default"]


def test_parameters_are_as_many_as_the_guide_says():
    model = adapted("qwen3_moe", rank=4)
    rank, hidden, inner, embedding = 4, 32, 24, 16
    gate_up = EXPERTS * (rank * (hidden + 2 * inner) + 2 * inner)
    down = EXPERTS * (rank * (inner + hidden) + hidden)
    trunk = 2 * (rank * embedding + rank * embedding)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * (gate_up + down + trunk + 2)  # and a tau for each stack
