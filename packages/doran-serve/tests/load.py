"""Serving under load: many adapters that come, go, change and break while clients ask, and every answer is checked.

`python load.py` is the long form, ten minutes; `python load.py --short`, as `test_load.py`, is half a minute. What may
be answered follows from what the directory held while the request was open: the tokens of a version that was there, or
a refusal if it was broken.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_specs import make_adapter
from servers import TOKENS, Server

from doran_serve import publish_adapter

FORMS = ("folded", "lora", "folded", "dora", "folded", "lora", "trainable", "lora")
TARGETS = ("q_proj", "v_proj", "gate_proj", "down_proj")
BAD_NAMES = ("..", ".", ".hidden", "x" * 300, "a/b", "../adapters", "nobody", "\x00")
PROMPTS = 3
LONG = {"seconds": 600.0, "adapters": 200, "clients": 32}
SHORT = {"seconds": 30.0, "adapters": 24, "clients": 16}
APART = 1e-3
"""The least distance of the best two logits, for each token of an answer that is checked."""
State = str | int  # "gone", "broken", or the version that lies there


@dataclass
class Adapter:
    """One name: its versions' right answers, and what lay in its directory when."""

    name: str
    answers: list[list[list[int]]]
    states: list[tuple[float, float, State]] = field(
        default_factory=list
    )  # begin and end of the change, what lies there

    def between(self, start: float, end: float) -> set[State]:
        """What a request that was open from `start` to `end` may have met. A change counts from its begin."""
        found: set[State] = set()
        for index, (begun, _, state) in enumerate(self.states):
            over = self.states[index + 1][1] if index + 1 < len(self.states) else float("inf")
            if begun <= end and over >= start:
                found.add(state)
        return found


@dataclass
class Report:
    """What was seen."""

    requests: int = 0
    right: int = 0
    refused: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)
    deaths: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    growth: float = 0.0
    stop_seconds: float = 0.0
    orphans: int = 0

    def line(self) -> str:
        """One line for people."""
        return (
            f"{self.requests} requests: {self.right} right, {self.refused} refused, {len(self.wrong)} wrong, "
            f"{len(self.unanswered)} without an answer; {self.deaths} engine deaths; {sum(self.changes.values())} "
            f"changes on disk {dict(self.changes)}; stopped under load in {self.stop_seconds:.1f} s, killed with "
            f"{self.orphans} processes left; memory "
            f"{self.memory[-1][1] / 2**30:.2f} GiB, {100 * self.growth:+.1f}% after warm-up"
        )


