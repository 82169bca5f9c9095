"""Faster implementations of adapted layers: a backward by hand, weight sides computed together and kept, kernels.

The formulas are doran_core.functional's; what is here computes the same function and is held to it by tests.
``dispatch.py`` chooses for one call, ``adapted_linear.py`` is the layer, ``passes.py`` and ``triton_passes.py`` its
passes over memory; ``weight_side.py`` computes A, B and c of many layers, ``layer_groups.py`` says of which and
``prepare.py`` when. ``expert_rows.py`` is the output of stacked experts.
Triton is imported when first used, never before.
"""

from doran_core.kernels.backend import Backend, get_backend, set_backend, use_backend
from doran_core.kernels.prepare import prepare, unprepare
from doran_core.kernels.weight_side import refresh

__all__ = [
    "Backend",
    "get_backend",
    "prepare",
    "refresh",
    "set_backend",
    "unprepare",
    "use_backend",
]
