"""`doran serve --mode merged` over HTTP: clients of different adapters at once, and the OpenAI SDK's client."""

from __future__ import annotations

import asyncio
import importlib.util
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

EXAMPLE = Path(__file__).parents[3] / "examples" / "serving" / "client.py"


def test_real_model_for_concurrent_clients(
    checkpoint: Callable[[str], Path], reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base, folder = reference("smollm2"), checkpoint("smollm2")
    skip = r"\.[12]\d\."  # the first ten layers: quicker
    adapters = {
        name: make_adapter(form, base.weights, ("q_proj", "v_proj"), rank=4, seed=60 + i, size=0.2, skip=skip)
        for i, (name, form) in enumerate({"sentiment": "folded", "b": "trainable", "c": "dora"}.items())
    }
    for name, spec in adapters.items():
        spec.write(tmp_path / "adapters" / name)
    prompts = prompts_of([9, 9], 49152, seed=6)
    server = Server(folder, tmp_path / "adapters", tmp_path / "log", "--mode", "merged")
    try:
        asked = [(name, index) for index in range(len(prompts)) for name in (None, *adapters)]
        with ThreadPoolExecutor(len(asked)) as clients:
            found = list(clients.map(lambda pair: server.complete(pair[0], prompts[pair[1]]), asked))
        for name in (None, *adapters):
            expected = base.answer(prompts, name and adapters[name], TOKENS)
            assert [tokens for (n, _), tokens in zip(asked, found, strict=True) if n == name] == expected, (
                name or "base"
            )
        assert "switched to" in server.everything()

        spec = importlib.util.spec_from_file_location("client", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        client = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(client)
        texts = asyncio.run(client.answers(f"{server.url}/v1", "The capital of France is", 4))
        assert set(texts) == {str(folder), *adapters}
        assert "Paris" in texts[str(folder)]
        printed, _ = run_readme("OpenAI(", {"http://127.0.0.1:8000/v1": f"{server.url}/v1"})
        assert printed.strip()
        assert server.complete("nobody", prompts[0])[0] == 404
    finally:
        server.close()
