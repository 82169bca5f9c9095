"""DoRAN on the stacked parameters of an experts module: DoranExperts around it, a DoranStack for each parameter.

The module stays unchanged, and the implementation from transformers' registry computes it. During a call, an
:class:`~doran_hf.adapted_weight.AdaptedWeight` stands in for each adapted parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from doran_core.errors import TargetError
from doran_core.layers.adapter import note_loading
from doran_core.layers.stack import StackAdapter, StackView
from doran_core.support.torch_internals import own_modules
from doran_hf.adapted_weight import AdaptedWeight, call_with, refuse_replaced_forward, summed
from doran_hf.layer import DoranLayer
from doran_hf.peft_internals import is_expert_parallel

__all__ = ["DoranExperts", "DoranStack"]

_PER_EXPERT = 4
"""Routed tokens per expert, on average. Below this, some experts probably get none, and only the others' norms are
computed. Above it, finding out costs more than it saves."""


class DoranStack(DoranLayer):
    """One stacked parameter ``[experts, d_out, d_in]`` (or transposed) and its adapters.

    A stack is not called. :class:`DoranExperts` gets the parameter's stand-in from it.

    Args:
        holder: the experts module.
        parameter: the parameter's name in it.
        name: the parameter's name in the base model.

    Raises:
        TargetError: the parameter is no stack, or its module does not declare the layout (``is_transposed``).
    """

    adapter_class = StackAdapter

    def __init__(self, holder: nn.Module, parameter: str, name: str) -> None:
        nn.Module.__init__(self)
        self._holder = (holder,)  # in a tuple, because the module is the child of DoranExperts
        self._parameter = parameter
        self._prepare(self._new_view(), name)

    def _new_view(self) -> StackView:
        holder = self._holder[0]
        return StackView(holder, self._parameter, transposed=holder.is_transposed, name=self._parameter)  # type: ignore[arg-type]

    @property
    def view(self) -> StackView:
        """The parameter as matrices ``[experts, d_out, d_in]``."""
        return self._new_view()

    @property
    def parameter_name(self) -> str:
        """The adapted parameter's name in the base model."""
        return self.name

    def get_base_layer(self) -> nn.Module:
        """The experts module."""
        return self._holder[0]

    def adapter_in_use(self) -> None:
        """None: the batched computation of ordinary layers skips stacks."""
        return

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's ``convert_to_lora`` is for single matrices."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not defined: DoranExperts computes its module with the stand-ins."""
        raise TargetError(f"{self.name}: stacked expert weights are not called; call their module")

    def stand_in(self, chosen: Tensor | None) -> AdaptedWeight | None:
        """The parameter's stand-in for this pass; None to use the parameter itself.

        Args:
            chosen: indices of the experts that get tokens; None for all.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        adapters = self._adapters_in_use()
        if not adapters:
            return None
        view, base = self.view, getattr(self.get_base_layer(), self._parameter)
        sides = []
        for adapter in adapters:
            vars(adapter)["called"] = True
            assert isinstance(adapter, StackAdapter)
            sides.append(adapter.weight_side(view, chosen))
        scale, A, B = summed(sides)
        dropout = adapters[0].config.dropout if self.training else 0.0
        return AdaptedWeight(base, scale, A.to(base.dtype), B.to(base.dtype), not view.transposed, dropout, self.name)


class DoranExperts(nn.Module):
    """An experts module with adapters on some of its stacked parameters: a child DoranStack under each one's name.

    Args:
        base_layer: the experts module.
        name: its name in the base model.

    Raises:
        TargetError: the module does not declare the layout of its weights, or its call would bypass the adapters.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        if not isinstance(getattr(base_layer, "is_transposed", None), bool):
            raise TargetError(
                f"{name}: {type(base_layer).__name__} does not say whether it stores [experts, d_out, d_in] or "
                "[experts, d_in, d_out]: DoRAN adapts the experts modules of transformers that are decorated with "
                "use_experts_implementation, which set is_transposed"
            )
        self.name = name
        self.base_layer = base_layer
        self._refuse_bypass()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        note_loading(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def stack(self, parameter: str) -> DoranStack:
        """The DoranStack of one parameter, made if there is none."""
        stack = own_modules(self).get(parameter)
        if stack is None:
            stack = DoranStack(self.base_layer, parameter, f"{self.name}.{parameter}")
            setattr(self, parameter, stack)
        assert isinstance(stack, DoranStack)
        return stack

    def stacks(self) -> dict[str, DoranStack]:
        """The adapted parameters by name."""
        return {name: child for name, child in own_modules(self).items() if isinstance(child, DoranStack)}

    # The routing breaks the graph anyway, and the stand-ins are no tensors.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The experts module's output, adapted."""
        self._refuse_bypass()
        chosen = self._chosen((*args, *kwargs.values()))
        found = {name: stack.stand_in(chosen) for name, stack in self.stacks().items()}
        stand_ins = {name: weight for name, weight in found.items() if weight is not None}
        if not stand_ins:
            return self.base_layer(*args, **kwargs)
        return call_with(self.base_layer, stand_ins, *args, **kwargs)

    def _refuse_bypass(self) -> None:
        """Refuse a module whose call would read the parameters instead of the stand-ins."""
        refuse_replaced_forward(self.base_layer, self.name, "leave target_parameters out")
        if is_expert_parallel(self.base_layer):
            raise TargetError(f"{self.name}: DoRAN does not adapt experts under expert parallelism; load without it")

    def _chosen(self, inputs: tuple[Any, ...]) -> Tensor | None:
        """The experts that get tokens, if the routing is available and short; None for all."""
        routes = [x for x in inputs if isinstance(x, Tensor) and not x.is_floating_point() and x.dtype != torch.bool]
        count = next(iter(self.stacks().values())).view.experts
        if len(routes) != 1 or routes[0].numel() >= _PER_EXPERT * count:
            return None
        chosen: Tensor = torch.unique(routes[0])
        return chosen[chosen < count]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The experts module, with W' in place of W0 if requested. PEFT calls this."""
        if merge:
            for stack in self.stacks().values():
                stack.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def drop_empty(self) -> bool:
        """Remove the stacks without adapters; return whether no stack is left."""
        for name, stack in self.stacks().items():
            if not stack.doran_adapter:
                del own_modules(self)[name]
        return not self.stacks()
