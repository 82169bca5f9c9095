"""What a merge writes: adapted weights as the float64 oracle says, all else to the byte, and the files around them."""

import json

import made
import oracle
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from doran_core.adapter import read_adapter, write_folded
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.checkpoint.weight_layout import from_matrix, to_matrix
from doran_core.convert import fold_adapter
from doran_core.errors import ConfigError
from doran_core.merge import merge_checkpoint

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def expected_weight(adapter, weight, kind="linear"):
    """W' in float64, in the layout of the file."""
    with torch.no_grad():
        A, B = adapter.factor_pair()
        matrix = to_matrix(weight, kind)
        merged = oracle.merged(matrix, A, B, adapter.scaling, adapter.magnitude, adapter.tau.value())
    return from_matrix(merged, kind, weight.shape)


def assert_merged(found, expected, key):
    """Equal to the bit; in float64, where nothing is rounded away, up to the order in which sums are taken."""
    last_bits = 4e-15 if expected.dtype == torch.float64 else 0.0
    torch.testing.assert_close(found, expected, rtol=last_bits, atol=last_bits, msg=key)


def read_all(directory):
    return {key: tensor for file in directory.glob("*.safetensors") for key, tensor in load_file(file).items()}


@pytest.fixture
def base(tmp_path):
    return made.write_base(tmp_path / "base")


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_adapted_weights_are_the_oracles_and_the_rest_is_copied(tmp_path, shards, dtype):
    weights = made.base_weights(dtype) | {"model.steps": torch.arange(3), "model.scalar": torch.tensor(1.5)}
    made.write_base(tmp_path / "base", weights, shards=shards)
    live = made.write_adapter(tmp_path / "adapter", weights)
    assert merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == tmp_path / "out"
    merged = read_all(tmp_path / "out")
    assert merged.keys() == weights.keys()
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        expected = expected_weight(live[module], weight).to(dtype) if module in live else weight
        assert_merged(merged[key], expected, key)
    for shard in Checkpoint(tmp_path / "base").shards:
        written = (tmp_path / "out" / shard.path.name).read_bytes()
        assert written[: shard.header_bytes] == shard.path.read_bytes()[: shard.header_bytes]
    assert not (tmp_path / ".out.doran-merge").exists()


@pytest.mark.parametrize("options", [{"share_output": True}, {"experts": True}, {"tau_granularity": "row"}], ids=str)
def test_options(tmp_path, base, options):
    weights = made.base_weights()
    live = made.write_adapter(tmp_path / "adapter", weights, **options)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_all(tmp_path / "out")
    for name, adapter in live.items():
        assert torch.equal(merged[f"{name}.weight"], expected_weight(adapter, weights[f"{name}.weight"]).float())


def test_rows_are_independent_of_the_size_of_the_pieces(tmp_path, base, monkeypatch):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "whole")
    monkeypatch.setattr("doran_core.checkpoint.binding.CHUNK_ELEMENTS", 60)
    monkeypatch.setattr("doran_core.merge.write.CHUNK_ELEMENTS", 60)
    monkeypatch.setattr("doran_core.merge.write._COPY_BYTES", 101)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "pieces")
    assert made.folder_bytes(tmp_path / "whole") == made.folder_bytes(tmp_path / "pieces")


def test_without_the_kernels_copy(tmp_path, base, monkeypatch):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "one")

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refuse)
    monkeypatch.setattr("os.posix_fallocate", refuse)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "two")
    assert made.folder_bytes(tmp_path / "one") == made.folder_bytes(tmp_path / "two")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shards", [1, 2])
def test_chosen_dtype(tmp_path, dtype, shards):
    weights = made.base_weights() | {"model.steps": torch.arange(3)}
    config = {"torch_dtype": "float32", "text_config": {"dtype": "float32", "width": 1}}
    made.write_base(tmp_path / "base", weights, shards=shards, config=config)
    live = made.write_adapter(tmp_path / "adapter", weights)
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    merged = read_all(tmp_path / "out")
    for key, weight in weights.items():
        module = key.removesuffix(".weight")
        expected = expected_weight(live[module], weight) if module in live else weight
        expected = expected.to(dtype) if weight.is_floating_point() else weight
        assert_merged(merged[key], expected, key)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    assert (config["torch_dtype"], config["text_config"]) == (name, {"dtype": name, "width": 1})
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in merged.values())
    assert set(Checkpoint(tmp_path / "out").keys()) == set(weights)


