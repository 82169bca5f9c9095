"""A running `doran serve` for the tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

TOKENS = 8


class Client:
    """Questions to a running server, and its answers as token ids."""

    def __init__(self, url: str, base: str) -> None:
        self.url, self.base = url, base

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

    def complete(self, model: str | None, prompt: list[int], tokens: int = TOKENS) -> Any:
        """The answer's tokens, or (status, text) of a refusal."""
        status, text = self.request(
            "/v1/completions",
            model=model or self.base,
            prompt=prompt,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        return json.loads(text)["choices"][0]["token_ids"] if status == 200 else (status, text)

    def running(self) -> int:
        """Requests that the engine works on now."""
        lines = self.request("/metrics")[1].splitlines()
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running{"))


class Server(Client):
    """A running `doran serve`."""

    def __init__(self, base: Path, adapters: Path, log: Path, *more: str, **variables: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{port}", str(base))
        script = "import sys; from doran_core.cli.main import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, "serve", self.base, "--adapters", str(adapters)]
        flags = ["--port", str(port), "--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager"]
        flags += ["--max-model-len", "128", *more]
        # Unbound threads: bound ones spin on cores that other processes of the tests need.
        env = os.environ | {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind"} | variables
        self.log = log.open("w+")
        self.process = subprocess.Popen([*command, *flags], env=env, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + 600  # most of it is waiting for other processes of the tests
        try:
            while self.request("/health")[0] != 200:
                assert self.process.poll() is None, self.tail()
                assert time.monotonic() < deadline, self.tail()
                time.sleep(1)
        except BaseException:
            self.process.kill()
            raise

    def everything(self) -> str:
        """What it has said."""
        self.log.seek(0)
        return self.log.read()

    def tail(self) -> str:
        """The last of what it has said."""
        return self.everything()[-4000:]

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
