"""One adapter's whole way on a real model and real text: fine-tune, save, merge, export, serve, report.

    python examples/end_to_end.py             # up to 15 minutes on two CPU cores; a GPU is used where there is one
    python examples/end_to_end.py --short     # the same steps with less training

Base: SmolLM2-135M-Instruct. Data: Rotten Tomatoes sentences and IMDb reviews. It trains two DoRAN adapters: `sentiment`
answers positive or negative, `critic` goes on with a review. Read it from top to bottom; the folder demo has the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# vLLM reads these on import: a small cache on the CPU, a fresh engine process, no statistics, no hub.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parent))
from demo.checks import Checks, check_before_starting, max_difference
from demo.data import make_prompts, prepare_base, read_data
from demo.report import Run, write_report
from demo.tasks import Sizes, Task, critic_task, generate, new_tokens, sentiment_task

from doran_core.errors import DoranError


@dataclass
class Training:
    """The adapter's configuration, the learning rate and the seed."""

    config: Any
    learning_rate: float = 2e-3
    seed: int = 0


def main() -> None:
    args = parse_arguments()
    check_before_starting(Path(args.out), args.base)
    import torch

    import doran_hf

    torch.manual_seed(0)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = Sizes.short() if args.short else Sizes()
    started, checks, runs, adapters = time.time(), Checks(), [], {}
    with tempfile.TemporaryDirectory(prefix="doran-demo-") as scratch:
        work = Path(args.keep or scratch)
        work.mkdir(parents=True, exist_ok=True)
        base, tokenizer = prepare_base(args.base, work / "base")
        sentences, reviews = read_data()
        prompts = make_prompts(sentences)
        for task in (sentiment_task(tokenizer, sentences, sizes), critic_task(tokenizer, reviews, sizes)):
            training = Training(doran_hf.DoranConfig(rank=8, alpha=16, task_type="CAUSAL_LM"))
            run = fine_tune(task, base, tokenizer, device, training, checks)
            adapters[task.name] = save_and_merge(run, base, tokenizer, work, checks)
            runs.append(run)
        export_to_onnx(work / "merged-sentiment", work / "onnx", tokenizer, prompts["sentiment"], checks)
        served = serve(base, adapters, prompts, tokenizer)
        checks.tokens(served, generate(base, work, tokenizer, prompts, device))
        if not args.short:
            checks.gains(*runs)
        name = args.base or "SmolLM2-135M-Instruct"
        write_report(Path(args.out), runs, adapters, checks, prompts, served, tokenizer, name, time.time() - started)
    if checks.failed:
        raise DoranError("the demo ran, but this did not hold: " + "; ".join(checks.failed))


def fine_tune(task: Task, base: Path, tokenizer: Any, device: str, training: Training, checks: Checks) -> Run:
    """1. Train an adapter with transformers' Trainer; score base and adapted model on the same unseen texts."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    import doran_hf

    print(f"\n=== Fine-tune {task.name}: {task.steps} steps of {task.batch}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).to(device).eval()
    base_score = task.score(model, f"{task.name}: base")
    probe = torch.tensor([task.examples[0]["input_ids"]], device=device)
    with torch.no_grad():
        before = model(probe).logits
        model = get_peft_model(model, training.config)
        checks.below(f"{task.name}: step 0 = base", max_difference(model.eval()(probe).logits, before), 1e-5)
    model.print_trainable_parameters()
    tau_before = doran_hf.tau_by_layer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=task.steps, per_device_train_batch_size=task.batch, learning_rate=training.learning_rate,
            warmup_steps=task.steps // 10, lr_scheduler_type="linear", logging_steps=max(1, task.steps // 50),
            save_strategy="no", report_to=[], seed=training.seed, train_sampling_strategy="group_by_length",
            use_cpu=device == "cpu", dataloader_pin_memory=device != "cpu",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        trainer = Trainer(model=model, args=arguments, train_dataset=task.examples, data_collator=collator)
        started = time.time()
        trainer.train()
    seconds = time.time() - started
    tau = doran_hf.tau_by_layer(model)
    return Run(
        name=task.name,
        model=model.eval(),
        losses=[(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        tau={layer: (tau_before[layer].mean().item(), tau[layer].mean().item()) for layer in tau},
        seconds=seconds,
        metric=task.metric,
        base_score=base_score,
        score=task.score(model, f"{task.name}: adapted"),
        test_size=task.test_size,
    )


def save_and_merge(run: Run, base: Path, tokenizer: Any, work: Path, checks: Checks) -> Path:
    """2. Save the adapter, load it again, merge it into a plain Hugging Face checkpoint; all three compute the same."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from doran_core.merge import merge_checkpoint

    directory, merged = work / f"adapter-{run.name}", work / f"merged-{run.name}"
    run.model.to("cpu").save_pretrained(directory)
    merge_checkpoint(base, [directory], merged)
    probe = tokenizer(["Review: a film to remember\nSentiment:"], return_tensors="pt").input_ids
    with torch.no_grad():
        trained = run.model(probe).logits
        run.model = None  # the memory of a whole base model
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), directory)
        checks.below(f"{run.name}: reloaded = trained", max_difference(again.eval()(probe).logits, trained), 1e-6)
        plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
        checks.below(f"{run.name}: merged = unmerged", max_difference(plain(probe).logits, trained), 1e-4)
    return directory


def export_to_onnx(merged: Path, out: Path, tokenizer: Any, prompts: list[str], checks: Checks) -> None:
    """3. The merged model in ONNX Runtime, against PyTorch."""
    import torch
    from transformers import AutoModelForCausalLM

    from doran_export import OnnxRunner, export

    print("\n=== ONNX", flush=True)
    export(merged, out, exporter="torch")
    runner = OnnxRunner(out)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    with torch.no_grad():
        for text in prompts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            logits, expected = torch.as_tensor(runner.run({"input_ids": ids})["logits"]), model(ids).logits
            checks.below(f"ONNX = merged, {text[8:24]}...", max_difference(logits, expected), 1e-3)


def serve(
    base: Path, adapters: dict[str, Path], prompts: dict[str, list[str]], tokenizer: Any
) -> dict[str, list[list[int]]]:
    """4. One vLLM engine, one batch: base requests beside those of both adapters. Returns tokens by adapter."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    print("\n=== vLLM: base, sentiment and critic in one batch", flush=True)
    engine = LLM(
        model=str(base), dtype="float32", max_model_len=512, enable_lora=True, max_loras=2, max_lora_rank=8,
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
