"""Replacements of vLLM's pure-PyTorch LoRA operators: one product per slot, and none for tokens without an adapter.

vLLM's operators index the stacked weights with each token's slot. A token without an adapter has slot -1, which in
PyTorch is the last slot. So such a token silently gets that slot's adapter whenever another token of the batch uses an
adapter. vLLM's operators also copy a whole factor per token. These replacements keep the signatures, skip -1, and
multiply once per slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["bgmv_expand", "bgmv_expand_slice", "bgmv_shrink"]


def _groups(slots: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (slot, token indices `[k]`) for every slot that the tokens `[n]` use."""
    for slot in torch.unique(slots).tolist():
        if slot >= 0:
            yield int(slot), (slots == slot).nonzero().squeeze(1)


def _multiply(inputs: torch.Tensor, stacked: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x_t @ W[slot of t].T` for tokens `[n, i]` and weights `[slots, (1,) o, i]`: `[n, o]`, zero without a slot."""
    weights = stacked.squeeze(1) if stacked.ndim == 4 else stacked
    result = torch.zeros(inputs.shape[0], weights.shape[1], dtype=dtype, device=inputs.device)
    for slot, tokens in _groups(slots):
        result[tokens] = inputs[tokens].to(dtype) @ weights[slot].to(dtype).T
    return result


def bgmv_shrink(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    scaling: float = 1.0,
) -> None:
    """`output[:, :o] = scaling * x @ W[slot].T`; inputs `[n, i]`, weights `[slots, (1,) o, i]`, output `[n, >= o]`."""
    product = _multiply(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)
    output_tensor[:, : product.shape[1]] = scaling * product


def bgmv_expand(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    add_inputs: bool = True,
) -> None:
    """`output (+)= x @ W[slot].T` on the columns that both have; shapes as in `bgmv_shrink`."""
    width = min(lora_b_weights.shape[-2], output_tensor.shape[1])
    bgmv_expand_slice(inputs, lora_b_weights, output_tensor, lora_indices_tensor, 0, width, add_inputs)


def bgmv_expand_slice(
    inputs: torch.Tensor,
    lora_b_weights: torch.Tensor,
    output_tensor: torch.Tensor,
    lora_indices_tensor: torch.Tensor,
    slice_offset: int,
    slice_size: int,
    add_inputs: bool = True,
) -> None:
    """`output[:, offset : offset + size] (+)= x @ W[slot].T`; shapes as in `bgmv_shrink`."""
    product = _multiply(inputs, lora_b_weights, lora_indices_tensor, output_tensor.dtype)[:, :slice_size]
    target = output_tensor[:, slice_offset : slice_offset + slice_size]
    if add_inputs:
        target += product
    else:
        target.copy_(product)
