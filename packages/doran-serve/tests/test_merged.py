"""Merged mode in a real vLLM: the weights swap between requests, and every answer is that of the merged checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import AdapterSpec, LayerSpec, make_adapter
from models import Reference
from safetensors.torch import load_file, save_file
from test_mixed import ALL, check_mixed, five_adapters, prompts_of, requests_for
from vllm import SamplingParams
from vllm.v1.worker.gpu_worker import Worker

from doran_core.errors import DoranError

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)


def one_adapter(base: Any, folder: Path, seed: int, layers: tuple[str, ...] = ALL) -> tuple[AdapterSpec, Any]:
    """A folded adapter, and the request for its directory `folder/a`."""
    spec = make_adapter("folded", base.weights, layers, rank=4, seed=seed, size=0.5)
    return spec, requests_for({"a": spec}, folder)["a"]


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
    _, request = one_adapter(reference("llama"), tmp_path, 31)
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
    spec, request = one_adapter(reference("llama"), tmp_path, 32, ("v_proj", "down_proj"))
    running.answer([[5, 6, 7]], [request], 2)
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
    spec, request = one_adapter(base, tmp_path, 33)
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
        spec, request = one_adapter(base, tmp_path, seed)
        assert running.answer(prompts, [request], 6) == base.answer(prompts, spec, 6)


def test_a_bad_adapter_is_refused_and_one_that_fails_late_harms_nobody(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    prompts = prompts_of([7, 7], 512, seed=5)
    spec, request = one_adapter(base, tmp_path, 36)
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
    spec, request = one_adapter(base, tmp_path, 37)
    prompts = prompts_of([100], 512, seed=6)  # longer than a cache block
    for adapter in (request, None, request):
        running.answer(prompts, [request], 6)
        running.llm.collective_rpc("reload_weights")
        assert running.answer(prompts, [adapter], 6) == base.answer(prompts, spec if adapter else None, 6)


def test_adapters_are_swapped_into_reloaded_weights(
    engine: Callable[..., Any], checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    old, running = reference("llama"), engine("llama", merged=True)
    spec, request = one_adapter(old, tmp_path, 38)
    other = {name: tensor.flip(0) for name, tensor in load_file(checkpoint("llama") / "model.safetensors").items()}
    shutil.copytree(checkpoint("llama"), tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    new = Reference(tmp_path / "other")
    prompts = prompts_of([9], 512, seed=6)
    assert running.answer(prompts, [request], 6) == old.answer(prompts, spec, 6)
    try:
        running.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other.items())})
        before = running.llm.collective_rpc(weights_of)[0]
        moved = cast(AdapterSpec, MovedAdapter(spec, new.weights))
        for adapter in (request, None):
            expected = new.answer(prompts, moved if adapter else None, 6)
            assert running.answer(prompts, [adapter], 6) == expected
        after = running.llm.collective_rpc(weights_of)[0]
        assert all(torch.equal(before[name], after[name]) for name in before)
    finally:
        running.llm.collective_rpc("reload_weights")


@dataclass
class MovedAdapter:
    """A folded adapter on another base than it was folded for: its scale c stays, `c (W + B A)`."""

    spec: AdapterSpec
    weights: dict[str, torch.Tensor]

    @property
    def layers(self) -> dict[str, LayerSpec]:
        return self.spec.layers

    def merged(self, name: str) -> torch.Tensor:
        change = self.weights[name].double() - self.spec.base[name].double()
        return self.spec.merged(name) + self.spec.scale(name)[:, None] * change


class Replacing:
    """Methods that other packages add to vLLM's worker; here each reverses the rows of every weight."""

    def _replace(self) -> None:
        for parameter in cast(Any, self).get_model().parameters():
            parameter.data.copy_(parameter.data.flip(0))

    update_weights_from_ipc = update_weights_from_ipc_handles = update_weights_from_collective = _replace  # verl, NeMo
    update_weight = update_weight_cuda_ipc = _replace  # OpenRLHF
    update_named_param = load_weights = _replace  # TRL, SkyRL
    start_weight_update = update_weights = finish_weight_update = reset_weights = _replace  # vLLM


