"""The output scale of a served layer: per-slot scales beside vLLM's LoRA layers. Does not import vLLM.

A DoRAN layer is `y = c * (W0 x + B A x) + bias`. vLLM's LoRA layer gives `z = W0 x + B A x + bias`, so
`y = c * z + (1 - c) * bias` row by row of the batch, with c = 1 for tokens whose adapter has no scale (LoRA, base):
their rows stay as they are, to the bit.

On a GPU the scale is folded into LoRA's second product (`fused`); elsewhere it is one pass after vLLM's own LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from doran_serve import fused

if TYPE_CHECKING:

    class StockLayer:
        """The parts of vLLM's `BaseLinearLayerWithLoRA` that `ScaledOutput` uses."""

        _enable_aux_cuda_stream: bool
        base_layer: Any
        device: torch.device
        doran_blocks: torch.Tensor
        doran_scale: torch.Tensor
        lora_a_stacked: tuple[torch.Tensor, ...]
        lora_b_stacked: tuple[torch.Tensor, ...]
        n_slices: int
        output_size: int  # rows of this rank's output
        punica_wrapper: Any
        tp_rank: int
        tp_size: int

        def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None: ...
        def reset_lora(self, index: int) -> None: ...
        def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor: ...
        def slice_lora_b(self, lora_b: Any) -> Any: ...
        def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor: ...
        def register_buffer(self, name: str, tensor: torch.Tensor, persistent: bool) -> None: ...

else:
    StockLayer = object

__all__ = ["ScaledOutput", "scale_output", "with_scaled_output"]


def scale_output(
    output: torch.Tensor, scale: torch.Tensor, token_slots: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Scale each token's output by the row of its adapter slot, without the bias.

    Args:
        output: `[..., d_out]`, LoRA's output with the bias in it; n tokens when flattened.
        scale: `[slots + 1, d_out]` float32; the last row is 1, for tokens without an adapter.
        token_slots: `[>= n]` slot of each token, -1 for none; values beyond the batch are ignored.
        bias: `[d_out]` the bias that is in `output`, or None.

    Returns:
        `[..., d_out]` in the dtype of `output`; the arithmetic is float32.
    """
    rows = output.reshape(-1, output.shape[-1])
    none = scale.shape[0] - 1
    slots = token_slots[: rows.shape[0]]
    slots = torch.where((slots < 0) | (slots > none), none, slots)
    c = scale.index_select(0, slots)
    scaled = rows.float() * c
    if bias is not None:
        scaled = scaled + (1 - c) * bias.float()
    return scaled.to(output.dtype).view(output.shape)


class ScaledOutput(StockLayer):
    """Mixin over a vLLM LoRA linear layer: has the scales of the slots, and applies them after the layer."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        """Stock buffers, and `doran_scale` `[max_loras + 1, d_out of this rank]` full of ones.

        For the fused path the stock buffers become views of one tensor for all of the layer's projections.
        """
        super().create_lora_weights(max_loras, lora_config, model_config)
        ones = torch.ones(max_loras + 1, self.output_size, dtype=torch.float32, device=self.device)
        self.register_buffer("doran_scale", ones, persistent=False)
        stock_path = lora_config.fully_sharded_loras or self._enable_aux_cuda_stream
        self.doran_fused = fused.usable(ones.device) and not stock_path
        if self.doran_fused:
            self._join_buffers()

    def _join_buffers(self) -> None:
        a, b = self.lora_a_stacked, self.lora_b_stacked
        self.doran_a, self.doran_b = torch.cat(a, dim=2).squeeze(1), torch.cat(b, dim=2).squeeze(1)
        sizes = [part.shape[2] for part in b]
        self.lora_a_stacked = tuple(torch.split(self.doran_a.unsqueeze(1), [part.shape[2] for part in a], dim=2))
        self.lora_b_stacked = tuple(torch.split(self.doran_b.unsqueeze(1), sizes, dim=2))
        # vLLM's LoRA factors have the dtype of the layer's output.
        self.register_buffer(
            "doran_blocks", fused.column_blocks(sizes, self.doran_b.dtype, self.device), persistent=False
        )
        fused.prepare(self.doran_a, self.doran_b, self.doran_scale, self._bias_in_output(), self.doran_blocks)

    def reset_lora(self, index: int) -> None:
        """Empty slot `index`: factors 0, scale 1. vLLM also calls this before every `set_lora`."""
        super().reset_lora(index)
        self.doran_scale[index] = 1

    def set_scale(self, index: int, parts: Sequence[torch.Tensor]) -> None:
        """Put an adapter's scales into slot `index`.

        Args:
            index: the slot.
            parts: the full scale `[d_out_i]` of each projection packed into this layer, in the layer's order (one
                for a layer that packs none). Each rank takes its share, cut as vLLM cuts lora_B.
        """
        columns = [part.to(torch.float32).unsqueeze(1) for part in parts]
        if len(columns) < self.n_slices:  # one tensor in the checkpoint, several slices in the layer
            columns = list(torch.split(torch.cat(columns), list(self.base_layer.output_sizes)))
        # A row-parallel layer's outputs are partial sums of full width. Every rank scales its own sum, and the sums add
        # up.
        if self.tp_size > 1 and not hasattr(self.base_layer, "input_is_parallel"):
            columns = self.slice_lora_b(columns) if self.n_slices > 1 else [self.slice_lora_b(torch.cat(columns))]
        self.doran_scale[index].copy_(torch.cat(columns).squeeze(1))

    def apply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """LoRA's output `[..., d_out]`, scaled."""
        output = super().apply(x, bias)
        if self.doran_fused:  # `_apply_lora_to_output` has scaled it
            return output
        # The persistent buffer, not the property over it: its length is no trace-time constant, and CUDA graphs
        # replay with the addresses they were captured with.
        return scale_output(output, self.doran_scale, self.punica_wrapper._token_lora_indices, bias)

    def _apply_lora_to_output(self, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Called by vLLM on the base layer's output `[..., d_out]`: adds the adapters, and scales the sum."""
        if not self.doran_fused:
            return super()._apply_lora_to_output(x, output)
        # Do not view a two-dimensional output: torch.compile would copy the tensor that the operator changes in place.
        shape = output.shape
        if output.ndim > 2:
            output, x = output.flatten(0, -2), x.flatten(0, -2)
        meta = self.punica_wrapper.token_mapping_meta
        fused.add_adapters(
            output,
            x,
            self.doran_a,
            self.doran_b,
            self.doran_scale,
            self._bias_in_output(),
            self.doran_blocks,
            meta.token_indices_sorted_by_lora_ids,
            meta.active_lora_ids,
            meta.num_tokens_per_lora,
            meta.lora_token_start_loc,
            meta.no_lora_flag_cpu,
        )
        return output.view(shape) if len(shape) > 2 else output

    def _bias_in_output(self) -> torch.Tensor | None:
        """The bias that the base layer has added on this rank."""
        row_parallel = hasattr(self.base_layer, "input_is_parallel")
        if self.base_layer.skip_bias_add or (row_parallel and self.tp_rank > 0):
            return None
        bias: torch.Tensor | None = self.base_layer.bias
        return bias


def with_scaled_output(stock: type) -> type:
    """A subclass of the vLLM LoRA layer class `stock` whose output is scaled.

    The class becomes a name of this module, because torch.compile's cache finds classes by module and name.
    """
    name = f"Scaled{stock.__name__}"
    globals()[name] = type(name, (ScaledOutput, stock), {"__module__": __name__})
    scaled: type = globals()[name]
    return scaled
