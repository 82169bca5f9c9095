"""The gate of the readers: pipes and devices, sizes, odd JSON, broken headers, and directories that are replaced."""

import json
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import made
import pytest
import torch
from safetensors.torch import save_file

from doran_core.adapter import read_adapter, write_folded, write_trainable
from doran_core.adapter.digest import directory_digest
from doran_core.checkpoint.checkpoint import Checkpoint
from doran_core.convert import fold_adapter
from doran_core.errors import AdapterFormatError, CheckpointError, CorruptFileError, DoranError, MissingKeyError
from doran_core.files.jsonfile import parse_object, read_json
from doran_core.files.opening import OpenDirectory, is_plain_name, named_errors, read_directory, read_file
from doran_core.files.tensors import tensor_pieces
from doran_core.merge import merge_checkpoint

FILES = ("adapter_config.json", "adapter_model.safetensors", "doran_scale.safetensors")
BASE_FILES = ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    weights = made.base_weights()
    made.write_base(folder / "base", weights)
    made.write_adapter(folder / "trainable", weights)
    write_folded(fold_adapter(folder / "trainable", folder / "base"), folder / "folded")
    return folder


def pipe(path):
    os.mkfifo(path)


def link_to_a_pipe(path):
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def link_to_a_device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as opened:
        here = Path.cwd()
        os.chdir(path.parent)  # where the name is short enough for a socket
        try:
            opened.bind(path.name)
        finally:
            os.chdir(here)


def directory(path):
    path.mkdir()


@pytest.fixture
def in_time():
    """A reader that waits for a pipe is woken up and fails."""

    def wake(*_):
        raise TimeoutError("waited for 20 seconds")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


SPECIAL = [pipe, link_to_a_pipe, link_to_a_device, unix_socket, directory]


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("put", SPECIAL)
@pytest.mark.parametrize("name", FILES)
def test_only_regular_files_of_an_adapter_are_read(originals, tmp_path, name, put):
    folder = shutil.copytree(originals / "folded", tmp_path / "adapter")
    (folder / name).unlink()
    put(folder / name)
    with pytest.raises(AdapterFormatError, match=name):
        read_adapter(folder)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("put", SPECIAL)
@pytest.mark.parametrize("name", BASE_FILES)
def test_only_regular_files_of_a_checkpoint_are_read(originals, tmp_path, name, put):
    base = shutil.copytree(originals / "base", tmp_path / "base")
    (base / name).unlink()
    put(base / name)
    with pytest.raises(CheckpointError, match=name):
        merge_checkpoint(base, originals / "trainable", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_to_regular_files_are_read(originals, tmp_path):
    for name in FILES:
        (tmp_path / name).symlink_to(originals / "folded" / name)
    assert read_adapter(tmp_path).modules.keys() == set(made.TARGETS)


def test_a_dangling_shard_is_named(originals, tmp_path):
    base = shutil.copytree(originals / "base", tmp_path / "base")
    (base / BASE_FILES[2]).unlink()
    (base / BASE_FILES[2]).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{BASE_FILES[2]} is missing"):
        Checkpoint(base)


def test_sizes_are_limited_before_anything_is_parsed(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 10)
    assert read_file(tmp_path / "small", 10) == b"x" * 10
    with pytest.raises(CorruptFileError, match="small: more than 9 bytes"):
        read_file(tmp_path / "small", 9)
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**42)  # sparse
    with pytest.raises(CorruptFileError, match="huge: more than"):
        read_json(tmp_path / "huge")


def test_a_sparse_tensor_file_larger_than_the_memory(originals, tmp_path):
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    os.truncate(folder / FILES[1], 2**42)
    with pytest.raises(CorruptFileError, match=f"{FILES[1]}: more than"):
        read_adapter(folder)


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", FILES)
def test_what_a_header_does_not_describe_is_not_read(originals, tmp_path, name):
    """A sparse file of 8 GB takes no disk, and would take all memory."""
    folder = shutil.copytree(originals / "folded", tmp_path / "adapter")
    os.truncate(folder / name, 2**33)
    for use in (
        lambda: read_adapter(folder),
        lambda: directory_digest(folder),
        lambda: merge_checkpoint(originals / "base", folder, tmp_path / "out"),
    ):
        with pytest.raises(AdapterFormatError, match=name):
            use()


