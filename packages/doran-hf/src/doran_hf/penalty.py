"""Adds the penalty on generated factors to the loss that a model returns in training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from doran_hf.diagnostics import factor_penalty

__all__ = ["PenaltyHook"]


class PenaltyHook:
    """A forward hook on the base model: ``loss + penalty`` in training, when the model was given labels.

    On the base model, because there it works for PeftModel and for transformers' own ``add_adapter`` alike. A class
    rather than a closure, so that the model can still be copied and pickled.
    """

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Put the hook on a model, unless it is there."""
        if not any(isinstance(hook, cls) for hook in model._forward_hooks.values()):
            model.register_forward_hook(cls(), with_kwargs=True)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Take the hook off a model, if it is there."""
        for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, cls)]:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        labels = kwargs.get("labels")
        if not model.training or labels is None:
            return None
        penalty = factor_penalty(model)
        if penalty is None:
            return None
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            # Trainer sums such losses over the micro-batches of a step: each takes its share of the penalty.
            penalty = penalty * ((labels != -100).sum().to(penalty.device) / items)
        if isinstance(output, tuple):
            return (_add(output[0], penalty), *output[1:])
        if isinstance(getattr(output, "loss", None), Tensor):
            output.loss = _add(output.loss, penalty)
        return output


def _add(loss: Tensor, penalty: Tensor) -> Tensor:
    return loss + penalty.to(loss.device)
