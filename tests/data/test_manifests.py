"""Tests of `manifests`: entries come back, and what is missing, of another format or changed is refused."""

import json

import pytest

from hieratok_hf.data.manifests import checksum_of, is_count, is_number, is_text, read_manifest, settle, write_manifest

SCHEMA = {"rows": is_count(1), "name": is_text}
SETTINGS = {"format": 3, "rows": 7, "name": "é", "more": [1, None]}


def read(path):
    return read_manifest(path, "box of latents", 3, SCHEMA)


def test_entries_come_back_in_any_order(tmp_path):
    path = tmp_path / "box.json"
    write_manifest(path, SETTINGS)
    assert read(path) == SETTINGS
    turned = dict(reversed(SETTINGS.items()))
    assert checksum_of(turned) == checksum_of(SETTINGS) != checksum_of({**SETTINGS, "rows": 8})
    write_manifest(path, turned)
    assert read(path) == SETTINGS


def test_what_is_missing_or_of_another_format_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no box of latents: it has no box\.json"):
        read(tmp_path / "box.json")
    write_manifest(tmp_path / "box.json", {**SETTINGS, "format": 2})
    with pytest.raises(ValueError, match="the format 3, got 2"):
        read(tmp_path / "box.json")


@pytest.mark.parametrize("changes", [{"rows": 8}, {"rows": 0}, {"name": None}, {"more": []}, {"checksum": "0"}])
def test_changes_by_hand_are_refused(changes, tmp_path):
    path = tmp_path / "box.json"
    write_manifest(path, SETTINGS)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=r"box\.json' is damaged"):
        read(path)


def test_an_entry_that_is_missing_or_wrong_is_named_whatever_the_checksum(tmp_path):
    path = tmp_path / "box.json"
    for name, value in (("rows", 0), ("rows", 7.0), ("rows", True), ("rows", 2**40), ("name", 1), ("name", ...)):
        changed = {key: x for key, x in {**SETTINGS, name: value}.items() if x is not ...}
        write_manifest(path, changed)
        with pytest.raises(ValueError, match=f"no valid '{name}'"):
            read(path)


def test_numbers_are_finite_and_of_a_size_to_work_with():
    assert is_number(0) and is_number(-1.5)
    assert not any(map(is_number, (True, "1", None, 1e9, float("nan"), float("inf"))))


def test_a_folder_of_shards_goes_on_only_as_what_it_is(tmp_path):
    path = tmp_path / "new" / "box.json"
    settle(path, "box", None, SETTINGS)
    assert read(path) == SETTINGS
    settle(path, "box", SETTINGS, dict(SETTINGS))
    with pytest.raises(ValueError, match="holds another box: rows 7, not 8; other buckets"):
        settle(path, "box", SETTINGS, {**SETTINGS, "rows": 8, "buckets": [1]})
    path.unlink()
    (path.parent / "shard-00000.tar").touch()
    with pytest.raises(ValueError, match=r"holds shards, but no box\.json"):
        settle(path, "box", None, SETTINGS)
    assert not path.exists()
