"""The report of an adapter directory holds what a direct calculation gives, in every form."""

import time

import made
import oracle
import pytest
import torch
from damage import edit_tensors, set_tensor, unseal
from safetensors.torch import load_file

from doran_core.adapter import write_folded
from doran_core.convert import fold_adapter, to_peft_dora
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import ConfigError, DoranError, MissingKeyError
from doran_core.merge import merge_checkpoint


@pytest.fixture
def folder(tmp_path):
    made.write_base(tmp_path / "base")
    return tmp_path


def test_trainable_with_its_base(folder):
    weights = made.base_weights()
    live = made.write_adapter(folder / "adapter", weights, tau_granularity="row")
    report = inspect_adapter(folder / "adapter", folder / "base")
    assert (report.form, report.base_model) == ("trainable", "made/llama")
    assert [layer.name for layer in report.layers] == sorted(live)
    for layer in report.layers:
        adapter, weight = live[layer.name], weights[f"{layer.name}.weight"]
        with torch.no_grad():
            A, B = adapter.factor_pair()
            tau = adapter.tau.value().double()
        norm = oracle.norm(weight, A, B, adapter.scaling)
        scale = adapter.magnitude.detach().double() / (norm + tau)
        merged = oracle.merged(weight, A, B, adapter.scaling, adapter.magnitude.detach(), tau)
        assert (layer.rank, layer.d_out, layer.d_in) == (4, *weight.shape)
        assert layer.norm.mean == pytest.approx(float(norm.mean()))
        assert layer.scale.largest == pytest.approx(float(scale.max()))
        assert layer.tau.least == pytest.approx(float(tau.min()))
        assert layer.tau_share == pytest.approx(float((tau / (norm + tau)).mean()))
        assert layer.change == pytest.approx(float((merged - weight).norm() / weight.norm()))


def test_without_the_base_only_what_the_adapter_knows(folder):
    made.write_adapter(folder / "adapter", made.base_weights())
    layer = inspect_adapter(folder / "adapter").layers[0]
    assert layer.tau is not None
    assert (layer.scale, layer.norm, layer.change) == (None, None, None)


def test_compiled_and_peft(folder):
    made.write_adapter(folder / "adapter", made.base_weights())
    folded = fold_adapter(folder / "adapter", folder / "base")
    write_folded(folded, folder / "folded")
    to_peft_dora(folded, folder / "dora")
    made.write_peft(folder / "lora", made.lora_tensors(made.TARGETS[0], 24, 24))
    reports = {name: inspect_adapter(folder / name) for name in ("folded", "dora", "lora")}
    assert [report.form for report in reports.values()] == ["folded", "peft-dora", "peft-lora"]
    assert reports["folded"].layers[0].scale is not None
    assert reports["dora"].layers[0].scale is None
    assert reports["lora"].layers[0].scale.mean == 1.0
    with_base = {name: inspect_adapter(folder / name, folder / "base").layers[0] for name in ("adapter", *reports)}
    for name in ("folded", "dora"):
        assert with_base[name].change == pytest.approx(with_base["adapter"].change, rel=1e-5)


def test_layers_in_natural_order(folder):
    names = [f"model.layers.{index}.q" for index in (0, 2, 10, 1)]
    weights = {f"{name}.weight": torch.randn(6, 5) for name in names}
    made.write_adapter(folder / "adapter", weights, targets=names)
    order = [layer.name.split(".")[2] for layer in inspect_adapter(folder / "adapter").layers]
    assert order == ["0", "1", "2", "10"]


def test_similarity_of_the_layers_of_a_projection(folder):
    live = made.write_adapter(folder / "adapter", made.base_weights(), rank_pattern={"0.self_attn.v_proj": 2})
    (group,) = inspect_adapter(folder / "adapter").similarities
    assert (group.projection, group.layers) == ("q_proj", [name for name in made.TARGETS if "q_proj" in name])
    with torch.no_grad():
        (A, B), (C, D) = (live[name].factor_pair() for name in group.layers)

    def cosine(one, other):
        return float((one.double() * other.double()).sum() / one.double().norm() / other.double().norm())

    assert group.update[0][1] == group.update[1][0] == pytest.approx(cosine(B @ A, D @ C), rel=1e-5)
    assert group.A[0][1] == pytest.approx(cosine(A, C))
    assert group.B[0][1] == pytest.approx(cosine(B, D))
    assert group.mean_update() == pytest.approx(group.update[0][1])
    assert [group.A[i][i] for i in range(2)] == pytest.approx([1.0, 1.0])


def test_shared_output_layers_need_the_base(folder):
    made.write_adapter(folder / "adapter", made.base_weights(), share_output=True)
    with pytest.raises(ConfigError, match="shared"):
        inspect_adapter(folder / "adapter")
    assert len(inspect_adapter(folder / "adapter", folder / "base").layers) == 4


def test_no_adapter(folder):
    with pytest.raises(MissingKeyError, match="adapter_config"):
        inspect_adapter(folder / "base")


def test_many_layers_of_one_name_take_linear_time(tmp_path):
    """A thousand layers took half a minute once, ten thousand several."""
    names = [f"model.layers.{number}.q_proj" for number in range(1000)]
    tensors = {}
    for number, name in enumerate(names):
        tensors |= made.lora_tensors(name, 8, 8, rank=2, seed=number)
    made.write_peft(tmp_path / "adapter", tensors, r=2)
    start = time.monotonic()
    report = inspect_adapter(tmp_path / "adapter")
    assert time.monotonic() - start < 10
    assert [layer.name for layer in report.layers] == names
    (similarity,) = report.similarities
    assert (len(similarity.layers), similarity.layers[0], similarity.layers[-1]) == (256, names[0], names[-1])
    parts = ("lora_B.weight", "lora_A.weight")
    factors = [[tensors[f"{name}.{part}"].double() for part in parts] for name in (names[0], names[-1])]
    first, last = (B @ A for B, A in factors)
    expected = torch.nn.functional.cosine_similarity(first.flatten(), last.flatten(), dim=0)
    assert similarity.update[0][-1] == pytest.approx(float(expected), abs=1e-12)


def test_messages_name_the_directory(tmp_path):
    weights = made.base_weights()
    made.write_base(tmp_path / "base", weights)
    made.write_adapter(tmp_path / "adapter", weights)
    unseal(tmp_path / "adapter")
    key = next(k for k in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if k.endswith("weights.0"))
    edit_tensors(tmp_path / "adapter" / "adapter_model.safetensors", set_tensor(key, torch.ones(3, 5)))
    for use in (
        lambda: inspect_adapter(tmp_path / "adapter"),
        lambda: inspect_adapter(tmp_path / "adapter", tmp_path / "base"),
        lambda: fold_adapter(tmp_path / "adapter", tmp_path / "base"),
        lambda: merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(DoranError, match=str(tmp_path / "adapter")):
            use()