def test_a_huge_file_beside_the_weights_is_not_copied(originals, tmp_path):
    base = shutil.copytree(originals / "base", tmp_path / "base")
    os.truncate(base / "tokenizer.json", 2**41)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: too large"):
        merge_checkpoint(base, originals / "trainable", tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"a": "\\ud800"}',
        '{"a\\uDFFF": 1}',
        '{"a": ' + "9" * 6000 + "}",
        '{"a": 123456789012345678901}',
        "[" * 100_000,
        '{"a": "\x01"}',
    ],
)
def test_json_that_other_programs_would_read_otherwise(tmp_path, text):
    with pytest.raises((ValueError, RecursionError)):
        parse_object(text)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"x\.json: not JSON"):
        read_json(tmp_path / "x.json")


def test_surrogate_pairs_are_text():
    assert parse_object('{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}


def shard(path, header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + payload)


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


BROKEN = {
    "true as a size": {"a": entry(shape=[True, 4])},
    "no such dtype": {"a": entry(dtype="F99")},
    "a dtype that is a list": {"a": entry(dtype=["F32"])},
    "a 4-bit dtype of a wrong size": {"a": entry(dtype="F4", shape=[4])},
    "an 8-bit dtype of a wrong size": {"a": entry(dtype="F8_E8M0", shape=[4])},
    "sizes that overflow": {"a": entry(shape=[0, 2**62], offsets=[0, 16])},
    "70 dimensions": {"a": entry(shape=[1] * 69 + [4])},
    "a size with a fraction": {"a": entry(shape=[4.0])},
    "three offsets": {"a": entry(offsets=[0, 16, 16])},
    "a list": [entry()],
    "a name twice": b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2),
    "half a surrogate pair": b'{"\\ud800":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "UTF-16": json.dumps({"a": entry()}).encode("utf-16"),
    "a space before the object": b" " + json.dumps({"a": entry()}).encode(),
    "minus zero": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[-0,16]}}',
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_safetensors_refuses_is_refused(tmp_path, originals, case):
    base = shutil.copytree(originals / "base", tmp_path / "base")
    shutil.copy(originals / "base" / "config.json", base)
    for file in base.glob("model*"):
        file.unlink()
    shard(base / "model.safetensors", BROKEN[case], b"\0" * 16)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(base)
    folder = shutil.copytree(originals / "trainable", tmp_path / "adapter")
    shard(folder / FILES[1], BROKEN[case], b"\0" * 16)
    with pytest.raises(DoranError, match=FILES[1]):
        read_adapter(folder)


