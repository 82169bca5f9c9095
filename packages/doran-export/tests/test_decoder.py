"""A small decoder's directory: cache, generation, names, and what is and is not in the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import saved, tiny_llama
from transformers import AutoModelForCausalLM

from doran_core.errors import ConfigError
from doran_export import ExportReport, OnnxRunner, ProofError, verify

Decoder = tuple[Path, ExportReport]


def expected_tokens(source: Path, prompt: list[list[int]], count: int) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(source)
    ids = torch.tensor(prompt)
    out = model.generate(ids, do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return out[:, ids.shape[1] :].numpy()


def test_proof(tiny_decoder: Decoder) -> None:
    _, report = tiny_decoder
    assert report.proof.max_difference < 1e-4
    (greedy,) = report.proof.greedy
    assert greedy.steps == 64
    assert greedy.identical + len(greedy.ties) == greedy.prompts
    written = json.loads((report.directory / "export_report.json").read_text())
    assert written["proof"]["max_difference"] == report.proof.max_difference
    assert written["task"] == "text-generation"


def test_generates_what_transformers_generates(tiny_decoder: Decoder) -> None:
    source, report = tiny_decoder
    runner = OnnxRunner(report.directory)
    prompt = [[5, 6, 7, 8], [9, 8, 7, 6]]
    got = runner.generate(prompt, max_new_tokens=20, stop_at_end=False)
    np.testing.assert_array_equal(got, expected_tokens(source, prompt, 20))
    streamed = list(runner.stream(prompt, max_new_tokens=20, stop_at_end=False))
    np.testing.assert_array_equal(np.stack(streamed, axis=1), got)


def test_padding_on_the_left_changes_nothing(tiny_decoder: Decoder) -> None:
    runner = OnnxRunner(tiny_decoder[1].directory)
    alone = runner.run({"input_ids": [[5, 6, 7]]})["logits"]
    padded = runner.run({"input_ids": [[0, 0, 5, 6, 7]], "attention_mask": [[0, 0, 1, 1, 1]]})["logits"]
    np.testing.assert_allclose(padded[:, 2:], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[5, 6, 7], [5, 6]], r"input_ids: expected rows of one length, got rows of \[3, 2\]; pad them"),
        ([5, 6, 7], r"input_ids: expected \[batch, sequence\]"),
        ([[]], r"input_ids: expected \[batch, sequence\]"),
    ],
)
def test_prompts_of_another_shape_are_refused(tiny_decoder: Decoder, ids: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OnnxRunner(tiny_decoder[1].directory).generate(ids)


def test_stops_at_an_end_token(tiny_decoder: Decoder, tmp_path: Path) -> None:
    _, report = tiny_decoder
    free = OnnxRunner(report.directory).generate([[5, 6, 7, 8]], max_new_tokens=12, stop_at_end=False)[0].tolist()
    copy = Path(shutil.copytree(report.directory, tmp_path / "copy"))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [free[4]]}))
    got = OnnxRunner(copy).generate([[5, 6, 7, 8]], max_new_tokens=12)[0].tolist()
    assert got == free[: free.index(free[4]) + 1]


def test_verify(tiny_decoder: Decoder, tmp_path: Path) -> None:
    source, report = tiny_decoder
    assert verify(report.directory, source).max_difference < 1e-4
    torch.manual_seed(1)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[5].mlp.down_proj.weight[0, 0] += 1.0
    with pytest.raises(ProofError, match=r"differs from PyTorch in logits .* by .*, more than the allowed"):
        verify(report.directory, saved(other, tmp_path / "other"))


def test_axes_are_named(tiny_decoder: Decoder) -> None:
    graph = onnx.load(tiny_decoder[1].directory / "model.onnx", load_external_data=False).graph
    values = [*graph.input, *graph.output]
    axes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values}
    assert axes["input_ids"] == ["batch", "sequence"]
    assert axes["attention_mask"] == ["batch", "total_sequence"]
    assert axes["past_key_values.5.value"] == ["batch", 2, "past_sequence", 8]
    assert axes["present.5.value"] == ["batch", 2, "total_sequence", 8]
    assert axes["logits"] == ["batch", "sequence", 97]
    layers = [f"past_key_values.{layer}.{part}" for layer in range(6) for part in ("key", "value")]
    assert list(axes)[3 : 3 + 12] == layers


def test_files(tiny_decoder: Decoder, tmp_path: Path) -> None:
    source, report = tiny_decoder
    assert set(report.files) == {"model.onnx", "model.onnx.data"}
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(source).parameters()) * 4
    assert report.files["model.onnx.data"] < 1.05 * weights  # the tied table is in it once
    moved = Path(shutil.copytree(report.directory, tmp_path / "moved"))  # the reference between the two is relative
    assert OnnxRunner(moved).run({"input_ids": [[3]]})["logits"].shape == (1, 1, 97)


def test_nothing_of_this_machine_is_inside(tiny_decoder: Decoder) -> None:
    source, report = tiny_decoder
    for path in report.directory.iterdir():
        data = path.read_bytes()
        assert b"site-packages" not in data, path
        assert str(source.parent).encode() not in data, path
