"""The one atomic writer: other programs' files, kills, races, places that cannot be replaced, modes, errors."""

import errno
import multiprocessing
import os
import threading
import time
from pathlib import Path

import made
import pytest

from doran_core.adapter import read_adapter, write_trainable
from doran_core.errors import CheckpointError, CorruptFileError, DoranError
from doran_core.files import swap
from doran_core.files.atomic import new_directory, write_file
from doran_core.files.temporary import SUFFIX, temporary
from doran_core.merge import merge_checkpoint

OWNED = ("a", "b")


def save(target, content, *, overwrite=True):
    with new_directory(target, overwrite=overwrite, owned=OWNED) as staging:
        (staging / "a").write_text(content)


def test_other_programs_files_stay(tmp_path):
    save(tmp_path / "out", "1")
    (tmp_path / "out" / "b").write_text("old")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "runs" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "runs" / "deep" / "events").write_text("mine, too")
    (tmp_path / "out" / "link").symlink_to("notes.txt")
    save(tmp_path / "out", "2")
    assert made.folder_bytes(tmp_path / "out") == {
        "a": b"2",
        "notes.txt": b"mine",
        "runs/deep/events": b"mine, too",
        "link": b"mine",
    }
    assert (tmp_path / "out" / "link").is_symlink()
    assert made.hidden(tmp_path) == []


def test_files_that_come_at_any_moment_stay(tmp_path, monkeypatch):
    """One is written while ours are written, one after the carrying, one into the directory that was swapped out."""
    target = tmp_path / "out"
    save(target, "1")
    (target / "log").write_text("first line\n")
    exchange = swap._exchange

    def between(first, second):
        (target / "after").write_text("2")
        (target / "new-folder").mkdir()
        (target / "new-folder" / "x").write_text("3")
        (target / "log.part").write_text("first line\nsecond line\n")
        (target / "log.part").replace(target / "log")
        exchange(first, second)
        (first / "late").write_text("4")

    monkeypatch.setattr(swap, "_exchange", between)
    with new_directory(target, overwrite=True, owned=OWNED) as staging:
        (staging / "a").write_text("2")
        (target / "during").write_text("1")
    assert made.folder_bytes(target) == {
        "a": b"2",
        "during": b"1",
        "after": b"2",
        "new-folder/x": b"3",
        "late": b"4",
        "log": b"first line\nsecond line\n",
    }
    assert made.hidden(tmp_path) == []


def test_what_is_written_after_the_swap_is_not_set_back(tmp_path, monkeypatch):
    target = tmp_path / "out"
    save(target, "1")
    (target / "state").write_text("old")
    exchange = swap._exchange

    def then_write(first, second):
        exchange(first, second)
        (target / "state.part").write_text("new")
        (target / "state.part").replace(target / "state")

    monkeypatch.setattr(swap, "_exchange", then_write)
    save(target, "2")
    assert (target / "state").read_text() == "new"


@pytest.mark.parametrize("links", [True, False])
def test_writers_beside_lose_nothing(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_, **__):
            raise OSError(errno.EOPNOTSUPP, "no hard links")

        monkeypatch.setattr(os, "link", refuse)
    target, written, stop = tmp_path / "out", [], threading.Event()
    save(target, "0")

    def write_beside():
        number = 0
        while not stop.is_set() and number < 200:
            time.sleep(0.002)
            try:
                (target / f"note-{number}").write_text(str(number))
            except FileNotFoundError:  # the open came between two directories: the program hears of it
                continue
            written.append(number)
            number += 1

    writer = threading.Thread(target=write_beside)
    writer.start()
    saves = 0
    while saves < 8 or (len(written) < 9 and saves < 5000):  # a quick machine ends eight before the other has begun
        save(target, str(saves))
        saves += 1
    stop.set()
    writer.join()
    lost = [n for n in written if not (target / f"note-{n}").exists()]
    assert (len(written) > 8, lost) == (True, [])
    assert all((target / f"note-{n}").read_text() == str(n) for n in written)
    assert made.hidden(tmp_path) == []


def hang(target, ready):
    with new_directory(Path(target), overwrite=True, owned=OWNED) as staging:
        (staging / "a").write_text("half")
        ready.set()
        threading.Event().wait()


