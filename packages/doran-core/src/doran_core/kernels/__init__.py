"""Faster implementations of an adapted linear layer: a backward by hand, and Triton kernels on the GPU.

The formulas are doran_core.functional's; what is here computes the same function and is held to it by tests.
``backend.py`` chooses, ``layer.py`` is the layer, ``passes.py`` and ``triton_passes.py`` its passes over memory,
``networks.py`` the factor networks by hand. Where layers are
computed together, ``fleet.py`` says when, ``weight_side.py`` and the families how, and ``prepared.py`` is the layer.
Triton is imported when first used, never before.
"""

from doran_core.kernels.backend import Backend, get_backend, set_backend, use_backend

__all__ = ["Backend", "get_backend", "set_backend", "use_backend"]
