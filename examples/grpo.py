"""Reinforcement learning with TRL's GRPOTrainer and vLLM, the policy a DoRAN adapter.

    python grpo.py BASE PROMPTS.jsonl OUT                  # vLLM gets the adapter alone after each update
    python grpo.py BASE PROMPTS.jsonl OUT --sync merged    # TRL's own way: all weights, with the adapter merged

See docs/howto/grpo.md for which to take.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from doran_hf import DoranConfig, exempt_from_decay, save_folded
from doran_serve import with_adapter_sync


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Yours. Here: the share of different words, so that the policy learns not to repeat itself."""
    return [len({*text.split()}) / max(1, len(text.split())) for text in completions]


def main(arguments: list[str] | None = None) -> GRPOTrainer:
    """Train and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="directory or hub name of the base model")
    parser.add_argument("prompts", type=Path, help="JSON lines with a field 'prompt'")
    parser.add_argument("out", type=Path, help="where the adapter goes")
    parser.add_argument("--sync", choices=["adapter", "merged"], default="adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="of a completion")
    options = parser.parse_args(arguments)

    gpu = torch.cuda.is_available()
    config = GRPOConfig(
        str(options.out),
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.3,
        max_steps=options.steps,
        max_completion_length=options.tokens,
        num_generations=4,
        per_device_train_batch_size=4,
        learning_rate=1e-4,
        use_cpu=not gpu,
        bf16=gpu,
        report_to=[],
    )
    trainer_class = with_adapter_sync(GRPOTrainer, save_folded) if options.sync == "adapter" else GRPOTrainer
    trainer = trainer_class(
        options.base,
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=str(options.prompts), split="train"),
        peft_config=DoranConfig(rank=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    exempt_from_decay(trainer)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
