"""A checkpoint directory, single or sharded: its keys, its tensors, a module's weight under another prefix, errors."""

import json

import made
import pytest
import torch

from doran_core.checkpoint.checkpoint import INDEX_FILE, Checkpoint
from doran_core.checkpoint.model_names import ModelNames
from doran_core.errors import CheckpointError


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors(tmp_path, shards, dtype):
    weights = made.base_weights(dtype) | {"counts": torch.arange(5), "scalar": torch.tensor(2.0)}
    checkpoint = Checkpoint(made.write_base(tmp_path, weights, shards=shards))
    assert set(checkpoint.keys()) == set(weights)
    for key, weight in weights.items():
        assert checkpoint.shape(key) == tuple(weight.shape)
        assert torch.equal(checkpoint.tensor(key), weight)


def test_rows(tmp_path):
    weights = made.base_weights()
    checkpoint = Checkpoint(made.write_base(tmp_path, weights))
    key = "model.embed_tokens.weight"
    parts = [(rows, values.clone()) for rows, values in checkpoint.file(key).rows(7)]
    assert [rows.stop - rows.start for rows, _ in parts] == [7] * 7 + [1]
    assert torch.equal(torch.cat([values for _, values in parts]), weights[key])


def key_of(tmp_path, keys, module):
    made.write_base(tmp_path, {key: torch.ones(2, 2) for key in keys}, shards=1)
    return ModelNames(Checkpoint(tmp_path)).locate(f"{module}.weight")[0]


@pytest.mark.parametrize(
    ("keys", "module", "expected"),
    [
        (["a.q.weight"], "a.q", "a.q.weight"),
        (["encoder.layer.0.q.weight", "pooler.weight"], "bert.encoder.layer.0.q", "encoder.layer.0.q.weight"),
        (["bert.encoder.layer.0.q.weight"], "encoder.layer.0.q", "bert.encoder.layer.0.q.weight"),
    ],
)
def test_weight_key(tmp_path, keys, module, expected):
    assert key_of(tmp_path, keys, module) == expected


def test_ambiguous_weight_key(tmp_path):
    with pytest.raises(CheckpointError, match=r"could be any of .*text\.layers.*vision\.layers"):
        key_of(tmp_path, ["text.layers.0.q.weight", "vision.layers.0.q.weight"], "layers.0.q")


def test_missing_weight_key_names_the_nearest(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.q_pro\.weight'.*q_proj"):
        key_of(tmp_path, ["model.layers.0.q_proj.weight"], "model.layers.0.q_pro")


def test_no_such_directory(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        Checkpoint(tmp_path / "nowhere")


def test_no_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)


def test_pickled_weights_only(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint(tmp_path)


def test_missing_shard(tmp_path):
    made.write_base(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        Checkpoint(tmp_path)


def test_truncated_shard(tmp_path):
    made.write_base(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"00002.*truncated"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": "../a.safetensors"}}])
def test_broken_index(tmp_path, index):
    made.write_base(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        Checkpoint(tmp_path)


def test_index_that_names_a_tensor_of_another_shard(tmp_path):
    made.write_base(tmp_path)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not in it"):
        Checkpoint(tmp_path)
