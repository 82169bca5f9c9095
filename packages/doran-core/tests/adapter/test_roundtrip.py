"""What is written is what is read, in every form; writes are whole or not at all, and equal for equal contents."""

import dataclasses
import json

import made
import pytest
import torch
from damage import unseal
from safetensors.torch import load_file

from doran_core.adapter import (
    FoldedAdapter,
    FoldedModule,
    PeftAdapter,
    TrainableAdapter,
    read_adapter,
    read_folded,
    write_folded,
    write_peft_dora,
    write_trainable,
)
from doran_core.errors import AdapterFormatError, CheckpointError, DoranError, NonFiniteError, UnexpectedKeyError

OPTIONS = [
    {},
    {"factors": "static"},
    {"factors": "static", "tau_kind": "zero"},
    {"sharing": "model"},
    {"sharing": "none", "depth": 3},
    {"share_output": True},
    {"experts": True},
    {"tau_granularity": "row", "tau_kind": "gaussian"},
    {"tau_granularity": "head", "head_dim": 6, "tau_kind": "fixed"},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 5.0}, "use_rslora": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trainable(tmp_path, options):
    record, _ = made.trainable_record(made.base_weights(), **options)
    write_trainable(record, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert isinstance(read, TrainableAdapter)
    assert read.config == record.config
    assert (read.base_fingerprint, read.base_model, read.task_type) == (
        record.base_fingerprint,
        "made/llama",
        "CAUSAL_LM",
    )
    assert read.modules.keys() == record.modules.keys()
    for name, tensors in record.modules.items():
        assert read.modules[name].keys() == tensors.keys()
        for part, tensor in tensors.items():
            assert torch.equal(read.modules[name][part], tensor), (name, part)


def folded_record(**changes):
    generator = torch.Generator().manual_seed(1)

    def module(name, d_out, d_in, rank, **fields):
        A, B = torch.randn(rank, d_in, generator=generator), torch.randn(d_out, rank, generator=generator)
        scale, magnitude = torch.rand(d_out, generator=generator), torch.rand(d_out, generator=generator)
        return FoldedModule(name, A, B, scale, magnitude, **fields)

    modules = [
        module("model.layers.0.self_attn.q_proj", 24, 24, 4),
        module("model.layers.0.self_attn.v_proj", 12, 24, 2),
        module("model.layers.0.c_attn", 24, 8, 4, kind="conv1d"),
        module("model.embed_tokens", 24, 50, 4, kind="embedding"),
        module("vision.conv", 6, 3 * 2 * 2, 4, kind="conv2d", kernel=(3, 2, 2)),
        module("audio.conv", 6, 3 * 5, 4, kind="conv", kernel=(3, 5)),
        module("film.conv", 6, 2 * 2 * 3 * 4, 4, kind="conv", kernel=(2, 2, 3, 4)),
    ]
    record = FoldedAdapter(
        modules={m.name: m for m in modules},
        extra={"score.weight": torch.randn(2, 24, generator=generator), "score.count": torch.tensor(3)},
        base_fingerprint="sha256:" + "ab" * 32,
        base_model="made/llama",
        task_type="SEQ_CLS",
        modules_to_save=["score"],
    )
    return dataclasses.replace(record, **changes)


def assert_same_module(one, other):
    assert (one.name, one.kind, one.kernel) == (other.name, other.kind, other.kernel)
    for field in ("A", "B", "scale", "magnitude"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_folded(tmp_path):
    record = folded_record()
    write_folded(record, tmp_path / "adapter")
    read = read_folded(tmp_path / "adapter")
    assert read.modules.keys() == record.modules.keys()
    for name in record.modules:
        assert_same_module(read.modules[name], record.modules[name])
    assert read.extra.keys() == record.extra.keys()
    assert torch.equal(read.extra["score.weight"], record.extra["score.weight"])
    for field in ("base_fingerprint", "base_model", "task_type", "modules_to_save", "created_by"):
        assert getattr(read, field) == getattr(record, field), field


def test_compiled_is_a_peft_dora_directory_with_scaling_one(tmp_path):
    write_folded(folded_record(), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"], config["r"], config["lora_alpha"]) == ("LORA", True, 4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {"model.layers.0.self_attn.v_proj": 2}
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model."
    assert keys[f"{prefix}model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 24)
    assert keys[f"{prefix}model.layers.0.self_attn.q_proj.lora_magnitude_vector"].shape == (24,)
    assert keys[f"{prefix}model.embed_tokens.lora_embedding_A"].shape == (4, 50)
    assert keys[f"{prefix}vision.conv.lora_A.weight"].shape == (4, 3, 2, 2)
    assert keys[f"{prefix}vision.conv.lora_magnitude_vector"].shape == (1, 6, 1, 1)
    scales = load_file(tmp_path / "adapter" / "doran_scale.safetensors")
    assert scales.keys() == folded_record().modules.keys()


def test_peft_dora_has_no_scales(tmp_path):
    write_peft_dora(folded_record(), tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    read = read_adapter(tmp_path / "adapter")
    assert isinstance(read, PeftAdapter)
    assert all(module.scaling == 1.0 for module in read.modules.values())
    with pytest.raises(AdapterFormatError, match="without scales"):
        read_folded(tmp_path / "adapter")


def test_keys_without_the_prefix_and_fields_of_peft_are_read(tmp_path):
    record, _ = made.trainable_record(made.base_weights(), factors="static")
    write_trainable(
        dataclasses.replace(record, peft_fields={"peft_version": "0.21.2", "peft_odd": [1]}), tmp_path / "a"
    )
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(file).items()}
    file.unlink()
    made.save_file(tensors, file)
    unseal(tmp_path / "a")
    read = read_adapter(tmp_path / "a")
    assert read.modules.keys() == record.modules.keys()
    assert read.peft_fields["peft_version"] == "0.21.2"
    assert read.peft_fields["peft_odd"] == [1]


ODD_NAMES = [
    "x.lora_head.fc",
    "x.doran_adapter.fc",
    "lora_A.weight.fc",
    "x.doran_adapter",
    "y.lora_B",
    "z.base_layer.fc",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("form", ["trainable", "folded", "dora"])
def test_module_names_with_parts_like_the_formats_own(tmp_path, name, form):
    extra = {"x.lora_head.norm.weight": torch.ones(3), "x.doran_adapter.fc.bias": torch.ones(3)}
    saved = ["lora_head.norm", "doran_adapter.fc"]
    if form == "trainable":
        weights = {f"{name}.weight": torch.randn(8, 8)}
        record, _ = made.trainable_record(weights, [name], extra=extra, modules_to_save=saved)
        write_trainable(record, tmp_path / "adapter")
    else:
        record = folded_record(extra=extra, modules_to_save=saved)
        module = dataclasses.replace(next(iter(record.modules.values())), name=name)
        record = dataclasses.replace(record, modules={name: module})
        (write_folded if form == "folded" else write_peft_dora)(record, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert read.modules.keys() == {name}
    assert read.extra.keys() == extra.keys()


@pytest.mark.parametrize("name", ["x.lora_A.weight", "x.doran_adapter.magnitude", "x.base_layer.weight"])
def test_names_that_would_not_be_read_back_are_refused(tmp_path, name):
    with pytest.raises(UnexpectedKeyError, match=r"x\."):
        write_folded(folded_record(extra={name: torch.ones(3)}, modules_to_save=["x"]), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_equal_contents_give_equal_bytes(tmp_path):
    record, _ = made.trainable_record(made.base_weights())
    backwards = dataclasses.replace(record, modules=dict(reversed(record.modules.items())))
    write_trainable(record, tmp_path / "one")
    write_trainable(backwards, tmp_path / "two")
    assert made.folder_bytes(tmp_path / "one") == made.folder_bytes(tmp_path / "two")


def test_an_existing_adapter_is_replaced_only_when_asked_and_other_files_stay(tmp_path):
    record, _ = made.trainable_record(made.base_weights())
    target = tmp_path / "adapter"
    write_folded(folded_record(), target)
    (target / "README.md").write_text("mine")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("1")
    before = made.folder_bytes(target)
    for write, given in ((write_trainable, record), (write_folded, folded_record())):
        with pytest.raises(DoranError, match="already holds an adapter; pass overwrite=True") as caught:
            write(given, target)
        assert type(caught.value) is DoranError
    assert made.folder_bytes(target) == before
    write_trainable(record, target, overwrite=True)
    assert isinstance(read_adapter(target), TrainableAdapter)
    assert not (target / "doran_scale.safetensors").exists()
    assert (target / "README.md").read_text() == "mine"
    assert (target / "runs" / "log").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_bad_record_writes_nothing(tmp_path):
    record = folded_record()
    module = record.modules["model.layers.0.self_attn.q_proj"]
    bad = dataclasses.replace(module, scale=module.scale.clone().fill_(float("nan")))
    with pytest.raises(NonFiniteError, match="q_proj"):
        write_folded(dataclasses.replace(record, modules={bad.name: bad}), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch):
    target = tmp_path / "adapter"
    write_folded(folded_record(), target)
    before = made.folder_bytes(target)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("doran_core.adapter.write.save_safetensors", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        write_folded(folded_record(created_by="other"), target, overwrite=True)
    assert made.folder_bytes(target) == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_target_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "adapter").write_text("x")
    with pytest.raises(CheckpointError, match="not a directory"):
        write_folded(folded_record(), tmp_path / "adapter", overwrite=True)
