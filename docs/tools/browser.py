"""Looks at the built site in a real, headless Chromium, as wide as a desktop and as a phone.

    mkdocs build && python docs/tools/browser.py [PAGE ...] [--shots DIR]

On every page: no error on the console, no failed request, nothing wider than the screen, and every figure is drawn.
With --shots, a picture of each whole page in both widths and both colour schemes. Without a Chromium, prints so and
exits with 2; the session `docs` does not run this file. Needs `websocket-client`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket
from places import REPOSITORY

SITE = REPOSITORY / "build" / "site"
SCREENS = {"phone": (390, 844), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
TALLEST = 12_000
"""Pixels of a picture's height: Chromium draws no taller ones reliably."""
MEASURE = """(() => {
  const edge = window.innerWidth + 1
  const scrolled = 'pre, code, .md-typeset__scrollwrap'
  const drawn = [...document.images].filter(i => getComputedStyle(i).display !== 'none')
  const empty = i => !i.complete || i.naturalWidth === 0 || i.getBoundingClientRect().width < 50
  const wide = [...document.querySelectorAll('.md-content *')]
    .filter(e => e.getBoundingClientRect().right > edge && !e.closest(scrolled))
  return JSON.stringify({
    width: document.documentElement.scrollWidth,
    height: document.documentElement.scrollHeight,
    screen: window.innerWidth,
    wide: wide.slice(0, 3).map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`),
    undrawn: drawn.filter(empty).map(i => i.src),
  })
})()"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="such as howto/vllm; by default all")
    parser.add_argument("--shots", type=Path, metavar="DIR", help="write a picture of each page")
    arguments = parser.parse_args()
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        print("browser.py: nothing checked: no Chromium on this machine", file=sys.stderr)
        return 2
    paths = arguments.pages or sorted(file.parent.relative_to(SITE).as_posix() for file in SITE.rglob("index.html"))
    with served(SITE) as address, Chromium(program) as chromium:
        problems = [problem for path in paths for problem in look_at(chromium, address, path, arguments.shots)]
    print(f"{len(paths)} pages, {len(SCREENS)} widths, {len(SCHEMES)} schemes: {len(problems)} problems")
    print("\n".join(problems))
    return 1 if problems else 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A file server that says nothing."""

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The folder over HTTP on a free port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


class Chromium:
    """A headless Chromium with one tab, spoken to over its DevTools protocol."""

    def __init__(self, program: str) -> None:
        self.profile = tempfile.TemporaryDirectory(prefix="doran-browser-", ignore_cleanup_errors=True)
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [program, *flags, f"--user-data-dir={self.profile.name}", "about:blank"], stderr=subprocess.DEVNULL
        )
        port_file = Path(self.profile.name, "DevToolsActivePort")
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text().strip()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{program} did not start")
            time.sleep(0.1)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(tab for tab in json.load(answer) if tab["type"] == "page")
        self.socket = websocket.create_connection(tab["webSocketDebuggerUrl"], timeout=60, suppress_origin=True)
        self.events: list[dict[str, Any]] = []
        self.count = 0
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Chromium:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(30)
        self.profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result; events that come meanwhile are kept."""
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def open(self, url: str) -> None:
        """Load a page and wait until it is quiet."""
        self.send("Storage.clearDataForOrigin", origin=url, storageTypes="local_storage")  # a scheme once chosen
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(self.socket.recv()))
        self.evaluate("new Promise(done => setTimeout(done, 250))")

    def evaluate(self, script: str) -> Any:
        """The value of a script, waited for if it is a promise."""
        return self.send("Runtime.evaluate", expression=script, awaitPromise=True)["result"].get("value")

    def complaints(self) -> list[str]:
        """Errors on the console, exceptions, and requests that failed, since the page was opened."""
        found = []
        for event in self.events:
            method, given = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(f"exception: {given['exceptionDetails'].get('text')}")
            elif method == "Runtime.consoleAPICalled" and given["type"] == "error":
                found.append(f"console: {given['args']}")
            elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
                found.append(f"log: {given['entry']['text']} {given['entry'].get('url', '')}")
            elif method == "Network.loadingFailed" and not given.get("canceled"):
                found.append(f"request failed: {given['errorText']}")
            elif method == "Network.responseReceived" and given["response"]["status"] >= 400:
                found.append(f"request: {given['response']['status']} {given['response']['url']}")
        return found


def look_at(chromium: Chromium, address: str, path: str, shots: Path | None) -> Iterator[str]:
    """Problems of one page, in every width and scheme."""
    for scheme in SCHEMES:
        chromium.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for screen, (width, height) in SCREENS.items():
            chromium.send(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=screen == "phone",
            )
            chromium.open(f"{address}/{path}/" if path != "." else f"{address}/")
            chromium.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
            seen = json.loads(chromium.evaluate(MEASURE))
            where = f"{path} ({screen}, {scheme})"
            yield from (f"{where}: {complaint}" for complaint in chromium.complaints())
            if seen["width"] > seen["screen"]:
                yield f"{where}: {seen['width']} wide on a screen of {seen['screen']}: {seen['wide']}"
            yield from (f"{where}: figure not drawn: {source}" for source in seen["undrawn"])
            if shots is not None:
                shots.mkdir(parents=True, exist_ok=True)
                whole = {"x": 0, "y": 0, "width": width, "height": min(seen["height"], TALLEST), "scale": 1}
                picture = chromium.send("Page.captureScreenshot", captureBeyondViewport=True, clip=whole)["data"]
                name = f"{path.replace('/', '_') if path != '.' else 'index'}-{screen}-{scheme}.png"
                (shots / name).write_bytes(base64.b64decode(picture))


if __name__ == "__main__":
    sys.exit(main())
