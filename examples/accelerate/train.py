"""Fine-tune a causal language model with DoRAN on several GPUs.

    accelerate launch --config_file fsdp2.yaml train.py BASE TEXTS.jsonl OUT

The configuration says how the work is spread; nothing here depends on it. See docs/howto/scaling.md for which to take.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from datasets import load_dataset
from peft import get_peft_model
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
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_dataset("json", data_files=str(options.texts), split="train")
    data = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=data.column_names
    )

    set_seed(0)  # the same start in every process
    model = AutoModelForCausalLM.from_pretrained(options.base)
    model = get_peft_model(model, DoranConfig(rank=8, target_modules="all-linear", task_type="CAUSAL_LM"))
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
    exempt_from_decay(trainer)
    trainer.train()
    save(trainer)


def save(trainer: Trainer) -> None:
    """Trainer's own saving, but under FSDP1, whose state dict has no place for networks that layers share."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 1:
        trainer.save_model()
        return
    with FullyShardedDataParallel.summon_full_params(trainer.model_wrapped, writeback=False):
        trained = {
            name: p.detach() for name, p in trainer.model_wrapped.named_parameters() if ".doran_adapter." in name
        }
        if trainer.is_world_process_zero():
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(trainer.args.output_dir, state_dict=trained)


if __name__ == "__main__":
    main()
