"""Mutations of the files of a directory, drawn from a seed: bytes, JSON, headers, whole files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

__all__ = ["mutate"]

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**64, 10**400, 1e308, 1e400, float("nan"), 0.5, "", "x", "false"),
    *("\0", "\ud800", "é\x1b[2J", "../..", "/etc/passwd", "(", "([a-z.]+)+!", "(?i)v", "q{99999999999}", "a" * 5000),
    *([], [1], [[]], ["x"], [None], {}, {"x": 1}, {"(a+)+!": 2}, {"x": "y"}, {"": []}, [True, 4], [1] * 70, [2**60, 4]),
    *("F32", "F99", "F4", "F8_E8M0", "BOOL", "I64", "DORAN", "LORA", "linear", "conv2d"),
]


def mutate(folder: Path, others: list[Path], random: Random) -> str:
    """Change one to three things in a directory, in place, and say which."""
    done = []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        files = [path for path in files if path.stat().st_size < 2**20]  # not those that were made huge
        if not files:
            break
        file = random.choice(files)
        kind = random.choice(_KINDS_JSON if file.suffix in (".json", ".yaml") else _KINDS_TENSORS)
        kind(file, others, random)
        done.append(f"{kind.__name__.strip('_')} {file.name}")
    return ", ".join(done)


def _bytes(file: Path, others: list[Path], random: Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 4)):
        position = random.randrange(len(data) + 1)
        data[position : position + random.randint(0, 4)] = random.randbytes(random.randint(0, 4))
    file.write_bytes(data)


def _bits(file: Path, others: list[Path], random: Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(random.randint(1, 8)):
        if data:
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def _head(file: Path, others: list[Path], random: Random) -> None:
    data = bytearray(file.read_bytes())
    position = random.randrange(min(len(data), 1500) or 1)
    data[position : position + 1] = random.randbytes(1)
    file.write_bytes(data)


def _truncate(file: Path, others: list[Path], random: Random) -> None:
    os.truncate(file, random.randrange(file.stat().st_size + 1))


def _append(file: Path, others: list[Path], random: Random) -> None:
    with file.open("ab") as opened:
        opened.write(random.randbytes(random.randint(1, 64)))


def _grow(file: Path, others: list[Path], random: Random) -> None:
    os.truncate(file, 2 ** random.randint(20, 41))  # sparse


def _remove(file: Path, others: list[Path], random: Random) -> None:
    file.unlink()


def _replace(file: Path, others: list[Path], random: Random) -> None:
    source = random.choice(others)
    names = sorted(path for path in source.iterdir() if path.is_file())
    if names:
        shutil.copy(random.choice(names), file)


def _sibling(file: Path, others: list[Path], random: Random) -> None:
    source = random.choice(others) / file.name
    if source.exists():
        shutil.copy(source, file)


def _special(file: Path, others: list[Path], random: Random) -> None:
    file.unlink()
    choice = random.randrange(4)
    if choice == 0:
        os.mkfifo(file)
    elif choice == 1:
        file.mkdir()
    elif choice == 2:
        file.symlink_to(random.choice(["/dev/zero", "/dev/stdin", "nowhere", file.name, "/proc/self/mem"]))
    else:
        file.write_bytes(b"")


def _nest(file: Path, others: list[Path], random: Random) -> None:
    file.write_text(random.choice(["[", '{"a":']) * random.choice([500, 50_000]))


def _pickle(file: Path, others: list[Path], random: Random) -> None:
    file.write_bytes(random.choice([b"PK\x03\x04", b"\x80\x02}q\0."]) + random.randbytes(100))


def _json(file: Path, others: list[Path], random: Random) -> None:
    try:
        value = json.loads(file.read_text())
    except (ValueError, OSError, RecursionError):
        return _bits(file, others, random)
    if isinstance(value, dict):
        _edit(value, random)
    file.write_text(json.dumps(value))
    return None


def _header(file: Path, others: list[Path], random: Random) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return _bits(file, others, random)
    if isinstance(header, dict):
        _edit(header, random)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return None


def _edit(value: dict[str, Any], random: Random) -> None:
    """Change an entry of an object, or of an object or a list within it."""
    names = [name for name in value if name not in ("digest", "tensors_digest")]
    # An adapter without digests is a legal one of format 1: whoever takes them away may change the rest.
    if not names:
        value["x"] = random.choice(ODD)
        return None
    name = random.choice(names)
    inner = value[name]
    if isinstance(inner, dict) and inner and random.random() < 0.7:
        return _edit(inner, random)
    choice = random.randrange(5)
    if choice == 0:
        del value[name]
    elif choice == 1:
        value[name + random.choice(["x", ".y", "\0", ""])] = value.pop(name)
    elif choice == 2 and isinstance(inner, list) and inner:
        inner[random.randrange(len(inner))] = random.choice(ODD)
    elif choice == 3 and isinstance(inner, int | float) and not isinstance(inner, bool):
        value[name] = random.choice([inner + 1, -inner, inner * 2**40, float(inner % 2**53), str(inner)])
    else:
        value[name] = random.choice(ODD)
    return None


_Kind = Callable[[Path, list[Path], Random], Any]
_COMMON: list[_Kind] = [_bytes, _bits, _truncate, _append, _remove, _replace, _sibling, _special, _pickle]
_KINDS_JSON: list[_Kind] = [*_COMMON, _json, _json, _json, _json, _json, _json, _nest, _grow]
_KINDS_TENSORS: list[_Kind] = [*_COMMON, _header, _header, _header, _header, _head, _head, _bits, _bits, _grow]
