"""Real vLLM on the CPU, float32: every sequence of a mixed batch equals Hugging Face's on the merged checkpoint."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adapter_specs import AdapterSpec, make_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def five_adapters(base: dict[str, Any], size: float, skip: str | None = None) -> dict[str, AdapterSpec]:
    """LoRA, DoRA and three DoRANs, with other targets (parts of packed layers, too) and ranks each."""
    mlp, mixed = ("gate_proj", "down_proj"), ("v_proj", "o_proj", "up_proj")
    return {
        "lora": make_adapter("lora", base, ("q_proj", "v_proj"), rank=4, seed=1, size=size, skip=skip),
        "dora": make_adapter("dora", base, ALL, rank=8, seed=2, size=size, skip=skip),
        "attention": make_adapter("folded", base, ALL[:4], rank=5, seed=3, size=size, skip=skip),
        "mlp": make_adapter("folded", base, mlp, rank=16, seed=4, size=size, skip=skip),
        "trainable": make_adapter("trainable", base, mixed, rank=8, seed=5, size=size, skip=skip or r"\.0\."),
    }


def requests_for(adapters: dict[str, AdapterSpec], folder: Path, first: int = 1) -> dict[str, Any]:
    """Write the adapters and name them to vLLM."""
    from vllm.lora.request import LoRARequest

    return {
        name: LoRARequest(f"{folder.name}-{name}", number, str(spec.write(folder / name)))
        for number, (name, spec) in enumerate(adapters.items(), first)
    }


def ask_elsewhere(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]], tokens: int, **options: Any
) -> dict[str, list[list[int]]]:
    """Answers of an engine in processes of its own, by adapter ("None" is the base)."""
    spec = {"base": str(base), "adapters": {n: str(p) for n, p in adapters.items()}, "prompts": prompts}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ask.py")), json.dumps(spec | {"tokens": tokens} | options)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers: dict[str, list[list[int]]] = json.loads(line.removeprefix("ANSWERS "))
    return answers


def prompts_of(lengths: list[int], vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def check_mixed(
    engine: Any, reference: Any, adapters: dict[str, AdapterSpec], lora: dict[str, Any], **ask: Any
) -> None:
    """Every prompt with the base and with every adapter, interleaved in one call, against Hugging Face."""
    prompts, tokens, names = ask["prompts"], ask["tokens"], [None, *adapters]
    expected = {name: reference.answer(prompts, name and adapters[name], tokens) for name in names}
    assert len({str(answers) for answers in expected.values()}) == len(names), "every adapter has to make a difference"

    asked = [(name, index) for index in range(len(prompts)) for name in names]
    found = engine.answer([prompts[i] for _, i in asked], [name and lora[name] for name, _ in asked], tokens)

    for (name, index), answer in zip(asked, found, strict=True):
        assert answer == expected[name][index], f"{name or 'base'}, prompt {index}"


def test_smollm2(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("smollm2")
    adapters = five_adapters(base.weights, 0.1, skip=r"\.[12]\d\.")  # the first ten layers: quicker
    prompts = prompts_of([12, 12], 49152, seed=11)
    lora = requests_for(adapters, tmp_path)
    check_mixed(engine("smollm2"), base, adapters, lora, prompts=prompts, tokens=8)


def test_qwen2_with_biases(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("qwen2")
    adapters = five_adapters(base.weights, 0.5)
    prompts = prompts_of([5, 9, 17], 512, seed=11)
    lora = requests_for(adapters, tmp_path)
    check_mixed(engine("qwen2"), base, adapters, lora, prompts=prompts, tokens=16)


def test_gemma(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("gemma")
    adapters = five_adapters(base.weights, 0.5)
    prompts = prompts_of([5, 9, 17], 512, seed=11)
    lora = requests_for(adapters, tmp_path)
    check_mixed(engine("gemma"), base, adapters, lora, prompts=prompts, tokens=16)


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 4 and "DORAN_TEST_RANKS" not in os.environ,
    reason="two ranks on fewer than four cores take minutes; DORAN_TEST_RANKS=1 runs them",
)
def test_two_ranks(checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path) -> None:
    """Tensor parallelism, in a process of its own: its workers outlive an engine in this one."""
    adapters = five_adapters(reference("qwen2").weights, 0.5)
    for name, spec in adapters.items():
        spec.write(tmp_path / name)
    prompts = prompts_of([5, 9], 512, seed=12)
    expected = {name: reference("qwen2").answer(prompts, name and adapters[name], 8) for name in (None, *adapters)}
    for mode in ("mixed", "merged"):
        found = ask_elsewhere(checkpoint("qwen2"), {n: tmp_path / n for n in adapters}, prompts, 8, mode=mode, ranks=2)
        assert found == {str(name): answers for name, answers in expected.items()}, mode


def test_long_prompts_in_pieces_and_from_the_cache(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """Chunked prefill (64 tokens a step, see conftest) and prefix caching, with another adapter per prefix."""
    base, running = reference("llama"), engine("llama")
    adapters = five_adapters(base.weights, 0.5)
    lora = requests_for(adapters, tmp_path)
    prompts = prompts_of([100, 100], 512, seed=13)
    prompts[1][:96] = prompts[0][:96]
    for _ in range(2):
        check_mixed(running, base, adapters, lora, prompts=prompts, tokens=6)
    metrics = {metric.name: getattr(metric, "value", 0) for metric in running.llm.get_metrics()}
    assert metrics["vllm:prefix_cache_hits"] > 0


def test_llama(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("llama")
    adapters = five_adapters(base.weights, 0.5)
    prompts = prompts_of([5, 9, 17], 512, seed=11)
    lora = requests_for(adapters, tmp_path)
    check_mixed(engine("llama"), base, adapters, lora, prompts=prompts, tokens=16)


def test_more_adapters_than_slots(engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path) -> None:
    base = reference("llama")
    forms = ("folded", "lora", "trainable", "dora", "folded", "lora", "folded", "dora")
    adapters = {
        f"{form}-{seed}": make_adapter(form, base.weights, ALL[seed % 4 :], rank=3 + seed, seed=seed, size=0.5)
        for seed, form in enumerate(forms)
    }
    lora = requests_for(adapters, tmp_path, first=100)
    for seed in (1, 2):  # the second time every slot has held something else
        prompts = prompts_of([6, 13], 512, seed=seed)
        check_mixed(engine("llama"), base, adapters, lora, prompts=prompts, tokens=8)
