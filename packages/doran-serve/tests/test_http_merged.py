"""`doran serve --mode merged` over HTTP: clients of different adapters at once, and the OpenAI SDK's client."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adapter_specs import make_adapter
from readme import run_readme
from servers import TOKENS, Server
from test_mixed import prompts_of
from test_readme import write_tokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "serving" / "client.py"


@pytest.mark.parametrize("name", ["llama", pytest.param("smollm2", marks=pytest.mark.long)])
def test_concurrent_clients(
    name: str, checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, folder, vocabulary, size = reference(name), checkpoint(name), 49152, 0.2
    skip: str | None = r"\.[12]\d\."  # the first ten layers: quicker
    if name == "llama":
        folder, vocabulary, size, skip = Path(shutil.copytree(folder, tmp_path / "base")), 512, 0.5, None
        write_tokenizer(folder)
    adapters = {
        adapter: make_adapter(form, base.weights, ("q_proj", "v_proj"), rank=4, seed=60 + i, size=size, skip=skip)
        for i, (adapter, form) in enumerate({"sentiment": "folded", "b": "trainable", "c": "dora"}.items())
    }
    for adapter, spec in adapters.items():
        spec.write(tmp_path / "adapters" / adapter)
    prompts = prompts_of([9, 9], vocabulary, seed=6)
    server = Server(folder, tmp_path / "adapters", tmp_path / "log", "--mode", "merged")
    try:
        asked = [(adapter, index) for index in range(len(prompts)) for adapter in (None, *adapters)]
        with ThreadPoolExecutor(len(asked)) as clients:
            found = list(clients.map(lambda pair: server.complete(pair[0], prompts[pair[1]]), asked))
        for adapter in (None, *adapters):
            expected = base.answer(prompts, adapter and adapters[adapter], TOKENS)
            got = [tokens for (asked_of, _), tokens in zip(asked, found, strict=True) if asked_of == adapter]
            assert got == expected, adapter or "base"
        assert "switched to" in server.everything()

        module = importlib.util.spec_from_file_location("client", EXAMPLE)
        assert module is not None
        assert module.loader is not None
        client = importlib.util.module_from_spec(module)
        module.loader.exec_module(client)
        texts = asyncio.run(client.answers(f"{server.url}/v1", "The capital of France is", 4))
        assert set(texts) == {str(folder), *adapters}
        if name == "smollm2":
            assert "Paris" in texts[str(folder)]
        printed, _ = run_readme("OpenAI(", {"http://127.0.0.1:8000/v1": f"{server.url}/v1"})
        assert printed.strip()
        assert server.complete("nobody", prompts[0])[0] == 404
    finally:
        server.close()
