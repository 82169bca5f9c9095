"""An engine that goes on while its adapter is replaced, and one that slept in between."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import make_adapter
from conftest import ALWAYS, MIXED, Engine
from test_mixed import ALL, prompts_of, requests_for
from vllm.lora.layers import BaseLayerWithLoRA

from doran_core.errors import DoranError
from doran_serve import reload_adapter, reload_adapter_async


def test_versions_follow_each_other_in_place(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running, folder = reference("llama"), engine("llama"), tmp_path / "policy"
    prompts = prompts_of([100, 9], 512, seed=21)  # the first is longer than a block of the prefix cache
    untouched = base.answer(prompts, None, 6)
    held = []
    for update, form in enumerate(("folded", "trainable", "lora", "folded")):
        spec = make_adapter(form, base.weights, ALL, rank=4, seed=400 + update, size=0.5)
        request = reload_adapter(running.llm, "policy", spec.write(folder))
        shutil.rmtree(folder)
        assert running.answer(prompts, [request, request], 6) == base.answer(prompts, spec, 6)
        assert running.answer(prompts, [None, None], 6) == untouched
        held.append(request.lora_int_id)
        loaded = running.llm.llm_engine.list_loras()
        assert held[-1] in loaded
        assert not loaded & set(held[:-1])
    folder.mkdir()
    with pytest.raises(DoranError, match="'policy' refused"):
        reload_adapter(running.llm, "policy", folder)
    assert running.answer(prompts, [request, None], 6)[0] == base.answer(prompts[:1], spec, 6)[0]


def test_requests_keep_their_version_while_others_are_loaded(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], engine: Any, tmp_path: Path
) -> None:
    """vLLM's asynchronous engine, in processes of its own: each request is answered by the version it was sent with."""
    base, prompts = reference("llama"), prompts_of([40, 9], 512, seed=23)
    engine.close()  # two engines disturb each other
    found = asyncio.run(reload_while_requests_run(checkpoint("llama"), base.weights, prompts, tmp_path / "policy"))
    assert len(found) == 5 * len(prompts)
    for spec, prompt, tokens in found:
        assert tokens == base.answer([prompt], spec, 60)[0]


async def reload_while_requests_run(
    model: Path, weights: Any, prompts: list[list[int]], folder: Path
) -> list[tuple[Any, list[int], list[int]]]:
    """Five versions of one adapter, loaded one after the other, and the answers to long requests for each of them."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(model), **(ALWAYS | MIXED)))
    settings = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)

    async def answer(name: str, request: Any, prompt: list[int], begun: asyncio.Event) -> list[int]:
        tokens: list[int] = []
        async for output in llm.generate({"prompt_token_ids": prompt}, settings, name, lora_request=request):
            tokens = list(output.outputs[0].token_ids)
            begun.set()
        return tokens

    asked: list[tuple[Any, list[int], asyncio.Task[list[int]]]] = []
    overtaken = 0
    try:
        for update, form in enumerate(("folded", "trainable", "lora", "dora", "folded")):
            spec = make_adapter(form, weights, ALL, rank=4, seed=440 + update, size=0.5)
            request = await reload_adapter_async(llm, "policy", spec.write(folder))
            shutil.rmtree(folder)
            overtaken += sum(not task.done() for *_, task in asked)
            for number, prompt in enumerate(prompts):
                begun = asyncio.Event()
                task = asyncio.create_task(answer(f"{update}-{number}", request, prompt, begun))
                asked.append((spec, prompt, task))
                await begun.wait()
        assert overtaken, "no version was replaced while it answered"
        return [(spec, prompt, await task) for spec, prompt, task in asked]
    finally:
        llm.shutdown()


def lose_memory(worker: Any) -> None:
    """What sleep level 2 does on a GPU: all that is no buffer is lost. The CPU's worker does not sleep.

    Linear weights are left: the CPU's worker has packed them where no parameter shows them.
    """
    for parameter in worker.get_model().parameters():
        parameter.data.fill_(float("nan"))
    for module in worker.get_model().modules():
        for tensor in (*getattr(module, "lora_a_stacked", ()), *getattr(module, "lora_b_stacked", ())):
            tensor.fill_(float("nan"))


def answers_outlast(
    sleep: Callable[[], object], running: Any, base: Any, folder: Path, first: int, *, is_exact: bool = True
) -> None:
    """An engine's answers for adapters of three forms are the same before and after it slept.

    Before, they are the reference's if the engine computes in float32 as that does, and else not all the same.
    """
    adapters = {
        form: make_adapter(form, base.weights, ALL, rank=4, seed=420 + index, size=0.5)
        for index, form in enumerate(("folded", "dora", "lora"))
    }
    lora = requests_for(adapters, folder, first=first)
    prompts = prompts_of([9], 512, seed=22)
    names = [None, *adapters]

    def ask() -> list[list[int]]:
        return running.answer(prompts * 4, [name and lora[name] for name in names], 6)  # type: ignore[no-any-return]

    found = ask()
    if is_exact:
        assert found == [base.answer(prompts, name and adapters[name], 6)[0] for name in names]
    assert len(set(map(tuple, found))) > 1
    sleep()
    assert ask() == found


RELOADS = pytest.mark.skipif(
    not hasattr(BaseLayerWithLoRA, "load_weights"), reason="before 0.28 vLLM's reload_weights fails with LoRA enabled"
)


@pytest.mark.parametrize("level", [1, pytest.param(2, marks=RELOADS)])
def test_scales_survive_sleep(
    level: int, engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    running = engine("llama")

    def sleep() -> None:
        running.llm.sleep(level=level)
        if level == 2:
            running.llm.collective_rpc(lose_memory)
        running.llm.wake_up()
        if level == 2:
            running.llm.collective_rpc("reload_weights")

    answers_outlast(sleep, running, reference("llama"), tmp_path, 500 + 10 * level)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: vLLM's CPU worker does not sleep")
@pytest.mark.parametrize("level", [1, pytest.param(2, marks=RELOADS)])
def test_scales_survive_the_sleep_of_a_gpu(
    level: int, checkpoint: Callable[[str], Path], reference: Callable[[str], Any], engine: Any, tmp_path: Path
) -> None:
    """Level 2 discards the weights, too: vLLM loads them again from the checkpoint.

    In bfloat16: vLLM's LoRA kernels refuse float32 on a GPU. A process of its own: one can have one engine that sleeps.
    """
    engine.close()  # two engines disturb each other
    options = {"enable_sleep_mode": True, "gpu_memory_utilization": 0.2, "dtype": "bfloat16"}
    running = Engine("llama", checkpoint("llama"), separate=True, **options)

    def sleep() -> None:
        free = torch.cuda.mem_get_info()[0]
        running.llm.sleep(level=level)
        assert torch.cuda.mem_get_info()[0] > free, "it did sleep"
        running.llm.wake_up()
        if level == 2:
            running.llm.collective_rpc("reload_weights")

    try:
        answers_outlast(sleep, running, reference("llama"), tmp_path, 600 + 10 * level, is_exact=False)
    finally:
        running.close()
