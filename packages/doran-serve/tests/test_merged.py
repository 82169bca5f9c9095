"""Merged mode in a real vLLM: the weights swap between requests, and every answer is that of the merged checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import make_adapter
from safetensors.torch import load_file
from test_mixed import ALL, check_mixed, five_adapters, prompts_of, requests_for

from doran_core.errors import DoranError


def weights_of(worker: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in worker.get_model().named_parameters()}


@pytest.mark.parametrize("name", ["qwen2", "llama"])  # in this order, since the next tests go on with llama
def test_mixed_requests_take_turns(
    name: str, engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base = reference(name)
    adapters = five_adapters(base.weights, 0.5)
    lora = requests_for(adapters, tmp_path)
    for seed in (11, 12):  # the second time from the last adapter's weights
        prompts = prompts_of([5, 9, 17], 512, seed=seed)
        check_mixed(engine(name, merged=True), base, adapters, lora, prompts=prompts, tokens=8)


def test_the_base_comes_back_to_the_bit(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    running = engine("llama", merged=True)
    prompt = [[5, 6, 7, 8]]
    running.answer(prompt, [None], 2)
    before = running.llm.collective_rpc(weights_of)[0]
    spec = make_adapter("folded", reference("llama").weights, ALL, rank=4, seed=31, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    running.answer(prompt, [request], 2)
    adapted = running.llm.collective_rpc(weights_of)[0]
    changed = {name for name in before if not torch.equal(before[name], adapted[name])}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    running.answer(prompt, [None], 2)
    after = running.llm.collective_rpc(weights_of)[0]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_are_those_of_the_merged_checkpoint(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    running = engine("llama", merged=True)
    spec = make_adapter("folded", reference("llama").weights, ("v_proj", "down_proj"), rank=4, seed=32, size=0.5)
    running.answer([[5, 6, 7]], [requests_for({"a": spec}, tmp_path)["a"]], 2)
    found = running.llm.collective_rpc(weights_of)[0]
    for name in spec.layers:
        expected = spec.merged(name).float()
        if name.endswith("v_proj"):
            rows = found[name.replace("v_proj", "qkv_proj") + ".weight"][-expected.shape[0] :]
        else:
            rows = found[f"{name}.weight"]
        torch.testing.assert_close(rows, expected, rtol=3e-7, atol=1e-8)


def test_cached_prefixes_of_other_weights_are_not_used(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    spec = make_adapter("folded", base.weights, ALL, rank=4, seed=33, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    prompts = prompts_of([100], 512, seed=3)  # longer than a cache block
    for adapter in (None, request, None, request):
        expected = base.answer(prompts, spec if adapter else None, 6)
        assert running.answer(prompts, [adapter], 6) == expected
        assert running.answer(prompts, [adapter], 6) == expected  # from the cache


def test_a_replaced_adapter_takes_effect(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    prompts = prompts_of([7], 512, seed=4)
    for seed in (34, 35):
        spec = make_adapter("folded", base.weights, ALL, rank=4, seed=seed, size=0.5)
        request = requests_for({"a": spec}, tmp_path)["a"]
        assert running.answer(prompts, [request], 6) == base.answer(prompts, spec, 6)


def test_a_bad_adapter_is_refused_and_one_that_fails_late_harms_nobody(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    prompts = prompts_of([7, 7], 512, seed=5)
    spec = make_adapter("folded", base.weights, ALL, rank=4, seed=36, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    (tmp_path / "a" / "doran_scale.safetensors").unlink()
    spec.write_scales(tmp_path / "a", format_version="9")
    with pytest.raises(DoranError, match="format_version 9 is newer"):
        running.answer(prompts, [request, None], 4)

    spec.write(tmp_path / "a")
    from doran_serve.merged.weights import MergedWeights

    def fail(self: Any, path: str) -> Any:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(MergedWeights, "_read", fail)
        failed, answered = running.answer(prompts, [request, None], 4)
    assert failed == []
    assert [answered] == base.answer(prompts[1:], None, 4)
    assert running.answer(prompts, [request, None], 4) == [
        base.answer(prompts[:1], spec, 4)[0],
        base.answer(prompts[1:], None, 4)[0],
    ]


def test_reloading_the_base_leaves_no_adapter_in_it(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """vLLM's reload_weights, as after sleep level 2: the weights are plain then, whatever was merged before."""
    base, running = reference("llama"), engine("llama", merged=True)
    spec = make_adapter("folded", base.weights, ALL, rank=4, seed=37, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    prompts = prompts_of([100], 512, seed=6)  # longer than a cache block
    for adapter in (request, None, request):
        running.answer(prompts, [request], 6)
        running.llm.collective_rpc("reload_weights")
        assert running.answer(prompts, [adapter], 6) == base.answer(prompts, spec if adapter else None, 6)


def test_a_swap_goes_back_to_reloaded_weights(
    engine: Callable[..., Any], checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    running = engine("llama", merged=True)
    spec = make_adapter("folded", reference("llama").weights, ALL, rank=4, seed=38, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    running.answer([[5, 6, 7]], [request], 2)
    other = [(name, 2 * tensor) for name, tensor in load_file(checkpoint("llama") / "model.safetensors").items()]
    try:
        running.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other)})
        before = running.llm.collective_rpc(weights_of)[0]
        for adapter in (request, None):
            running.answer([[5, 6, 7]], [adapter], 2)
        after = running.llm.collective_rpc(weights_of)[0]
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        running.llm.collective_rpc("reload_weights")


def test_the_base_is_not_reloaded_under_requests_for_an_adapter(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    from vllm import SamplingParams

    base, running = reference("llama"), engine("llama", merged=True)
    spec = make_adapter("folded", base.weights, ALL, rank=4, seed=39, size=0.5)
    request = requests_for({"a": spec}, tmp_path)["a"]
    prompts, llm = prompts_of([9], 512, seed=7), running.llm.llm_engine
    settings = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    llm.add_request("0", {"prompt_token_ids": prompts[0]}, settings, lora_request=request)
    outputs = llm.step()
    with pytest.raises(DoranError, match=r"reload_weights: 1 request\(s\) for .*unfinished"):
        running.llm.collective_rpc("reload_weights")
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert [list(outputs[0].outputs[0].token_ids)] == base.answer(prompts, spec, 6)
