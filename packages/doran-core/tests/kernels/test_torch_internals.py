"""The private names of PyTorch that the accelerated path uses still exist, and each says why and until when."""

import functools
import importlib
import re
from pathlib import Path

import pytest
import torch

import doran_core
from doran_core.kernels.torch_internals import ATTRIBUTES, NAMES, is_replica


@pytest.mark.parametrize("entry", NAMES, ids=lambda entry: entry[1])
def test_a_private_name_exists(entry):
    path, name, why, removed_when = entry
    if "_cuda_" in name and not torch.backends.cuda.is_built():
        pytest.skip("this build of PyTorch has no CUDA")
    try:
        home = importlib.import_module(path)
    except ImportError:
        home = functools.reduce(getattr, path.split(".")[1:], torch)
    assert hasattr(home, name)
    assert why
    assert removed_when


@pytest.mark.parametrize("entry", ATTRIBUTES, ids=lambda entry: f"{entry[0].__name__}.{entry[1]}")
def test_objects_have_a_private_attribute(entry):
    kind, name, why, removed_when = entry
    assert hasattr(kind(), name)
    assert why
    assert removed_when


def test_replicas_say_so():
    replica = torch.nn.Linear(2, 2)._replicate_for_data_parallel()
    assert is_replica(replica)
    assert not is_replica(torch.nn.Linear(2, 2))


def test_no_other_file_of_kernels_and_layers_reads_a_modules_dictionaries():
    package = Path(doran_core.__file__).parent
    names = re.compile(r"\._(parameters|buffers|modules|version|forward_hooks|forward_pre_hooks)\b(?!\()")
    for file in [*package.glob("kernels/*.py"), *package.glob("layers/*.py")]:
        assert file.name == "torch_internals.py" or not names.findall(file.read_text()), file
