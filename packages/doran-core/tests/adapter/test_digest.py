"""Files that doran writes carry digests: any flipped bit is refused, and so are the files of two saves together."""

import hashlib
import json
import random
import shutil

import made
import pytest
import torch

from doran_core.adapter import read_adapter, write_folded, write_peft_dora, write_trainable
from doran_core.adapter.digest import directory_digest, fields_digest, tensors_digest
from doran_core.adapter.schema import CONFIG_FILE, SCALE_FILE, TENSOR_FILE
from doran_core.convert import fold_adapter
from doran_core.errors import AdapterFormatError, CorruptFileError, DoranError

FILES = {
    "trainable": (CONFIG_FILE, TENSOR_FILE),
    "folded": (CONFIG_FILE, TENSOR_FILE, SCALE_FILE),
    "peft_dora": (CONFIG_FILE, TENSOR_FILE),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One adapter of each form, and another save of the same layers."""
    folder = tmp_path_factory.mktemp("written")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    for name, seed, task in (("", 5, "CAUSAL_LM"), ("other_", 6, "FEATURE_EXTRACTION")):
        record, _ = made.trainable_record(weights, rank=2, seed=seed, task_type=task)
        write_trainable(record, folder / f"{name}trainable")
        folded = fold_adapter(folder / f"{name}trainable", folder / "base")
        write_folded(folded, folder / f"{name}folded")
        write_peft_dora(folded, folder / f"{name}peft_dora")
    return folder


@pytest.mark.parametrize(("form", "file"), [(form, file) for form, files in FILES.items() for file in files])
def test_every_flipped_bit_is_refused(written, tmp_path, form, file):
    shutil.copytree(written / form, tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    good = path.read_bytes()
    draw = random.Random(18)
    positions = {draw.randrange(8 * len(good)) for _ in range(250)}
    passed = []
    for position in sorted(positions):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        path.write_bytes(bad)
        try:
            read_adapter(tmp_path / "adapter")
            passed.append(position)
        except DoranError:
            pass
    assert not passed, [(p, good[p // 8 - 10 : p // 8 + 10]) for p in passed]
    path.write_bytes(good)
    assert read_adapter(tmp_path / "adapter").digest


@pytest.mark.parametrize(("form", "file"), [(form, file) for form, files in FILES.items() for file in files])
def test_files_of_two_saves_are_refused(written, tmp_path, form, file):
    shutil.copytree(written / form, tmp_path / "adapter")
    shutil.copy(written / f"other_{form}" / file, tmp_path / "adapter" / file)
    with pytest.raises(CorruptFileError):
        read_adapter(tmp_path / "adapter")


def test_an_edit_by_hand_says_what_to_delete(written, tmp_path, caplog):
    shutil.copytree(written / "trainable", tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG_FILE
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere"}
    path.write_text(json.dumps(fields))
    with pytest.raises(CorruptFileError, match=r"edited by hand.*delete its field 'digest'"):
        read_adapter(tmp_path / "adapter")
    del fields["digest"]
    path.write_text(json.dumps(fields))
    assert read_adapter(tmp_path / "adapter").base_model == "elsewhere"
    assert "has no digest" in caplog.text


def test_a_header_without_digest_is_refused(written, tmp_path):
    shutil.copytree(written / "folded", tmp_path / "adapter")
    path = tmp_path / "adapter" / SCALE_FILE
    path.write_bytes(path.read_bytes().replace(b'"digest"', b'"eigest"'))
    with pytest.raises(AdapterFormatError, match="no 'digest' in its metadata"):
        read_adapter(tmp_path / "adapter")


def test_the_digest_is_of_content(written):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    known = tensors_digest(tensors)
    assert known == tensors_digest(dict(reversed(tensors.items())))
    assert known == tensors_digest({**tensors, "b": tensors["b"].T.contiguous().T})
    others = [
        {**tensors, "b": tensors["b"].reshape(3, 2)},
        {**tensors, "b": tensors["b"].double()},
        {"c": tensors["b"], "a": tensors["a"]},
        {**tensors, "empty": torch.ones(0)},
    ]
    assert len({known, *map(tensors_digest, others)}) == 5
    assert fields_digest({"a": 1, "digest": "x"}) == fields_digest({"a": 1}) != fields_digest({"a": 2})
    assert directory_digest(written / "folded") != directory_digest(written / "other_folded")


@pytest.mark.parametrize(("form", "passes"), [("trainable", 1), ("folded", 2)])
def test_a_reader_hashes_no_byte_more_often_than_a_digest_needs(written, monkeypatch, form, passes):
    """Reading is mostly hashing. Of the folded form the scale file records its neighbour's bytes, header included."""
    real, hashed = hashlib.sha256, []

    class Counting:
        def __init__(self, data=b""):
            self.made = real(data)
            hashed.append(len(data))

        def update(self, data):
            hashed.append(len(data))
            self.made.update(data)

        def hexdigest(self):
            return self.made.hexdigest()

    monkeypatch.setattr(hashlib, "sha256", Counting)
    adapter = read_adapter(written / form)
    assert adapter.digest
    size = sum((written / form / file).stat().st_size for file in FILES[form])
    assert sum(hashed) < (passes + 0.1) * size
