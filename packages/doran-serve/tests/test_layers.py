"""The post-scaling formula against float64, and the row-by-row promises made for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from doran_serve import fused
from doran_serve.layers import ScaledOutput, scale_output, with_scaled_output


@pytest.mark.parametrize("shape", [(7, 5), (1, 123), (1, 7, 16)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scaling_the_lora_output_is_scaling_the_weight(shape: tuple[int, ...], with_bias: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    tokens, d_out, d_in = shape[-2], shape[-1], 11
    x = torch.randn(*shape[:-1], d_in, generator=draw, dtype=torch.float64)
    V = torch.randn(d_out, d_in, generator=draw, dtype=torch.float64)
    bias = torch.randn(d_out, generator=draw, dtype=torch.float64) if with_bias else None
    scale = 1 + 0.3 * torch.randn(4, d_out, generator=draw)
    scale[-1] = 1
    slots = torch.randint(-1, 3, (tokens,), generator=draw)

    lora = x @ V.T + (bias if bias is not None else 0)
    found = scale_output(lora.float(), scale, slots, None if bias is None else bias.float())

    c = scale.double()[slots].view(*shape[:-1], d_out)  # -1 is the last row here, on purpose
    expected = c * (x @ V.T) + (bias if bias is not None else 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_without_a_scale_keep_every_bit(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(4)
    output = torch.randn(6, 32, generator=draw).to(dtype)
    scale = torch.rand(3, 32, generator=draw)
    scale[-1] = 1
    slots = torch.tensor([-1, 0, -1, 1, 0, -1])
    found = scale_output(output, scale, slots, torch.randn(32, generator=draw).to(dtype))
    assert torch.equal(found[slots == -1], output[slots == -1])
    assert not torch.equal(found[slots == 0], output[slots == 0])


def test_slots_beyond_the_batch_may_be_garbage() -> None:
    output, scale = torch.ones(2, 4), torch.ones(3, 4)
    slots = torch.tensor([0, -1, 2**40, -(2**40)])
    assert torch.equal(scale_output(output, scale, slots, None), output)
    assert torch.equal(scale_output(torch.ones(4, 4), scale, slots, None), torch.ones(4, 4))


def test_a_scaled_class_stays_a_stock_class() -> None:
    class Stock(torch.nn.Module):
        pass

    scaled = with_scaled_output(Stock)
    assert issubclass(scaled, Stock)
    assert issubclass(scaled, ScaledOutput)
    assert scaled.__name__ == "ScaledStock"


class StockLinear(nn.Module):
    """What a packed LoRA layer of vLLM does, with two projections."""

    def __init__(self, sizes: tuple[int, int], d_in: int) -> None:
        super().__init__()
        self.device, self.tp_size, self.tp_rank, self.n_slices = torch.device("cpu"), 1, 0, len(sizes)
        self.sizes, self.output_size = sizes, sum(sizes)
        self._enable_aux_cuda_stream = False
        self.base_layer = nn.Linear(d_in, sum(sizes))
        self.base_layer.skip_bias_add = False  # type: ignore[assignment]

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        rank, d_in = lora_config.max_lora_rank, self.base_layer.in_features
        self.lora_a_stacked = tuple(torch.zeros(max_loras, 1, rank, d_in) for _ in self.sizes)
        self.lora_b_stacked = tuple(torch.zeros(max_loras, 1, size, rank) for size in self.sizes)

    def reset_lora(self, index: int) -> None:
        for part in (*self.lora_a_stacked, *self.lora_b_stacked):
            part[index] = 0

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._apply_lora_to_output(x, nn.functional.linear(x, self.base_layer.weight, bias))


def in_the_interpreters_place(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, *rest: Any) -> None:
    """The operator on the CPU, token by token."""
    bias, blocks, order, ids, counts, starts, idle = rest
    ends = {index: end for index, _, end in blocks.tolist()}  # of each projection's columns, in order
    sizes = [end - ends.get(index - 1, 0) for index, end in ends.items()]
    if idle.item():
        return
    for slot, count, start in zip(ids.tolist(), counts.tolist(), starts.tolist(), strict=False):
        for token in order[start : start + count].tolist() if slot >= 0 else []:
            h = (a[slot] @ x[token]).view(len(sizes), -1)
            delta = torch.cat([part @ h[i] for i, part in enumerate(b[slot].split(sizes))])
            y[token] = scale[slot] * (y[token] + delta - bias) + bias


@pytest.mark.parametrize("batched", [False, True])
def test_the_fused_path_under_torch_compile(batched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the operator: joined factors, columns, bias, slots; and torch.compile keeps what it changes."""
    library: Any = torch.library.Library("doran", "IMPL")
    library.impl("add_adapters", in_the_interpreters_place, "CPU")
    monkeypatch.setattr(fused, "usable", lambda device: True)
    monkeypatch.setattr(fused, "prepare", lambda *args: None)
    draw = torch.Generator().manual_seed(10)
    sizes, d_in, rank, most = (6, 10), 12, 4, 3
    layer: Any = with_scaled_output(StockLinear)(sizes, d_in)
    layer.create_lora_weights(most, SimpleNamespace(max_lora_rank=rank, fully_sharded_loras=False))
    layer.reset_lora(2)
    for parts in (layer.lora_a_stacked, layer.lora_b_stacked):
        for part in parts:
            part.copy_(torch.randn(part.shape, generator=draw))
    scales = 1 + 0.3 * torch.randn(most, sum(sizes), generator=draw)
    for slot in range(most):
        layer.set_scale(slot, list(scales[slot].split(sizes)))
    slots = torch.tensor([2, -1, 0, 0, 2])
    layer.punica_wrapper = SimpleNamespace(
        token_mapping_meta=SimpleNamespace(
            token_indices_sorted_by_lora_ids=torch.tensor([1, 2, 3, 0, 4]),
            active_lora_ids=torch.tensor([-1, 0, 2, -1]),
            num_tokens_per_lora=torch.tensor([1, 2, 2, 0]),
            lora_token_start_loc=torch.tensor([0, 1, 3, 5, 0]),
            no_lora_flag_cpu=torch.tensor([False]),
        )
    )
    x = torch.randn(5, d_in, generator=draw)
    bias = layer.base_layer.bias
    compiled = torch.compile(lambda x: layer.apply(x, bias) * 2, fullgraph=True, backend="inductor")
    with torch.no_grad():
        found = compiled(x[None] if batched else x) / 2
        expected = layer.base_layer(x)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                delta = [
                    b[slot, 0] @ (a[slot, 0] @ x[token])
                    for a, b in zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
                ]
                expected[token] = scales[slot] * (expected[token] + torch.cat(delta) - bias) + bias
    torch.testing.assert_close(found.view(5, -1), expected)


def test_the_fused_path_keeps_nothing_that_sleep_mode_would_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's sleep level 2 discards a model's memory and restores its buffers alone; slots are filled anew."""
    monkeypatch.setattr(fused, "usable", lambda device: True)
    monkeypatch.setattr(fused, "prepare", lambda *args: None)
    layer: Any = with_scaled_output(StockLinear)((6, 10), 12)
    layer.create_lora_weights(3, SimpleNamespace(max_lora_rank=4, fully_sharded_loras=False))
    buffers = {name for name, _ in layer.named_buffers()}
    kept = {
        name for name, value in vars(layer).items() if name.startswith("doran_") and isinstance(value, torch.Tensor)
    }
    assert buffers >= {"doran_scale", "doran_blocks"}
    assert kept == {"doran_a", "doran_b"}, "the slots' factors, which the next request loads again"
