"""The name of :mod:`doran_core.method.tau` before version 0.2; it stays for programs that import it."""

from doran_core.method.tau import *  # noqa: F403
from doran_core.method.tau import __all__ as __all__
