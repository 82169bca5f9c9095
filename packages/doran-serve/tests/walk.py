"""The verdicts of vLLM's own adapter manager, without an engine: `python walk.py SPEC`.

SPEC is JSON: for each base directory, whether vLLM pools with its model, and the adapters' directories.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def manager_of(base: str, pooling: bool) -> Iterator[Any]:
    """The worker's adapter manager over vLLM's model of `base`, with any weights."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
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
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/meeting", 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        try:
            model = initialize_model(vllm_config=config)
            manager = lora_model_runner_mixin.LRUCacheWorkerLoRAManager(config, torch.device("cpu"), {})
            manager.create_lora_manager(model, config)
            yield manager
        finally:
            parallel_state.cleanup_dist_env_and_memory()


def verdict(manager: Any, adapter: str, number: int) -> str:
    """ "" if vLLM takes the adapter, else the refusal."""
    from vllm.lora.request import LoRARequest

    try:
        manager.add_adapter(LoRARequest(Path(adapter).name, number, adapter))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def ask_vllm(spec: dict[Path, tuple[bool, list[Path]]]) -> dict[str, str]:
    """Run this file on `spec` in a process of its own, and return what it prints."""
    text = json.dumps({str(base): (pooling, list(map(str, paths))) for base, (pooling, paths) in spec.items()})
    done = subprocess.run([sys.executable, __file__, text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("VERDICTS "))
    verdicts: dict[str, str] = json.loads(line.removeprefix("VERDICTS "))
    return verdicts


def main(spec: dict[str, tuple[bool, list[str]]]) -> None:
    """Print `{adapter: verdict}` after `VERDICTS`, and `{base: reason}` of a model that vLLM has no LoRA layers for."""
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from doran_serve import register

    register()
    verdicts: dict[str, str] = {}
    for base, (pooling, adapters) in spec.items():
        try:
            with manager_of(base, pooling) as manager:
                verdicts |= {adapter: verdict(manager, adapter, number) for number, adapter in enumerate(adapters, 1)}
        except Exception as error:
            verdicts[base] = f"{type(error).__name__}: {error}"
    print("\nVERDICTS " + json.dumps(verdicts), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
