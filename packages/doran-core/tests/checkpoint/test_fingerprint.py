"""The fingerprint names the adapted weights: same for a bf16 copy, another for other weights, on disk as in memory."""

import made
import pytest
import torch

from doran_core.adapter import read_adapter
from doran_core.checkpoint.binding import bind, checkpoint_fingerprint
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.checkpoint.fingerprint import SAMPLES_PER_WEIGHT, fingerprint_weights, sample_stride


def weights():
    return {"a.q": torch.randn(300, 500), "b.q": torch.randn(7, 3)}


def test_bf16_copy_has_the_same():
    items = weights()
    assert fingerprint_weights(items.items()) == fingerprint_weights((n, w.bfloat16()) for n, w in items.items())


def test_order_and_strides_do_not_count():
    items = weights()
    backwards = {name: weight.T.contiguous().T for name, weight in reversed(items.items())}
    assert fingerprint_weights(items.items()) == fingerprint_weights(backwards.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items.pop("b.q"),
        lambda items: items.__setitem__("c.q", items.pop("b.q")),
        lambda items: items.__setitem__("b.q", items["b.q"].T),
        lambda items: items["a.q"].__setitem__((0, 0), 3.0),
    ],
)
def test_other_weights_have_another(change):
    items = weights()
    before = fingerprint_weights(items.items())
    change(items)
    assert fingerprint_weights(items.items()) != before


SHAPES = [(1, 1), (256, 256), (1024, 1024), (4096, 4096), (14336, 4096), (4096, 14336), (49152, 576), (30, 30030)]


@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (1, SAMPLES_PER_WEIGHT + 1), (576, 151936)])
def test_samples_are_few(rows, columns):
    count = len(range(0, rows * columns, sample_stride(rows, columns)))
    assert min(rows * columns, SAMPLES_PER_WEIGHT) // 2 < count <= SAMPLES_PER_WEIGHT


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_samples_lie_in_every_column_and_every_row(rows, columns):
    samples = range(0, rows * columns, sample_stride(rows, columns))
    assert {index % columns for index in samples} == set(range(columns))
    assert {index // columns for index in samples} == set(range(rows))


def test_a_change_of_any_single_column_is_seen():
    weight = torch.randn(1024, 1024)
    found = {fingerprint_weights([("q", weight)])}
    for column in range(1024):
        weight[:, column] += 1.0
        found.add(fingerprint_weights([("q", weight)]))
        weight[:, column] -= 1.0
    assert len(found) == 1025


def test_large_weight_on_disk_as_in_memory(tmp_path):
    base = {"layers.0.q.weight": torch.randn(513, 300), "layers.0.c.weight": torch.randn(300, 517)}
    made.write_base(tmp_path / "base", base, shards=1, config={"architectures": ["Made"]})
    kinds = {"layers.0.c": "conv1d"}
    made.write_adapter(tmp_path / "adapter", base, targets=["layers.0.q", "layers.0.c"], kinds=kinds, factors="static")
    adapter = read_adapter(tmp_path / "adapter")
    bound = bind(adapter, Checkpoint(tmp_path / "base"), "adapter")
    assert checkpoint_fingerprint(bound.modules) == adapter.base_fingerprint
