"""Names of parameters in the checkpoints of models whose tensors transformers renames on loading.

Below transformers' public interface: ``revert_weight_conversion`` is what ``save_pretrained`` renames with. To be
removed when a model says by itself under which names it is saved.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["stored_name"]


def stored_name(model: PreTrainedModel, parameter: str) -> str | None:
    """The name that ``save_pretrained`` gives a parameter.

    Args:
        model: as it was loaded; how it was decides the names.
        parameter: its name in the model.

    Returns:
        None where the checkpoint does not hold the parameter as it is, but several in one tensor, or in another shape.
    """
    value = torch.empty(1, 1, device="meta")
    try:
        stored = revert_weight_conversion(model, {parameter: value})
    except Exception:  # a conversion that needs the values, or their neighbours: not a renaming
        return None
    (name, tensor), *others = stored.items()
    return str(name) if tensor is value and not others else None
