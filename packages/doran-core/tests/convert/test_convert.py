"""Converting keeps the function: trainable, PEFT LoRA and PEFT DoRA to folded, and folded to PEFT DoRA."""

import made
import oracle
import pytest
import torch

from doran_core.adapter import (
    FoldedAdapter,
    PeftAdapter,
    read_adapter,
    read_folded,
    write_folded,
    write_trainable,
)
from doran_core.checkpoint.weight_layout import to_matrix
from doran_core.convert import fold_adapter, from_peft, to_peft_dora
from doran_core.errors import AdapterFormatError, BaseMismatchError, CheckpointError, NonFiniteError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"


def merged_of(module, matrix):
    """c (W0 + B A) in float64, from a folded module."""
    return module.scale.double()[:, None] * (matrix.double() + module.B.double() @ module.A.double())


def merged_live(adapter, matrix):
    with torch.no_grad():
        A, B = adapter.factor_pair()
        return oracle.merged(matrix, A, B, adapter.scaling, adapter.magnitude, adapter.tau.value())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factors": "static", "tau_kind": "zero"},
        {"share_output": True, "use_rslora": True},
        {"experts": True, "expert_mask": "element", "expert_dropout": 0.5},
        {"tau_granularity": "row", "tau_kind": "gaussian"},
        {"tau_granularity": "head", "head_dim": 6, "rank_pattern": {"v_proj": 2}, "alpha": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_the_trainable(tmp_path, options, dtype):
    weights = made.base_weights(dtype)
    made.write_base(tmp_path / "base", weights)
    live = made.write_adapter(tmp_path / "adapter", weights, **options)
    folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
    write_folded(folded, tmp_path / "folded")
    read = read_folded(tmp_path / "folded")
    assert read.modules.keys() == live.keys()
    for name, adapter in live.items():
        matrix = weights[f"{name}.weight"]
        torch.testing.assert_close(
            merged_of(read.modules[name], matrix), merged_live(adapter, matrix), rtol=2e-6, atol=2e-6
        )


@pytest.mark.parametrize("tau_kind", ["learned", "zero"])
@pytest.mark.parametrize("write", [write_folded, to_peft_dora])
def test_a_row_of_zeros_is_refused_by_the_forms_that_peft_reads(tmp_path, tau_kind, write):
    weights = made.base_weights()
    weights[f"{Q}.weight"][5] = 0.0
    made.write_base(tmp_path / "base", weights)
    record, _ = made.trainable_record(weights, [Q, V], factors="static", tau_kind=tau_kind)
    record.modules[Q]["factors.B"][5] = 0.0
    record.modules[Q]["magnitude"][3:6] = 0.0  # a magnitude of 0 alone is no harm
    write_trainable(record, tmp_path / "adapter")
    folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
    assert torch.equal(merged_of(folded.modules[Q], weights[f"{Q}.weight"])[3:6], torch.zeros(3, 24).double())
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.q_proj: .* 0 in 1 of its rows \(5\)"):
        write(folded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_compiled_magnitude_over_norm_is_the_scale(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    for name, module in fold_adapter(tmp_path / "adapter", tmp_path / "base").modules.items():
        norm = oracle.norm(weights[f"{name}.weight"], module.A, module.B, 1.0)
        torch.testing.assert_close(module.magnitude.double() / norm, module.scale.double(), rtol=2e-7, atol=0)


def test_kinds(tmp_path):
    weights = {
        "h.0.attn.c_attn.weight": torch.randn(8, 24),
        "h.0.square.weight": torch.randn(8, 8),
        "wte.weight": torch.randn(30, 8),
        "conv.weight": torch.randn(6, 3, 2, 2),
    }
    kinds = {"h.0.attn.c_attn": "conv1d", "h.0.square": "conv1d", "wte": "embedding", "conv": "conv2d"}
    made.write_base(tmp_path / "base", weights, config={"architectures": ["Made"], "tie_word_embeddings": False})
    live = made.write_adapter(tmp_path / "adapter", weights, targets=list(kinds), kinds=kinds, factors="static")
    write_folded(fold_adapter(tmp_path / "adapter", tmp_path / "base"), tmp_path / "folded")
    read = read_folded(tmp_path / "folded")
    assert {name: module.kind for name, module in read.modules.items()} == kinds
    assert read.modules["conv"].kernel == (3, 2, 2)
    for name, adapter in live.items():
        matrix = to_matrix(weights[f"{name}.weight"], kinds[name])
        torch.testing.assert_close(
            merged_of(read.modules[name], matrix), merged_live(adapter, matrix), rtol=2e-6, atol=2e-6
        )


def test_conv1d_is_seen_by_its_shape_when_the_adapter_does_not_say(tmp_path):
    weights = {"h.0.c_attn.weight": torch.randn(8, 24)}
    made.write_base(tmp_path / "base", weights, shards=1)
    made.write_peft(tmp_path / "lora", made.lora_tensors("h.0.c_attn", 24, 8))
    assert from_peft(tmp_path / "lora", tmp_path / "base").modules["h.0.c_attn"].kind == "conv1d"


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_square_weight_is_settled_by_the_flag(tmp_path, fan_in_fan_out):
    weights = {"h.0.square.weight": torch.randn(8, 8)}
    made.write_base(tmp_path / "base", weights, shards=1)
    made.write_peft(tmp_path / "lora", made.lora_tensors("h.0.square", 8, 8), fan_in_fan_out=fan_in_fan_out)
    kind = from_peft(tmp_path / "lora", tmp_path / "base").modules["h.0.square"].kind
    assert kind == ("conv1d" if fan_in_fan_out else "linear")


LORA_OPTIONS = [
    ({}, 2.0, 2.0),
    ({"use_rslora": True}, 4.0, 4.0),
    ({"alpha_pattern": {"v_proj": 2}}, 2.0, 0.5),
    ({"rank_pattern": {"q_proj": 2}, "r": 4}, 4.0, 2.0),
    ({"init_lora_weights": "gaussian", "lora_dropout": 0.3}, 2.0, 2.0),
]


@pytest.mark.parametrize(("options", "q_scaling", "v_scaling"), LORA_OPTIONS)
@pytest.mark.parametrize("dora", [False, True])
def test_from_peft(tmp_path, options, q_scaling, v_scaling, dora):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    q_rank = 2 if "rank_pattern" in options else 4
    magnitudes = {Q: torch.rand(24) + 1, V: torch.rand(12) + 1} if dora else {}
    tensors = made.lora_tensors(Q, 24, 24, rank=q_rank, magnitude=magnitudes.get(Q))
    tensors |= made.lora_tensors(V, 12, 24, magnitude=magnitudes.get(V))
    made.write_peft(tmp_path / "peft", tensors, use_dora=dora, **options)
    folded = from_peft(tmp_path / "peft", tmp_path / "base")
    assert folded.base_fingerprint is not None
    for name, scaling in ((Q, q_scaling), (V, v_scaling)):
        matrix = weights[f"{name}.weight"]
        A, B = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        if dora:
            expected = oracle.merged(matrix, A, B, scaling, magnitudes[name], 0.0)
        else:
            expected = oracle.direction(matrix, A, B, scaling)
            assert torch.equal(folded.modules[name].scale, torch.ones(matrix.shape[0]))
        torch.testing.assert_close(merged_of(folded.modules[name], matrix), expected, rtol=2e-6, atol=2e-6)


def test_to_peft_dora_and_back(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
    to_peft_dora(folded, tmp_path / "dora")
    assert isinstance(read_adapter(tmp_path / "dora"), PeftAdapter)
    back = from_peft(tmp_path / "dora", tmp_path / "base")
    for name, module in folded.modules.items():
        assert torch.equal(back.modules[name].A, module.A)
        assert torch.equal(back.modules[name].B, module.B)
        torch.testing.assert_close(back.modules[name].scale, module.scale, rtol=3e-7, atol=0)


def test_a_compiled_adapter_stays_as_it_is(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    write_folded(fold_adapter(tmp_path / "adapter", tmp_path / "base"), tmp_path / "one")
    write_folded(fold_adapter(tmp_path / "one", tmp_path / "base"), tmp_path / "two")
    assert made.folder_bytes(tmp_path / "one") == made.folder_bytes(tmp_path / "two")


def test_extra_tensors_come_along(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    head = {"score.weight": torch.randn(2, 24)}
    made.write_adapter(tmp_path / "adapter", weights, extra=head, modules_to_save=["score"])
    folded = fold_adapter(tmp_path / "adapter", tmp_path / "base")
    assert isinstance(folded, FoldedAdapter)
    assert torch.equal(folded.extra["score.weight"], head["score.weight"])
    assert folded.modules_to_save == ["score"]


def test_another_base_is_refused_with_both_fingerprints(tmp_path):
    weights = made.base_weights()
    made.write_adapter(tmp_path / "adapter", weights)
    other = {name: weight + 0.1 for name, weight in weights.items()}
    made.write_base(tmp_path / "other", other)
    with pytest.raises(BaseMismatchError) as caught:
        fold_adapter(tmp_path / "adapter", tmp_path / "other")
    assert str(caught.value).count("sha256:") == 2
    folded = fold_adapter(tmp_path / "adapter", tmp_path / "other", allow_base_mismatch=True)
    assert folded.base_fingerprint != read_adapter(tmp_path / "adapter").base_fingerprint


def test_the_fingerprint_is_left_out_for_a_half_precision_base(tmp_path):
    weights = made.base_weights(torch.float16)
    made.write_base(tmp_path / "base", weights)
    made.write_peft(tmp_path / "lora", made.lora_tensors(Q, 24, 24))
    assert from_peft(tmp_path / "lora", tmp_path / "base").base_fingerprint is None


def test_from_peft_refuses_a_doran_adapter(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    with pytest.raises(AdapterFormatError, match="is a DoRAN adapter"):
        from_peft(tmp_path / "adapter", tmp_path / "base")


def test_sizes_that_do_not_fit(tmp_path):
    made.write_base(tmp_path / "base")
    made.write_peft(tmp_path / "lora", made.lora_tensors(Q, 24, 23))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*\[24, 24\].*d_out=24 and d_in=23"):
        from_peft(tmp_path / "lora", tmp_path / "base")
