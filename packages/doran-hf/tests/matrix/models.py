"""What the matrix runs over: models of transformers' families and of PEFT's own custom-model tests, made small here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from conftest import SPREAD, VOCABULARY, make_bert, make_gpt2, make_llama, make_vit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from doran_hf import DoranConfig

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "initializer_range": SPREAD}
DECODER = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass
class Case:
    """One model and what is adapted in it.

    Attributes:
        make: the model, the same at each call.
        inputs: arguments of a forward pass.
        options: of DoranConfig.
        generates: whether it has generate.
    """

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    generates: bool = False

    def base(self, dtype: torch.dtype = torch.float32) -> Any:
        return self.make().to(dtype).eval()

    def config(self, **changes: Any) -> DoranConfig:
        return DoranConfig(**(self.options | changes))

    def adapted(self, adapter_name: str = "default", dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
        """The model with an adapter that does something."""
        torch.manual_seed(7)
        model = get_peft_model(self.base(dtype), self.config(**changes), adapter_name=adapter_name)
        stir(model, adapter_name)
        return model.eval()

    @torch.no_grad()
    def output(self, model: nn.Module, **extra: Any) -> Tensor:
        """Logits, or the first output, in eval mode."""
        found = model.eval()(**self.inputs(), **extra)
        return getattr(found, "logits", found[0] if not isinstance(found, Tensor) else found)

    def loss(self, model: nn.Module) -> Tensor:
        """Something to train on. Batch norms keep their statistics, which no adapter saves."""
        for module in model.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        found = model(**self.inputs())
        return getattr(found, "logits", found[0] if not isinstance(found, Tensor) else found).float().square().mean()


@torch.no_grad()
def stir(model: nn.Module, adapter_name: str, seed: int = 5) -> None:
    """Move an adapter's tensors, biases and copied modules away from the start, and well so that outputs change."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".{adapter_name}." in f"{name}.":
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(noise, alpha=0.1 if parameter.abs().max() == 0 else 0.1 * float(parameter.abs().mean()))


def _tokens(rows: int = 3, columns: int = 9) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(3, VOCABULARY, (rows, columns), generator=generator)}


def _text_pairs() -> dict[str, Any]:
    tokens = _tokens()["input_ids"]
    return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]}


def _pixels(channels: int = 1, side: int = 8) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))}


def _made(model_class: Any, config_class: Any, **values: Any) -> Callable[[], Any]:
    def make() -> Any:
        torch.manual_seed(0)
        return model_class(config_class(**values))

    return make


def _decoder(name: str, **values: Any) -> Callable[[], Any]:
    return _made(getattr(tf, f"{name}ForCausalLM"), getattr(tf, f"{name}Config"), **(DECODER | TOKENS | values))


DECODERS = {
    "llama": Case(make_llama, _tokens, generates=True),
    "llama all-linear": Case(make_llama, _tokens, {"target_modules": "all-linear"}, generates=True),
    "gpt2": Case(make_gpt2, _tokens, generates=True),
    "opt": Case(
        _decoder("OPT", ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, init_std=SPREAD),
        _tokens,
        generates=True,
    ),
    "gpt_neox": Case(_decoder("GPTNeoX", max_position_embeddings=64), _tokens, generates=True),
    "bloom": Case(_decoder("Bloom", n_layer=2, n_head=4), _tokens, generates=True),
    "mistral": Case(_decoder("Mistral", num_key_value_heads=2, sliding_window=None), _tokens, generates=True),
    "qwen2 biases": Case(_decoder("Qwen2", num_key_value_heads=2), _tokens, {"bias": "doran_only"}, generates=True),
    "qwen3": Case(_decoder("Qwen3", num_key_value_heads=2, head_dim=8), _tokens, generates=True),
    "gemma": Case(_decoder("Gemma", num_key_value_heads=2, head_dim=8), _tokens, generates=True),
    "phi3 fused qkv": Case(
        _decoder("Phi3", num_key_value_heads=2), _tokens, {"target_modules": ["qkv_proj"]}, generates=True
    ),
}

ENCODERS = {
    "bert": Case(make_bert, _tokens, {"task_type": "SEQ_CLS"}),
    "bert all-linear": Case(make_bert, _tokens, {"target_modules": "all-linear"}),
    "roberta": Case(
        _made(tf.RobertaModel, tf.RobertaConfig, **DECODER, max_position_embeddings=64, pad_token_id=0),
        _tokens,
        {"task_type": "FEATURE_EXTRACTION"},
    ),
    "deberta-v2": Case(_made(tf.DebertaV2Model, tf.DebertaV2Config, **DECODER), _tokens),
    "distilbert": Case(
        _made(
            tf.DistilBertModel,
            tf.DistilBertConfig,
            vocab_size=VOCABULARY,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            initializer_range=SPREAD,
        ),
        _tokens,
    ),
    "vit": Case(make_vit, _pixels),
    "resnet convolutions": Case(
        _made(
            tf.ResNetForImageClassification,
            tf.ResNetConfig,
            num_channels=1,
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            tie_word_embeddings=False,
            num_labels=4,
        ),
        lambda: _pixels(side=32),
        {"target_modules": ["convolution"], "modules_to_save": ["classifier"]},
    ),
}