@pytest.mark.parametrize("architectures", [5, "LlamaForCausalLM", [5], {}])
def test_architectures_that_are_no_names(originals, tmp_path, architectures):
    base = shutil.copytree(originals / "base", tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(CheckpointError, match=r"config.json: architectures="):
        merge_checkpoint(base, originals / "trainable", tmp_path / "out")


def test_plain_names():
    assert all(map(is_plain_name, ("a", "a.b", "ä", "x" * 255)))
    assert not any(map(is_plain_name, ("", ".", "..", ".a", "a/b", "/", "a\0", "x" * 256, "ä" * 128, "\ud800", "a\\b")))


def test_named_errors_name_the_file_once():
    for failure in (KeyError("x"), OverflowError("y"), RecursionError("z"), OSError(5, "Input/output error")):
        with pytest.raises(CorruptFileError, match=r"^here/file: "), named_errors("here/file"):
            raise failure
    with pytest.raises(MissingKeyError, match=r"^here: no x$"), named_errors("here"):
        raise MissingKeyError("no x")
    with pytest.raises(MissingKeyError, match=r"^in here: no x$"), named_errors("here"):
        raise MissingKeyError("in here: no x")


def write_number(directory, number):
    """An adapter in which configuration and tensors say the same number."""
    record, _ = made.trainable_record(made.base_weights(), alpha=float(number), fingerprint=False)
    for parts in record.modules.values():
        parts["magnitude"] = torch.full_like(parts["magnitude"], float(number))
    write_trainable(record, directory, overwrite=True)


def test_a_reader_never_mixes_two_saves(tmp_path):
    write_number(tmp_path / "adapter", 1)
    done, failures = threading.Event(), []

    def overwrite():
        try:
            for number in range(2, 60):
                write_number(tmp_path / "adapter", number)
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    writer = threading.Thread(target=overwrite)
    writer.start()
    reads = 0
    while not done.is_set() or reads < 10:
        adapter = read_adapter(tmp_path / "adapter")
        numbers = {float(parts["magnitude"][0]) for parts in adapter.modules.values()} | {adapter.config.alpha}
        assert len(numbers) == 1
        reads += 1
    writer.join()
    assert not failures


def test_a_reader_between_two_files_starts_again(tmp_path, originals):
    """The writer comes exactly between the reading of two files."""
    write_number(tmp_path / "adapter", 1)
    seen = []

    def read(directory):
        first = json.loads(directory.read(FILES[0], 10**6))["alpha"]
        if not seen:
            write_number(tmp_path / "adapter", 2)
        seen.append(first)
        return first, directory.read(FILES[1], 10**6)

    alpha, _ = read_directory(tmp_path / "adapter", read)
    assert (seen, alpha) == ([1.0, 2.0], 2.0)


def test_a_directory_that_never_stays(tmp_path):
    (tmp_path / "x").mkdir()

    def read(directory):
        (tmp_path / "x").rename(tmp_path / f"x{len(list(tmp_path.iterdir()))}")
        (tmp_path / "x").mkdir()

    with pytest.raises(CorruptFileError, match="was replaced 100 times"):
        read_directory(tmp_path / "x", read)


def test_a_float8_tensor_is_copied_and_not_replaced(tmp_path, originals):
    weights = made.base_weights()
    weights["extra.weight"] = torch.zeros(8, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    made.write_base(tmp_path / "base", weights, shards=1)
    made.write_adapter(tmp_path / "plain", weights)
    merge_checkpoint(tmp_path / "base", tmp_path / "plain", tmp_path / "out")
    made.write_adapter(tmp_path / "adapter", weights, extra={"extra.weight": torch.ones(8)}, modules_to_save=["extra"])
    with pytest.raises(CheckpointError, match=r"extra\.weight.*F8_E8M0"):
        merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize("shape", [(), (0, 4), (24, 0)])
def test_base_weights_that_are_no_matrix(tmp_path, originals, shape):
    weights = made.base_weights()
    weights[f"{made.TARGETS[0]}.weight"] = torch.ones(shape)
    made.write_base(tmp_path / "base", weights)
    for use in (
        lambda: merge_checkpoint(tmp_path / "base", originals / "trainable", tmp_path / "out"),
        lambda: fold_adapter(originals / "trainable", tmp_path / "base"),
    ):
        with pytest.raises(DoranError, match=made.TARGETS[0]):
            use()


def test_save_file_is_what_the_library_reads(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    assert Checkpoint(tmp_path).keys() == ["a"]


def test_a_file_that_grows_while_it_is_read_is_not_read_for_ever(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(2**19)}, file)

    def read_while_it_grows(directory):
        for count, _ in enumerate(tensor_pieces(directory, file.name)):
            assert count < 10
            with file.open("ab") as opened:
                opened.write(bytes(2**20))

    with OpenDirectory(tmp_path) as directory, pytest.raises(CorruptFileError, match="size changed"):
        read_while_it_grows(directory)