def test_leftovers_of_the_killed_are_swept_and_those_of_the_living_stay(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = []
    for name in ("killed", "living"):
        ready = context.Event()
        processes.append(context.Process(target=hang, args=(tmp_path / name, ready)))
        processes[-1].start()
        assert ready.wait(60)
    processes[0].kill()
    processes[0].join()
    assert len(made.hidden(tmp_path)) == 2
    save(tmp_path / "another", "1")
    assert [name.split(".")[1] for name in made.hidden(tmp_path)] == ["living"]
    processes[1].kill()
    processes[1].join()
    write_file(tmp_path / "file", "x")
    assert made.hidden(tmp_path) == []


def test_a_symlink_that_looks_like_a_leftover_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("1")
    (tmp_path / f".trap{SUFFIX}").symlink_to("precious")
    save(tmp_path / "out", "1")
    assert (tmp_path / "precious" / "x").exists()


def test_two_writers_at_once(tmp_path):
    failures = []

    def write(content):
        try:
            for _ in range(20):
                save(tmp_path / "out", content)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(str(number),)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert (tmp_path / "out" / "a").read_text() in "0123"
    assert made.hidden(tmp_path) == []


@pytest.mark.parametrize("empty", [True, False])
def test_a_second_writer_without_overwrite_is_refused_at_the_end_too(tmp_path, empty):
    target = tmp_path / "out"
    if not empty:
        target.mkdir()
        (target / "notes").write_text("mine")
    with pytest.raises(CheckpointError), new_directory(target, owned=OWNED) as staging:  # noqa: PT012
        (staging / "a").write_text("second")
        save(target, "first", overwrite=False)
    assert (target / "a").read_text() == "first"
    assert empty or (target / "notes").read_text() == "mine"
    assert made.hidden(tmp_path) == []


@pytest.mark.parametrize("given", [".", "", "../here", "..", "/"])
@pytest.mark.parametrize("owned", [None, OWNED])
def test_the_current_directory_is_not_taken_away(tmp_path, monkeypatch, given, owned):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    inode = Path().stat().st_ino
    with (
        pytest.raises(CheckpointError, match="current directory"),
        new_directory(Path(given), overwrite=True, owned=owned),
    ):
        pytest.fail("nothing is to be written")
    assert Path().stat().st_ino == inode == (tmp_path / "here").stat().st_ino
    assert made.hidden(tmp_path) == made.hidden(tmp_path / "here") == []


def test_saving_and_merging_into_the_current_directory(tmp_path, monkeypatch):
    made.write_base(tmp_path / "base")
    record, _ = made.trainable_record(made.base_weights())
    write_trainable(record, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for use in (
        lambda: write_trainable(record, ".", overwrite=True),
        lambda: write_trainable(record, "", overwrite=True),
        lambda: merge_checkpoint(tmp_path / "base", ".", "/"),
        lambda: merge_checkpoint(tmp_path / "base", ".", ""),
    ):
        with pytest.raises(DoranError, match="current directory"):
            use()
    assert read_adapter(".").modules.keys() == set(made.TARGETS)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes(tmp_path, mask):
    before = os.umask(mask)
    try:
        save(tmp_path / "out", "1")
        write_file(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask
    (tmp_path / "out").chmod(0o700)
    save(tmp_path / "out", "2")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700


def test_an_error_inside_removes_what_was_begun(tmp_path):
    save(tmp_path / "out", "1")
    for error in (KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_directory(tmp_path / "out", overwrite=True, owned=OWNED) as staging:  # noqa: PT012
            (staging / "a").write_text("2")
            raise error
    assert made.folder_bytes(tmp_path) == {"out/a": b"1"}


def test_temporary_names_fit_any_target(tmp_path):
    with temporary(tmp_path / ("n" * 250), directory=True) as path:
        assert path.is_dir()


def test_a_corrupt_file_is_still_that(tmp_path):
    with pytest.raises(CorruptFileError), new_directory(tmp_path / "out"):
        raise CorruptFileError("a file that was read meanwhile")
    with pytest.raises(FileNotFoundError), new_directory(tmp_path / "out"):
        Path("/nonexistent/base").read_text()
