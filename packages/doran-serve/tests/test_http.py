"""`doran serve` and vLLM's own HTTP server: concurrent clients; adapters loaded, replaced and unloaded at run time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adapter_specs import AdapterSpec, make_adapter

TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")
PROMPTS = [[5, 6, 7, 8, 9], [30, 31, 32]]
TOKENS = 8


class Server:
    """A running `doran serve`, and its answers as token ids."""

    def __init__(self, base: Path, adapters: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.base = str(base)
        script = "import sys; from doran_core.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, "serve", self.base, "--adapters", str(adapters)]
        flags = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        flags += ["--max-model-len", "128", "--skip-tokenizer-init", "--max-lora-rank", "16"]
        env = os.environ | {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "DORAN_ADAPTERS_DIR": str(adapters.parent / "more"),
        }
        self.log = log.open("w+")
        self.process = subprocess.Popen([*command, *flags], env=env, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 240
        while self.request("/health")[0] != 200:
            assert self.process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(1)

    def tail(self) -> str:
        self.log.seek(0)
        return self.log.read()[-4000:]

    def request(self, path: str, **body: Any) -> tuple[int, Any]:
        """POST `body` as JSON, or GET without one: status, and the answer's text."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def complete(self, model: str | None, prompt: list[int]) -> Any:
        status, text = self.request(
            "/v1/completions",
            model=model or self.base,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return json.loads(text)["choices"][0]["token_ids"] if status == 200 else (status, text)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


@pytest.fixture(scope="module")
def adapters(reference: Callable[[str], Any]) -> dict[str, AdapterSpec]:
    weights = reference("llama").weights
    forms = {"lora": "lora", "dora": "dora", "doran": "compiled", "trained": "trainable"}
    return {
        name: make_adapter(form, weights, TARGETS[i % 2 :], rank=4 + i, seed=40 + i, size=0.5)
        for i, (name, form) in enumerate(forms.items())
    }


@pytest.fixture(scope="module")
def server(
    adapters: dict[str, AdapterSpec], checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("http")
    for name, spec in adapters.items():
        spec.write(folder / "adapters" / name)
    (folder / "more").mkdir()
    running = Server(checkpoint("llama"), folder / "adapters", folder / "log")
    yield running
    running.close()


def test_concurrent_clients_get_each_models_own_answer(
    server: Server, adapters: dict[str, AdapterSpec], reference: Callable[[str], Any]
) -> None:
    asked = [(name, prompt) for prompt in PROMPTS for name in (None, *adapters)]
    with ThreadPoolExecutor(len(asked)) as clients:
        found = list(clients.map(lambda pair: server.complete(*pair), asked))
    for (name, prompt), tokens in zip(asked, found, strict=True):
        expected = reference("llama").answer([prompt], name and adapters[name], TOKENS)[0]
        assert tokens == expected, name or "base"


def test_load_replace_and_unload(server: Server, reference: Callable[[str], Any], tmp_path: Path) -> None:
    weights = reference("llama").weights
    first, second = (make_adapter("compiled", weights, TARGETS, rank=6, seed=s, size=0.5) for s in (70, 71))
    one, two = first.write(tmp_path / "one"), second.write(tmp_path / "two")

    assert server.request("/v1/load_lora_adapter", lora_name="new", lora_path=str(one))[0] == 200
    assert server.complete("new", PROMPTS[0]) == reference("llama").answer([PROMPTS[0]], first, TOKENS)[0]

    status, _ = server.request("/v1/load_lora_adapter", lora_name="new", lora_path=str(two), load_inplace=True)
    assert status == 200
    assert server.complete("new", PROMPTS[0]) == reference("llama").answer([PROMPTS[0]], second, TOKENS)[0]

    assert server.request("/v1/unload_lora_adapter", lora_name="new")[0] == 200
    assert server.complete("new", PROMPTS[0])[0] == 404


def test_a_bad_adapter_is_refused_and_the_server_lives(
    server: Server, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    spec = make_adapter("compiled", reference("llama").weights, TARGETS, rank=6, seed=72, size=0.5)
    folder = spec.write(tmp_path / "bad")
    spec.write_scales(folder, format_version="9")
    status, text = server.request("/v1/load_lora_adapter", lora_name="bad", lora_path=str(folder))
    assert status >= 400
    assert "adapter 'bad' refused" in text
    assert "format_version 9 is newer" in text
    assert server.request("/v1/load_lora_adapter", lora_name="gone", lora_path=str(tmp_path / "gone"))[0] == 404
    assert server.complete(None, PROMPTS[1]) == reference("llama").answer([PROMPTS[1]], None, TOKENS)[0]

    spec.write(folder)
    assert server.request("/v1/load_lora_adapter", lora_name="bad", lora_path=str(folder))[0] == 200
    assert server.complete("bad", PROMPTS[1]) == reference("llama").answer([PROMPTS[1]], spec, TOKENS)[0]

    # Its files go while it is served: its requests fail, and nobody else's.
    shutil.rmtree(folder)
    status, text = server.complete("bad", PROMPTS[1])
    assert status in (400, 404), text
    assert server.complete(None, PROMPTS[1]) == reference("llama").answer([PROMPTS[1]], None, TOKENS)[0]


def test_adapters_are_found_by_name_in_a_directory(server: Server, reference: Callable[[str], Any]) -> None:
    folder = Path(server.log.name).parent / "more"
    weights = reference("llama").weights
    for seed, form in enumerate(("trainable", "dora", "compiled", "lora")):
        spec = make_adapter(form, weights, TARGETS, rank=5, seed=80 + seed, size=0.5)
        spec.write(folder / f"tenant-{seed}")
        assert server.complete(f"tenant-{seed}", PROMPTS[0]) == reference("llama").answer([PROMPTS[0]], spec, TOKENS)[0]
    foreign = make_adapter("compiled", weights, TARGETS, rank=5, seed=90, size=0.5)
    foreign.write_scales(foreign.write(folder / "foreign"), fingerprint="sha256:beef")
    status, text = server.complete("foreign", PROMPTS[0])
    assert status == 400, text
    assert "sha256:beef" in text
    assert server.complete("nobody", PROMPTS[0])[0] == 404
    assert server.complete("../adapters/lora", PROMPTS[0])[0] == 404
