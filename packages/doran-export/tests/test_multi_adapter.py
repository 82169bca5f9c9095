"""Many adapters over one graph: equal to their merged exports, of any ranks and targets, refused where they cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import make_adapter, saved, tiny_llama

from doran_core.adapter import FoldedAdapter, FoldedModule, write_folded
from doran_core.cli.main import main
from doran_core.errors import BaseMismatchError, ConfigError, DoranError
from doran_export import ExportError, ExportReport, OnnxRunner, ProofError, UnsupportedModelError, export, verify
from doran_export.adapters.adapter_file import write_adapter

IDS = np.random.default_rng(7).integers(3, 97, (2, 9))

Made = tuple[Path, dict[str, Path], ExportReport]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(base, adapters, report): a base whose projections have biases, two adapters of other ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    base = saved(tiny_llama(attention_bias=True, num_hidden_layers=2), folder / "base")
    first = make_adapter(base, folder / "first", 1, rank=4, target_modules=["q_proj", "v_proj"])
    second = make_adapter(
        base, folder / "second", 2, rank=3, target_modules=["v_proj", "down_proj"], factors="static",
        rank_pattern={"model.layers.1.mlp.down_proj": 5},
    )  # fmt: skip
    adapters = {"first": first, "second": second}
    return base, adapters, export(out=folder / "out", base=base, adapters=adapters)


def test_one_session_equals_the_merged_exports(made: Made, tmp_path: Path) -> None:
    base, adapters, report = made
    runner = OnnxRunner(report.directory)
    outputs = {}
    for name in [None, "first", "second", None]:
        runner.set_adapter(name)
        assert runner.adapter == name
        outputs[name] = runner.run({"input_ids": IDS})["logits"]
    for name, adapter in adapters.items():
        export(out=tmp_path / name, base=base, adapter=adapter, exporter="torch")
        merged = OnnxRunner(tmp_path / name)
        np.testing.assert_allclose(outputs[name], merged.run({"input_ids": IDS})["logits"], atol=1e-4)
        runner.set_adapter(name)
        tokens = runner.generate(IDS, max_new_tokens=12, stop_at_end=False)
        np.testing.assert_array_equal(tokens, merged.generate(IDS, max_new_tokens=12, stop_at_end=False))
    export(base, tmp_path / "base", exporter="torch")
    np.testing.assert_allclose(
        outputs[None], OnnxRunner(tmp_path / "base").run({"input_ids": IDS})["logits"], atol=1e-4
    )
    assert np.abs(outputs["first"] - outputs[None]).max() > 0.1
    assert np.abs(outputs["second"] - outputs["first"]).max() > 0.1


def test_verify_proves_every_adapter(made: Made, tmp_path: Path) -> None:
    base, adapters, report = made
    proof = verify(report.directory, base)
    assert {check.adapter for check in proof.checks} == {None, "first", "second"}
    assert [greedy.adapter for greedy in proof.greedy] == [None, "first", "second"]
    assert verify(report.directory, base, adapters=adapters).max_difference < 1e-4
    with pytest.raises(ProofError, match=r"adapter first.* differs from PyTorch"):
        verify(report.directory, base, adapters={"first": adapters["second"]})
    with pytest.raises(ConfigError, match="has no adapter 'third': expected some of first, second"):
        verify(report.directory, base, adapters={"third": base})
    narrow = saved(tiny_llama(attention_bias=True, num_hidden_layers=1), tmp_path / "narrow")
    with pytest.raises(ExportError, match="an adapter does not fit LlamaForCausalLM"):
        verify(report.directory, narrow)


def test_onnxruntime_alone_runs_it(made: Made) -> None:
    """No code of this package is needed: RunOptions activates the file."""
    _, _, report = made
    session = onnxruntime.InferenceSession(report.directory / "model.onnx", providers=["CPUExecutionProvider"])
    cache = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    feed = {name: np.zeros((2, shape[1], 0, shape[3]), np.float32) for name, shape in cache.items()}
    feed |= {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": np.arange(9)[None].repeat(2, 0)}
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(report.directory / "adapters" / "first.onnx_adapter"))
    options.add_active_adapter(adapter)
    (got,) = session.run(["logits"], feed, options)
    runner = OnnxRunner(report.directory)
    runner.set_adapter("first")
    np.testing.assert_allclose(got, runner.run({"input_ids": IDS})["logits"], atol=1e-5)


def test_an_adapter_holds_its_own_layers_only(made: Made) -> None:
    _, _, report = made
    path = report.directory / "adapters" / "second.onnx_adapter"
    tensors = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
    assert len(tensors) == 3 * 4
    assert tensors["model.layers.1.mlp.down_proj.lora_A"].shape() == [48, 5]
    assert tensors["model.layers.0.mlp.down_proj.lora_A"].shape() == [48, 3]
    assert report.adapters["second"]["ranks"] == [3, 5]
    assert report.adapters["first"]["modules"] == 4


def test_adapters_of_an_encoder_in_half_precision(tmp_path: Path) -> None:
    """By hand: y = c (W0 x) + B' A x + bias on one layer of a small BERT, in fp16."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    base = saved(model, tmp_path / "base")
    name = "bert.encoder.layer.0.attention.self.value"
    weight = model.get_submodule(name).weight.detach()
    a, b, scale = torch.randn(2, 32) * 0.3, torch.randn(32, 2) * 0.3, 1 + 0.2 * torch.rand(32)
    adapted = weight + b @ a
    module = FoldedModule(name, a, b, scale, scale * adapted.norm(dim=1))
    write_folded(FoldedAdapter({name: module}, task_type="SEQ_CLS"), tmp_path / "adapter")

    report = export(out=tmp_path / "out", base=base, adapters={"one": tmp_path / "adapter"}, precision="fp16")
    assert report.proof.max_difference < 5e-2
    runner = OnnxRunner(report.directory)
    runner.set_adapter("one")
    got = runner.run({"input_ids": IDS})["logits"]
    model.get_submodule(name).weight.data = scale[:, None] * adapted
    with torch.inference_mode():
        expected = model(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=2e-2)


