"""Text for standard output and error: in any encoding, with control characters escaped."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

__all__ = ["drop_output", "json_for", "open_streams", "printable"]

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters other than tab and newline, and characters that change the writing direction."""


def open_streams() -> None:
    """Make standard output and error usable, even if the caller closed them.

    A closed stream is redirected to the null device; else the next opened file would take its number. Characters that
    the encoding lacks are escaped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """The text with control characters escaped, because metadata may contain them."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_for(text: str, escaped: str) -> str:
    """The first of two forms of the same JSON that standard output can show.

    Args:
        text: JSON in Unicode.
        escaped: JSON in ASCII.
    """
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return escaped
    return escaped if _STEERING.search(text) else text


def drop_output() -> None:
    """Redirect standard output to the null device: Python flushes it at exit, and would raise the same error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
