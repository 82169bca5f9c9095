"""DoRAN on the routers of mixture-of-experts models: modules that multiply with a matrix ``weight`` and choose experts.

The module stays unchanged. During a call an :class:`~doran_hf.adapted_weight.AdaptedWeight` stands in for the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from doran_core.errors import TargetError
from doran_core.layers import BaseView, is_adaptable
from doran_core.support.sharding import held, whole_shape
from doran_hf.adapted_weight import AdaptedWeight, call_with, refuse_replaced_forward, summed
from doran_hf.layer import DoranLayer

__all__ = ["RouterDoranLayer", "is_router"]


def is_router(module: nn.Module) -> bool:
    """Whether a module has a matrix ``weight`` ``[d_out, d_in]``, perhaps a bias, and a forward of its own."""
    if is_adaptable(module) or list(module.children()):
        return False
    names = {name for name, _ in module.named_parameters(recurse=False)}
    weight = held(module, "weight")
    if not isinstance(weight, Tensor) or not names or not names <= {"weight", "bias"}:
        return False
    return len(whole_shape(weight)) == 2 and weight.is_floating_point() and weight.dtype.itemsize > 1


class _RouterView(BaseView):
    """A router's weight ``[experts, d_in]`` as the matrix."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer, *whole_shape(held(layer, "weight")))

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(F.linear(x, A), B)

    def _apply_base(self, rows: Tensor) -> Tensor:
        raise TargetError(
            f"{type(self.layer).__name__}: a router's weight is whole only inside its own forward pass (ZeRO-3, a "
            "sharding unit of its own, offload), and DoRAN needs it outside: leave the router out of target_modules"
        )


class RouterDoranLayer(DoranLayer):
    """A router and its adapters. Arguments and outputs are the router's."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self._prepare(_RouterView(base_layer), name)

    @property
    def view(self) -> BaseView:
        """The router's weight."""
        return _RouterView(self.get_base_layer())

    def adapter_in_use(self) -> None:
        """None: the batched computation of ordinary layers skips routers."""
        return

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT has no LoRA layer around routers."""
        return False

    # A stand-in is no tensor.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The router's output, adapted.

        Raises:
            TargetError: the router's call would read the weight instead of the stand-in.
        """
        if self.merged and self.disable_adapters:
            self.unmerge()
        adapters, router = self._adapters_in_use(), self.base_layer
        if not adapters:
            return router(*args, **kwargs)
        refuse_replaced_forward(router, self.name, "leave the router out")
        view, sides = self.view, []
        for adapter in adapters:
            vars(adapter)["called"] = True
            sides.append(adapter.scale_and_factors(view))
        scale, A, B = summed(sides)
        dropout = adapters[0].config.dropout if self.training else 0.0
        weight: Tensor = router.weight  # type: ignore[assignment]
        adapted = AdaptedWeight(weight, scale, A, B, True, dropout, f"{self.name}.weight")
        return call_with(router, {"weight": adapted}, *args, **kwargs)
