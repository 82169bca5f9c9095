"""Serve DoRAN, DoRA, LoRA and base requests in one vLLM batch. Importing this needs neither vLLM nor a GPU."""

from doran_core.support.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(__name__, distribution="doran-serve")  # the names of __init__.pyi
