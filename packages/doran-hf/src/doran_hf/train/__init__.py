"""`doran train` as a library: a configuration in, an adapter with metrics and a model card out."""

from doran_core.support.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__)  # the names of __init__.pyi
