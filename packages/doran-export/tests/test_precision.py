"""Precisions and roads: what is made is proven, what a target does not run is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import saved, tiny_llama

from doran_core.errors import ConfigError, DoranError
from doran_export import ExportReport, OnnxRunner, UnsupportedModelError, export, verify
from doran_export.precision import PRECISIONS, ROADS, proof_providers, road_for
from doran_export.tasks import TASKS

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
HAS_CUDA = CUDA in onnxruntime.get_available_providers()


def test_float16(tiny_decoder: tuple[Path, ExportReport], tmp_path: Path) -> None:
    source, full = tiny_decoder
    report = export(source, tmp_path / "out", road="torch", precision="fp16")
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    kinds = {tensor.data_type for tensor in graph.graph.initializer if len(tensor.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16}
    assert sum(report.files.values()) < 0.7 * sum(full.files.values())
    runner = OnnxRunner(tmp_path / "out")
    got = runner.run({"input_ids": [[3, 4, 5]]})["logits"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, OnnxRunner(full.directory).run({"input_ids": [[3, 4, 5]]})["logits"], atol=5e-2)
    assert verify(tmp_path / "out", source).max_difference < 5e-2


def test_int8(tiny_decoder: tuple[Path, ExportReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _ = tiny_decoder
    monkeypatch.setattr("doran_export.graph._INLINE_LIMIT", 1000)  # weights beside the graph, as in a large model
    report = export(source, tmp_path / "out", road="torch", precision="int8")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") + kinds.count("DynamicQuantizeMatMul") >= 6 * 7
    assert set(report.files) == {"model.onnx", "model.onnx.data"}
    assert report.proof.max_difference > 1e-4


@pytest.mark.skipif(HAS_CUDA, reason="a machine with CUDA runs it")
def test_bfloat16_on_the_cpu(tiny_decoder: tuple[Path, ExportReport], tmp_path: Path) -> None:
    for road in ROADS:
        with pytest.raises(UnsupportedModelError, match=r"bf16 of the road .* runs on CUDAExecutionProvider, which"):
            export(tiny_decoder[0], tmp_path / "out", road=road, precision="bf16")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_CUDA, reason="needs onnxruntime-gpu and a GPU")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_cuda(precision: str, tmp_path: Path) -> None:
    source = saved(tiny_llama(), tmp_path / "model")
    report = export(source, tmp_path / "out", road="torch", precision=precision, providers=["cuda"])
    assert {check.provider for check in report.proof.checks} == {CUDA}
    tokens = OnnxRunner(tmp_path / "out", providers=["cuda"]).generate([[3, 4, 5]], max_new_tokens=8, stop_at_end=False)
    assert tokens.shape == (1, 8)


def refuse(kind: type[DoranError], match: str, task: str, precision: str, road: str | None) -> None:
    with pytest.raises(kind, match=match):
        road_for(TASKS[task], PRECISIONS[precision], road, multi_adapter=False)


def test_roads() -> None:
    assert road_for(TASKS["text-generation"], PRECISIONS["fp32"], None, multi_adapter=False).name == "genai"
    assert road_for(TASKS["text-generation"], PRECISIONS["fp32"], None, multi_adapter=True).name == "torch"
    assert road_for(TASKS["text-classification"], PRECISIONS["int8"], None, multi_adapter=False).name == "torch"
    refuse(ConfigError, "road 'dirt' is not known: expected one of torch, genai", "text-generation", "fp32", "dirt")
    refuse(UnsupportedModelError, "genai makes text-generation models, not fill-mask", "fill-mask", "fp32", "genai")
    refuse(
        UnsupportedModelError, "torch has no int4: expected .* or the road genai$", "text-generation", "int4", "torch"
    )
    refuse(UnsupportedModelError, "torch has no int4.*text-generation models only", "fill-mask", "int4", None)


def test_providers() -> None:
    both = [CUDA, CPU]
    torch_road, genai = ROADS["torch"], ROADS["genai"]
    assert proof_providers(torch_road, PRECISIONS["fp32"], None, both) == both
    assert proof_providers(torch_road, PRECISIONS["int8"], None, both) == [CPU]
    assert proof_providers(torch_road, PRECISIONS["bf16"], None, both) == [CUDA]
    assert proof_providers(genai, PRECISIONS["int4"], [CPU], both) == [CPU]
    with pytest.raises(
        UnsupportedModelError, match=r"CUDAExecutionProvider does not run int8 .*: onnxruntime's dynamic"
    ):
        proof_providers(torch_road, PRECISIONS["int8"], [CUDA], both)
    with pytest.raises(ConfigError, match="'CUDAExecutionProvider' is not available: expected some of CPUExecution"):
        proof_providers(torch_road, PRECISIONS["fp32"], [CUDA], [CPU])
