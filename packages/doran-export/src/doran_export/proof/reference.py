"""PyTorch's outputs in float32, recorded before the export: the reference of a proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from doran_export.graph.spec import GraphSpec, cache_name
from doran_export.graph.wrappers import mean_embedding
from doran_export.proof.cases import Case
from doran_export.runtime.session import Array

__all__ = ["Answer", "Greedy", "Reference", "ask_pytorch"]

_SEED = 20251004


@dataclass(frozen=True)
class Greedy:
    """A greedy generation.

    Attributes:
        prompts: left-padded ``input_ids`` and ``attention_mask`` [batch, length].
        tokens: the chosen tokens [batch, steps].
        margins: the distance of the logits' two best values at each step [batch, steps].
        scale: root mean square of the logits.
    """

    prompts: dict[str, Array]
    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]
    scale: float


@dataclass(frozen=True)
class Answer:
    """PyTorch's answer to one case.

    Attributes:
        case: its inputs.
        outputs: by name.
        noise: the change of each output, without its last axis, when every layer's output is rounded differently. Some
            tokens amplify rounding a thousandfold (in SmolLM2 mostly the first ones), and then PyTorch's own output is
            inexact.
    """

    case: Case
    outputs: dict[str, Array]
    noise: dict[str, Array]


@dataclass(frozen=True)
class Reference:
    """PyTorch's answers, and its greedy generation if the model is a decoder."""

    answers: list[Answer]
    greedy: Greedy | None


def ask_pytorch(
    model: PreTrainedModel,
    spec: GraphSpec,
    cases: Sequence[Case],
    prompts: dict[str, Array] | None,
    steps: int,
    advance: Callable[[], None],
) -> Reference:
    """Run a model on every case, and generate from the prompts.

    Args:
        model: in float32.
        spec: its graph.
        cases: the inputs.
        prompts: a left-padded batch to generate from, for decoders.
        steps: number of tokens to generate.
        advance: called after each case and after the generation.
    """
    answers = []
    with torch.inference_mode():
        for case in cases:
            outputs = _outputs(model, spec, case)
            with _rounded_otherwise(model):
                again = _outputs(model, spec, case)
            noise = {name: np.abs(outputs[name] - again[name]).max(-1) for name in outputs}
            answers.append(Answer(case, outputs, noise))
            advance()
        greedy = None
        if prompts is not None:
            greedy = _generate(model, prompts, steps)
            advance()
    return Reference(answers, greedy)


@contextmanager
def _rounded_otherwise(model: PreTrainedModel) -> Iterator[None]:
    """A context in which every linear layer and convolution rounds its output differently.

    Sums in another order differ by about one unit in the last place of the largest summands. This noise is of the same
    size, and the same at every call. On SmolLM2 the noise moves the logits about five times as far as float32 is from
    float64.
    """
    random = torch.Generator().manual_seed(_SEED)

    def hook(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        unit = output.abs().amax(-1, keepdim=True) * torch.finfo(output.dtype).eps
        return output + unit * torch.empty_like(output).uniform_(-2, 2, generator=random)

    kinds = (nn.Linear, nn.Conv2d, Conv1D)
    handles = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outputs(model: PreTrainedModel, spec: GraphSpec, case: Case) -> dict[str, Array]:
    inputs = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in case.inputs.items()}
    if spec.task.has_cache:
        inputs.setdefault("position_ids", (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0))
        inputs["use_cache"] = False  # type: ignore[assignment]
    output = model(**inputs)
    if spec.task.name == "feature-extraction":
        hidden = output.last_hidden_state
        embedding = mean_embedding(hidden, inputs["attention_mask"])
        return {"last_hidden_state": hidden.numpy(), "sentence_embedding": embedding.numpy()}
    return {"logits": output.logits.numpy()}


def _generate(model: PreTrainedModel, prompts: dict[str, Array], steps: int) -> Greedy:
    """Greedy search that never stops at an end token, so that every step can be compared."""
    tokens = torch.from_numpy(np.ascontiguousarray(prompts["input_ids"]))
    mask = torch.from_numpy(np.ascontiguousarray(prompts["attention_mask"]))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    name = cache_name(model)
    past, chosen, margins, squares = None, [], [], []
    for _ in range(steps):
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, **{name: past})
        past = output[name]
        logits = output.logits[:, -1].float()
        squares.append(logits.square().mean())
        best = logits.topk(2)
        chosen.append(best.indices[:, 0])
        margins.append(best.values[:, 0] - best.values[:, 1])
        tokens = best.indices[:, :1]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    scale = float(torch.stack(squares).mean().sqrt())
    return Greedy(prompts, torch.stack(chosen, 1).numpy(), torch.stack(margins, 1).numpy(), scale)