@pytest.mark.parametrize("method", [name for name in vars(Replacing) if not name.startswith("_")])
def test_every_named_call_that_replaces_weights_finds_and_leaves_the_base(
    method: str,
    engine: Callable[..., Any],
    reference: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = engine("llama", merged=True)
    _, request = one_adapter(reference("llama"), tmp_path, 40, ("o_proj",))
    running.answer([[5, 6, 7]], [None], 2)
    base = running.llm.collective_rpc(weights_of)[0]
    running.answer([[5, 6, 7]], [request], 2)
    with monkeypatch.context() as patch:
        patch.setattr(Worker, method, getattr(Replacing, method), raising=False)
        running.llm.collective_rpc(method)
    try:
        for adapter in (request, None):
            running.answer([[5, 6, 7]], [adapter], 2)
        found = running.llm.collective_rpc(weights_of)[0]
        assert all(torch.equal(found[name], base[name].flip(0)) for name in base)
    finally:
        running.llm.collective_rpc("reload_weights")


@pytest.mark.parametrize("called", ["LLMEngine", "collective_rpc"])
def test_the_base_is_saved_while_an_adapter_is_merged(
    called: str, engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    running = engine("llama", merged=True)
    _, request = one_adapter(reference("llama"), tmp_path, 41)
    running.answer([[5, 6, 7]], [None], 2)
    base = running.llm.collective_rpc(weights_of)[0]
    answer = running.answer([[5, 6, 7]], [request], 6)
    (tmp_path / "saved").mkdir()
    if called == "LLMEngine":
        running.llm.llm_engine.engine_core.save_sharded_state(str(tmp_path / "saved"))
    else:
        running.llm.collective_rpc("save_sharded_state", args=(str(tmp_path / "saved"),))
    saved = load_file(next((tmp_path / "saved").glob("*.safetensors")))
    assert all(torch.equal(saved[name], base[name]) for name in base)
    assert running.answer([[5, 6, 7]], [request], 6) == answer


def test_checksums_are_those_of_the_base(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    if not hasattr(Worker, "compute_weight_checksums"):
        pytest.skip("this vLLM has no checksums")
    running = engine("llama", merged=True)
    _, request = one_adapter(reference("llama"), tmp_path, 42)
    running.answer([[5, 6, 7]], [None], 2)
    before = running.llm.collective_rpc("compute_weight_checksums")
    running.answer([[5, 6, 7]], [request], 2)
    assert running.llm.collective_rpc("compute_weight_checksums") == before


def test_a_paused_engine_can_replace_its_weights_and_answers_after_it_resumes(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    adapters = {
        name: make_adapter("folded", base.weights, ALL, rank=4, seed=seed, size=0.5)
        for name, seed in (("a", 43), ("b", 44))
    }
    lora = requests_for(adapters, tmp_path)
    prompts, llm = prompts_of([9], 512, seed=8), running.llm.llm_engine
    running.answer(prompts, [lora["a"]], 2)
    running.llm.sleep(level=0)  # pauses only
    try:
        asked: dict[str, str | None] = {"0": "a", "1": None, "2": "b", "3": "a"}
        for number, name in asked.items():
            llm.add_request(number, {"prompt_token_ids": prompts[0]}, GREEDY, lora_request=name and lora[name])
        running.llm.collective_rpc("reload_weights")
    finally:
        running.llm.wake_up(tags=["scheduling"])
    found = {}
    while llm.has_unfinished_requests():
        found |= {output.request_id: list(output.outputs[0].token_ids) for output in llm.step()}
    assert found == {
        number: base.answer(prompts, adapters[name] if name else None, 6)[0] for number, name in asked.items()
    }


def test_a_request_sent_during_a_pause_joins_the_kept_ones_for_its_adapter(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    spec, request = one_adapter(base, tmp_path, 45)
    prompts, llm = prompts_of([9, 9], 512, seed=9), running.llm.llm_engine
    llm.add_request("0", {"prompt_token_ids": prompts[0]}, GREEDY, lora_request=request)
    llm.step()
    running.llm.sleep(level=0, mode="keep")
    llm.add_request("1", {"prompt_token_ids": prompts[1]}, GREEDY, lora_request=request)
    running.llm.wake_up(tags=["scheduling"])
    together, found = 0, {}
    while llm.has_unfinished_requests():
        outputs = llm.step()
        together += len(outputs) == 2
        found |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
    assert [found["0"], found["1"]] == base.answer(prompts, spec, 6)
    assert together > 1


def test_the_base_is_not_reloaded_under_requests_for_an_adapter(
    engine: Callable[..., Any], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, running = reference("llama"), engine("llama", merged=True)
    spec, request = one_adapter(base, tmp_path, 39)
    prompts, llm = prompts_of([9], 512, seed=7), running.llm.llm_engine
    llm.add_request("0", {"prompt_token_ids": prompts[0]}, GREEDY, lora_request=request)
    outputs = llm.step()
    with pytest.raises(DoranError, match=rf"reload_weights: 1 request\(s\) for {tmp_path / 'a'} are unfinished"):
        running.llm.collective_rpc("reload_weights")
    while llm.has_unfinished_requests():
        outputs = llm.step()
    assert [list(outputs[0].outputs[0].token_ids)] == base.answer(prompts, spec, 6)