def refuse(kind: type[DoranError], match: str, tmp_path: Path, **arguments: object) -> None:
    with pytest.raises(kind, match=match):
        export(out=tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_refusals(made: Made, tmp_path: Path) -> None:
    base, adapters, report = made
    refuse(ConfigError, "no adapter was given", tmp_path, base=base, adapters={})
    refuse(
        ConfigError,
        r"adapter name '\.\./x': expected letters",
        tmp_path,
        base=base,
        adapters={"../x": adapters["first"]},
    )
    refuse(
        UnsupportedModelError, "int8 does not take adapters", tmp_path, base=base, adapters=adapters, precision="int8"
    )
    refuse(
        UnsupportedModelError,
        "genai exporter does not take adapters",
        tmp_path,
        base=base,
        adapters=adapters,
        exporter="genai",
    )
    refuse(ConfigError, "give either a model directory", tmp_path, base=base, adapters=adapters, adapter=base)
    with pytest.raises(ConfigError, match="has no adapter 'third': expected one of first, second, or None"):
        OnnxRunner(report.directory).set_adapter("third")


def test_adapters_that_cannot_be_inputs(made: Made, tmp_path: Path) -> None:
    base, adapters, _ = made
    model = tiny_llama(attention_bias=True, num_hidden_layers=2)
    embedding = make_adapter(base, tmp_path / "embedding", 1, rank=2, target_modules=["embed_tokens"])
    refuse(
        UnsupportedModelError,
        "embed_tokens, a Embedding: expected linear",
        tmp_path,
        base=base,
        adapters={"e": embedding},
    )
    norm = make_adapter(base, tmp_path / "norm", 1, rank=2, target_modules=["q_proj"], modules_to_save=["model.norm"])
    refuse(UnsupportedModelError, "replaces model.norm.weight in full", tmp_path, base=base, adapters={"n": norm})
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0] += 1.0
    other = saved(model, tmp_path / "other")
    refuse(BaseMismatchError, "fingerprint", tmp_path, base=other, adapters={"first": adapters["first"]})


def test_an_adapter_of_another_graph(made: Made, tmp_path: Path) -> None:
    _, _, report = made
    copy = Path(shutil.copytree(report.directory, tmp_path / "copy"))
    layer = "model.layers.0.self_attn.o_proj"
    parts = {"lora_A": torch.zeros(32, 2), "lora_B": torch.zeros(2, 32), "scale": torch.ones(32)}
    tensors = {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    write_adapter(tensors, copy / "adapters" / "foreign.onnx_adapter")
    with pytest.raises(DoranError, match=r"made for another graph: this one has no input model\.layers\.0"):
        OnnxRunner(copy).set_adapter("foreign")
    (copy / "adapters" / "first.onnx_adapter").write_bytes(b"not an adapter")
    with pytest.raises(DoranError, match="cannot read the adapter"):
        OnnxRunner(copy).set_adapter("first")


def test_command(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapters, _ = made
    out = ["--base", str(base), "--out", str(tmp_path / "out"), "--multi-adapter"]
    assert main(["export", *out, "--adapter", str(adapters["first"])]) == 2
    assert "--multi-adapter takes --adapter NAME=DIR" in capsys.readouterr().err
    assert main(["export", *out[:-1], "--adapter", "a", "--adapter", "b"]) == 2
    assert "2 adapters were given" in capsys.readouterr().err
    assert main(["export", *out, "--adapter", f"mine={adapters['first']}"]) == 0
    assert "adapters: mine" in capsys.readouterr().out
    assert OnnxRunner(tmp_path / "out").adapters == ["mine"]
