"""Tests of `latent_shards`: what `cache.json` and shards must be, and which images make up a batch."""

import pytest
import torch
from latent_data import BROKEN, make_images, shards_in
from safetensors.torch import save_file

pytest.importorskip("datasets", reason="images are read through it")

import datasets

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.data.latent_shards import (
    ShardBatches,
    read_header,
    read_settings,
    settle,
    shard_path,
    shards_of,
    write_settings,
    write_shard,
)

SETTINGS = {
    "format": 1,
    "kind": "moments",
    "flips": False,
    "dtype": "float32",
    "size": 16,
    "shard_size": 3,
    "seed": 0,
    "rows": 8,
    "limit": None,
    "latent_shape": [2, 4, 4],
}


def batch(*rows, **skipped):
    values = {"rows": list(rows), "labels": [row - 1 for row in rows], "plain": torch.rand(len(rows), 4, 4, 4)}
    return {"shard": rows[0] // 3, **values, "skipped": {int(row[1:]): why for row, why in skipped.items()}}


def test_a_shard_tells_what_it_holds(tmp_path):
    path = shard_path(tmp_path, 1)
    parts = [batch(3), batch(4, r5="broken")]
    write_shard(path, parts, SETTINGS)
    assert read_header(path, SETTINGS) == (2, {5: "broken"})
    tensors = shards_in(tmp_path)["shard-00001.safetensors"]
    assert tensors["rows"].tolist() == [3, 4] and tensors["labels"].tolist() == [2, 3]
    assert torch.equal(tensors["moments"], torch.cat([part["plain"] for part in parts]))
    before = path.read_bytes()
    write_shard(path, parts, SETTINGS)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    assert shards_of(SETTINGS) == range(3)


def test_shards_that_are_not_what_they_should_be_are_named(tmp_path):
    path = shard_path(tmp_path, 0)
    write_shard(path, [batch(0, 1, 2)], SETTINGS)
    whole = path.read_bytes()
    changes = ({"kind": "mode"}, {"flips": True}, {"dtype": "float16"}, {"latent_shape": [2, 4, 5]}, {"rows": 2})
    for change in changes:
        with pytest.raises(ValueError, match=r"shard '.*shard-00000\.safetensors' is damaged: it must h"):
            read_header(path, SETTINGS | change)
    assert read_header(path, SETTINGS | {"rows": None}) == (3, {})
    for content in (b"", whole[:7], whole[:100], whole[:-1], whole + b"x", b"x" * 400):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"shard '.*shard-00000\.safetensors' is damaged: .+"):
            read_header(path, SETTINGS)
    for metadata in (None, {}, {"skipped": "no JSON"}, {"skipped": "[]"}, {"skipped": '{"x": ""}'}):
        save_file({"rows": torch.zeros(1)}, path, metadata)
        with pytest.raises(ValueError, match=r"shard-00000\.safetensors' is damaged: .+"):
            read_header(path, SETTINGS)


def test_settings_go_on_only_where_they_agree(tmp_path):
    folder = tmp_path / "new" / "folder"
    assert settle(folder, SETTINGS | {"rows": None}) == (SETTINGS | {"rows": None}, "")
    assert settle(folder, SETTINGS) == (SETTINGS, "") and read_settings(folder) == SETTINGS
    # A stream goes on with the number of rows that is known by now.
    assert settle(folder, SETTINGS | {"rows": None}) == (SETTINGS, "")
    for change in ({"rows": 9}, {"seed": 2}, {"latent_shape": [1, 4, 4]}):
        ((name, value),) = change.items()
        settings, problem = settle(folder, SETTINGS | change)
        assert not settings and problem.endswith(f"holds another cache: {name} {SETTINGS[name]!r}, not {value!r}.")
    assert read_settings(folder) == SETTINGS
    with pytest.raises(FileNotFoundError, match=r"new' is no cache of latents: it has no cache\.json"):
        read_settings(tmp_path / "new")
    write_settings(folder, {"format": 0})
    with pytest.raises(ValueError, match=r"cache\.json' must have the format 1, got 0"):
        read_settings(folder)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_shards_that_are_missing(world, streaming, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = load_images(str(make_images(tmp_path / "images", 8)), streaming=streaming)
    folder, settings = tmp_path / "shards", SETTINGS | ({"rows": None} if streaming else {})
    folder.mkdir()
    write_shard(shard_path(folder, 0), [batch(0, 1, 2)], SETTINGS)
    found = {}
    for rank in range(world):
        batches = ShardBatches(images, folder, settings, batch_size=2, threads=2, rank=rank, world=world)
        for part in batches:
            rows = [*part["rows"], *part["skipped"]]
            assert {row // 3 for row in rows} == {part["shard"]} and part["shard"] % world == rank
            assert len(part["labels"]) == len(part["rows"]) and set(part["skipped"]) <= {BROKEN}
            found |= {row: part.get("levels", torch.empty(0)).shape[1:] for row in part["rows"]}
        assert batches.rows == 8
    assert found == dict.fromkeys([3, 4, 6, 7], (16, 16, 3))
