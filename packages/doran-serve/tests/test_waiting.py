"""Adapters that are damaged, removed, or replaced and put back while requests for them wait for a slot."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from adapter_specs import AdapterSpec, make_adapter
from test_mixed import prompts_of

TARGETS = ("q_proj", "down_proj")
SLOTS = 5


@pytest.fixture(scope="module")
def served(engine: Callable[..., Any]) -> Any:
    """An engine in processes of its own: in one process nothing could die."""
    return engine("llama", separate="DORAN_TEST_INPROCESS" not in os.environ)


class Waiting:
    """Long requests for as many adapters as there are slots; what is asked now waits for one of them."""

    def __init__(self, served: Any, reference: Any, folder: Path, seed: int) -> None:
        from vllm.lora.request import LoRARequest

        self.engine, self.reference, self._request = served.llm.llm_engine, reference, LoRARequest
        self._number = 1000 * seed
        self._asked: dict[str, tuple[AdapterSpec, list[int], int]] = {}
        self.found: dict[str, tuple[list[int], str | None]] = {}
        busy = [
            make_adapter("folded", reference.weights, TARGETS, rank=3, seed=seed + index, size=0.5)
            for index in range(SLOTS)
        ]
        for index, spec in enumerate(busy):
            spec.write(folder / f"busy-{index}")
        for index, spec in enumerate(busy):
            self.ask(f"busy-{index}", folder / f"busy-{index}", spec, [5, 6, 7, index + 8], 100)

    def ask(self, request_id: str, folder: Path, spec: AdapterSpec, prompt: list[int], tokens: int) -> None:
        """Send a request whose answer is `spec`'s; the adapter is named and numbered by its folder."""
        from vllm import SamplingParams

        self._number += 1
        adapter = self._request(str(folder), 1 + int.from_bytes(str(folder).encode()[-3:]), str(folder))
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        name = f"{request_id}/{self._number}"
        self.engine.add_request(name, {"prompt_token_ids": prompt}, settings, lora_request=adapter)
        self._asked[request_id] = (spec, prompt, tokens)

    def step(self) -> set[str]:
        """The requests that have new tokens, or are answered."""
        outputs = {output.request_id.partition("/")[0]: output for output in self.engine.step()}
        for name, output in outputs.items():
            if output.finished:
                answer = output.outputs[0]
                self.found[name] = (list(answer.token_ids), answer.finish_reason)
        return set(outputs)

    def fill_slots(self) -> None:
        """Run until each busy request has a token: its adapter is then in a slot, and no longer read."""
        started: set[str] = set()
        while len(started) < SLOTS:
            started |= self.step()

    def finish(self) -> dict[str, tuple[list[int], str | None]]:
        """Run until all are answered: tokens and finish reason by request, and nobody's may be wrong."""
        while self.engine.has_unfinished_requests():
            self.step()
        return self.found

    def check(self, *names: str) -> None:
        """Those named, and all busy ones, were answered by their own adapter."""
        for name in (*names, *(name for name in self._asked if name.startswith("busy"))):
            spec, prompt, tokens = self._asked[name]
            assert self.found[name] == (self.reference.answer([prompt], spec, tokens)[0], "length"), name


def damage(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(("seed", "harm"), [(200, damage), (210, shutil.rmtree)], ids=["damaged", "removed"])
def test_a_waiting_request_gets_what_was_admitted(
    seed: int, harm: Callable[[Path], Any], served: Any, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    base = reference("llama")
    waiting = Waiting(served, base, tmp_path, seed)
    spec = make_adapter("folded", base.weights, TARGETS, rank=4, seed=seed + 9, size=0.5)
    waiting.ask("late", spec.write(tmp_path / "late"), spec, [9, 8, 7], 6)
    harm(tmp_path / "late")
    waiting.finish()
    waiting.check("late")


def test_only_the_requests_of_an_adapter_that_is_gone_fail(
    served: Any, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """Its directory and its private copy are gone: one error, and nothing of the stand-in in the prefix cache."""
    base, prompt = reference("llama"), prompts_of([100], 512, seed=5)[0]
    spec = make_adapter("folded", base.weights, TARGETS, rank=4, seed=230, size=0.5)
    waiting = Waiting(served, base, tmp_path, 220)
    waiting.ask("late", spec.write(tmp_path / "late"), spec, prompt, 6)
    waiting.fill_slots()
    for copy in (Path(os.environ["DORAN_CACHE_DIR"]) / "admitted").iterdir():
        shutil.rmtree(copy)
    shutil.move(tmp_path / "late", tmp_path / "aside")
    assert waiting.finish()["late"] == ([], "error")
    waiting.check()

    shutil.move(tmp_path / "aside", tmp_path / "late")
    again = Waiting(served, base, tmp_path / "again", 240)
    again.ask("late", tmp_path / "late", spec, prompt, 6)
    again.finish()
    again.check("late")


def test_a_version_that_was_put_back_answers_as_itself(
    served: Any, reference: Callable[[str], Any], tmp_path: Path
) -> None:
    """X waits; another version is put in its place, then X is moved back: name and number must not change hands."""
    base, folder = reference("llama"), tmp_path / "x"
    old, new = (make_adapter("folded", base.weights, TARGETS, rank=4, seed=s, size=0.5) for s in (260, 261))
    waiting = Waiting(served, base, tmp_path, 250)
    waiting.ask("first", old.write(folder), old, [9, 8, 7], 6)
    folder.rename(tmp_path / "aside")
    new.write(folder)
    waiting.ask("second", folder, new, [9, 8, 7], 6)
    shutil.rmtree(folder)
    (tmp_path / "aside").rename(folder)
    waiting.finish()
    waiting.ask("third", folder, old, [9, 8, 7], 6)
    waiting.finish()
    waiting.check("first", "second", "third")


def test_a_number_that_two_adapters_share(served: Any, reference: Callable[[str], Any], tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    base = reference("llama")
    specs = [make_adapter("folded", base.weights, TARGETS, rank=4, seed=s, size=0.5) for s in (270, 271)]
    requests = [
        LoRARequest(f"shared-{i}", 77, str(spec.write(tmp_path / f"shared-{i}"))) for i, spec in enumerate(specs)
    ]
    prompts = [[9, 8, 7, 6]] * 2
    assert served.answer(prompts, requests, 6) == [base.answer(prompts[:1], spec, 6)[0] for spec in specs]
