"""Every kind of model, small and random: exported and proven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from conftest import TEXT, saved, tiny_llama
from safetensors.torch import load_file
from transformers import PreTrainedModel

from doran_core import DoranConfig, adapt
from doran_core.errors import ConfigError
from doran_export import OnnxRunner, UnsupportedModelError, export, verify
from doran_export.graph.layer_stack import find_layers
from doran_export.graph.trace_cache import Traces

SHAPE = {**TEXT, "num_hidden_layers": 2, "intermediate_size": 48, "max_position_embeddings": 160}


def bert(kind: str, **changes: object) -> PreTrainedModel:
    return getattr(transformers, kind)(transformers.BertConfig(**(SHAPE | changes))).eval()


def roberta() -> PreTrainedModel:
    config = transformers.RobertaConfig(**(SHAPE | {"max_position_embeddings": 162}), type_vocab_size=1)
    return transformers.RobertaForSequenceClassification(config).eval()


def llama_classifier() -> PreTrainedModel:
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, pad_token_id=0)).eval()


def resnet() -> PreTrainedModel:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5
    )
    config.image_size = 32
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize(
    ("make", "task"),
    [
        (lambda: bert("BertForTokenClassification"), "token-classification"),
        (lambda: bert("BertForMaskedLM"), "fill-mask"),
        (roberta, "text-classification"),
        (llama_classifier, "text-classification"),
        (resnet, "image-classification"),
    ],
    ids=["bert-token", "bert-mlm", "roberta", "llama-cls", "resnet"],
)
def test_kind(make: Callable[[], PreTrainedModel], task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = export(saved(make(), tmp_path / "model"), tmp_path / "out")

    assert report.task == task
    assert report.proof.max_difference < 1e-4
    assert {check.batch for check in report.proof.checks} >= {1, 2}
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ConfigError, match="it cannot generate"):
        OnnxRunner(tmp_path / "out").generate([[1]])


def test_sliding_window_decoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**(SHAPE | {"num_hidden_layers": 1}), num_key_value_heads=2, sliding_window=8)
    report = export(
        saved(transformers.MistralForCausalLM(config).eval(), tmp_path / "model"), tmp_path / "out", exporter="torch"
    )
    assert report.proof.max_difference < 1e-4


def test_repeated_layers_give_the_graph_of_a_whole_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("doran_export.graph.layer_stack._FEWEST", 5)
    source = saved(bert("BertForSequenceClassification", num_hidden_layers=5), tmp_path / "model")
    export(source, tmp_path / "short")
    monkeypatch.setattr("doran_export.graph.torch_export.find_layers", lambda model: None)
    export(source, tmp_path / "whole")

    graphs = [onnx.load(tmp_path / name / "model.onnx").graph for name in ("short", "whole")]
    assert sorted(node.op_type for node in graphs[0].node) == sorted(node.op_type for node in graphs[1].node)
    ids = [[3, 4, 5]]
    logits = [OnnxRunner(tmp_path / name).run({"input_ids": ids})["logits"] for name in ("short", "whole")]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_a_trace_serves_models_that_differ_in_their_weights_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is not traced, and has its own weights: its proof says so. Another setting is traced anew."""
    torch.manual_seed(0)
    places = [saved(bert("BertForMaskedLM", hidden_act="silu"), tmp_path / name) for name in ("first", "second")]
    other = saved(bert("BertForMaskedLM", hidden_act="relu"), tmp_path / "other")
    monkeypatch.setattr("doran_export.graph.torch_export._TRACES", Traces())
    traced = []
    whole = torch.export.export
    monkeypatch.setattr(torch.export, "export", lambda *rest, **more: traced.append(1) or whole(*rest, **more))
    for number, (place, traces) in enumerate([(places[0], 1), (places[1], 1), (places[0], 1), (other, 2)]):
        report = export(place, tmp_path / f"out{number}", precision="fp16" if number == 2 else "fp32")
        assert report.proof.max_difference < (5e-2 if number == 2 else 1e-4)
        assert len(traced) == traces
    ids = {"input_ids": [[3, 4, 5]]}
    first, second = (OnnxRunner(tmp_path / f"out{number}").run(ids)["logits"] for number in range(2))
    assert np.abs(first - second).max() > 0.1


def test_adapter_of_a_checkpoint_with_older_names(tmp_path: Path) -> None:
    """transformers saves a ViT under other names than its modules have, which the adapter goes by."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, initializer_range=0.2, num_labels=3,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    base = saved(model, tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    assert "vit.encoder.layer.0.attention.attention.query.weight" in stored
    handle = adapt(model, DoranConfig(rank=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for _, parameter in handle.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter = handle.save(tmp_path / "adapter")
    image = np.random.default_rng(1).standard_normal((2, 1, 8, 8), dtype=np.float32)
    with torch.inference_mode():
        expected = model(torch.from_numpy(image)).logits.numpy()

    export(out=tmp_path / "merged", base=base, adapter=adapter)
    export(out=tmp_path / "many", base=base, adapters={"one": adapter})
    many = OnnxRunner(tmp_path / "many")
    assert np.abs(many.run({"pixel_values": image})["logits"] - expected).max() > 1e-2
    many.set_adapter("one")
    for runner in (OnnxRunner(tmp_path / "merged"), many):
        np.testing.assert_allclose(runner.run({"pixel_values": image})["logits"], expected, atol=1e-4)
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        "config.json",
        "export_report.json",
        "model.onnx",
    }
    verify(tmp_path / "many", base, adapters={"one": adapter})


def test_layers_that_differ_are_not_repeated() -> None:
    stack = find_layers(tiny_llama())
    assert stack is not None
    assert (stack.path, len(stack.layers)) == ("model.layers", 6)
    changed = tiny_llama()
    changed.model.layers[4].self_attn.scaling *= 2
    assert find_layers(changed) is None
    assert find_layers(tiny_llama(num_hidden_layers=3)) is None  # nothing to gain


def test_other_states_than_a_cache_are_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM keeps a state"):
        export(saved(transformers.MambaForCausalLM(config), tmp_path / "model"), tmp_path / "out", exporter="torch")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
