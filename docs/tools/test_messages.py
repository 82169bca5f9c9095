"""The messages that the pages quote are those that the code gives: each is provoked, and found in its page.

In a page "..." stands for any text.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from places import REPOSITORY
from safetensors.torch import load_file, save_file
from setups import prepare
from torch import nn
from transformers import AutoModelForCausalLM

from doran_core import DoranConfig, adapt, load
from doran_core.cli.group import parse
from doran_core.convert import fold_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import DoranError
from doran_core.merge import merge_checkpoint
from doran_core.method.factors import FactorTrunk, GeneratedFactors, LayerSpec
from doran_export import export
from doran_hf import DoranConfig as DoranPeftConfig
from doran_hf import restore_start
from doran_serve.launch import plan


def run(words: list[str]) -> None:
    """What a command line does, with its error as it is."""
    context = parse(words)
    options = {name: value for name, value in context.params.items() if name not in ("as_json", "debug")}
    with context:
        context.command.callback(**options)  # type: ignore[misc]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def config(**options: object) -> DoranConfig:
    return DoranConfig(**({"rank": 2, "target_modules": "all-linear"} | options))  # type: ignore[arg-type]


def adapt_twice() -> None:
    model = mlp()
    adapt(model, config())
    adapt(model, config())


def use_a_removed_handle() -> None:
    handle = adapt(mlp(), config())
    handle.remove()
    handle.merge()


def load_on_another_base() -> None:
    adapt(mlp(), config()).save("adapter-of-another")
    load(mlp(), "adapter-of-another")


def merge_on_another_base() -> None:
    weights = load_file("base/model.safetensors")
    shutil.copytree("base", "other")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, "other/model.safetensors", {"format": "pt"})
    merge_checkpoint("other", "adapter", "merged")


def merge_over_something() -> None:
    Path("merged").mkdir()
    Path("merged", "file").touch()
    merge_checkpoint("base", "adapter", "merged")


def merge_into_a_quantized_base() -> None:
    weights = load_file("base/model.safetensors")
    packed = {name: tensor.to(torch.uint8) if "q_proj" in name else tensor for name, tensor in weights.items()}
    shutil.copytree("base", "packed")
    save_file(packed, "packed/model.safetensors", {"format": "pt"})
    merge_checkpoint("packed", "adapter", "merged", allow_base_mismatch=True)


def inspect_nothing() -> None:
    Path("empty").mkdir()
    inspect_adapter("empty")


def inspect_shared_outputs() -> None:
    adapt(mlp(), config(share_output=True)).save("shared")
    inspect_adapter("shared")


def inspect_nan() -> None:
    shutil.copytree("adapter", "broken")
    file = "broken/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, file, {"format": "pt"})
    fold_adapter("broken", "base")


def share_what_is_not_there() -> None:
    config(share_output=True, factors="static")


def mix_ranks() -> None:
    spec = LayerSpec("layer", "", 8, 8, rank=16, scaling=1.0)
    GeneratedFactors(spec, config(), FactorTrunk(8, config()))


def load_on_another_base_with_peft() -> None:
    weights = load_file("base/model.safetensors")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), DoranPeftConfig(task_type="CAUSAL_LM"))
    model.save_pretrained("of-this-base")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, "base/model.safetensors", {"format": "pt"})
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "of-this-base")


def put_back_the_start_of_a_trained_adapter() -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), DoranPeftConfig(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    restore_start(model)


def export_over_something() -> None:
    Path("onnx").mkdir()
    Path("onnx", "file").touch()
    export("base", "onnx")


def export_two_adapters_of_one_name() -> None:
    given = [word for _ in range(2) for word in ("--adapter", "one=adapter")]
    run(["export", "--base", "base", "--multi-adapter", *given, "--out", "onnx"])


def serve_a_broken_adapter() -> None:
    shutil.rmtree("base")
    prepare("docs/howto/vllm.md", Path())
    Path("adapters/critic/adapter_model.safetensors").unlink()
    checked = plan("base", Path("adapters"), "mixed", []).adapters
    assert checked is not None
    checked.require_all()


MESSAGES: dict[Callable[[], object], tuple[str, ...]] = {
    adapt_twice: ("howto/custom-loop.md",),
    use_a_removed_handle: ("howto/custom-loop.md",),
    load_on_another_base: ("howto/custom-loop.md",),
    merge_on_another_base: ("howto/merge.md",),
    merge_over_something: ("howto/merge.md",),
    merge_into_a_quantized_base: ("howto/merge.md", "howto/quantized.md"),
    inspect_nothing: ("howto/inspect.md",),
    inspect_shared_outputs: ("howto/inspect.md",),
    inspect_nan: ("howto/inspect.md",),
    share_what_is_not_there: ("concepts/generators.md",),
    mix_ranks: ("concepts/generators.md",),
    lambda: adapt(mlp(), config(target_modules=["q_proj"])): ("howto/custom-loop.md",),
    lambda: config(tau_init=-0.1): ("concepts/tau.md",),
    load_on_another_base_with_peft: ("howto/trainer.md",),
    lambda: DoranPeftConfig.from_lora(LoraConfig(init_lora_weights="pissa")): ("howto/trainer.md",),
    put_back_the_start_of_a_trained_adapter: ("howto/quantized.md",),
    export_over_something: ("howto/onnx.md",),
    export_two_adapters_of_one_name: ("howto/onnx-adapters.md",),
    serve_a_broken_adapter: ("howto/vllm.md",),
}


@pytest.mark.parametrize(("provoke", "pages"), MESSAGES.items())
def test_quoted_as_given(
    provoke: Callable[[], object], pages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare("docs/howto/merge.md", tmp_path)
    with pytest.raises(DoranError) as raised:
        provoke()
    message = " ".join(str(raised.value).split())
    for page in pages:
        quoted = quotations(page)
        assert any(re.search(pattern, message) for pattern in quoted), f"{page} does not quote: {message}"


def quotations(page: str) -> list[str]:
    """First cells of the page's last table, as patterns."""
    table = (REPOSITORY / "docs" / page).read_text(encoding="utf-8").rpartition("## What goes wrong")[2]
    messages = re.findall(r"^\| `(.+?)` ?[^`|]*\|", table, re.MULTILINE)
    assert messages, page
    return [re.escape(message).replace(re.escape("..."), ".*") for message in messages]
