"""The `doran` command: runs a subcommand, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Sequence

from doran_core.cli import exit_codes
from doran_core.cli.terminal import open_streams, printable
from doran_core.errors import CheckFailedError, DoranError

__all__ = ["COMPLETION_VARIABLE", "main"]

COMPLETION_VARIABLE = "_DORAN_COMPLETE"
"""Set by the scripts of `doran completion` when a shell asks for completions."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return one of :mod:`doran_core.cli.exit_codes`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    open_streams()
    try:
        import click
    except ImportError:
        print("doran: error: the `doran` command needs click: pip install 'doran-core[cli]'", file=sys.stderr)
        return exit_codes.USAGE
    from doran_core.cli.command import only_flags
    from doran_core.cli.group import doran

    try:
        with only_flags():
            if COMPLETION_VARIABLE in os.environ:
                from click.shell_completion import shell_complete

                return shell_complete(doran, {}, "doran", COMPLETION_VARIABLE, os.environ[COMPLETION_VARIABLE])
            with doran.make_context("doran", list(argv)) as context:
                doran.invoke(context)
        return exit_codes.OK
    except click.exceptions.Exit as ended:  # --help and --version
        return ended.exit_code
    except click.UsageError as error:
        where = "doran" if error.ctx is None else error.ctx.command_path
        print(printable(f"{where}: error: {error.format_message()} See: {where} --help"), file=sys.stderr)
        return exit_codes.USAGE
    except (KeyboardInterrupt, click.Abort):
        print("doran: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    except Exception as error:
        sentence, code = _explain(error)
        if "--debug" in argv:
            print(printable("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        print(printable(f"doran: {sentence}"), file=sys.stderr)
        return code


def _explain(error: Exception) -> tuple[str, int]:
    """An error as one sentence, and its exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, CheckFailedError):
        return f"error: {error}", exit_codes.CHECK_FAILED
    if isinstance(error, DoranError):
        return f"error: {error}", exit_codes.SYSTEM if _is_from_system(error) else exit_codes.USAGE
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's: by name, not imported
        return f"error: out of memory: {text}", exit_codes.SYSTEM
    if isinstance(error, OSError):
        return f"error: {text}", exit_codes.SYSTEM
    frame = traceback.extract_tb(error.__traceback__)[-1]
    sentence = (
        f"bug: {type(error).__name__}: {text} ({frame.filename}, line {frame.lineno}). This should not have happened: "
        "run it again with --debug for the traceback, and report that with the output of `doran --version`"
    )
    return sentence, exit_codes.BUG


def _is_from_system(error: BaseException | None) -> bool:
    """Whether the machine refused the request: an OSError or out of memory, also as the cause of another error."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SYSTEM):
            return True
        error = error.__cause__
    return False


_SYSTEM = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
        *(errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    }
)
