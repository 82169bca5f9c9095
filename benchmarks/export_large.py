"""Peak memory of exporting a made model of several GB, by stage, against the size of its weights.

    python benchmarks/export_large.py --work DIR              # 3 GB of float32; needs 10 GB of disk and of memory
    python benchmarks/export_large.py --work DIR --layers 2   # a small try

Makes a Llama-shaped checkpoint of random weights with an adapter on q and v. A process of its own exports both with the
torch exporter: merged as a stream, traced, written with external data, proven in ONNX Runtime. Memory is the peak of
the resident set above what importing took, read at the end of every stage. Mapped files count while their pages are in.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INNER, VOCABULARY, HEADS = 2048, 5632, 8192, 16


def make(work: Path, layers: int) -> None:
    """The base, in float32, and a folded adapter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from doran_core import DoranConfig, adapt

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(work / "base", max_shard_size="1GB")
    handle = adapt(model, DoranConfig(rank=16, target_modules=["q_proj", "v_proj"], factors="static"))
    with torch.no_grad():
        for _, parameter in handle.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    handle.save(work / "adapter")


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def export_one(work: Path) -> dict[str, object]:
    """Export in this process and note the peak of every stage."""
    from doran_export.api import export

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    imported, peaks = memory("VmRSS"), {}

    def note(stage: str, done: int, total: int) -> None:
        peaks[stage] = max(peaks.get(stage, 0), memory("VmHWM") - imported)
        if done == 0:
            Path("/proc/self/clear_refs").write_text("5")

    start = time.perf_counter()
    report = export(out=work / "out", base=work / "base", adapter=work / "adapter", exporter="torch", progress=note)
    return {
        "seconds": time.perf_counter() - start,
        "peaks": peaks,
        "files": report.files,
        "difference": report.proof.max_difference,
        "stages": report.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the made files, removed at the end")
    parser.add_argument("--layers", type=int, default=16, help="16 give 3 GB")
    parser.add_argument("--step", choices=["make", "export"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.step == "make":
        make(work, arguments.layers)
        return
    if arguments.step == "export":
        print(json.dumps(export_one(work)))
        return
    work.mkdir(parents=True)
    try:
        command = [sys.executable, __file__, "--work", str(work), "--layers", str(arguments.layers), "--step"]
        subprocess.run([*command, "make"], check=True, stdout=subprocess.DEVNULL)
        done = subprocess.run([*command, "export"], check=True, stdout=subprocess.PIPE, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        weights = sum(file.stat().st_size for file in (work / "base").glob("*.safetensors"))
        print(f"{weights / 1e9:.2f} GB of weights, {result['seconds']:.0f} s, difference {result['difference']:.1e}\n")
        print("| stage | peak, GB | x weights | s |\n|---|---|---|---|")
        for stage, peak in result["peaks"].items():
            print(f"| {stage} | {peak / 1e9:.2f} | {peak / weights:.2f} | {result['stages'].get(stage, 0):.0f} |")
        print("\nfiles: " + ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in result["files"].items()))
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
