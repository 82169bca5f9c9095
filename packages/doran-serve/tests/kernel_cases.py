"""The Triton kernels against float64, token by token; run by `test_kernels`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from doran_serve import fused, kernels
from doran_serve.tile_config import expand_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter multiplies no bfloat16


def metadata(slots: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """order, ids, counts, starts as vLLM's LoRAKernelMeta fills them; the tail of order is garbage, as there."""
    order = torch.full((slots.numel() + 5,), 2**30, dtype=torch.int32)
    order[: slots.numel()] = torch.sort(slots, stable=True).indices
    ids, counts, starts = torch.full((most + 1,), -1), torch.zeros(most + 1), torch.zeros(most + 2)
    found, sizes = torch.unique(slots, sorted=True, return_counts=True)
    ids[: found.numel()], counts[: found.numel()] = found, sizes.float()
    starts[1 : 1 + found.numel()] = torch.cumsum(sizes, 0)
    return tuple(t.to(torch.int32).to(DEVICE) for t in (order, ids, counts, starts))  # type: ignore[return-value]


CASES = {
    "packed, ranks not full": (37, (48, 16, 24), 8, 40, torch.float32),
    "one token": (1, (33,), 16, 70, torch.float32),
    "rank above a tile": (5, (20,), 80, 33, torch.float32),
    "many tokens": (300, (64, 64), 16, 96, torch.float32),
    "half precision": (41, (40, 24), 16, 64, HALF),
}


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_every_token_gets_its_own_adapter(case: str, with_bias: bool) -> None:
    n, sizes, rank, d_in, dtype = CASES[case]
    draw = torch.Generator().manual_seed(8)
    most, d_out, width = 4, sum(sizes), rank * len(sizes)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    x, a, b, y = random(n, d_in), random(most, width, d_in) / d_in**0.5, random(most, d_out, rank), random(n, d_out)
    bias = random(d_out) if with_bias else None
    scale = 1 + 0.3 * torch.randn(most + 1, d_out, generator=draw)
    slots = torch.randint(-1, most, (n,), generator=draw)
    slots[slots == 2] = 0  # one slot is not used
    slots[0] = 3

    found = y.clone().to(DEVICE)
    order, ids, counts, starts = metadata(slots, most)
    h = kernels.shrink(x.to(DEVICE), a.to(DEVICE), order, ids, counts, starts)
    config = expand_config(n, rank, dtype)
    blocks = kernels.column_blocks(sizes, config.columns, DEVICE)
    on = [t if t is None else t.to(DEVICE) for t in (b, scale, bias)]
    kernels.expand(h, *on, found, order, ids, counts, starts, blocks, config)

    expected = y.double()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            inner = (a[slot].double() @ x[t].double()).view(len(sizes), rank)
            parts = torch.split(b[slot].double(), list(sizes))
            delta = torch.cat([part @ inner[i] for i, part in enumerate(parts)])
            c, fixed = scale[slot].double(), 0.0 if bias is None else bias.double()
            expected[t] = c * (expected[t] + delta - fixed) + fixed
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.cpu()[slots == -1], y[slots == -1])


def test_nobody_has_an_adapter() -> None:
    """What a CUDA graph replays when its batch holds base tokens alone."""
    x, a, b = torch.randn(6, 16), torch.randn(2, 8, 16), torch.randn(2, 24, 8)
    y = torch.randn(6, 24).to(DEVICE)
    before = y.clone()
    order = torch.arange(6, dtype=torch.int32)
    ids, counts, starts = torch.full((3,), -1), torch.zeros(3), torch.zeros(4)
    meta = [t.to(torch.int32).to(DEVICE) for t in (order, ids, counts, starts)]
    h = kernels.shrink(x.to(DEVICE), a.to(DEVICE), *meta)
    config = expand_config(6, 8, torch.float32)
    blocks = kernels.column_blocks((24,), config.columns, DEVICE)
    kernels.expand(h, b.to(DEVICE), torch.ones(3, 24).to(DEVICE), None, y, *meta, blocks, config)
    assert torch.equal(y, before)


def test_the_sum_does_not_depend_on_the_other_tokens() -> None:
    """A token's numbers are the same, bit for bit, wherever it stands in a batch of the same size."""
    draw = torch.Generator().manual_seed(9)
    x, a = torch.randn(8, 64, generator=draw), torch.randn(3, 8, 64, generator=draw)
    b, y = torch.randn(3, 32, 8, generator=draw), torch.randn(8, 32, generator=draw)
    scale = torch.rand(4, 32, generator=draw) + 0.5
    config = expand_config(8, 8, torch.float32)
    blocks = kernels.column_blocks((32,), config.columns, DEVICE)
    results = []
    for slots in (torch.tensor([1, 0, 2, 0, -1, 1, 2, 2]), torch.tensor([1, 1, 1, 1, 1, 1, 1, 1])):
        meta = metadata(slots, 3)
        out = y.clone().to(DEVICE)
        h = kernels.shrink(x.to(DEVICE), a.to(DEVICE), *meta)
        kernels.expand(h, b.to(DEVICE), scale.to(DEVICE), None, out, *meta, blocks, config)
        results.append(out[[0, 5]].cpu())
    assert torch.equal(*results)


def test_the_operator_of_a_layer() -> None:
    """`fused` puts the two kernels together, with the column blocks that a layer keeps as a buffer."""
    draw = torch.Generator().manual_seed(11)
    sizes, rank, d_in, most = [40, 24], 8, 32, 3
    x, a = torch.randn(7, d_in, generator=draw), torch.randn(most, 2 * rank, d_in, generator=draw)
    b, y = torch.randn(most, sum(sizes), rank, generator=draw), torch.randn(7, sum(sizes), generator=draw)
    scale = torch.rand(most + 1, sum(sizes), generator=draw) + 0.5
    slots = torch.tensor([2, -1, 0, 0, 2, -1, 1])
    blocks = fused.column_blocks(sizes, y.dtype, torch.device(DEVICE))
    on = [tensor.to(DEVICE) for tensor in (x, a, b, scale)]
    found = y.clone().to(DEVICE)
    fused._add_adapters(found, *on, None, blocks, *metadata(slots, most), torch.tensor([False]))
    expected = y.double()
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            inner = (a[slot].double() @ x[token].double()).view(2, rank)
            delta = torch.cat([part.double() @ inner[i] for i, part in enumerate(b[slot].split(sizes))])
            expected[token] = scale[slot].double() * (expected[token] + delta)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
