"""Commands of the documentation's shell blocks: held against parsers, extras, sessions and files; `doran` ones run.

A command that nothing here knows fails: what is written down has to be checked by something.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import re
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import click
from places import REPOSITORY

from doran_core.cli.group import parse
from doran_core.cli.main import main

__all__ = ["check_command", "run_command", "shell_commands"]

Words = list[str]


def shell_commands(source: str, place: str) -> list[Words]:
    """The simple commands of a block, without comments, variables set before a command, `cd` and `export`."""
    commands = []
    for line in source.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:&&|\|)\s", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", words[0], re.DOTALL):
                words = words[1:]
            if words and words[0] not in ("cd", "export"):
                commands.append(words)
    assert commands, f"{place}: no command in it"
    return commands


def run_command(words: Words, place: str) -> None:
    """Run a `doran` command in this process; check any other."""
    check_command(words, place)
    if words[0] != "doran":
        return
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = main(words[1:])
    assert status == 0, f"{place}: {shlex.join(words)} gave {status}: {errors.getvalue()[-500:]}"


def check_command(words: Words, place: str) -> None:
    """Hold a command against what it would run.

    Raises:
        AssertionError: an unknown command, option, extra, session or file.
    """
    name = Path(words[0]).name or words[0]  # "." is `source`
    assert name in _CHECKS, f"{place}: no check for the command {name!r}; known: {sorted(_CHECKS)}"
    problem = _CHECKS[name](words[1:])
    assert problem is None, f"{place}: {shlex.join(words)}: {problem}"


def _doran(words: Words) -> str | None:
    if words in (["--help"], ["--version"]):
        return None
    try:
        parse(words)
    except (click.UsageError, click.exceptions.Exit) as error:  # --help ends with Exit
        return error.format_message() if isinstance(error, click.UsageError) else None
    return None


def _pip(words: Words) -> str | None:
    """Packages of this repository, with their extras; what comes from an index is not looked up."""
    if words[0] == "uninstall":
        return None
    for word in words[1:]:
        match = re.fullmatch(r"(?:\./)?(?:packages/)?(doran-\w+)(?:\[([\w,]+)\])?", word)
        if match is None:
            continue
        file = REPOSITORY / "packages" / match[1] / "pyproject.toml"
        if not file.is_file():
            return f"no package {match[1]}"
        extras = tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("optional-dependencies", {})
        unknown = set((match[2] or "").split(",")) - {"", *extras}
        if unknown:
            return f"{match[1]} has no extra {sorted(unknown)}"
    return None


def _nox(words: Words) -> str | None:
    defined = set(
        re.findall(r"^def (\w+)\(session", (REPOSITORY / "noxfile.py").read_text(encoding="utf-8"), re.MULTILINE)
    )
    asked = [words[i + 1] for i, word in enumerate(words) if word == "-s"]
    return next((f"no session {name!r}" for name in asked if name not in defined), None)


def _python(words: Words) -> str | None:
    if words[:1] == ["-m"]:
        known = words[1] in ("venv", "pip") or importlib.util.find_spec(words[1]) is not None
        return None if known else f"no module {words[1]!r}"
    file = REPOSITORY / words[0].removeprefix("../")
    if not file.is_file():
        return f"no file {words[0]!r} in the repository"
    text = file.read_text(encoding="utf-8")
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
    return next((f"{words[0]} has no option {option}" for option in options if f'"{option}"' not in text), None)


def _vllm(words: Words) -> str | None:
    """vLLM's own parser, where vLLM is installed. `doran serve --check` and the serve session test the rest."""
    if importlib.util.find_spec("vllm") is None:
        return None if words[0] in ("serve", "bench") else f"no vllm command {words[0]!r}"
    place = "launchers" if importlib.util.find_spec("vllm.entrypoints.launchers") else "openai"  # moved in 0.32
    make_arg_parser = importlib.import_module(f"vllm.entrypoints.{place}.cli_args").make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])
    except (SystemExit, argparse.ArgumentError) as error:
        return str(error)
    return None


def _anything(words: Words) -> str | None:
    return None


_CHECKS: dict[str, Callable[[Words], str | None]] = {
    ".": _anything,
    "cp": _anything,
    "curl": _anything,
    "doran": _doran,
    "git": _anything,
    "mkdir": _anything,
    "mkdocs": _anything,
    "nox": _nox,
    "pip": _pip,
    "pytest": _anything,
    "python": _python,
    "python3": _python,
    "vllm": _vllm,
}
