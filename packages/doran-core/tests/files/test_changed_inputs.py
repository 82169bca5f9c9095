"""A base or an adapter that changes while it is read: no result is made of two versions."""

import shutil

import made
import pytest

from doran_core.adapter import write_trainable
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.convert import fold_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import CheckpointError
from doran_core.merge import merge_checkpoint
from doran_core.merge import run as merge_run


class TestABaseThatChanges:
    """Bytes of two bases never meet in one result."""

    @pytest.fixture
    def folder(self, tmp_path):
        weights = made.base_weights()
        made.write_base(tmp_path / "base", weights, shards=3)
        made.write_base(tmp_path / "other", {name: 2 * value for name, value in weights.items()}, shards=3)
        made.write_adapter(tmp_path / "adapter", weights, fingerprint=False)
        return tmp_path

    @staticmethod
    def change(folder, how):
        shard = "model-00003-of-00003.safetensors"
        if how == "the directory":
            (folder / "base").rename(folder / "was")
            (folder / "other").rename(folder / "base")
        elif how == "a shard, by a rename":
            (folder / "other" / shard).replace(folder / "base" / shard)
        elif how == "a shard, in place":
            (folder / "base" / shard).write_bytes((folder / "other" / shard).read_bytes())
        elif how == "the configuration":
            (folder / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "x": 1}')
        else:
            (folder / "base" / shard).unlink()

    HOWS = ("the directory", "a shard, by a rename", "a shard, in place", "the configuration", "a shard is removed")

    @pytest.mark.parametrize("how", HOWS)
    def test_while_it_is_merged(self, folder, monkeypatch, how):
        write = merge_run.write_side_files

        def then_change(*arguments):
            write(*arguments)
            self.change(folder, how)

        monkeypatch.setattr(merge_run, "write_side_files", then_change)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            merge_checkpoint(folder / "base", folder / "adapter", folder / "out")
        assert not (folder / "out").exists()
        assert made.hidden(folder) == []

    @pytest.mark.parametrize("how", HOWS[:3])
    @pytest.mark.parametrize("use", [fold_adapter, inspect_adapter])
    def test_while_it_is_read(self, folder, monkeypatch, how, use):
        module = {fold_adapter: "doran_core.convert.fold", inspect_adapter: "doran_core.diagnostics.inspect"}[use]
        name = {fold_adapter: "fold_layer", inspect_adapter: "_bound_report"}[use]
        import importlib

        original, changed = getattr(importlib.import_module(module), name), []

        def change_once(*arguments):
            result = original(*arguments)
            if not changed:
                changed.append(True)
                self.change(folder, how)
            return result

        monkeypatch.setattr(f"{module}.{name}", change_once)
        with pytest.raises(CheckpointError, match="changed while it was being read"):
            use(folder / "adapter", folder / "base")

    def test_a_base_that_stays(self, folder):
        checkpoint = Checkpoint(folder / "base")
        shutil.copytree(folder / "base", folder / "copy")
        checkpoint.require_unchanged()


def test_an_adapter_that_changes_between_reading_and_its_digest(tmp_path, monkeypatch):
    """A merge that is resumed belongs to the very adapter that its finished part was made of."""
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    second, _ = made.trainable_record(weights, seed=6)
    read, seen = merge_run.read_adapter, []

    def then_overwrite(folder):
        adapter = read(folder)
        if not seen:
            write_trainable(second, tmp_path / "adapter", overwrite=True)
        seen.append(adapter)
        return adapter

    monkeypatch.setattr(merge_run, "read_adapter", then_overwrite)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert len(seen) == 2
    monkeypatch.undo()
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "expected")
    assert made.folder_bytes(tmp_path / "out") == made.folder_bytes(tmp_path / "expected")
