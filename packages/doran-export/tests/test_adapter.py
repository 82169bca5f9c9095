"""`--base` and `--adapter`: the adapter is merged first, and the graph computes the adapted model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import TEXT, saved, tiny_llama
from transformers import AutoModelForCausalLM

from doran_core import DoranConfig, adapt
from doran_core.adapter import FoldedAdapter, FoldedModule, read_folded, write_folded
from doran_core.cli.main import main
from doran_core.errors import BaseMismatchError, ConfigError
from doran_export import OnnxRunner, export

_MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A base and an adapter for it, large enough to change every logit."""
    model = tiny_llama(num_hidden_layers=1)
    base = saved(model, tmp_path / "base")
    random = torch.Generator().manual_seed(1)
    modules = {}
    for name in _MODULES:
        weight = model.get_submodule(name).weight
        b, a = (torch.randn(shape, generator=random) * 0.3 for shape in ((weight.shape[0], 4), (4, weight.shape[1])))
        scale = 1 + 0.2 * torch.randn(weight.shape[0], generator=random)
        magnitude = scale * (weight + b @ a).norm(dim=1)
        modules[name] = FoldedModule(name, a, b, scale.abs(), magnitude.abs())
    write_folded(FoldedAdapter(modules, task_type="CAUSAL_LM"), tmp_path / "adapter")
    return base, tmp_path / "adapter"


def test_export_of_base_and_adapter(
    base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = base_and_adapter
    assert (
        main(
            [
                "export",
                "--base",
                str(base),
                "--adapter",
                str(adapter),
                "--out",
                str(tmp_path / "out"),
                "--exporter",
                "torch",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, text-generation, fp32 for cpu, by torch" in printed
    assert "greedy tokens identical on" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}
    assert not (tmp_path / "out" / "merged").exists()

    # W' = c (W0 + B A), written out here and put into the base.
    model = AutoModelForCausalLM.from_pretrained(base)
    before = model(torch.tensor([[3, 4, 5]])).logits
    for name, part in read_folded(adapter).modules.items():
        weight = model.get_submodule(name).weight.data
        weight.copy_(part.scale[:, None] * (weight + part.B @ part.A))
    after = model(torch.tensor([[3, 4, 5]])).logits
    got = OnnxRunner(tmp_path / "out").run({"input_ids": [[3, 4, 5]]})["logits"]
    np.testing.assert_allclose(got, after.detach().numpy(), atol=1e-4)
    assert (after - before).abs().max() > 0.1


def test_adapter_for_another_base(base_and_adapter: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = base_and_adapter
    folded = read_folded(adapter)
    wrong = FoldedAdapter(folded.modules, base_fingerprint="0" * 64, task_type="CAUSAL_LM")
    write_folded(wrong, tmp_path / "wrong")
    with pytest.raises(BaseMismatchError, match="0000"):
        export(out=tmp_path / "out", base=base, adapter=tmp_path / "wrong", exporter="torch")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "wrong"}


def test_a_head_that_the_base_lacks_needs_its_task(tmp_path: Path) -> None:
    """A bare encoder as base: the task that its architecture names would leave the trained classifier out."""
    torch.manual_seed(0)
    shape = {**TEXT, "num_hidden_layers": 1, "intermediate_size": 48, "max_position_embeddings": 64}
    base = saved(transformers.BertModel(transformers.BertConfig(**shape)).eval(), tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    adapter = adapt(model, DoranConfig(rank=2, target_modules=["query"], modules_to_save=["classifier"])).save(
        tmp_path / "adapter"
    )
    with pytest.raises(ConfigError, match=r"brings classifier\.bias, which BertModel does not have: .* --task"):
        export(out=tmp_path / "out", base=base, adapter=adapter)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    encoder = export(out=tmp_path / "encoder", base=base, adapter=adapter, task="feature-extraction")
    assert encoder.architecture == "BertModel"  # asked for by name
    export(out=tmp_path / "out", base=base, adapter=adapter, task="text-classification")
    with torch.inference_mode():
        expected = model.eval()(torch.tensor([[3, 4, 5]])).logits.numpy()
    got = OnnxRunner(tmp_path / "out").run({"input_ids": [[3, 4, 5]]})["logits"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_command_refuses(
    base_and_adapter: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = base_and_adapter
    for arguments, message in (
        (["--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "o")], "does not exist"),
        (["--model", str(base), "--out", str(adapter)], "is not empty"),
        (["--base", str(base), "--out", str(tmp_path / "o")], "both a base and an adapter"),
        (
            [
                "--base",
                str(base),
                "--adapter",
                str(tmp_path / "none"),
                "--out",
                str(tmp_path / "o"),
                "--road",  # the old name
                "torch",
            ],
            "none",
        ),
        (["--model", str(base), "--out", str(tmp_path / "o"), "--precision", "fp12"], "precision 'fp12' is not known"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("doran: error: ")
        assert message in error
        assert not (tmp_path / "o").exists()