def test_compiled_and_peft_adapters(tmp_path, base):
    weights = made.base_weights()
    live = made.write_adapter(tmp_path / "adapter", weights)
    write_folded(fold_adapter(tmp_path / "adapter", base), tmp_path / "folded")
    magnitude = torch.rand(24) + 1
    lora, dora = made.lora_tensors(Q, 24, 24), made.lora_tensors(Q, 24, 24, magnitude=magnitude)
    made.write_peft(tmp_path / "lora", lora)
    made.write_peft(tmp_path / "dora", dora, use_dora=True)
    for name in ("folded", "lora", "dora"):
        merge_checkpoint(base, tmp_path / name, tmp_path / f"out-{name}")
    merged = read_all(tmp_path / "out-folded")
    for name, adapter in live.items():
        expected = expected_weight(adapter, weights[f"{name}.weight"])
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=2e-6, atol=2e-6)
    W, A, B = weights[f"{Q}.weight"], lora[f"{Q}.lora_A.weight"], lora[f"{Q}.lora_B.weight"]
    assert torch.equal(
        read_all(tmp_path / "out-lora")[f"{Q}.weight"], (W.double() + 2.0 * (B.double() @ A.double())).float()
    )
    assert torch.equal(
        read_all(tmp_path / "out-dora")[f"{Q}.weight"], oracle.merged(W, A, B, 2.0, magnitude, 0.0).float()
    )


def test_every_kind_of_layer(tmp_path):
    weights = {
        "h.0.c_attn.weight": torch.randn(8, 24),
        "wte.weight": torch.randn(30, 8),
        "conv.weight": torch.randn(6, 3, 2, 2),
        "conv.bias": torch.randn(6),
        "wave.weight": torch.randn(6, 3, 5),
        "film.weight": torch.randn(4, 2, 2, 3, 2),
    }
    kinds = {"h.0.c_attn": "conv1d", "wte": "embedding", "conv": "conv2d", "wave": "conv", "film": "conv"}
    made.write_base(tmp_path / "base", weights, config={"architectures": ["Made"], "tie_word_embeddings": False})
    live = made.write_adapter(tmp_path / "adapter", weights, targets=list(kinds), kinds=kinds, factors="static")
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert torch.equal(merged["conv.bias"], weights["conv.bias"])
    for name, adapter in live.items():
        expected = expected_weight(adapter, weights[f"{name}.weight"], kinds[name]).float()
        assert torch.equal(merged[f"{name}.weight"], expected), name


