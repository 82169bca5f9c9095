"""Options that several subcommands share, and the conversion of their values."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from doran_core.errors import ConfigError

if TYPE_CHECKING:
    from doran_core.method.factors import FactorBuilder

__all__ = ["DIRECTORY", "FILE", "adapter_options", "load_factor_builder"]

DIRECTORY = click.Path(file_okay=False)
"""Type of a directory option: shells complete directories, and the command checks the directory itself."""
FILE = click.Path(dir_okay=False)
"""Type of a file option, likewise."""


def adapter_options(function: Any) -> Any:
    """Decorator: the options of every subcommand that evaluates an adapter."""
    function = click.option(
        "--factor-builder",
        metavar="MODULE:NAME",
        help="The factor_builder that was given to adapt(), for an adapter with a generator of your own. "
        "MODULE is imported, so its code runs; the current directory is searched first.",
    )(function)
    return click.option("--allow-base-mismatch", is_flag=True, help="Accept an adapter made for other base weights.")(
        function
    )


def load_factor_builder(given: str | None) -> FactorBuilder | None:
    """Import the factor builder that ``MODULE:NAME`` names.

    Raises:
        ConfigError: the value has another form, or what it names cannot be imported or called.
    """
    if given is None:
        return None
    module, _, name = given.partition(":")
    if not module or not name:
        raise ConfigError(f"--factor-builder {given!r}: expected MODULE:NAME, such as my_generators:Fourier")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        builder = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's code can raise anything
        raise ConfigError(f"--factor-builder {given}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(builder):
        raise ConfigError(f"--factor-builder {given}: expected a callable, got {builder!r}")
    return builder  # type: ignore[no-any-return]
