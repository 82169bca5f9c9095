"""What goes wrong says so in one sentence, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT, saved, tiny_llama

from doran_core.errors import CheckpointError, ConfigError, DoranError, MissingDependencyError
from doran_core.files.atomic import new_directory
from doran_export import ExportError, OnnxRunner, ProofError, UnsupportedModelError, export, verify
from doran_export.graph.torch_export import trace
from doran_export.proof.cases import read_inputs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A small classifier's directory."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**TEXT, num_hidden_layers=1, intermediate_size=48, max_position_embeddings=64)
    return saved(transformers.BertForSequenceClassification(config), tmp_path / "model")


def change_config(model: Path, **changes: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(kind: type[DoranError], match: str, model: Path, **arguments: object) -> None:
    """Check that an export raises, in one line, and leaves no trace."""
    out = model.parent / "out"
    with pytest.raises(kind, match=match) as caught:
        export(model, out, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(model.parent.glob(".*"))


def test_missing_directory(tmp_path: Path) -> None:
    refuse(CheckpointError, "model directory .*nowhere does not exist", tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(CheckpointError, r"has no config\.json", tmp_path / "empty")


def test_broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")
    refuse(CheckpointError, r"config\.json: not JSON", model)


def test_config_with_a_bad_value(model: Path) -> None:
    change_config(model, hidden_size="large")
    refuse(CheckpointError, r"config\.json is not valid: .*hidden_size", model)


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    refuse(CheckpointError, "has no safetensors weights", model)


def test_truncated_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refuse(CheckpointError, r"model\.safetensors: truncated", model)


def test_missing_head(model: Path) -> None:
    change_config(model, architectures=["BertForTokenClassification"], id2label={"0": "a", "1": "b"})
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refuse(CheckpointError, "lacks weights that token-classification needs: classifier.weight", model)


def test_head_of_another_size(model: Path) -> None:
    change_config(model, id2label={str(i): str(i) for i in range(5)}, label2id={str(i): i for i in range(5)})
    refuse(CheckpointError, "cannot load the weights", model)


def test_unknown_architecture(model: Path) -> None:
    change_config(model, architectures=["BertForNextSentencePrediction"])
    refuse(UnsupportedModelError, "BertForNextSentencePrediction .* is not supported: expected a name ending", model)


def test_unknown_model_type(model: Path) -> None:
    change_config(model, model_type="nonesuch")
    refuse(UnsupportedModelError, "does not know the model", model)


def test_encoder_decoder(model: Path) -> None:
    transformers.T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(model)
    refuse(UnsupportedModelError, "encoder-decoder", model)


def test_experts_with_a_loop_of_their_own(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "intermediate_size": 48, "intermediate_size_mlp": 48, "num_key_value_heads": 2}
    config = transformers.Llama4TextConfig(**TEXT | sizes, num_local_experts=2, head_dim=8)
    path = saved(transformers.Llama4ForCausalLM(config), tmp_path / "llama4")
    refuse(UnsupportedModelError, "mixture of experts .num_local_experts=2. whose code", path, exporter="torch")


def test_quantized(model: Path) -> None:
    change_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refuse(UnsupportedModelError, "quantized", model)


def test_unknown_names(model: Path) -> None:
    refuse(ConfigError, "precision 'fp12' is not known: expected one of fp32", model, precision="fp12")
    refuse(ConfigError, "task 'telepathy' is not known: expected one of text-generation", model, task="telepathy")
    refuse(UnsupportedModelError, "cannot do image-classification", model, task="image-classification")


def test_arguments_that_do_not_go_together(model: Path) -> None:
    refuse(ConfigError, "give either a model directory, or both", model, base=model)
    with pytest.raises(ConfigError, match="no output directory"):
        export(model)


def test_output_directory_in_use(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ExportError, match=r"is not empty \(it holds mine\.txt\)"):
        export(model, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"
    with pytest.raises(ExportError, match="is not a directory"):
        export(model, tmp_path / "out" / "mine.txt")


def test_failed_proof_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(ProofError, "a tolerance of 1e-12 cannot be proven", model, tolerance=1e-12)

    def trace_another(loaded: transformers.PreTrainedModel, *rest: Any) -> Any:
        loaded.classifier.bias.data += 0.02
        return trace(loaded, *rest)

    monkeypatch.setattr("doran_export.pipeline.trace", trace_another)
    refuse(ProofError, r"differs from PyTorch in logits .* by 0\.0[0-9]*, more than the allowed 0\.0", model)
    rounded = export(model, model.parent / "fp16", precision="fp16")  # 0.02 is within what float16 rounds
    assert 0.01 < rounded.proof.max_difference < 0.1


def test_bad_given_inputs(model: Path) -> None:
    refuse(ConfigError, "has no tokenizer", model, inputs=["a text"])
    refuse(ConfigError, r"given input 0 has \['pixels'\]", model, inputs=[{"pixels": np.zeros(1, int)}])
    wrong = {"input_ids": np.zeros((1, 3), np.float32)}
    refuse(ConfigError, "input input_ids has dtype float32, expected int64", model, inputs=[wrong])


def test_input_files(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        read_inputs(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ExportError, match="holds no text"):
        read_inputs(tmp_path / "empty.txt")
    (tmp_path / "table.csv").write_text("a")
    with pytest.raises(ExportError, match=r"expected \.txt"):
        read_inputs(tmp_path / "table.csv")
    (tmp_path / "broken.npz").write_text("a")
    with pytest.raises(ExportError, match=r"cannot be read as \.npz"):
        read_inputs(tmp_path / "broken.npz")
    (tmp_path / "two.txt").write_text("one\n\ntwo\n")
    assert read_inputs(tmp_path / "two.txt") == ["one", "two"]
    np.savez(tmp_path / "arrays.npz", input_ids=np.array([[1]]))
    assert read_inputs(tmp_path / "arrays.npz")[0]["input_ids"].tolist() == [[1]]


def test_full_disk(tmp_path: Path) -> None:
    def write() -> None:
        with new_directory(tmp_path / "out", error=ExportError) as work:
            (work / "half").write_text("half")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("the writer failed") from error

    with pytest.raises(ExportError, match="the disk is full"):
        write()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_output_directory_follows_the_umask(model: Path, tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        export(model, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert not list(tmp_path.glob(".*"))


def test_two_exports_to_one_place(model: Path, tmp_path: Path) -> None:
    """The second to be done finds the first there, and leaves it."""

    def second() -> None:
        with new_directory(tmp_path / "out", error=ExportError) as work:
            (work / "model.onnx").write_text("second")
            with new_directory(tmp_path / "out", error=ExportError) as other:
                (other / "model.onnx").write_text("first")

    with pytest.raises(ExportError, match="something else was put there"):
        second()
    assert (tmp_path / "out" / "model.onnx").read_text() == "first"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_in_place_of_a_file(model: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(model, tmp_path / "odd")
    (tmp_path / "odd" / name).unlink()
    os.mkfifo(tmp_path / "odd" / name)
    refuse(CheckpointError, name, tmp_path / "odd")


def test_runner_and_verify_on_another_directory(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model\.onnx"):
        OnnxRunner(model)
    with pytest.raises(ExportError, match=r"has no model\.onnx"):
        verify(model, model)


def test_unknown_provider_and_inputs(tiny_decoder: tuple[Path, object]) -> None:
    directory = tiny_decoder[1].directory  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="'AbacusExecutionProvider' is not available: expected some of"):
        OnnxRunner(directory, providers=["AbacusExecutionProvider"])
    with pytest.raises(ConfigError, match=r"inputs .* were given, but"):
        OnnxRunner(directory).run({"pixel_values": np.zeros((1, 1, 8, 8))})
    with pytest.raises(ConfigError, match="input input_ids has dtype float64, expected int64"):
        OnnxRunner(directory).run({"input_ids": [[1.0, 2.0]]})
    for mask in ([[1, 1, 0]], [[1, 0, 1]], [[0, 0, 0]]):
        with pytest.raises(ConfigError, match="attention_mask: expected prompts padded on the left"):
            OnnxRunner(directory).generate([[3, 4, 5]], mask)
    with pytest.raises(ConfigError, match="max_new_tokens: expected at least 1, got 0"):
        OnnxRunner(directory).generate([[1, 2]], max_new_tokens=0)


@pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan"), float("inf")])
def test_a_tolerance_that_proves_nothing(model: Path, tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(ConfigError, match="tolerance: expected a positive number or None, got"):
        export(model, tmp_path / "out", tolerance=tolerance)
    assert not (tmp_path / "out").exists()


def test_without_onnxruntime(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refuse(MissingDependencyError, r"pip install 'doran-export\[cpu\]'", model)


def test_import_is_light() -> None:
    code = "import sys, doran_export, doran_export.cli; print([m for m in sys.modules if m in {%s}])"
    heavy = "'onnxruntime', 'torch', 'transformers', 'onnx', 'peft', 'vllm', 'doran_hf'"
    result = subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nothing_of_the_other_backends_is_imported() -> None:
    code = "import sys, doran_export.api; print([m for m in sys.modules if m in {'peft', 'vllm', 'doran_hf'}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tiny_llama_is_not_degenerate() -> None:
    """The proofs on random models mean something: their logits are not all alike."""
    logits = tiny_llama()(torch.tensor([[3, 4, 5]])).logits
    assert logits.std() > 0.1


def test_the_exporters_old_name_is_still_read(tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match="called exporter"), pytest.raises(DoranError):
        export(tmp_path / "no-model", tmp_path / "out", road="torch")