def test_disjoint_adapters_are_each_exact(tmp_path, base):
    weights = made.base_weights()
    one = made.write_adapter(tmp_path / "one", weights, targets=made.TARGETS[:2])
    two = made.write_adapter(tmp_path / "two", weights, targets=made.TARGETS[2:], rank=2)
    merge_checkpoint(base, [tmp_path / "one", (tmp_path / "two", 1.0)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    for name, adapter in (one | two).items():
        assert torch.equal(merged[f"{name}.weight"], expected_weight(adapter, weights[f"{name}.weight"]).float())


def test_overlapping_adapters_add_their_weighted_changes(tmp_path, base):
    weights = made.base_weights()
    one = made.write_adapter(tmp_path / "one", weights)
    two = made.write_adapter(tmp_path / "two", weights, targets=made.TARGETS[:1], seed=9, rank=2)
    merge_checkpoint(base, [(tmp_path / "one", 0.25), (tmp_path / "two", 2.0)], tmp_path / "out")
    merged = read_all(tmp_path / "out")
    for name in one:
        weight = weights[f"{name}.weight"]
        expected = weight.double() + 0.25 * (expected_weight(one[name], weight) - weight)
        if name in two:
            expected += 2.0 * (expected_weight(two[name], weight) - weight)
        torch.testing.assert_close(merged[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_a_weight_of_zero_is_the_base(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    merge_checkpoint(base, (tmp_path / "adapter", 0.0), tmp_path / "out")
    merged = read_all(tmp_path / "out")
    assert all(torch.equal(merged[key], weight) for key, weight in made.base_weights().items())


@pytest.mark.parametrize(("adapters", "words"), [([], "no adapter"), ([("adapter", float("nan"))], "weight nan")])
def test_weights_that_are_none(tmp_path, base, adapters, words):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    with pytest.raises(ConfigError, match=words):
        merge_checkpoint(base, [(tmp_path / name, weight) for name, weight in adapters], tmp_path / "out")


def test_two_kinds_for_one_weight(tmp_path, base):
    for name, kind in (("one", {}), ("two", {Q: "conv1d"})):
        made.write_adapter(tmp_path / name, made.base_weights(), targets=[Q], kinds=kind, fingerprint=False)
    with pytest.raises(ConfigError, match="conv1d"):
        merge_checkpoint(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "out")


class TestTiedEmbeddings:
    @pytest.fixture
    def weights(self):
        return made.base_weights(tied=True)

    def config(self, tmp_path):
        return json.loads((tmp_path / "out" / "config.json").read_text())

    def test_stay_tied_when_neither_end_is_adapted(self, tmp_path, weights):
        made.write_base(tmp_path / "base", weights)
        made.write_adapter(tmp_path / "adapter", weights)
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert "lm_head.weight" not in read_all(tmp_path / "out")
        assert self.config(tmp_path)["tie_word_embeddings"] is True

    @pytest.mark.parametrize("shards", [1, 2])
    def test_adapted_output_layer_gets_its_own_weight(self, tmp_path, weights, shards):
        made.write_base(tmp_path / "base", weights, shards=shards)
        live = made.write_adapter(
            tmp_path / "adapter",
            weights | {"lm_head.weight": weights["model.embed_tokens.weight"]},
            targets=["lm_head"],
        )
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        merged, embedding = read_all(tmp_path / "out"), weights["model.embed_tokens.weight"]
        assert torch.equal(merged["model.embed_tokens.weight"], embedding)
        assert torch.equal(merged["lm_head.weight"], expected_weight(live["lm_head"], embedding).float())
        assert self.config(tmp_path)["tie_word_embeddings"] is False
        assert "lm_head.weight" in Checkpoint(tmp_path / "out")

    def test_adapted_embedding_leaves_the_output_layer(self, tmp_path, weights):
        made.write_base(tmp_path / "base", weights)
        kinds = {"model.embed_tokens": "embedding"}
        live = made.write_adapter(tmp_path / "adapter", weights, targets=list(kinds), kinds=kinds)
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype=torch.float64)
        merged, embedding = read_all(tmp_path / "out"), weights["model.embed_tokens.weight"]
        assert torch.equal(merged["lm_head.weight"], embedding.double())
        expected = expected_weight(live["model.embed_tokens"], embedding, "embedding")
        torch.testing.assert_close(merged["model.embed_tokens.weight"], expected, rtol=1e-14, atol=1e-14)


class TestExtraTensors:
    def test_replace_what_the_base_has(self, tmp_path, base):
        weights = made.base_weights()
        norm = torch.randn(24)
        made.write_adapter(
            tmp_path / "adapter", weights, extra={"model.norm.weight": norm}, modules_to_save=["model.norm"]
        )
        merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
        assert torch.equal(read_all(tmp_path / "out")["model.norm.weight"], norm)

    @pytest.mark.parametrize("shards", [1, 2])
    def test_a_new_head_is_added_and_config_says_so(self, tmp_path, shards):
        weights = made.base_weights(torch.bfloat16)
        made.write_base(tmp_path / "base", weights, shards=shards)
        head = torch.randn(3, 24)
        made.write_adapter(
            tmp_path / "adapter", weights, extra={"score.weight": head}, modules_to_save=["score"], task_type="SEQ_CLS"
        )
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert torch.equal(read_all(tmp_path / "out")["score.weight"], head.bfloat16())
        assert "score.weight" in Checkpoint(tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["LlamaForSequenceClassification"]
        assert len(config["id2label"]) == 3

    def test_a_bare_base_takes_the_names_of_the_adapted_model(self, tmp_path):
        weights = {f"encoder.layer.{i}.query.weight": torch.randn(8, 8) for i in range(2)} | {
            "embeddings.weight": torch.randn(10, 8)
        }
        made.write_base(tmp_path / "base", weights, config={"architectures": ["BertModel"]})
        named = {f"bert.{key}": weight for key, weight in weights.items()}
        targets = ["bert.encoder.layer.0.query", "bert.encoder.layer.1.query"]
        head = {"classifier.weight": torch.randn(2, 8), "classifier.bias": torch.randn(2)}
        live = made.write_adapter(
            tmp_path / "adapter",
            named,
            targets=targets,
            extra=head,
            modules_to_save=["classifier"],
            task_type="SEQ_CLS",
        )
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        merged = read_all(tmp_path / "out")
        assert merged.keys() == named.keys() | head.keys()
        for name in targets:
            assert torch.equal(merged[f"{name}.weight"], expected_weight(live[name], named[f"{name}.weight"]).float())
        assert torch.equal(merged["bert.embeddings.weight"], weights["embeddings.weight"])
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]

    @pytest.mark.parametrize(("own", "base"), [("", ""), ("bert.", ""), ("", "bert.")])
    def test_a_new_head_does_not_replace_a_base_tensor_of_a_like_name(self, tmp_path, own, base):
        weights = {"fc.weight": torch.randn(8, 8), "norm.weight": torch.randn(8), "pooler.weight": torch.randn(8)}
        stored = {base + key: weight for key, weight in weights.items()}
        made.write_base(tmp_path / "base", stored, shards=1, config={"architectures": ["Made"]})
        named = {own + key: weight for key, weight in weights.items()}
        extra = {"head.norm.weight": torch.randn(8), f"{own}pooler.weight": torch.randn(8)}
        made.write_adapter(
            tmp_path / "adapter",
            named,
            targets=[f"{own}fc"],
            extra=extra,
            modules_to_save=["head.norm", f"{own}pooler"],
        )
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        merged, prefix = read_all(tmp_path / "out"), own or base
        assert merged.keys() == {f"{prefix}{key}" for key in weights} | {"head.norm.weight"}
        assert torch.equal(merged[f"{prefix}norm.weight"], weights["norm.weight"])
        assert torch.equal(merged[f"{prefix}pooler.weight"], extra[f"{own}pooler.weight"])
        assert torch.equal(merged["head.norm.weight"], extra["head.norm.weight"])
        folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
        assert folded.extra.keys() == extra.keys()

    def test_contradicting_adapters(self, tmp_path, base):
        weights = made.base_weights()
        for number in (1, 2):
            made.write_adapter(
                tmp_path / f"a{number}",
                weights,
                targets=[made.TARGETS[number]],
                extra={"model.norm.weight": torch.full((24,), float(number))},
                modules_to_save=["model.norm"],
            )
        with pytest.raises(ConfigError, match="different values"):
            merge_checkpoint(base, [tmp_path / "a1", tmp_path / "a2"], tmp_path / "out")
        with pytest.raises(ConfigError, match="takes weight 1"):
            merge_checkpoint(base, [(tmp_path / "a1", 0.5)], tmp_path / "out")


def test_companions(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    (base / "merges.txt").write_text("a b")
    for name in ("pytorch_model.bin", "adapter_config.json", "rust_model.ot.h5", ".hidden", "consolidated.00.pth"):
        (base / name).write_text("x")
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_text("x")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert sorted(made.folder_bytes(tmp_path / "out")) == [
        "1_Pooling/config.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules.json",
        "tokenizer.json",
    ]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_shard_metadata_stays(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    with safe_open(tmp_path / "out" / "model-00001-of-00002.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_progress_counts_all_bytes_once(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    calls = []
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out", progress=lambda *call: calls.append(call))
    done = [count for count, _ in calls]
    assert done == sorted(done)
    total = sum(tensor.nbytes for tensor in made.base_weights().values())
    headers = sum(shard.header_bytes for shard in Checkpoint(base).shards)
    assert {total for _, total in calls} == {total + headers}
    assert done[-1] == total + headers


def test_an_empty_output_directory_is_taken(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    (tmp_path / "out").mkdir()
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert Checkpoint(tmp_path / "out").keys()


def test_reading_the_adapter_changes_nothing(tmp_path, base):
    made.write_adapter(tmp_path / "adapter", made.base_weights())
    before = made.folder_bytes(tmp_path / "adapter") | made.folder_bytes(base)
    read_adapter(tmp_path / "adapter")
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert made.folder_bytes(tmp_path / "adapter") | made.folder_bytes(base) == before
