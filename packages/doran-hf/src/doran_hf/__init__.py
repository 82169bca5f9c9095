"""DoRAN as a PEFT method. Importing this package registers it; the math is doran_core's."""

from importlib import import_module

from doran_core.cli.command import reading_flags
from doran_core.support.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(  # the names of __init__.pyi
    __name__, distribution="doran-hf", first="doran_hf.registration"
)

if not reading_flags():  # PEFT takes seconds to import, and a command's help does not need it
    import_module("doran_hf.registration")
