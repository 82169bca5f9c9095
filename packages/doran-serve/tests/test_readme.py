"""The README's Python examples, run as written; the client's is run in test_http_merged, where a server is up."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_specs import make_adapter
from conftest import end
from readme import python_block, run_readme

from doran_serve.merged.mode import merged_options


def write_tokenizer(folder: Path) -> None:
    """One token for each byte and, so that every token of the tiny model has a text, for some pairs of them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [f"{letter}{other}" for letter in letters[33:49] for other in letters[33:49]]
    bytes_ = Tokenizer(BPE({text: index for index, text in enumerate([*letters, *pairs])}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token=letters[2]).save_pretrained(folder)


def test_from_python(
    checkpoint: Callable[[str], Path],
    engine: Any,
    reference: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed, name in enumerate(("sentiment", "critic")):
        spec = make_adapter("folded", reference("llama").weights, ("q_proj", "v_proj"), rank=8, seed=seed, size=0.5)
        spec.write(tmp_path / "adapters" / name)
    write_tokenizer(shutil.copytree(checkpoint("llama"), tmp_path / "base"))
    engine.close()  # the example's own comes now
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    text = "output.outputs[0].text"
    printed, names = run_readme("LoRARequest(", {f"print({text})": f"print(repr({text}))"})  # it may have several lines
    end(names.pop("llm"), separate=False)
    answers = printed.splitlines()[-3:]  # after what vLLM says
    base, sentiment, critic = map(ast.literal_eval, answers)
    assert all(isinstance(text, str) and text for text in (base, sentiment, critic))
    assert len({base, sentiment, critic}) == 3


def test_merged_mode_is_asked_for_as_written() -> None:
    """Engines of merged mode are tested in test_merged, with these very options."""
    call = ast.parse(python_block("doran_mode")).body[0].value  # type: ignore[attr-defined]
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert options == {"additional_config": merged_options()}
