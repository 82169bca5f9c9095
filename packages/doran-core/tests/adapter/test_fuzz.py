"""Whatever is in an adapter's files, reading it succeeds or raises a DoranError: nothing else gets out."""

import contextlib
import json
import shutil

import made
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doran_core.adapter import read_adapter, write_folded
from doran_core.convert import fold_adapter
from doran_core.errors import DoranError

FILES = {
    "trainable": ["adapter_config.json", "adapter_model.safetensors"],
    "folded": ["adapter_config.json", "adapter_model.safetensors", "doran_scale.safetensors"],
}
SETTINGS = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    made.write_adapter(folder / "trainable", weights, targets=made.TARGETS[:1], factors="static")
    write_folded(fold_adapter(folder / "trainable", folder / "base"), folder / "folded")
    return folder


def read_or_refuse(folder):
    with contextlib.suppress(DoranError):
        read_adapter(folder)


@SETTINGS
@given(data=st.data())
@pytest.mark.parametrize("form", FILES)
def test_bytes(originals, tmp_path, form, data):
    folder = shutil.copytree(originals / form, tmp_path / "adapter", dirs_exist_ok=True)
    path = folder / data.draw(st.sampled_from(FILES[form]))
    contents = bytearray((originals / form / path.name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, min(len(contents), 900) - 1))
        contents[position : position + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(contents)
    read_or_refuse(folder)


ODD = [None, True, -1, 0, 5, 1e400, "", "x", "(", [], [1], ["x"], [[]], {}, {"x": 1}, {"x": "y"}, {"(": 2}, {"x": [1]}]


@pytest.mark.parametrize("form", FILES)
def test_every_config_field_with_odd_values(originals, tmp_path, form):
    folder = shutil.copytree(originals / form, tmp_path / "adapter")
    fields = json.loads((folder / "adapter_config.json").read_text())
    for name in [*fields, "module_kinds", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "lora_bias"]:
        for value in ODD:
            (folder / "adapter_config.json").write_text(json.dumps(fields | {name: value}))
            read_or_refuse(folder)


@pytest.mark.parametrize("entry", [None, 3, [], {}, {"dtype": "F32"}, {"dtype": 1, "shape": "x", "data_offsets": [0]}])
def test_odd_header_entries(originals, tmp_path, entry):
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    header = json.dumps({"a": entry}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DoranError, match="not safetensors"):
        read_adapter(folder)


def test_deeply_nested_json(originals, tmp_path):
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("[" * 100_000)
    read_or_refuse(folder)
    header = b"[" * 100_000
    shutil.copy(originals / "trainable" / "adapter_config.json", folder)
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    read_or_refuse(folder)
