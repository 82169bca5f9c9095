"""Text for standard output and error: in any encoding, with control characters escaped."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

__all__ = ["drop_output", "json_for", "open_streams", "printable"]

_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and newline, and those that change the direction of writing."""


def open_streams() -> None:
    """Make standard output and error usable, whatever the caller made of them.

    A closed one leads nowhere, instead of into the next file that is opened. What an encoding cannot show is escaped.
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
    """The text with escapes in place of characters that steer a terminal: metadata may hold any."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def json_for(text: str, escaped: str) -> str:
    """JSON as standard output can show it.

    Args:
        text: JSON in Unicode.
        escaped: the same in ASCII.
    """
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return escaped
    return escaped if _STEERING.search(text) else text


def drop_output() -> None:
    """Lead standard output nowhere: Python flushes it once more when it ends, and would meet the same error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
