"""What vLLM's own adapter manager says of adapters, without an engine: `python walk.py BASE POOLING ADAPTER...`."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def manager_of(base: str, pooling: bool) -> Any:
    """The worker's adapter manager over vLLM's model of `base`, whose weights do not matter."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.v1.worker import lora_model_runner_mixin

    torch.set_default_dtype(torch.float32)
    arguments: dict[str, Any] = {"runner": "pooling"} if pooling else {}
    config = EngineArgs(
        model=base,
        enable_lora=True,
        max_lora_rank=16,
        max_cpu_loras=4,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=128,
        **arguments,
    ).create_engine_config()
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        manager = lora_model_runner_mixin.LRUCacheWorkerLoRAManager(config, torch.device("cpu"), {})
        manager.create_lora_manager(model, config)
    return manager


def main(base: str, pooling: str, *adapters: str) -> None:
    """Print `{adapter: "" or the refusal}` after `VERDICTS`."""
    from vllm.lora.request import LoRARequest

    from doran_serve import register

    register()
    manager = manager_of(base, bool(int(pooling)))
    verdicts = {}
    for number, adapter in enumerate(adapters, 1):
        try:
            manager.add_adapter(LoRARequest(Path(adapter).name, number, adapter))
            verdicts[adapter] = ""
        except Exception as error:
            verdicts[adapter] = f"{type(error).__name__}: {error}"
    print("\nVERDICTS " + json.dumps(verdicts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
