"""The private names of PyTorch that the accelerated path uses still exist, and each says why and until when."""

import functools
import importlib

import pytest
import torch

from doran_core.kernels.torch_internals import NAMES


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
