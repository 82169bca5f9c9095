"""An adapter trained with a generator of the user's own: loaded, merged, folded and inspected from its files."""

import copy
from pathlib import Path

import made
import pytest
import torch
from own_generators import Cosines
from safetensors.torch import load_file, save_file
from torch import nn

from doran_core import DoranConfig, adapt, load
from doran_core.cli.main import main
from doran_core.convert import fold_adapter
from doran_core.diagnostics import inspect_adapter
from doran_core.errors import AdapterFormatError, ConfigError, MissingKeyError, TensorShapeError
from doran_core.merge import merge_checkpoint


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A base checkpoint of two layers, an adapter of it with generators of its own, and the adapted model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.py").write_text("from own_generators import Cosines\n\nnot_callable = 3\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    base = copy.deepcopy(model)
    handle = adapt(model, DoranConfig(rank=3, target_modules=["0", "1"]), factor_builder=Cosines)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    handle.save("adapter")
    return base, model


def merged_outputs(base, x):
    base.load_state_dict(load_file("merged/model.safetensors"))
    return base(x)


def test_loaded_with_its_builder(trained):
    base, model = trained
    x = torch.randn(5, 12)
    load(base, "adapter", factor_builder=Cosines)
    assert torch.equal(base(x), model(x))


def test_merged_from_python_and_from_the_command_line(trained):
    base, model = trained
    x = torch.randn(5, 12)
    merge_checkpoint("base", "adapter", "merged", factor_builder=Cosines)
    torch.testing.assert_close(merged_outputs(base, x), model(x))
    command = "merge --base base --adapter adapter --factor-builder here:Cosines --out again"
    assert main(command.split()) == 0
    assert made.folder_bytes(Path("again")) == made.folder_bytes(Path("merged"))


def test_compiled_and_then_merged_without_it(trained):
    base, model = trained
    x = torch.randn(5, 12)
    command = "convert adapter --to folded --base base --factor-builder here:Cosines --out folded"
    assert main(command.split()) == 0
    merge_checkpoint("base", "folded", "merged")
    torch.testing.assert_close(merged_outputs(base, x), model(x))


def test_inspected(trained, capsys):
    report = inspect_adapter("adapter", "base", factor_builder=Cosines)
    assert [layer.rank for layer in report.layers] == [3, 3]
    assert main(["inspect", "adapter", "--base", "base", "--factor-builder", "here:Cosines"]) == 0
    with pytest.raises(ConfigError, match="generator is not DoRAN's"):
        inspect_adapter("adapter", factor_builder=Cosines)


@pytest.mark.parametrize("use", [merge_checkpoint, fold_adapter], ids=lambda use: use.__name__)
def test_without_the_builder_the_error_says_what_to_give(trained, use):
    arguments = ("base", "adapter", "merged") if use is merge_checkpoint else ("adapter", "base")
    with pytest.raises(
        AdapterFormatError,
        match=r"adapter: .*\(factors.B, factors.frequencies\).*factor_builder.*--factor-builder.*folded form",
    ):
        use(*arguments)


class Wide(Cosines):
    def forward(self):
        A, B = super().forward()
        return torch.cat([A, A], 1), B


def test_a_builder_that_does_not_fit(trained):
    with pytest.raises(TensorShapeError, match=r"'0': Wide gives A \[3, 24\].*expected A \[3, 12\]"):
        fold_adapter("adapter", "base", factor_builder=Wide)
    with pytest.raises(MissingKeyError, match=r"'0': missing tensor\(s\) \['factors.bias'"):
        fold_adapter("adapter", "base", factor_builder=lambda spec: nn.Linear(spec.d_in, spec.d_out))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("here", "expected MODULE:NAME"),
        ("nowhere_at_all:Cosines", "No module named"),
        ("broken:Cosines", "ZeroDivisionError: division by zero"),
        ("here:Sines", "has no attribute"),
        ("here:not_callable", "expected a callable, got 3"),
    ],
)
def test_a_builder_that_cannot_be_had(trained, capsys, given, words):
    assert main(["merge", "--base", "base", "--adapter", "adapter", "--out", "merged", "--factor-builder", given]) == 2
    assert words in capsys.readouterr().err
    assert not Path("merged").exists()
