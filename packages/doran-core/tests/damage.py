"""Ways to spoil an adapter's files."""

import json
import pickle

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def edit_tensors(file, change):
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata=metadata)


def edit_config(folder, **changes):
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields = {name: value for name, value in (fields | changes).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def unseal(folder):
    """Take a trainable adapter's digests away, so that edits get as far as they would in a file of version 1."""
    edit_config(folder, digest=..., tensors_digest=...)


def set_tensor(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


def drop(key):
    return lambda tensors: tensors.pop(key)


def poison(key, value):
    def change(tensors):
        tensors[key].view(-1)[0] = value

    return change


def torch_save(path):
    torch.save({"a": torch.ones(2)}, path)


def old_torch_save(path):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def pickled(path):
    path.write_bytes(pickle.dumps({"a": 1}, protocol=4) + b"\0" * 2000)
