"""Fixtures of all tests: base checkpoints, Hugging Face's answers, and real vLLM engines, one at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "tests"))  # smollm2.py

# Before vLLM or torch start: offline, a small cache, and no fork after PyTorch has started threads.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Two files of tests run at once: threads bound to cores would have both engines wait for the same core.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: the session serve-long runs it, before a release")


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty DORAN_CACHE_DIR, inherited by the engines."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DORAN_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint directory by name: tiny random ones ("quantized" is "dequantized" in 4 bits), or smollm2."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            pytest.importorskip("transformers")
            import models
            import smollm2

            if name == "smollm2" and (ready := os.environ.get("DORAN_TEST_SMOLLM2")):
                made[name] = Path(ready)
            elif name in ("quantized", "dequantized"):
                folders = models.build_quantized(tmp_path_factory.mktemp("quantized"))
                made["quantized"], made["dequantized"] = folders
            elif name == "smollm2":
                made[name] = smollm2.save_base(tmp_path_factory.mktemp(name))
            else:
                made[name] = models.build_tiny(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """Hugging Face's answers by checkpoint name."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            import models

            made[name] = models.Reference(checkpoint(name))
        return made[name]

    return get


MIXED = {"enable_lora": True, "max_loras": 5, "max_lora_rank": 16}
ALWAYS = {
    "dtype": "float32",
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 128,
    # Prompts longer than a step are cut, and prefixes are cached in blocks smaller than the prompts.
    "max_num_batched_tokens": 64,
    "max_num_seqs": 64,
    "block_size": 32,
    "disable_log_stats": False,
}


class Engine:
    """A vLLM engine for one checkpoint, and the tokens it answers with.

    It lives in this process, which saves vLLM's start of two more, unless `separate`.
    """

    def __init__(self, name: str, folder: Path, *, separate: bool = False, merged: bool = False, **more: Any) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(separate))
        from vllm import LLM

        from doran_serve.merged.mode import merged_options

        self.separate = separate
        self.kind = (name, separate, merged)
        mode = {"additional_config": merged_options()} if merged else MIXED
        self.llm = LLM(str(folder), **(ALWAYS | mode | more))

    def answer(self, prompts: list[list[int]], adapters: list[Any], tokens: int) -> list[list[int]]:
        """Greedy continuations of all prompts, sent together, each with its LoRARequest or None."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False),
            lora_request=adapters,
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """End it, with its processes."""
        llm = self.llm
        del self.llm
        end(llm, separate=self.separate)


def end(llm: Any, *, separate: bool) -> None:
    """End vLLM's engine: its processes, or what it holds of this one."""
    llm.llm_engine.engine_core.shutdown()
    if not separate:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


class Engines:
    """The engine of a checkpoint by name; asking for another one ends the last."""

    def __init__(self, checkpoint: Callable[[str], Path]) -> None:
        self._checkpoint = checkpoint
        self._running: Engine | None = None

    def __call__(self, name: str, *, separate: bool = False, merged: bool = False) -> Engine:
        """The running engine, if it is of this kind, or a new one."""
        if self._running is None or self._running.kind != (name, separate, merged):
            self.close()
            options = {"dtype": "bfloat16"} if name == "quantized" else {}  # as vLLM's 4-bit kernel needs it
            self._running = Engine(name, self._checkpoint(name), separate=separate, merged=merged, **options)
        return self._running

    def close(self) -> None:
        """End the last engine: two in one process disturb each other."""
        if self._running is not None:
            self._running.close()
            self._running = None


@pytest.fixture(scope="session")
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Engines]:
    """Engines by name of the checkpoint, one at a time."""
    pytest.importorskip("vllm")
    engines = Engines(checkpoint)
    yield engines
    engines.close()
