"""A progress bar for terminals, plain lines elsewhere. No dependency."""

from __future__ import annotations

import sys
import time
from typing import TextIO

__all__ = ["ProgressBar"]

_WIDTH = 30
_BAR_INTERVAL = 0.1
_LINE_INTERVAL = 10.0


class ProgressBar:
    """Shows (done, total). On a terminal one line is redrawn; elsewhere a line is printed now and then.

    Args:
        label: the running action.
        unit: "B" for bytes, shown as GB and MB; else the name of the counted things.
        stream: where to write; standard error by default.
    """

    def __init__(self, label: str, *, unit: str = "B", stream: TextIO | None = None) -> None:
        self.label = label
        self.unit = unit
        self.stream = stream or sys.stderr
        self._live = self.stream.isatty()
        self._start = time.monotonic()
        self._last = self._start if not self._live else float("-inf")
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < (_BAR_INTERVAL if self._live else _LINE_INTERVAL) and done < total:
            return
        self._last = now
        share = done / total if total else 1.0
        text = f"{self.label} {share:4.0%}  {self._amount(done)} of {self._amount(total)}  {self._clock(now, share)}"
        if self._live:
            filled = round(share * _WIDTH)
            self.stream.write(f"\r[{'#' * filled}{'.' * (_WIDTH - filled)}] {text}\x1b[K")
            self._drawn = True
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        """End the line of a live bar."""
        if self._drawn:
            self.stream.write("\n")
            self.stream.flush()
            self._drawn = False

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _amount(self, count: int) -> str:
        if self.unit != "B":
            return f"{count} {self.unit}"
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"

    def _clock(self, now: float, share: float) -> str:
        elapsed = now - self._start
        if not 0.0 < share < 1.0:
            return f"{elapsed:.0f} s"
        return f"{elapsed:.0f} s, {elapsed / share - elapsed:.0f} s left"
