"""The private names of PEFT, transformers and accelerate that doran-hf uses still exist, and stand in one file."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from transformers import PreTrainedModel, Trainer

import doran_hf

WRITTEN_BY = {
    "_is_hf_initialized": "transformers.core_model_loading",
    "_is_expert_parallel": "transformers.integrations.moe",
    "_hf_hook": "accelerate.hooks",
}
"""Marks on objects, and the module that sets them."""


def test_private_methods_exist():
    assert callable(Trainer._load_from_checkpoint)
    assert hasattr(PreTrainedModel, "_keys_to_ignore_on_load_missing")


@pytest.mark.parametrize("mark", WRITTEN_BY)
def test_private_marks_are_still_set(mark):
    if mark == "_is_expert_parallel" and Version(transformers.__version__) < Version("5.18"):
        pytest.skip("before 5.18 transformers replaces the forward of such a module, and doran-hf refuses that")
    source = inspect.getsource(importlib.import_module(WRITTEN_BY[mark]))
    assert re.search(rf"\.{mark} = ", source)


def test_no_other_file_reads_them():
    names = re.compile("|".join([*WRITTEN_BY, r"\._load_from_checkpoint", "_keys_to_ignore", "_maybe_include_all"]))
    files = [file for file in Path(doran_hf.__file__).parent.rglob("*.py") if file.name != "peft_internals.py"]
    assert files
    assert [file for file in files if names.search(file.read_text())] == []
