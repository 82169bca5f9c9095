"""The report of an adapter directory holds what a direct calculation gives, in every form."""

import made
import oracle
import pytest
import torch

from doran_core.adapter import write_compiled
from doran_core.convert import compile_adapter, to_peft_dora
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import ConfigError, MissingKeyError


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
    compiled = compile_adapter(folder / "adapter", folder / "base")
    write_compiled(compiled, folder / "compiled")
    to_peft_dora(compiled, folder / "dora")
    made.write_peft(folder / "lora", made.lora_tensors(made.TARGETS[0], 24, 24))
    reports = {name: inspect_adapter(folder / name) for name in ("compiled", "dora", "lora")}
    assert [report.form for report in reports.values()] == ["compiled", "peft-dora", "peft-lora"]
    assert reports["compiled"].layers[0].scale is not None
    assert reports["dora"].layers[0].scale is None
    assert reports["lora"].layers[0].scale.mean == 1.0
    with_base = {name: inspect_adapter(folder / name, folder / "base").layers[0] for name in ("adapter", *reports)}
    for name in ("compiled", "dora"):
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
