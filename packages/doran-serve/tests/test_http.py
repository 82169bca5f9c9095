"""`doran serve` and vLLM's own HTTP server: concurrent clients; adapters loaded, replaced and unloaded at run time."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adapter_specs import AdapterSpec, make_adapter
from servers import TOKENS, Server

TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")
PROMPTS = [[5, 6, 7, 8, 9], [30, 31, 32]]


@pytest.fixture(scope="module")
def adapters(reference: Callable[[str], Any]) -> dict[str, AdapterSpec]:
    weights = reference("llama").weights
    forms = {"lora": "lora", "dora": "dora", "doran": "folded", "trained": "trainable"}
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
    running = Server(
        checkpoint("llama"),
        folder / "adapters",
        folder / "log",
        *("--skip-tokenizer-init", "--max-lora-rank", "16"),
        *("--lora-target-modules", *TARGETS),
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="True",
        DORAN_ADAPTERS_DIR=str(folder / "more"),
    )
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
    first, second = (make_adapter("folded", weights, TARGETS, rank=6, seed=s, size=0.5) for s in (70, 71))
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
    spec = make_adapter("folded", reference("llama").weights, TARGETS, rank=6, seed=72, size=0.5)
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
    forms = ("trainable", "dora", "folded", "lora") * 3  # three times as many as there are slots
    expected = {}
    for seed, form in enumerate(forms):
        spec = make_adapter(form, weights, TARGETS, rank=5, seed=80 + seed, size=0.5)
        spec.write(folder / f"tenant-{seed}")
        expected[f"tenant-{seed}"] = reference("llama").answer([PROMPTS[0]], spec, TOKENS)[0]
    for name in [*expected, *reversed(expected)]:
        assert server.complete(name, PROMPTS[0]) == expected[name], name
    foreign = make_adapter("folded", weights, TARGETS, rank=5, seed=90, size=0.5)
    foreign.write_scales(foreign.write(folder / "foreign"), fingerprint="sha256:beef")
    status, text = server.complete("foreign", PROMPTS[0])
    assert status == 400, text
    assert "sha256:beef" in text
    make_adapter("folded", weights, TARGETS, rank=17, seed=91, size=0.5).write(folder / "wide")
    status, text = server.complete("wide", PROMPTS[0])
    assert (status, "rank 17, but the engine was started with max_lora_rank=16" in text) == (400, True), text
    for name in ("nobody", "..", ".", ".hidden", "x" * 300, "x" * 5000):
        assert server.complete(name, PROMPTS[0])[0] == 404, name
    assert server.complete("../adapters/lora", PROMPTS[0])[0] == 404


def test_a_streamed_request_for_a_bad_adapter_is_refused_before_it_streams(
    server: Server, reference: Callable[[str], Any]
) -> None:
    folder = Path(server.log.name).parent / "more" / "breaking"
    spec = make_adapter("folded", reference("llama").weights, TARGETS, rank=5, seed=95, size=0.5)
    spec.write(folder)
    assert server.complete("breaking", PROMPTS[0]) == reference("llama").answer([PROMPTS[0]], spec, TOKENS)[0]
    (folder / "adapter_model.safetensors").write_bytes(b"cut off")
    tracebacks = server.everything().count("Traceback")
    status, text = server.request("/v1/completions", model="breaking", prompt=PROMPTS[0], max_tokens=4, stream=True)
    assert (status, "'breaking' refused" in text) == (400, True), text
    assert server.everything().count("Traceback") == tracebacks


def test_a_replaced_or_removed_adapter_is_noticed(server: Server, reference: Callable[[str], Any]) -> None:
    folder = Path(server.log.name).parent / "more"
    base, weights = reference("llama"), reference("llama").weights
    long = [list(range(10, 80))]  # longer than a cache block: its prefix is cached
    for seed in (100, 101):
        spec = make_adapter("folded", weights, TARGETS, rank=5, seed=seed, size=0.5)
        spec.write(folder / "changing")
        for _ in range(2):
            assert server.complete("changing", long[0]) == base.answer(long, spec, TOKENS)[0]
    shutil.rmtree(folder / "changing")
    assert server.complete("changing", long[0])[0] in (400, 404)
    spec.write(folder / "changing")
    assert server.complete("changing", long[0]) == base.answer(long, spec, TOKENS)[0]


def test_requests_in_flight_keep_the_version_that_they_started_with(
    server: Server, reference: Callable[[str], Any]
) -> None:
    folder = Path(server.log.name).parent / "more"
    base, weights = reference("llama"), reference("llama").weights
    old, new = (make_adapter("folded", weights, TARGETS, rank=5, seed=s, size=0.5) for s in (110, 111))
    prompt, tokens = [40, 41, 42], 110
    old.write(folder / "busy")
    assert server.complete("busy", prompt, 2) == base.answer([prompt], old, 2)[0]
    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(server.complete, "busy", prompt, tokens)
        while "vllm:num_requests_running{" not in server.request("/metrics")[1] or not server.running():
            assert not first.done(), "the request has to be in flight"
        new.write(folder / "busy")
        second = clients.submit(server.complete, "busy", prompt, tokens)
        assert second.result() == base.answer([prompt], new, tokens)[0]
        assert first.result() == base.answer([prompt], old, tokens)[0]


def test_replaced_under_load(server: Server, reference: Callable[[str], Any], tmp_path: Path) -> None:
    """Clients ask without a pause while /v1/load_lora_adapter puts one version in the place of the other and back.

    No request fails, none gets a mixture, and whoever asks after the answer to a load gets the version loaded.
    """
    base, weights = reference("llama"), reference("llama").weights
    versions = [make_adapter("folded", weights, TARGETS, rank=6, seed=s, size=0.5) for s in (120, 121)]
    paths = [spec.write(tmp_path / str(index)) for index, spec in enumerate(versions)]
    expected = [base.answer([PROMPTS[0]], spec, TOKENS)[0] for spec in versions]
    untouched = base.answer([PROMPTS[0]], None, TOKENS)[0]
    assert server.request("/v1/load_lora_adapter", lora_name="hot", lora_path=str(paths[0]))[0] == 200
    stop = threading.Event()

    def ask(model: str | None) -> list[Any]:
        found = []
        while not stop.is_set():
            found.append(server.complete(model, PROMPTS[0]))
        return found

    with ThreadPoolExecutor(4) as clients:
        asking = [clients.submit(ask, model) for model in ("hot", "hot", None)]
        try:
            for turn in range(1, 16):
                load = {"lora_name": "hot", "lora_path": str(paths[turn % 2]), "load_inplace": True}
                assert server.request("/v1/load_lora_adapter", **load)[0] == 200
                assert server.complete("hot", PROMPTS[0]) == expected[turn % 2], turn
        finally:
            stop.set()
    *hot, plain = [client.result() for client in asking]
    for answers in hot:
        assert all(answer in expected for answer in answers)
        assert len(answers) > 3
    assert all(answer == untouched for answer in plain)


def test_metrics_name_the_adapters(server: Server) -> None:
    server.complete("doran", PROMPTS[0])
    text = server.request("/metrics")[1]
    assert "vllm:lora_requests_info{" in text
    counts = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("doran:")}
    assert counts['doran:requests_total{adapter="doran"}'] >= 1
    assert counts['doran:refusals_total{adapter="bad"}'] >= 1
    assert counts['doran:refusals_total{adapter="foreign"}'] >= 1
