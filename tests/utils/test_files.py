"""Tests of `files`: nothing half, and JSON that is no object is named."""

import pytest

from hieratok_hf.utils.files import read_json, write_whole


def test_a_file_is_written_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "figures.json"
    with write_whole(path) as file:
        file.write(b"first")
    with pytest.raises(KeyboardInterrupt), write_whole(path) as file:
        file.write(b"half of the sec")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


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
