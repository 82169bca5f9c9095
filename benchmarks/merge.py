"""Time and memory of merging an adapter into a checkpoint: doran, PEFT, and a plain copy of the files.

    python benchmarks/merge.py --work DIR            # 4 GB of bfloat16 in 1 GB shards; needs 10 GB of disk
    python benchmarks/merge.py --work DIR --layers 2 # a small try

Makes a Llama-shaped checkpoint of random weights with adapters, then runs every way in a process of its own, in turn,
each with the base in the page cache and no dirty pages left by the one before. "time" ends when the way's own code
returns; "on disk" when its output has been synced too (doran syncs by itself, PEFT and cp do not). "memory" is the
peak of resident memory above what importing took. Needs transformers and peft.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 32
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
WAYS = ["copy", "doran", "doran-folded", "doran-dora", "doran-lora", "peft-dora", "peft-lora"]
SHARD_BYTES = 10**9


def layer_shapes(layer: int) -> dict[str, tuple[int, ...]]:
    """Parameters of one decoder layer."""
    name = f"model.layers.{layer}"
    kv = HIDDEN // HEADS * KV_HEADS
    return {
        f"{name}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.self_attn.k_proj.weight": (kv, HIDDEN),
        f"{name}.self_attn.v_proj.weight": (kv, HIDDEN),
        f"{name}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        f"{name}.mlp.gate_proj.weight": (INNER, HIDDEN),
        f"{name}.mlp.up_proj.weight": (INNER, HIDDEN),
        f"{name}.mlp.down_proj.weight": (HIDDEN, INNER),
        f"{name}.input_layernorm.weight": (HIDDEN,),
        f"{name}.post_attention_layernorm.weight": (HIDDEN,),
    }


def make_base(folder: Path, layers: int) -> None:
    """A Llama checkpoint of random bfloat16 weights in 1 GB shards."""
    import torch
    from safetensors.torch import save_file

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        shapes |= layer_shapes(layer)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    generator, shards, size = torch.Generator().manual_seed(0), [{}], 0
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator).mul_(0.02) if len(shape) > 1 else torch.ones(shape)
        if size + 2 * values.numel() > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = values.bfloat16()
        size += 2 * values.numel()
    folder.mkdir(parents=True)
    places = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_adapters(work: Path, layers: int, targets: list[str], rank: int) -> None:
    """A trainable DoRAN adapter, its folded form, the equal PEFT DoRA, and a PEFT LoRA of the same factors."""
    import torch

    from doran_core.adapter import TrainableAdapter, write_folded, write_trainable
    from doran_core.checkpoint.binding import bind, checkpoint_fingerprint
    from doran_core.checkpoint.checkpoint import Checkpoint
    from doran_core.convert import fold_adapter, to_peft_dora
    from doran_core.method.config import DoranConfig

    config = DoranConfig(rank=rank, target_modules=targets, factors="static", alpha=float(rank))
    generator, modules = torch.Generator().manual_seed(1), {}
    for layer in range(layers):
        for key, shape in layer_shapes(layer).items():
            name = key.removesuffix(".weight")
            if name.rpartition(".")[2] in targets:
                modules[name] = {
                    "magnitude": torch.full((shape[0],), 0.02 * shape[1] ** 0.5 * 1.1),
                    "tau.raw": torch.full((1,), -2.0),
                    "factors.A": torch.randn(rank, shape[1], generator=generator) * 0.02,
                    "factors.B": torch.randn(shape[0], rank, generator=generator) * 0.02,
                }
    record = TrainableAdapter(config, modules, base_model=str(work / "base"), task_type="CAUSAL_LM")
    fingerprint = checkpoint_fingerprint(bind(record, Checkpoint(work / "base"), "made").modules)
    record = TrainableAdapter(
        config, modules, base_fingerprint=fingerprint, base_model=str(work / "base"), task_type="CAUSAL_LM"
    )
    write_trainable(record, work / "doran")
    folded = fold_adapter(work / "doran", work / "base")
    write_folded(folded, work / "doran-folded")
    to_peft_dora(folded, work / "dora")
    make_lora(work)


def make_lora(work: Path) -> None:
    """The DoRA adapter without its magnitudes."""
    from safetensors.torch import load_file, save_file

    (work / "lora").mkdir()
    tensors = load_file(work / "dora" / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if "magnitude" not in key}
    save_file(kept, work / "lora" / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = json.loads((work / "dora" / "adapter_config.json").read_text()) | {"use_dora": False}
    (work / "lora" / "adapter_config.json").write_text(json.dumps(fields))


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run_one(way: str, work: Path) -> dict[str, float]:
    """Run one way in this process."""
    import torch

    base, out = work / "base", work / "out"
    if way.startswith("peft"):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    elif way.startswith("doran"):
        from doran_core.merge import merge_checkpoint
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    imported, start = memory("VmRSS"), time.perf_counter()
    if way == "copy":
        subprocess.run(["cp", "-r", base, out], check=True)
    elif way.startswith("peft"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = PeftModel.from_pretrained(model, work / way.removeprefix("peft-")).merge_and_unload()
        model.save_pretrained(out, max_shard_size="1GB")
    else:
        merge_checkpoint(base, work / {"doran-dora": "dora", "doran-lora": "lora"}.get(way, way), out)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - imported
    os.sync()
    return {"seconds": seconds, "on_disk": time.perf_counter() - start, "memory": peak}


def measure(way: str, work: Path) -> dict[str, float]:
    """Run one way in its own process, the base warm in the page cache."""
    shutil.rmtree(work / "out", ignore_errors=True)
    os.sync()
    for file in (work / "base").glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass
    command = [sys.executable, __file__, "--work", str(work), "--run", way]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    shutil.rmtree(work / "out")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the made files, removed at the end")
    parser.add_argument("--layers", type=int, default=36, help="36 give 4 GB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="qv")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--keep", action="store_true", help="leave the made files, and use those that are there")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    if arguments.run:
        print(json.dumps(run_one(arguments.run, work)))
        return
    made = arguments.keep and work.exists()
    work.mkdir(parents=True, exist_ok=made)
    try:
        if not made:
            make_base(work / "base", arguments.layers)
            make_adapters(work, arguments.layers, TARGETS[arguments.targets], arguments.rank)
        if arguments.repeats == 0:
            return
        size = sum(file.stat().st_size for file in (work / "base").iterdir())
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in arguments.ways}
        for repeat in range(arguments.repeats):
            for way in arguments.ways:
                runs[way].append(measure(way, work))
                print(f"run {repeat + 1}: {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
        print_table(runs, size, arguments)
    finally:
        if not arguments.keep:
            shutil.rmtree(work, ignore_errors=True)


def print_table(runs: dict[str, list[dict[str, float]]], size: int, arguments: argparse.Namespace) -> None:
    """Medians over the repeats, as Markdown."""
    print(f"{size / 1e9:.2f} GB, targets {arguments.targets}, rank {arguments.rank}, median of {arguments.repeats}\n")
    print("| way | time | on disk | memory above import |\n|---|---|---|---|")
    for way, results in runs.items():
        median = {key: statistics.median(result[key] for result in results) for key in results[0]}
        note = "" if way != "copy" else " (of this process; `cp` is another)"
        print(
            f"| {way} | {median['seconds']:.1f} s | {median['on_disk']:.1f} s | {median['memory'] / 1e6:.0f} MB{note} |"
        )


if __name__ == "__main__":
    main()