class Load:
    """A server, its adapters, whoever changes them, and its clients.

    Args:
        base: checkpoint.
        reference: Hugging Face's answers for it.
        folder: an empty directory.
        adapters: how many.
        clients: how many ask at once.
        seed: of everything drawn.
    """

    def __init__(self, base: Path, reference: Any, folder: Path, *, adapters: int, clients: int, seed: int) -> None:
        self.base, self.folder, self.clients, self.seed = base, folder, clients, seed
        draw = random.Random(seed)
        self.prompts = [[draw.randrange(3, 500) for _ in range(6)] for _ in range(PROMPTS)]
        self.served, self.made = folder / "adapters", folder / "versions"
        self.served.mkdir(parents=True)
        self.plain = reference.answer(self.prompts, None, TOKENS)
        self.adapters = [self._make(reference, index) for index in range(adapters)]
        self.report = Report()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._restarting = (float("inf"), float("inf"))
        self._server: Server

    def _make(self, reference: Any, index: int) -> Adapter:
        """Two versions whose answers are well apart from a tie, and from each other."""
        name, answers, seed = f"tenant-{index}", list[list[list[int]]](), self.seed + 1000 * index
        while len(answers) < 2:
            seed += 1
            form = FORMS[index % len(FORMS)]
            spec = make_adapter(form, reference.weights, TARGETS[index % 2 :], rank=2 + index % 7, seed=seed, size=0.5)
            found = reference.answer(self.prompts, spec, TOKENS)
            best = [
                reference.logits(prompt, answer, spec).topk(2).values
                for prompt, answer in zip(self.prompts, found, strict=True)
            ]
            if min(float((two[:, 0] - two[:, 1]).min()) for two in best) < APART or found in answers:
                continue
            spec.write(self.made / f"{name}-{len(answers)}")
            answers.append(found)
        adapter = Adapter(name, answers)
        publish_adapter(self.made / f"{name}-0", self.served / name)
        adapter.states.append((0.0, 0.0, 0))
        return adapter

    def run(self, seconds: float) -> Report:
        """Load for so long, with a restart after a third of it."""
        self._server = self._start()
        if self._server.request("/v1/load_lora_adapter", lora_name="x", lora_path=str(self.made))[0] != 404:
            self.report.wrong.append("any client may load adapters by path")
        try:
            threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.clients)]
            threads += [threading.Thread(target=self._change), threading.Thread(target=self._measure)]
            begun = time.monotonic()
            for thread in threads:
                thread.start()
            time.sleep(seconds / 3)
            self._restart()
            left = max(2 * seconds / 3, begun + seconds - time.monotonic())
            measured = time.monotonic() + left / 4
            time.sleep(left)
            self._stop.set()
            for thread in threads:
                thread.join(300)
            self.report.unanswered += [thread.name for thread in threads if thread.is_alive()]
            self.report.deaths += self._server.process.poll() is not None
            self.report.deaths += self._server.everything().count("EngineCore encountered a fatal error")
            after = [size for moment, size in self.report.memory if moment > measured]
            tenth = max(1, len(after) // 5)
            self.report.growth = statistics.median(after[-tenth:]) / statistics.median(after[:tenth]) - 1
        finally:
            self._stop.set()
            self.report.orphans = self._kill()
        return self.report

    def _kill(self) -> int:
        """kill -9 of the server's first process; how many of the others are still there half a minute later."""
        others = family(self._server.process.pid)[1:]
        self._server.process.kill()
        self._server.process.wait(60)
        deadline = time.monotonic() + 30
        while (left := [process for process in others if alive(process)]) and time.monotonic() < deadline:
            time.sleep(0.5)
        for process in left:
            os.kill(process, signal.SIGKILL)
        return len(left)

    def _start(self) -> Server:
        flags = ("--skip-tokenizer-init", "--max-lora-rank", "8", "--max-loras", "8", "--max-num-seqs", "64")
        log = self.folder / f"log-{time.monotonic():.0f}"
        return Server(self.base, self.served, log, *flags, "--lora-target-modules", *TARGETS)

    def _restart(self) -> None:
        """SIGTERM under load, with the directory as it is: broken and missing adapters, too."""
        self._restarting = (time.monotonic(), float("inf"))
        self.report.deaths += self._server.process.poll() is not None
        self.report.deaths += self._server.everything().count("EngineCore encountered a fatal error")
        begun = time.monotonic()
        self._server.process.send_signal(signal.SIGTERM)
        try:
            self._server.process.wait(60)
        except Exception:
            self.report.unanswered.append("the server did not end within 60 s of SIGTERM")
            self._server.process.kill()
        self.report.stop_seconds = time.monotonic() - begun
        self._server = self._start()
        self._restarting = (self._restarting[0], time.monotonic())

    def _change(self) -> None:
        """Whoever owns the directory: replaces, removes, puts back, breaks."""
        draw = random.Random(self.seed + 1)
        while not self._stop.wait(0.05 + 0.2 * draw.random()):
            adapter = draw.choice(self.adapters)
            now = adapter.states[-1][2]
            kind = draw.choice(("replace", "replace", "remove", "truncate", "garbage")) if now in (0, 1) else "put back"
            begun, target = time.monotonic(), self.served / adapter.name
            version = draw.randrange(2)
            state: State = {"remove": "gone", "truncate": "broken", "garbage": "broken"}.get(kind, version)
            adapter.states.append((begun, float("inf"), state))
            if kind in ("replace", "put back"):
                publish_adapter(self.made / f"{adapter.name}-{version}", target)
            elif kind == "remove":
                target.rename(self.folder / "trash")
                shutil.rmtree(self.folder / "trash")
            else:
                path = target / "adapter_model.safetensors"
                if kind == "truncate":
                    os.truncate(path, path.stat().st_size // 2)
                else:
                    path.write_bytes(draw.randbytes(100))
            adapter.states[-1] = (begun, time.monotonic(), state)
            self.report.changes[kind] += 1

    def _ask(self, number: int) -> None:
        draw = random.Random(self.seed + 100 + number)
        while not self._stop.is_set():
            index = draw.randrange(PROMPTS)
            kind = draw.random()
            if kind < 0.05:
                self._one(self._server.base, None, index, stream=False)
            elif kind < 0.08:
                self._one(draw.choice(BAD_NAMES), None, index, stream=False)
            else:
                adapter = draw.choice(self.adapters[: 12 if draw.random() < 0.3 else None])
                self._one(adapter.name, adapter, index, stream=draw.random() < 0.2)

    def _one(self, model: str, adapter: Adapter | None, index: int, *, stream: bool) -> None:
        begun = time.monotonic()
        status, tokens = self._send(model, self.prompts[index], stream)
        ended = time.monotonic()
        if ended >= self._restarting[0] and begun <= self._restarting[1]:
            if ended - begun > 120:
                self.report.unanswered.append(f"{model}: {ended - begun:.0f} s around the restart")
            if status != 200 or isinstance(tokens, str):
                time.sleep(0.5)
                return
        states: set[State] = {"gone"} if adapter is None else adapter.between(begun, ended)
        allowed = [adapter.answers[state][index] for state in states if isinstance(state, int)] if adapter else []
        if model == self._server.base:
            states, allowed = set(), [self.plain[index]]
        with self._lock:
            self.report.requests += 1
            if status == 0:
                self.report.unanswered.append(f"{model}: {tokens} after {ended - begun:.1f} s")
            elif status == 200 and tokens in allowed:
                self.report.right += 1
            elif status in (400, 404) and states & {"gone", "broken"}:
                self.report.refused += 1
            else:
                self.report.wrong.append(f"{model} ({states}, stream {stream}): {status} {str(tokens)[:300]}")

    def _send(self, model: str, prompt: list[int], stream: bool) -> tuple[int, Any]:
        """Status and tokens, or the text of a refusal; 0 if there was no answer."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": stream}
        connection = http.client.HTTPConnection("127.0.0.1", int(self._server.url.rpartition(":")[2]), timeout=240)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                return answer.status, text
            if not stream:
                choice = json.loads(text)["choices"][0]
                return 200, text if choice["finish_reason"] == "abort" else choice["token_ids"]
            events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
            chunks = [json.loads(event) for event in events]
            if any("error" in chunk or chunk["choices"][0]["finish_reason"] == "abort" for chunk in chunks):
                return 200, text
            return 200, [token for chunk in chunks for token in chunk["choices"][0]["token_ids"] or []]
        except (OSError, http.client.HTTPException) as error:
            return 0, repr(error)
        finally:
            connection.close()

    def _measure(self) -> None:
        while not self._stop.wait(1):
            size = resident(self._server.process.pid)
            self.report.memory.append((time.monotonic(), size))


def family(process: int) -> list[int]:
    """A process and all below it."""
    found, waiting = [], [process]
    while waiting:
        found.append(waiting.pop())
        try:
            for task in Path(f"/proc/{found[-1]}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def alive(process: int) -> bool:
    """Whether it runs, and is not only waiting to be collected."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def resident(process: int) -> float:
    """Bytes in memory of a process and all below it."""
    total = 0.0
    for one in family(process):
        try:
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            continue
    return total


def main() -> int:
    """The long form; the exit code is 1 unless everything held."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help=f"{SHORT} instead of {LONG}")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--adapters", type=int)
    parser.add_argument("--clients", type=int)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the model is tiny: more threads wait for each other, here and in the server
    import models
    import torch

    torch.set_num_threads(1)
    form = SHORT if options.short else LONG
    adapters, clients = (int(getattr(options, name) or form[name]) for name in ("adapters", "clients"))
    seconds = 60 * options.minutes if options.minutes else form["seconds"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DORAN_CACHE_DIR"] = f"{folder}/cache"
        base = models.build_tiny("llama", Path(folder, "base"))
        load = Load(base, models.Reference(base), Path(folder), adapters=adapters, clients=clients, seed=options.seed)
        print(f"seed {options.seed}: {adapters} adapters, {clients} clients, {seconds:.0f} s", flush=True)
        report = load.run(seconds)
    print(report.line())
    for fault in (report.wrong + report.unanswered)[:20]:
        print(fault)
    return int(bool(report.wrong or report.unanswered or report.deaths or report.orphans or report.growth >= 0.05))


if __name__ == "__main__":
    sys.exit(main())
