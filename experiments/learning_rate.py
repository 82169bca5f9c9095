"""Accuracy of the demo's `sentiment` fine-tuning against the learning rate, for LoRA, DoRA and DoRAN.

    python experiments/learning_rate.py --method doran --rates 5e-4 1e-3 2e-3 4e-3 --seeds 0 1 2

One JSON line per run: accuracy on 500 unseen sentences, the base model's, and seconds of training. Model, data and
training are those of examples/end_to_end.py; only method, rate and seed change. Needs what the demo needs, except vLLM.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import end_to_end as demo  # type: ignore[import-not-found]


def config(method: str) -> Any:
    """Rank 8 on query and value, by each method."""
    import doran_hf

    if method == "doran":
        return doran_hf.DoranConfig(rank=8, alpha=16, task_type="CAUSAL_LM")
    return LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], use_dora=method == "dora", task_type="CAUSAL_LM"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "dora", "doran"), default="doran")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--base", help="a model directory instead of SmolLM2")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        base, tokenizer = demo.prepare_base(args.base, Path(folder) / "base")
        sentences, _ = demo.read_data()
        for rate in args.rates:
            for seed in args.seeds:
                torch.manual_seed(seed)
                training = demo.Training(config(args.method), rate, seed)
                task = demo.sentiment_task(tokenizer, sentences, demo.Sizes())
                run = demo.fine_tune(task, base, tokenizer, device, training, demo.Checks())
                facts = {"method": args.method, "rate": rate, "seed": seed, "base": run.base_score}
                print(json.dumps({**facts, "accuracy": run.score, "seconds": round(run.seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
