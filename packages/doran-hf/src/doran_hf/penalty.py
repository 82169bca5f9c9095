"""Adds the penalty on generated factors to the loss that a model returns in training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from doran_core.support.torch_internals import call_hooks, remove_hooks
from doran_hf.diagnostics import factor_penalty
from doran_hf.layer import doran_layers

__all__ = ["PenaltyHook"]


class PenaltyHook:
    """A forward hook on the base model: in training, adds the penalty to the loss in the model's output.

    On the base model the hook works for PeftModel and for transformers' ``add_adapter``. A class, unlike a closure,
    can be copied and pickled with the model.
    """

    @classmethod
    def attach(cls, model: nn.Module) -> None:
        """Add the hook to a model, unless the model has one."""
        if not any(isinstance(hook, cls) for hooks in call_hooks(model) for hook in hooks.values()):
            model.register_forward_hook(cls(), with_kwargs=True)

    @classmethod
    def detach(cls, model: nn.Module) -> None:
        """Remove the hook from a model."""
        remove_hooks(model, lambda hook: isinstance(hook, cls))

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        loss = _loss_of(output)
        if not model.training or loss is None:
            return None
        penalty = factor_penalty(model) if any(layer.doran_adapter for layer in doran_layers(model)) else None
        if penalty is None:
            return None
        return _with_loss(output, loss + (penalty * _share_of_step(model, args, kwargs)).to(loss.device))


def _loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output: a field of that name, or a tuple's first member if it is a scalar that trains."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple):
        found = output[0] if output else None
    else:
        found = getattr(output, "loss", None)
    return found if isinstance(found, Tensor) and found.dim() == 0 and found.requires_grad else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]  # dict, or transformers' ModelOutput
        return output
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return (loss, *output[1:])
    if isinstance(output, tuple):
        return type(output)(loss, *output[1:])
    output.loss = loss
    return output


def _share_of_step(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | float:
    """The fraction of the penalty that this pass adds.

    Trainer passes the number of labels of the whole step and sums the losses of its micro-batches. Each micro-batch
    then adds the penalty times its share of the labels. Otherwise a pass is a step.
    """
    items = kwargs.get("num_items_in_batch")
    if items is None:
        return 1.0
    labels = kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs["labels"] if "labels" in kwargs else _positional(model, args, "labels")
        if labels is not None and _shifts_labels(model):
            labels = labels[..., 1:]
    if labels is None:
        return 1.0
    return (labels != -100).sum() / items  # type: ignore[no-any-return]


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss skips the first label, as Trainer's count does."""
    loss = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return loss is ForCausalLMLoss and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _positional(model: nn.Module, args: tuple[Any, ...], name: str) -> Any:
    names = list(inspect.signature(model.forward).parameters)[: len(args)]
    return args[names.index(name)] if name in names else None
