"""exempt_from_decay: keeps Trainer's weight decay off magnitude and tau."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from doran_core.method.optimizer_groups import is_exempt

__all__ = ["exempt_from_decay"]


def exempt_from_decay(trainer: Any) -> Any:
    """Exempt magnitude and tau from the weight decay of a Trainer (transformers' or a subclass, such as TRL's).

    Trainer exempts biases and norms by their names, and decays every other parameter. Decay moves tau to 0.69 for
    every weight norm, and a magnitude towards 0, which removes its row. Call this before training, because Trainer
    makes the optimizer when training begins, also under FSDP and DeepSpeed.

    Returns:
        The trainer.
    """
    trainer.get_decay_parameter_names = partial(_decayed, trainer.get_decay_parameter_names)
    return trainer


def _decayed(of_trainer: Any, model: nn.Module) -> list[str]:
    return [name for name in of_trainer(model) if not (".doran_adapter." in name and is_exempt(name))]