ENCODER_DECODERS = {
    "t5": Case(
        _made(
            tf.T5ForConditionalGeneration,
            tf.T5Config,
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            initializer_factor=1.0,
        ),
        _text_pairs,
        {"task_type": "SEQ_2_SEQ_LM"},
        generates=True,
    ),
    "bart": Case(
        _made(
            tf.BartForConditionalGeneration,
            tf.BartConfig,
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            init_std=SPREAD,
            forced_eos_token_id=None,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            decoder_start_token_id=2,
        ),
        _text_pairs,
        {"task_type": "SEQ_2_SEQ_LM"},
        generates=True,
    ),
}


class MLP(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.drop = nn.Dropout(0.0)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.lin0.weight.dtype)
        return self.lin1(self.drop(torch.relu(self.lin0(x)))).log_softmax(-1)


class DeepMLP(nn.Module):
    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"lin0": nn.Linear(size, size), "lin1": nn.Linear(size, size)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["lin1"](torch.relu(block["lin0"](x.to(block["lin0"].weight.dtype))))
        return x


class EmbConv1D(nn.Module):
    def __init__(self, tokens: int = 100) -> None:
        super().__init__()
        self.emb = nn.Embedding(tokens, 5)
        self.conv1d = Conv1D(1, 5)
        self.lin0 = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv1d(self.emb(x))).flatten(1)).log_softmax(-1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(6, 4, (1, 3), padding=(0, 2), dilation=2, bias=False)
        self.lin0 = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv0(x.to(self.conv0.weight.dtype)))
        return self.lin0(self.conv1(x).flatten(1)).log_softmax(-1)


class Conv1dNet(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=groups)
        self.lin0 = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv0(x.to(self.conv0.weight.dtype))).flatten(1)).log_softmax(-1)


class Conv3dNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv3d(2, 4, (1, 2, 3), dilation=(1, 2, 1))
        self.lin0 = nn.Linear(4 * 3 * 2 * 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.relu(self.conv0(x.to(self.conv0.weight.dtype))).flatten(1)).log_softmax(-1)


class GroupedConvolutions(nn.Module):
    """One convolution in two groups, and one that has a group for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.conv1 = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.lin0 = nn.Linear(6 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv0(x.to(self.conv0.weight.dtype)))
        return self.lin0(self.conv1(x).flatten(1)).log_softmax(-1)


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return make()

    return seeded


def _numbers(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(3))}


def _indices() -> dict[str, Any]:
    return {"x": torch.arange(90).reshape(10, 9)}


def _mlp(make: Callable[[], nn.Module] = MLP, **options: Any) -> Case:
    return Case(_seeded(make), _numbers(9, 10), options)


CUSTOM = {
    "MLP one layer": _mlp(target_modules="lin0"),
    "MLP a list": _mlp(target_modules=["lin0"], rank=4),
    "MLP the other layer": _mlp(target_modules=["lin1"]),
    "MLP both": _mlp(target_modules=["lin0", "lin1"]),
    "MLP all-linear": _mlp(target_modules="all-linear", exclude_modules=["lin1"]),
    "MLP modules_to_save": _mlp(target_modules=["lin0"], modules_to_save=["lin1"]),
    "MLP no bias": _mlp(lambda: MLP(bias=False), target_modules=["lin0", "lin1"], use_rslora=True),
    "MLP static": _mlp(target_modules=["lin0", "lin1"], factors="static"),
    "MLP as DoRA": _mlp(target_modules=["lin0"], factors="static", tau_kind="zero", norm_grad="detached"),
    "MLP direct norm": _mlp(target_modules=["lin0"], norm_method="direct", tau_granularity="row"),
    "MLP gaussian": _mlp(target_modules=["lin0"], tau_kind="gaussian", tau_learn_sigma=True),
    "MLP experts": _mlp(target_modules=["lin0"], experts=True, expert_mask="expert", expert_dropout=0.2),
    "MLP patterns": _mlp(target_modules=["lin0", "lin1"], rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 3.0}),
    "MLP shared outputs": _mlp(target_modules=["lin0", "lin1"], sharing="model", share_output=True),
    "deep, some layers": Case(
        _seeded(DeepMLP),
        _numbers(9, 16),
        {"target_modules": ["lin0"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
    ),
    "embedding": Case(_seeded(EmbConv1D), _indices, {"target_modules": ["emb"]}),
    "embedding and Conv1D": Case(_seeded(EmbConv1D), _indices, {"target_modules": ["emb", "conv1d"]}),
    "embedding, Conv1D, linear": Case(
        _seeded(EmbConv1D), _indices, {"target_modules": ["emb", "conv1d", "lin0"], "factors": "static"}
    ),
    "Conv2d": Case(_seeded(Convolutions), _numbers(5, 3, 8, 8), {"target_modules": ["conv0"]}),
    "Conv2d and linear": Case(
        _seeded(Convolutions), _numbers(5, 3, 8, 8), {"target_modules": ["conv0", "conv1", "lin0"]}
    ),
    "Conv1d": Case(_seeded(Conv1dNet), _numbers(5, 4, 8), {"target_modules": ["conv0"]}),
    "Conv1d in groups": Case(_seeded(lambda: Conv1dNet(2)), _numbers(5, 4, 8), {"target_modules": ["conv0", "lin0"]}),
    "Conv3d": Case(_seeded(Conv3dNet), _numbers(5, 2, 3, 4, 4), {"target_modules": ["conv0", "lin0"]}),
    "Conv2d in groups": Case(
        _seeded(GroupedConvolutions), _numbers(5, 4, 4, 4), {"target_modules": ["conv0", "conv1"]}
    ),
}

TRANSFORMERS = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
GENERATING = {name: case for name, case in TRANSFORMERS.items() if case.generates}
ALL = {**TRANSFORMERS, **CUSTOM}
