"""Where a model's parameters lie in a checkpoint: tied ones, renamed ones, under a prefix, in unknown architectures."""

import json

import made
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from doran_core import DoranConfig, adapt
from doran_core.adapter import read_adapter
from doran_core.adapter.keys import plain_name
from doran_core.checkpoint.architectures import known_ties, stored_candidates
from doran_core.checkpoint.ties import tied_parameters
from doran_core.errors import CheckpointError
from doran_core.merge import merge_checkpoint

SIZE, WORDS = 6, 11
T5 = ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]


def write(directory, weights, architecture, **config):
    made.write_base(directory, weights, shards=1, config={"architectures": [architecture], **config})
    fields = json.loads((directory / "config.json").read_text())
    fields.pop("tie_word_embeddings") if "tie_word_embeddings" not in config else None
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def merged(tmp_path, weights, target, kind, values=None, **config):
    """The merged tensors and config.json, and W', of an adapter of one module without facts of its base."""
    write(tmp_path / "base", weights, **config)
    live = made.write_adapter(
        tmp_path / "adapter",
        {f"{target}.weight": next(iter(weights.values())) if values is None else values},
        targets=[target],
        kinds={target: kind},
        factors="static",
        fingerprint=False,
    )
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    base = next(iter(weights.values())) if values is None else values
    matrix = base.T if kind == "embedding" else base
    expected = live[target].merged_weight(matrix).float()
    expected = expected.T if kind == "embedding" else expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    return load_file(tmp_path / "out" / "model.safetensors"), config, expected


@pytest.mark.parametrize(
    ("architecture", "source", "tied", "others"),
    [
        ("LlamaForCausalLM", "model.embed_tokens", "lm_head", {}),
        ("MambaForCausalLM", "backbone.embeddings", "lm_head", {}),
        ("WhisperForConditionalGeneration", "model.decoder.embed_tokens", "proj_out", {}),
        (
            "BertForMaskedLM",
            "bert.embeddings.word_embeddings",
            "cls.predictions.decoder",
            {"cls.predictions.decoder.bias": "cls.predictions.bias"},
        ),
    ],
)
@pytest.mark.parametrize("end", ["input", "output"])
def test_one_end_of_a_tie(tmp_path, architecture, source, tied, others, end):
    weights = {f"{source}.weight": torch.randn(WORDS, SIZE)} | {key: torch.randn(WORDS) for key in others.values()}
    target, kind = (source, "embedding") if end == "input" else (tied, "linear")
    found, config, expected = merged(
        tmp_path, weights, target, kind, architecture=architecture, tie_word_embeddings=True
    )
    changed, kept = (source, tied) if end == "input" else (tied, source)
    assert torch.allclose(found[f"{changed}.weight"], expected)
    assert torch.equal(found[f"{kept}.weight"], weights[f"{source}.weight"])
    assert not torch.allclose(expected, weights[f"{source}.weight"], atol=1e-3)
    for key, twin in others.items():
        assert torch.equal(found[key], weights[twin])
    assert config["tie_word_embeddings"] is False
    assert len(found) == 2 * len(weights)


@pytest.mark.parametrize("target", T5[1:])
def test_a_flag_that_the_forward_pass_reads_stays(tmp_path, target):
    weights = {"shared.weight": torch.randn(WORDS, SIZE)}
    kind = "linear" if target == "lm_head" else "embedding"
    found, config, expected = merged(
        tmp_path, weights, target, kind, architecture="T5ForConditionalGeneration", model_type="t5",
        tie_word_embeddings=True,
    )  # fmt: skip
    assert torch.allclose(found[f"{target}.weight"], expected)
    assert torch.equal(found["shared.weight"], weights["shared.weight"])
    assert config["tie_word_embeddings"] is True


def test_an_unchanged_tie_stays(tmp_path):
    weights = {"model.layers.0.q_proj.weight": torch.randn(SIZE, SIZE), "model.embed_tokens.weight": torch.randn(9, 6)}
    found, config, _ = merged(
        tmp_path, weights, "model.layers.0.q_proj", "linear", architecture="LlamaForCausalLM", tie_word_embeddings=True
    )
    assert found.keys() == weights.keys()
    assert config["tie_word_embeddings"] is True


def test_an_unknown_architecture_is_refused_where_a_tie_may_be_touched(tmp_path):
    weights = {"embed.weight": torch.randn(WORDS, SIZE)}
    with pytest.raises(CheckpointError, match=r"embed\.weight, which may be tied.*OursForCausalLM"):
        merged(tmp_path, weights, "embed", "embedding", architecture="OursForCausalLM")
    assert not (tmp_path / "out").exists()


