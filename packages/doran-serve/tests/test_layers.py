"""The post-scaling formula against float64, and the row-by-row promises made for it."""

from __future__ import annotations

import pytest
import torch

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
