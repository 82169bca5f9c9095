"""`doran completion`: the script with which a shell completes doran's commands, flags and paths."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from doran_core.cli.command import Outcome, command

__all__ = ["completion"]


@command(
    group="shell",
    short_help="print a script that completes doran's commands and flags",
    examples=(
        "doran completion bash > ~/.local/share/bash-completion/completions/doran",
        "doran completion zsh > ~/.zfunc/_doran    # with fpath+=~/.zfunc before compinit",
        "doran completion fish > ~/.config/fish/completions/doran.fish",
    ),
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> Outcome:
    """Print a shell's completion script. The script asks the installed `doran` for completions."""
    from doran_core.cli.group import doran
    from doran_core.cli.main import COMPLETION_VARIABLE

    kind = get_completion_class(shell)
    assert kind is not None
    script = kind(doran, {}, "doran", COMPLETION_VARIABLE).source()
    return Outcome({"shell": shell, "script": script}, [script])