def test_an_output_layer_of_an_unknown_architecture_is_refused(tmp_path):
    weights = {"head.weight": torch.randn(WORDS, SIZE)}
    with pytest.raises(CheckpointError, match=r"head\.weight, which may be tied"):
        merged(tmp_path, weights, "head", "linear", architecture="OursForCausalLM", vocab_size=WORDS)


def test_an_unknown_architecture_that_says_that_it_ties_nothing(tmp_path):
    weights = {"embed.weight": torch.randn(WORDS, SIZE)}
    found, _, expected = merged(
        tmp_path, weights, "embed", "embedding", architecture="OursForCausalLM", tie_word_embeddings=False
    )
    assert torch.allclose(found["embed.weight"], expected)


RENAMED = [
    ("ViTForImageClassification", "vit.layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
    ("ViTForImageClassification", "vit.layers.1.mlp.fc2", "vit.encoder.layer.1.output.dense"),
    ("ViTModel", "vit.layers.1.attention.q_proj", "encoder.layer.1.attention.attention.query"),
    ("ViTForImageClassification", "layers.1.attention.q_proj", "vit.encoder.layer.1.attention.attention.query"),
    ("LlavaForConditionalGeneration", "model.language_model.layers.3.q_proj", "language_model.model.layers.3.q_proj"),
    ("Qwen2VLForConditionalGeneration", "model.language_model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
    ("LlamaForCausalLM", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"),
]


@pytest.mark.parametrize(("architecture", "module", "stored"), RENAMED)
def test_renamed_tensors_are_found(tmp_path, architecture, module, stored):
    weights = {f"{stored}.weight": torch.randn(SIZE, SIZE)}
    found, _, expected = merged(tmp_path, weights, module, "linear", architecture=architecture)
    assert found.keys() == weights.keys()
    assert torch.allclose(found[f"{stored}.weight"], expected)


def test_a_checkpoint_with_the_models_own_names(tmp_path):
    weights = {"vit.layers.1.attention.q_proj.weight": torch.randn(SIZE, SIZE)}
    found, _, expected = merged(
        tmp_path, weights, "vit.layers.1.attention.q_proj", "linear", architecture="ViTForImageClassification"
    )
    assert torch.allclose(found["vit.layers.1.attention.q_proj.weight"], expected)


def test_the_table():
    assert known_ties({"architectures": ["NobodysModel"]}) is None
    assert known_ties({}) is None
    assert known_ties({"architectures": ["LlamaForCausalLM"]}) == {}  # its flag is off by default
    assert known_ties({"architectures": ["GemmaForCausalLM"]}) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert known_ties({"architectures": ["GemmaForCausalLM"], "tie_word_embeddings": False}) == {}
    assert stored_candidates({"architectures": ["LlamaForCausalLM"]}, "model.layers.0.q.weight") == []


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, SIZE)
        self.body = nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


@pytest.mark.parametrize("is_merged", [False, True])
def test_ties_of_a_plain_model_are_recorded(tmp_path, is_merged):
    model = Tied()
    assert tied_parameters(model) == {"head.weight": "embed.weight"}
    made.save_file({k: v.clone() for k, v in model.state_dict().items() if k != "head.weight"}, tmp_path / "w")
    handle = adapt(model, DoranConfig(rank=2, target_modules=["head"]))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1)
    handle.save(tmp_path / "adapter")
    assert read_adapter(tmp_path / "adapter").ties == {"head.weight": "embed.weight"}
    (tmp_path / "base").mkdir()
    (tmp_path / "w").rename(tmp_path / "base" / "model.safetensors")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    handle.merge()
    assert torch.allclose(found["head.weight"], model.head.base_layer.weight, atol=1e-6)
    assert torch.equal(found["embed.weight"], model.embed.weight)


def test_a_compiled_base_has_the_same_names_and_fingerprint(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.ModuleDict({"block": nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 4)})})

    config = DoranConfig(rank=2, target_modules=["q", "v"])
    plain = adapt(base(), config)
    compiled = adapt(torch.compile(base(), backend="eager"), config)
    parts = base()
    parts["block"] = torch.compile(parts["block"], backend="eager")
    blocks = adapt(parts, config)
    assert list(plain.layers) == list(compiled.layers) == list(blocks.layers) == ["block.q", "block.v"]
    assert plain.base_fingerprint() == compiled.base_fingerprint() == blocks.base_fingerprint()
    compiled.save(tmp_path / "a")
    plain.load(tmp_path / "a")
    assert plain_name("_orig_mod.layers.0._orig_mod.q") == "layers.0.q"


def test_a_model_left_merged_trains_where_it_did():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    adapt(model, DoranConfig(rank=2, target_modules=["0", "1"])).remove(merged=True)
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, False]


def test_the_penalty_of_a_model_on_two_devices():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0", "1"], factor_penalty=1.0, sharing="none"))
    model[0].doran_adapter.to("meta")
    assert handle.penalty().shape == ()
