"""Whatever goes wrong with a merge: one named error, no output directory, nothing left beside it."""

import os

import made
import pytest
import torch

from doran_core.errors import (
    AdapterFormatError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    DoranError,
    NonFiniteError,
    TensorShapeError,
)
from doran_core.merge import merge_checkpoint
from doran_core.merge.staging import open_staging

Q = made.TARGETS[0]


@pytest.fixture
def folder(tmp_path):
    made.write_base(tmp_path / "base")
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    return tmp_path


def refuse(folder, error, match, base="base", adapter="adapter", **options):
    """The merge fails with this error and leaves the folder as it was."""
    before = made.folder_bytes(folder)
    with pytest.raises(error, match=match) as caught:
        merge_checkpoint(folder / base, folder / adapter, folder / "out", **options)
    assert "\n" not in str(caught.value)
    assert made.folder_bytes(folder) == before
    assert not (folder / ".out.doran-merge").exists()


def test_wrong_base_path(folder):
    refuse(folder, CheckpointError, "no such checkpoint directory", base="nowhere")


def test_wrong_adapter_path(folder):
    refuse(folder, AdapterFormatError, "no such adapter directory", adapter="nowhere")


def test_dtype_that_is_no_floating_one(folder):
    refuse(folder, ConfigError, "int8", dtype=torch.int8)


def test_another_base(folder):
    made.write_base(folder / "other", {key: weight * 1.5 for key, weight in made.base_weights().items()})
    refuse(folder, BaseMismatchError, r"sha256:\w{64}.*sha256:\w{64}", base="other")
    merge_checkpoint(folder / "other", folder / "adapter", folder / "out", allow_base_mismatch=True)


def test_a_base_without_the_modules(folder):
    weights = {key: weight for key, weight in made.base_weights().items() if "q_proj" not in key}
    made.write_base(folder / "other", weights)
    refuse(folder, CheckpointError, r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'", base="other")


def test_a_base_of_another_size(folder):
    made.write_base(folder / "other", made.base_weights() | {f"{Q}.weight": torch.ones(24, 25)})
    refuse(folder, CheckpointError, r"q_proj\.weight.*\[24, 25\]", base="other")


def test_quantized_weights(folder):
    made.write_base(folder / "other", made.base_weights() | {f"{Q}.weight": torch.ones(24, 24, dtype=torch.int8)})
    refuse(folder, CheckpointError, "I8.*quantized", base="other")


def test_extra_tensor_of_another_size(folder):
    made.write_adapter(
        folder / "resized",
        made.base_weights(),
        extra={"model.norm.weight": torch.ones(25)},
        modules_to_save=["model.norm"],
    )
    refuse(folder, CheckpointError, r"norm\.weight.*\[24\].*\[25\]", adapter="resized")


def test_a_new_tensor_with_the_name_of_another_one_of_a_bare_base(folder):
    weights = {"fc.weight": torch.randn(8, 8), "norm.weight": torch.randn(8)}
    made.write_base(folder / "bare", weights, shards=1, config={"architectures": ["Made"]})
    named = {f"body.{key}": weight for key, weight in weights.items()}
    extra = {"norm.weight": torch.ones(8)}
    made.write_adapter(folder / "new", named, targets=["body.fc"], extra=extra, modules_to_save=["norm"])
    refuse(folder, CheckpointError, r"norm\.weight is new.*'body\.'.*another tensor", base="bare", adapter="new")


def test_two_modules_of_one_weight(folder):
    weights = {"fc.weight": torch.randn(8, 8)}
    made.write_base(folder / "bare", weights, shards=1, config={"architectures": ["Made"]})
    both = {"fc.weight": weights["fc.weight"], "head.fc.weight": weights["fc.weight"]}
    made.write_adapter(folder / "both", both, targets=["fc", "head.fc"])
    refuse(folder, CheckpointError, r"fc and head\.fc would both adapt fc\.weight", base="bare", adapter="both")


def test_an_output_that_is_there(folder):
    (folder / "out").mkdir()
    (folder / "out" / "file").write_text("mine")
    refuse(folder, CheckpointError, "not empty")


def test_an_output_that_is_a_file(folder):
    (folder / "out").write_text("mine")
    refuse(folder, CheckpointError, "exists")


def test_the_base_itself_as_output(folder):
    before = made.folder_bytes(folder)
    with pytest.raises(CheckpointError, match="not empty"):
        merge_checkpoint(folder / "base", folder / "adapter", folder / "base")
    assert made.folder_bytes(folder) == before


def full_disk(*args):
    raise OSError(28, os.strerror(28))


@pytest.mark.parametrize(
    "where", ["os.posix_fallocate", "doran_core.merge.write.write_tensor", "os.copy_file_range", "shutil.copyfile"]
)
def test_full_disk(folder, monkeypatch, where):
    monkeypatch.setattr(where, full_disk)
    refuse(folder, CheckpointError, "the disk is full")


def test_too_little_space_is_seen_before_the_work(folder, monkeypatch):
    class Usage:
        free = 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    monkeypatch.setattr("doran_core.merge.run.ShardWriter", full_disk)
    refuse(folder, CheckpointError, "the disk is full")


def test_a_parent_that_cannot_be_made(folder):
    (folder / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        merge_checkpoint(folder / "base", folder / "adapter", folder / "file" / "out")


def test_shapes_of_shared_parts(folder):
    record, _ = made.trainable_record(made.base_weights())
    record.modules[Q]["factors.trunk.A.embedding"] = torch.ones(9, 9)
    from doran_core.adapter import write_trainable

    write_trainable(record, folder / "odd")
    refuse(folder, TensorShapeError, r"trunk\.A\.embedding", adapter="odd")


def test_two_merges_into_one_output(folder):
    with (
        open_staging((folder / "out").resolve(), {}),
        pytest.raises(CheckpointError, match="another merge is writing"),
    ):
        merge_checkpoint(folder / "base", folder / "adapter", folder / "out")


def test_a_shard_that_shrinks_while_it_is_read(folder, monkeypatch):
    monkeypatch.setattr("os.copy_file_range", lambda *args: 0)
    with pytest.raises(DoranError, match="shorter"):
        merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
    assert not (folder / "out").exists()


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_rows_are_finite(tmp_path, kind, dtype):
    """Huge finite factors, whose products are infinite in the dtype of the output."""
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    module = "model.embed_tokens" if kind == "embedding" else made.TARGETS[0]
    rows, columns = weights[f"{module}.weight"].shape
    names = ("lora_embedding_A", "lora_embedding_B") if kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    sizes = [(4, rows), (columns, 4)] if kind == "embedding" else [(4, columns), (rows, 4)]
    tensors = {f"{module}.{name}": torch.full(size, 1e30) for name, size in zip(names, sizes, strict=True)}
    made.write_peft(tmp_path / "adapter", tensors)
    with pytest.raises(NonFiniteError, match=rf"{module}.weight: merged with .* is not finite in"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()
