"""Adapter directories across PEFT: what PEFT saves converts exactly, and what doran writes PEFT loads as it is."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from doran_core import DoranConfig, adapt
from doran_core.adapter import read_adapter, read_folded, write_folded
from doran_core.adapter.fields import CONFIG_FIELDS, check_fields
from doran_core.convert import fold_adapter, from_peft, to_peft_dora
from doran_core.errors import AdapterFormatError
from doran_core.files.tensors import save_safetensors
from doran_core.merge import merge_checkpoint

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def test_the_fields_of_every_peft_configuration_are_known():
    fields = {field.name for field in dataclasses.fields(PeftConfig)}
    check_fields("adapter_config.json", fields | CONFIG_FIELDS | {"format_version"})


class Picture(nn.Module):
    """A convolution, an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.conv = nn.Conv2d(1, 6, (3, 2), padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, tokens):
        return self.head(self.conv(self.embed(tokens)[:, None]).tanh().mean((2, 3)))


def llama(tie_word_embeddings=False):
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        tie_word_embeddings=tie_word_embeddings,
    )
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2))


MODELS = {
    "llama": (llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (gpt2, ["c_attn", "c_proj"]),
    "picture": (Picture, ["embed", "conv", "head"]),
}


def save_base(model, folder):
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        (folder / "config.json").write_text('{"tie_word_embeddings": false}')  # of an architecture that nobody knows
        save_safetensors(folder / "model.safetensors", model.state_dict(), {})
    return folder


@torch.no_grad()
def outputs(model):
    result = model.eval()(TOKENS)
    return getattr(result, "logits", result)


@torch.no_grad()
def shake(parameters, amount=0.1):
    for parameter in parameters:
        parameter.add_(amount * torch.randn_like(parameter))


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.fixture(params=MODELS)
def model(request):
    make, targets = MODELS[request.param]
    torch.manual_seed(0)
    return make().eval(), targets


@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"q_proj|c_attn|conv": 2}, "tau_granularity": "row"}, {"experts": True}], ids=str
)
def test_peft_loads_a_compiled_directory(tmp_path, model, options):
    model, targets = model
    untouched, before = copy.deepcopy(model), outputs(model)
    handle = adapt(model, DoranConfig(rank=4, target_modules=targets, **options))
    shake(handle.parameters())
    handle.save(tmp_path / "folded", form="folded")
    loaded = PeftModel.from_pretrained(untouched, tmp_path / "folded")
    close(outputs(loaded), outputs(model))
    assert (outputs(loaded) - before).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["trainable", "folded"])
def test_peft_loads_a_converted_directory(tmp_path, model, form):
    model, targets = model
    untouched = copy.deepcopy(model)
    base = save_base(model, tmp_path / "base")
    handle = adapt(model, DoranConfig(rank=4, target_modules=targets))
    shake(handle.parameters())
    handle.save(tmp_path / "adapter", form=form)
    to_peft_dora(fold_adapter(tmp_path / "adapter", base), tmp_path / "dora")
    close(outputs(PeftModel.from_pretrained(untouched, tmp_path / "dora")), outputs(model))


LORA = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "lora_alpha": 3},
    {"rank_pattern": {"q_proj": 2, "c_attn": 2, "conv": 2}, "alpha_pattern": {"v_proj": 5, "c_proj": 5, "head": 5}},
    {"use_dora": True, "rank_pattern": {"q_proj": 2, "c_attn": 2, "conv": 2}},
]


@pytest.mark.parametrize("options", LORA, ids=str)
def test_what_peft_saves_merges_and_converts_exactly(tmp_path, model, options):
    model, targets = model
    base = save_base(model, tmp_path / "base")
    untouched = copy.deepcopy(model)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets} | options))
    shake(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    expected = outputs(adapted)

    write_folded(from_peft(tmp_path / "peft", base), tmp_path / "folded")
    close(outputs(PeftModel.from_pretrained(copy.deepcopy(untouched), tmp_path / "folded")), expected)

    for name in ("peft", "folded"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"merged-{name}")
        close(outputs(load_merged(untouched, tmp_path / f"merged-{name}")), expected)

    if options.get("use_dora"):
        scales = {name: module.scale for name, module in read_folded(tmp_path / "folded").modules.items()}
        assert any((scale != 1).any() for scale in scales.values())


def load_merged(model, folder):
    if hasattr(model, "save_pretrained"):
        return type(model).from_pretrained(folder)
    from doran_core.checkpoint.checkpoint import Checkpoint

    merged = copy.deepcopy(model)
    checkpoint = Checkpoint(folder)
    merged.load_state_dict({key: checkpoint.tensor(key) for key in checkpoint})
    return merged


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_come_along(tmp_path, bias):
    torch.manual_seed(0)
    model = llama()
    base = save_base(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias=bias))
    shake(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "peft")
    write_folded(from_peft(tmp_path / "peft", base), tmp_path / "folded")
    for name in ("peft", "folded"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"merged-{name}")
        close(outputs(LlamaForCausalLM.from_pretrained(tmp_path / f"merged-{name}")), outputs(adapted))
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "folded")
    close(outputs(loaded), outputs(adapted))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_embedding_that_peft_saved_with_its_base(tmp_path, tied, dora):
    torch.manual_seed(0)
    base = save_base(llama(tie_word_embeddings=tied), tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], use_dora=dora))
    shake(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "peft")
    expected = outputs(adapted)
    write_folded(from_peft(tmp_path / "peft", base), tmp_path / "folded")
    for name in ("peft", "folded"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"merged-{name}")
        merged = LlamaForCausalLM.from_pretrained(tmp_path / f"merged-{name}")
        assert not merged.config.tie_word_embeddings
        close(outputs(merged), expected)


def test_modules_to_save_come_along(tmp_path):
    torch.manual_seed(0)
    model = llama()
    base = save_base(model, tmp_path / "base")
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    shake(parameter for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.save_pretrained(tmp_path / "peft")
    expected = outputs(adapted)
    write_folded(from_peft(tmp_path / "peft", base), tmp_path / "folded")
    for name in ("peft", "folded"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"merged-{name}")
        close(outputs(LlamaForCausalLM.from_pretrained(tmp_path / f"merged-{name}")), expected)
    close(outputs(PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "folded")), expected)


def test_merge_equals_peft_merge_and_unload(tmp_path):
    torch.manual_seed(0)
    model = llama()
    base = save_base(model, tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], use_dora=True))
    shake(parameter for name, parameter in adapted.named_parameters() if "lora_" in name)
    adapted.save_pretrained(tmp_path / "peft")
    merge_checkpoint(base, tmp_path / "peft", tmp_path / "merged")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    for key, weight in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "lora_bias"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "target_parameters"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(tmp_path, options, name):
    torch.manual_seed(0)
    adapted = get_peft_model(llama(), LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | options))
    adapted.save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterFormatError, match=name):
        read_adapter(tmp_path / "peft")
