"""Which rows and columns of a checkpoint each rank has, against cutting the tensors as tensor parallelism does."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from doran_serve.layer_map import Place, places_of


class Layer(nn.Module):
    """A vLLM linear layer, as much of it as counts."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


class Model(nn.Module):
    """One block with a packed qkv, a packed gate_up and a row-parallel o."""

    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, rank: int, ranks: int, kv_heads: int) -> None:
        super().__init__()
        common = {"tp_rank": rank, "tp_size": ranks, "input_size": 8}
        replicas = max(1, ranks // kv_heads)
        self.qkv_proj = Layer(
            **common, total_num_heads=8, total_num_kv_heads=kv_heads, head_size=2, num_kv_head_replicas=replicas
        )
        self.gate_up_proj = Layer(**common, output_sizes=[24, 24])
        self.o_proj = Layer(**common, output_size=8, input_is_parallel=True, input_size_per_partition=8 // ranks)


@pytest.mark.parametrize(("ranks", "kv_heads"), [(1, 4), (2, 4), (4, 2), (4, 1)])
def test_every_row_is_where_tensor_parallelism_puts_it(ranks: int, kv_heads: int) -> None:
    for rank in range(ranks):
        places = places_of(Model(rank, ranks, kv_heads), Layer)
        shard = rank // max(1, ranks // kv_heads)
        parts = min(ranks, kv_heads)

        def cut(rows: int, which: int, of: int) -> list[int]:
            return torch.arange(rows).chunk(of)[which].tolist()

        def outputs(place: Place) -> list[int]:
            return list(range(place.outputs.start, place.outputs.stop))

        q, k, v = (places[f"{name}_proj"] for name in "qkv")
        assert outputs(q) == cut(16, rank, ranks)
        assert outputs(k) == outputs(v) == cut(2 * kv_heads, shard, parts)
        assert (q.rows.start, q.rows.stop) == (0, k.rows.start)
        assert k.rows.stop == v.rows.start
        assert outputs(places["up_proj"]) == cut(24, rank, ranks)
        assert places["up_proj"].rows == slice(24 // ranks, 48 // ranks)
        assert places["o_proj"].rows == places["o_proj"].outputs == slice(0, 8)
        assert list(range(8))[places["o_proj"].inputs] == cut(8, rank, ranks)
        assert places["k_proj"].shape == (2 * kv_heads, 8)
