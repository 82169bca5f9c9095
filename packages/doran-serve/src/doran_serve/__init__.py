"""Serve DoRAN, DoRA, LoRA and base requests in one vLLM batch. Importing this needs neither vLLM nor a GPU."""

from doran_serve.plugin import register
from doran_serve.store import AdapterStore

__all__ = ["AdapterStore", "register"]
__version__ = "0.1.0"
