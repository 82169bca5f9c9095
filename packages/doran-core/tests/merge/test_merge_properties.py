"""Any small checkpoint, of any shapes, dtypes and shards, merges to the oracle's weights, in pieces of any size."""

import tempfile
from pathlib import Path
from unittest import mock

import made
import oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from doran_core.merge import merge_checkpoint

SIZES = st.integers(1, 9)
OPTIONS = st.sampled_from(
    [
        {},
        {"factors": "static"},
        {"factors": "static", "tau_kind": "zero"},
        {"sharing": "model", "share_output": True},
        {"sharing": "none", "depth": 3, "activation": "gelu"},
        {"tau_kind": "gaussian", "tau_granularity": "row"},
        {"experts": True, "use_rslora": True},
        {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"q_proj": 3.0}},
    ]
)


@st.composite
def checkpoints(draw):
    """Weights by name, two adapted modules per block and others beside them, and how many shards to write."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    weights, width = {}, draw(SIZES)
    for block in range(draw(st.integers(1, 3))):
        for name, rows in (("q_proj", draw(SIZES)), ("v_proj", draw(SIZES)), ("other", draw(SIZES))):
            weight = torch.randn(rows, width, generator=generator).to(dtype)
            weights[f"model.layers.{block}.{name}.weight"] = weight
    weights["steps"] = torch.arange(draw(SIZES))
    return weights, draw(st.integers(1, 3))


@settings(max_examples=40, deadline=None)
@given(checkpoints(), OPTIONS, st.integers(1, 4), st.integers(1, 40))
def test_any_checkpoint(checkpoint, options, rank, piece):
    weights, shards = checkpoint
    targets = [name.removesuffix(".weight") for name in weights if "_proj" in name]
    with tempfile.TemporaryDirectory() as made_here:
        folder = Path(made_here)
        made.write_base(folder / "base", weights, shards=shards)
        live = made.write_adapter(folder / "adapter", weights, targets=targets, rank=rank, **options)
        with (
            mock.patch("doran_core.checkpoint.binding.CHUNK_ELEMENTS", piece),
            mock.patch("doran_core.merge.write._COPY_BYTES", piece),
        ):
            merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
        files = (folder / "out").glob("*.safetensors")
        merged = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert merged.keys() == weights.keys()
    for key, weight in weights.items():
        adapter = live.get(key.removesuffix(".weight"))
        if adapter is not None:
            with torch.no_grad():
                A, B = adapter.factor_pair()
                tau = adapter.tau.value()
                exact = oracle.merged(weight, A, B, adapter.scaling, adapter.magnitude, tau)
            weight = exact.to(weight.dtype)
        assert torch.equal(merged[key], weight), key
