"""Precisions and exporters: what is made is proven, what a target does not run is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import make_adapter, saved, tiny_llama

from doran_core.errors import ConfigError, DoranError
from doran_export import ExportError, ExportReport, OnnxRunner, UnsupportedModelError, export, verify
from doran_export.graph.precision import EXPORTERS, PRECISIONS, exporter_for, proof_providers, target_for
from doran_export.tasks import TASKS

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HAS_CUDA = CUDA in onnxruntime.get_available_providers()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_float16(target: str, tiny_decoder: tuple[Path, ExportReport], tmp_path: Path) -> None:
    """For the CPU the weights alone are float16, and each is widened; for CUDA the arithmetic and the cache are too."""
    source, full = tiny_decoder
    report = export(source, tmp_path / "out", exporter="torch", precision="fp16", target=target)
    assert report.target == target
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    matrices = [tensor for tensor in graph.initializer if len(tensor.dims) == 2]
    assert {tensor.data_type for tensor in matrices} == {onnx.TensorProto.FLOAT16}
    widened = {node.input[0] for node in graph.node if node.op_type == "Cast"}
    assert ({tensor.name for tensor in matrices} <= widened) == (target == "cpu")
    cache = next(value for value in graph.input if value.name == "past_key_values.0.key")
    half = onnx.TensorProto.FLOAT16 if target == "cuda" else onnx.TensorProto.FLOAT
    assert cache.type.tensor_type.elem_type == half
    assert sum(report.files.values()) < 0.7 * sum(full.files.values())
    got = OnnxRunner(tmp_path / "out").run({"input_ids": [[3, 4, 5]]})["logits"]
    assert got.dtype == np.float32
    expected = OnnxRunner(full.directory).run({"input_ids": [[3, 4, 5]]})["logits"]
    np.testing.assert_allclose(got, expected, atol=5e-2)
    assert verify(tmp_path / "out", source).max_difference < 5e-2


def test_float16_that_overflows(tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[3] = -1e5
    source = saved(model, tmp_path / "model")
    with pytest.raises(ExportError, match=r"model\.norm\.weight holds values beyond 65504"):
        export(source, tmp_path / "out", exporter="torch", precision="fp16", target="cuda")
    assert not (tmp_path / "out").exists()


def test_int8(tiny_decoder: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = tiny_decoder
    # Weights beside the graph, as in a large model.
    monkeypatch.setattr("doran_export.graph.torch_export._INLINE_LIMIT", 1000)
    report = export(source, tmp_path / "out", exporter="torch", precision="int8")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") + kinds.count("DynamicQuantizeMatMul") >= 6 * 7
    assert set(report.files) == {"model.onnx", "model.onnx.data"}
    assert report.proof.max_difference > 1e-4


@pytest.mark.skipif(HAS_CUDA, reason="a machine with CUDA runs it")
def test_bfloat16_on_the_cpu(tiny_decoder: tuple[Path, ExportReport], tmp_path: Path) -> None:
    for exporter in EXPORTERS:
        with pytest.raises(
            UnsupportedModelError, match=r"bf16 of the .* exporter runs on CUDAExecutionProvider, which"
        ):
            export(tiny_decoder[0], tmp_path / "out", exporter=exporter, precision="bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_CUDA, reason="needs onnxruntime-gpu and a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda(precision: str, tmp_path: Path) -> None:
    source = saved(tiny_llama(), tmp_path / "model")
    report = export(source, tmp_path / "out", exporter="torch", precision=precision, providers=["cuda"])
    assert report.target == "cuda"
    assert {check.provider for check in report.proof.checks} == {CUDA}
    runner = OnnxRunner(tmp_path / "out", providers=["cuda"])
    cache = runner.graph.empty_past(1)[0]
    assert cache.device_name().lower() == "cuda"
    assert cache.element_type() == {"fp32": 1, "fp16": 10, "bf16": 16}[precision]
    tokens = runner.generate([[3, 4, 5]], max_new_tokens=8, stop_at_end=False)
    assert tokens.shape == (1, 8)


@pytest.mark.skipif(not HAS_CUDA, reason="needs onnxruntime-gpu and a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda_adapters(precision: str, tmp_path: Path) -> None:
    """Adapters switched on the GPU, where they are bound as inputs, give what PyTorch gives with each merged."""
    base = saved(tiny_llama(num_hidden_layers=2), tmp_path / "base")
    adapters = {
        "one": make_adapter(base, tmp_path / "one", 1, rank=4, target_modules=["q_proj", "v_proj"]),
        "two": make_adapter(base, tmp_path / "two", 2, rank=2, target_modules=["down_proj"]),
    }
    report = export(out=tmp_path / "out", base=base, adapters=adapters, precision=precision, providers=["cuda"])
    assert {check.adapter for check in report.proof.checks} == {None, "one", "two"}
    runner = OnnxRunner(tmp_path / "out", providers=["cuda"])
    outputs = []
    for name in (None, "one", "two", None):
        runner.set_adapter(name)
        outputs.append(runner.run({"input_ids": [[3, 4, 5]]})["logits"])
    np.testing.assert_array_equal(outputs[0], outputs[3])
    assert all(np.abs(outputs[0] - other).max() > 0.1 for other in outputs[1:3])


def refuse(kind: type[DoranError], match: str, task: str, precision: str, exporter: str | None) -> None:
    with pytest.raises(kind, match=match):
        exporter_for(TASKS[task], PRECISIONS[precision], exporter, multi_adapter=False)


def test_exporters() -> None:
    assert exporter_for(TASKS["text-generation"], PRECISIONS["fp32"], None, multi_adapter=False).name == "genai"
    assert exporter_for(TASKS["text-generation"], PRECISIONS["fp32"], None, multi_adapter=True).name == "torch"
    assert exporter_for(TASKS["text-classification"], PRECISIONS["int8"], None, multi_adapter=False).name == "torch"
    refuse(ConfigError, "exporter 'dirt' is not known: expected one of torch, genai", "text-generation", "fp32", "dirt")
    refuse(
        UnsupportedModelError,
        "genai exporter makes text-generation models, not fill-mask",
        "fill-mask",
        "fp32",
        "genai",
    )
    refuse(
        UnsupportedModelError,
        "torch exporter has no int4: expected .* or the genai exporter$",
        "text-generation",
        "int4",
        "torch",
    )
    refuse(UnsupportedModelError, "torch exporter has no int4.*text-generation models only", "fill-mask", "int4", None)


def test_providers() -> None:
    both = [CUDA, CPU]
    torch_exporter, genai = EXPORTERS["torch"], EXPORTERS["genai"]
    assert proof_providers(torch_exporter, PRECISIONS["fp32"], None, both) == both
    assert proof_providers(torch_exporter, PRECISIONS["int8"], None, both) == [CPU]
    assert proof_providers(torch_exporter, PRECISIONS["bf16"], None, both) == [CUDA]
    assert proof_providers(genai, PRECISIONS["int4"], [CPU], both) == [CPU]
    with pytest.raises(
        UnsupportedModelError, match=r"CUDAExecutionProvider does not run int8 .*: onnxruntime's dynamic"
    ):
        proof_providers(torch_exporter, PRECISIONS["int8"], [CUDA], both)
    with pytest.raises(ConfigError, match="'CUDAExecutionProvider' is not available: expected some of CPUExecution"):
        proof_providers(torch_exporter, PRECISIONS["fp32"], [CUDA], [CPU])


def test_targets() -> None:
    torch_exporter, genai, half = EXPORTERS["torch"], EXPORTERS["genai"], PRECISIONS["fp16"]
    assert target_for(torch_exporter, half, None, [CUDA, CPU]) == CUDA
    assert target_for(torch_exporter, half, "cuda", [CPU]) == CUDA  # made here for another machine
    assert (half.arithmetic(CUDA), half.arithmetic(CPU)) == (torch.float16, torch.float32)
    with pytest.raises(ConfigError, match="target 'tpu' is not known: expected one of cuda, cpu"):
        target_for(torch_exporter, half, "tpu", [CPU])
    with pytest.raises(UnsupportedModelError, match="cpu does not run bf16 of the torch exporter: the CPU provider"):
        target_for(torch_exporter, PRECISIONS["bf16"], "cpu", [CUDA])
    with pytest.raises(UnsupportedModelError, match="runs on cuda only, where the proof cannot run here"):
        target_for(genai, PRECISIONS["int4"], "cuda", [CPU])
