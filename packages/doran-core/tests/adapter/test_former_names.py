"""Names that were changed after 0.1, such as "compiled" for the folded form: each works, and says the present one."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import doran_core
from doran_core import DoranConfig, adapt, adapter, convert, layers, read_folded
from doran_core.cli.main import main


@pytest.mark.parametrize(
    ("package", "former", "present"),
    [
        (doran_core, "read_compiled", "read_folded"),
        (doran_core, "write_compiled", "write_folded"),
        (adapter, "CompiledAdapter", "FoldedAdapter"),
        (adapter, "CompiledModule", "FoldedModule"),
        (adapter, "read_compiled", "read_folded"),
        (adapter, "write_compiled", "write_folded"),
        (convert, "compile_adapter", "fold_adapter"),
        (layers, "DoranLayer", "AdaptedLayer"),
    ],
)
def test_names(package, former, present):
    with pytest.warns(DeprecationWarning, match=f"{former} is called {present} now"):
        assert getattr(package, former) is getattr(package, present)


def test_handle_and_command(tmp_path):
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    handle = adapt(model, DoranConfig(rank=2, target_modules=["0"]))
    with pytest.warns(DeprecationWarning, match="folded"):
        handle.save(tmp_path / "saved", form="compiled")
    with pytest.warns(DeprecationWarning, match="folded"):
        record = handle.compiled()
    assert torch.equal(read_folded(tmp_path / "saved").modules["0"].A, record.modules["0"].A)
    handle.save(tmp_path / "trainable")
    where = ["--base", str(tmp_path / "base"), "--out", str(tmp_path / "converted")]
    assert main(["convert", str(tmp_path / "trainable"), "--to", "compiled", *where]) == 0
    assert torch.equal(read_folded(tmp_path / "converted").modules["0"].A, record.modules["0"].A)
