"""Tests of `files`: nothing half, nothing through links that others planted, and JSON that is no object is named."""

import os
import subprocess
import sys
import threading

import pytest
from full_disk import full_disk
from helpers import temporary_of

from hieratok_hf.utils import files
from hieratok_hf.utils.files import read_json, write_whole


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "figures.json"
    with write_whole(path) as file:
        file.write(b"first")
    with pytest.raises(KeyboardInterrupt), write_whole(path) as file:
        file.write(b"half of the sec")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def write(path, content=b"new"):
    with write_whole(path) as file:
        file.write(content)


@pytest.fixture
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("mode", [None, 0o600, 0o666, 0o755])
def test_a_file_has_the_mode_of_the_one_that_it_replaces_or_the_ordinary_one(mode, tmp_path, umask):
    path = tmp_path / "figures.json"
    if mode is not None:
        path.touch()
        path.chmod(mode)
    with write_whole(path) as file:
        assert os.fstat(file.fileno()).st_mode & 0o777 & ~(mode or 0o640) == 0  # never wider on the way
    assert path.stat().st_mode & 0o777 == (mode or 0o640)


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "pipe", "folder"])
def test_what_is_planted_in_the_place_of_the_temporary_file_is_not_written_to(kind, tmp_path):
    path, victim = tmp_path / "here" / "figures.json", tmp_path / "victim"
    path.parent.mkdir()
    victim.write_text("old")
    planted = temporary_of(path)
    plant = {"link": lambda: planted.symlink_to(victim), "dangling link": lambda: planted.symlink_to(tmp_path / "no")}
    plant |= {"hard link": lambda: planted.hardlink_to(victim), "pipe": lambda: os.mkfifo(planted)}
    plant.get(kind, planted.mkdir)()
    write(path)
    assert path.read_text() == "new" and victim.read_text() == "old" and not (tmp_path / "no").exists()
    assert {*path.parent.iterdir()} <= {path, planted}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "none yet"):
        file, link = tmp_path / "there" / name, tmp_path / f"link to {name}"
        link.symlink_to(file)
        if name == "old":
            file.write_text("old")
        write(link)
        assert link.is_symlink() and file.read_text() == "new"
    assert sorted(os.listdir(tmp_path / "there")) == ["none yet", "old"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(OSError, match="loop"):
        write(loop)
    assert loop.is_symlink()


def test_a_pipe_or_a_device_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="pipe"):  # which nobody reads
        write(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe)
    assert os.read(reader, 9) == b"new" and list(tmp_path.iterdir()) == [pipe]
    os.close(reader)
    (tmp_path / "null").symlink_to(os.devnull)
    write(tmp_path / "null")
    assert (tmp_path / "null").is_char_device()
    if os.path.exists("/dev/full"):
        (tmp_path / "full").symlink_to("/dev/full")
        with pytest.raises(OSError, match="full"):
            write(tmp_path / "full")


@pytest.mark.parametrize(("stream", "mode"), [("stdout", "wb"), ("stderr", "wb"), ("stdout", "ab")])
def test_the_standard_output_keeps_what_was_printed(stream, mode, tmp_path):
    # The file alone, without the package, which would be slow to import.
    code = f"""
import runpy, sys
print("before", file=sys.{stream})
with runpy.run_path({files.__file__!r})["write_whole"]("/dev/{stream}") as file:
    file.write(b"whole\\n")
print("after", file=sys.{stream})
"""
    path = tmp_path / "out.txt"
    path.write_text("earlier\n")
    with path.open(mode) as file:
        subprocess.run([sys.executable, "-c", code], check=True, **{stream: file})
    assert path.read_text().split() == [*(["earlier"] if mode == "ab" else []), "before", "whole", "after"]


def test_readers_see_whole_files_of_several_writers_at_a_time(tmp_path):
    path, contents, seen, errors = tmp_path / "figures.json", [bytes([i]) * 300_000 for i in range(3)], set(), []
    write(path, contents[0])

    def keep_writing(content):
        try:
            for _ in range(30):
                write(path, content)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=keep_writing, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(path.read_bytes())
    assert not errors and seen <= {*contents} and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "figures.json"
    temporary_of(path).write_text("half of the fi")  # whose lock died with its process
    with write_whole(path) as outer:
        outer.write(b"outer")
        write(path, b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer" and list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_and_not_the_temporary_one(tmp_path):
    path, long = tmp_path / "none" / "figures.json", tmp_path / ("x" * 255)
    with pytest.raises(FileNotFoundError, match=r"figures\.json'$"):
        write(path)
    write(long)
    with full_disk(1000), pytest.raises(OSError, match=r"large: '.*x'$"):
        write(long, bytes(5000))
    with full_disk(1000), pytest.raises(OSError, match=r"large: '.*x'$"), write_whole(long) as file:
        file.write(bytes(5000))
        raise RuntimeError("what torch makes of it")
    with pytest.raises(OSError, match=r"encoder error.*x'$"), write_whole(long):
        raise OSError("encoder error -2 when writing image file")
    assert long.read_bytes() == b"new" and list(tmp_path.iterdir()) == [long]


@pytest.mark.parametrize("text", ["{", "[]", "1", '"config"'])
def test_json_that_is_no_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    assert read_json(tmp_path / "none.json") is None


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_of_windows_is_read(encoding, tmp_path):
    (tmp_path / "config.json").write_bytes('{"name": "café"}'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"name": "café"}


def test_json_that_is_nested_without_end_is_named(tmp_path):
    (tmp_path / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
