"""The private names of PyTorch that doran uses still exist, and each says why and until when."""

import copy
import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from doran_core.support.torch_internals import (
    ATTRIBUTES,
    COMPILED_PART,
    FSDP1_MARK,
    FSDP1_PART,
    NAMES,
    is_replica,
    remove_hooks,
    uncompiled,
)


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


def test_wrappers_have_the_names_that_are_stripped():
    common = importlib.import_module("torch.distributed.fsdp._common_utils")
    assert (common.FSDP_FLATTENED, common.FSDP_WRAPPED_MODULE) == (FSDP1_MARK, FSDP1_PART)
    layer = torch.nn.Linear(2, 2)
    compiled = torch.compile(layer)
    assert list(compiled.state_dict()) == [f"{COMPILED_PART}.weight", f"{COMPILED_PART}.bias"]
    assert uncompiled(compiled) is uncompiled(layer) is layer


def test_hooks_of_a_copy_are_removed_and_others_stay():
    layer, calls = torch.nn.Linear(2, 2), []

    def ours(*args):
        calls.append("ours")

    def other(*args):
        calls.append("other")

    layer.register_forward_pre_hook(ours)
    layer.register_forward_hook(ours, with_kwargs=True, always_call=True)
    layer.register_forward_hook(other)
    copied = copy.deepcopy(layer)
    remove_hooks(copied, lambda hook: hook is ours)
    copied(torch.ones(1, 2))
    assert calls == ["other"]
    layer(torch.ones(1, 2))
    assert calls == ["other", "ours", "ours", "other"]


PRIVATE = re.compile(r"\._(parameters|buffers|modules|version|\w+_hooks\w*|conv_forward|orig_mod|fsdp_\w+)\b(?!\()")


@pytest.mark.parametrize("package", ["doran_core", "doran_hf"])
def test_no_other_file_reads_private_names_of_modules(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    files = [file for file in Path(spec.origin).parent.rglob("*.py") if file.name != "torch_internals.py"]
    assert files
    assert [file for file in files if PRIVATE.search(file.read_text())] == []
