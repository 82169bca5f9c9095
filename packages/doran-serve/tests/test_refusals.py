"""A bad adapter is refused with a message of ours, the engine lives, and the repaired adapter loads under its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from adapter_specs import AdapterSpec, make_adapter
from safetensors.torch import load_file, save_file

from doran_core.errors import DoranError

MODULE = "model.layers.1.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_A.weight"


def edit_scales(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors import safe_open

    path = folder / "doran_scale.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def edit_factors(spec: AdapterSpec, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    spec.write_scales(folder)


def rename(tensors: dict[str, Any]) -> None:
    for key in [key for key in tensors if MODULE in key]:
        tensors[key.replace("q_proj", "z_proj")] = tensors.pop(key)


def rename_everywhere(spec: AdapterSpec, folder: Path) -> None:
    edit_factors(spec, folder, rename)
    edit_scales(folder, lambda t: t.update({MODULE.replace("q_proj", "z_proj"): t.pop(MODULE)}))


def rename_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def wrong_input(spec: AdapterSpec, folder: Path) -> None:
    edit_factors(spec, folder, lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}))


BREAK: dict[str, tuple[Callable[[AdapterSpec, Path], Any], str]] = {
    "scale missing": (lambda s, f: edit_scales(f, lambda t: t.pop(MODULE)), "no scale for module"),
    "scale of another size": (
        lambda s, f: edit_scales(f, lambda t: t.update({MODULE: torch.ones(5)})),
        r"shape \[5\], expected \[128\]",
    ),
    "scale not finite": (
        lambda s, f: edit_scales(f, lambda t: t[MODULE].__setitem__(3, float("nan"))),
        "1 of 128 values are NaN",
    ),
    "A of another width": (wrong_input, "127"),
    "unknown module": (rename_everywhere, "z_proj"),
    "another base": (lambda s, f: s.write_scales(f, fingerprint="sha256:0123"), "sha256:0123"),
    "newer format": (lambda s, f: s.write_scales(f, format_version="7"), "format_version 7 is newer"),
    "truncated": (
        lambda s, f: (f / "adapter_model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{"),
        "adapter_model.safetensors",
    ),
    "no tensors": (lambda s, f: (f / "adapter_model.safetensors").unlink(), "is missing"),
    "unknown method": (lambda s, f: rename_config(f, peft_type="IA3"), "IA3"),
    "no directory": (lambda s, f: shutil.rmtree(f), "No adapter found"),
}

FRONT_ONLY = {"another base"}
"""The base's files are read in the process that takes requests, not again in each worker."""


def folded(base: dict[str, Any], rank: int = 4, seed: int = 21) -> AdapterSpec:
    return make_adapter("folded", base, ("q_proj", "down_proj"), rank=rank, seed=seed, size=0.5)


@pytest.fixture(scope="module")
def served(engine: Callable[..., Any]) -> Any:
    """An engine in processes of its own: in one process nothing could die."""
    return engine("llama", separate=True)


@pytest.mark.parametrize("fault", BREAK)
def test_a_bad_adapter_is_refused(fault: str, served: Any, reference: Callable[[str], Any], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    spec = folded(reference("llama").weights)
    folder = spec.write(tmp_path / "bad")
    damage, message = BREAK[fault]
    damage(spec, folder)
    request = LoRARequest(f"bad {fault}", 50 + list(BREAK).index(fault), str(folder))
    prompts = [[5, 6, 7, 8], [9, 10, 11]]

    with pytest.raises(Exception, match=message) as refusal:
        served.answer(prompts, [None, request], 4)
    assert fault == "no directory" or isinstance(refusal.value, DoranError)
    if fault not in FRONT_ONLY:
        with pytest.raises(Exception, match=message):  # in the engine itself, past the check in front
            served.llm.llm_engine.engine_core.add_lora(request)

    assert served.answer(prompts, [None, None], 4) == reference("llama").answer(prompts, None, 4)
    spec.write(folder)
    assert served.answer(prompts, [request, request], 4) == reference("llama").answer(prompts, spec, 4)


def test_a_rank_above_the_engines_is_refused(served: Any, reference: Callable[[str], Any], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    folder = folded(reference("llama").weights, rank=17).write(tmp_path / "wide")
    with pytest.raises(DoranError, match="rank 17, but the engine was started with max_lora_rank=16"):
        served.answer([[5, 6, 7]], [LoRARequest("wide", 90, str(folder))], 2)


def test_a_bad_lora_is_refused(served: Any, reference: Callable[[str], Any], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    spec = make_adapter("lora", reference("llama").weights, ("q_proj",), rank=4, seed=3, size=0.5)
    folder = spec.write(tmp_path / "lora")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[KEY] = tensors[KEY][:, :64].contiguous()
    save_file(tensors, path)
    with pytest.raises(DoranError, match="d_in=64"):
        served.answer([[5, 6, 7]], [LoRARequest("narrow", 91, str(folder))], 2)
    assert len(served.answer([[5, 6, 7]], [None], 2)[0]) == 2
