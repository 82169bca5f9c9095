"""Fine-tune a causal language model with DoRAN on several GPUs.

    accelerate launch --config_file fsdp2.yaml train.py BASE TEXTS.jsonl OUT

The configuration says how the work is spread; nothing here depends on it. See docs/howto/scaling.md for which to take.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from doran_hf import DoranConfig, exempt_from_decay


def main() -> None:
    """Train and save; the adapter is the one that a single process would train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="directory or hub name of the base model")
    parser.add_argument("texts", type=Path, help="JSON lines with a field 'text'")
    parser.add_argument("out", type=Path, help="where the adapter goes")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="of each process")
    parser.add_argument("--dtype", default="auto", help="of the base model; by default the checkpoint's")
    parser.add_argument("--lora", action="store_true", help="train LoRA instead, to compare")
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=str(options.texts), split="train")
    data = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=data.column_names
    )

    set_seed(0)  # the same start in every process
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype)
    where = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = LoraConfig(r=8, lora_alpha=16, **where) if options.lora else DoranConfig(rank=8, **where)
    model = get_peft_model(model, config)
    arguments = TrainingArguments(
        str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        bf16=os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16",
        report_to=[],
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collator)
    if not options.lora:
        exempt_from_decay(trainer)
    elif is_fsdp1(trainer):
        parser.error("--lora: this script does not save LoRA under FSDP1")
    trainer.train()
    save(trainer)
    trainer.accelerator.end_training()  # with an open process group, gloo can abort a process that ends


def is_fsdp1(trainer: Trainer) -> bool:
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    return plugin is not None and plugin.fsdp_version == 1


def save(trainer: Trainer) -> None:
    """Trainer's own saving, but under FSDP1, whose state dict has no place for networks that layers share."""
    if not is_fsdp1(trainer):
        trainer.save_model()
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
        if trainer.is_world_process_zero():
            parameters = trainer.model_wrapped.named_parameters()
            trained = {name: p.detach() for name, p in parameters if ".doran_adapter." in name}
            model.save_pretrained(trainer.args.output_dir, state_dict=trained)


if __name__ == "__main__":
    main()
