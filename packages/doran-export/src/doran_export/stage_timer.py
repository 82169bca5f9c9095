"""Progress lines of an export, and the seconds that each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Progress", "StageTimer"]

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) during an export."""


class StageTimer:
    """Passes progress on to a caller.

    Attributes:
        seconds: wall-clock time of each stage, of all its rounds where it had several.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress: Progress = progress or (lambda stage, done, total: None)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, total: int = 1) -> Iterator[Callable[[], None]]:
        """Time a stage of `total` steps; yields a function to call after each step (not needed for a single one)."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress(name, done, total)

        start = time.perf_counter()
        self.progress(name, 0, total)
        yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if done == 0:
            self.progress(name, total, total)

    def bytes(self, name: str) -> Callable[[int, int], None]:
        """A callback for (bytes done, bytes in all)."""
        return lambda done, total: self.progress(name, done, total)
