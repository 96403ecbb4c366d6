"""Tests of `image_dataset`: folders, tar shards and data sets of the Hub, whole and streamed, and what is refused."""

import sys
import tarfile
from unittest.mock import Mock, call

import datasets
import numpy as np
import pytest
import torch
from image_files import encoded, noise
from local_data import picture, refused, seen, write_folder, write_shard
from PIL import Image

from hieratok_hf.data import image_dataset
from hieratok_hf.data.image_dataset import Images, decode_ahead, image_of, load_images
from hieratok_hf.utils.images import ImageError

pytestmark = pytest.mark.usefixtures("script_surroundings")
KINDS = datasets.Features({"image": datasets.Image()})


@pytest.mark.parametrize("streaming", [False, True])
def test_folders_give_images_labels_and_splits(tmp_path, streaming):
    for split, seeds in (("train", [0, 1]), ("test", [2, 3, 4])):
        write_folder(tmp_path / split, cat=seeds[:-1], dog=seeds[-1:])
    images = load_images(str(tmp_path), streaming=streaming)
    assert seen(images, [0, 1]) == [0, 1] and images.class_names == ["cat", "dog"]
    assert [row["name"] for row in images] == [f"{tmp_path}/train/{name}.png" for name in ("cat/0", "dog/1")]
    assert images.streaming is streaming and (streaming or len(images) == 2)
    assert seen(load_images(str(tmp_path), split="test", streaming=streaming), [2, 3, 4]) == [0, 0, 1]
    # One of them by its own path is a folder like any other.
    assert seen(load_images(str(tmp_path / "test"), streaming=streaming), [2, 3, 4]) == [0, 0, 1]


def test_names_of_images_decide_no_split(tmp_path):
    for seed, name in enumerate(["a", "bullet_train", "crash test", "valid-ticket"]):
        (tmp_path / f"{name}.png").write_bytes(encoded(picture(seed)))
    assert seen(load_images(str(tmp_path)), range(4)) == [None] * 4


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pattern_takes_the_shards_that_match_in_order(tmp_path, streaming):
    for i in (3, 0, 4, 1, 2):
        write_shard(tmp_path / f"train-{i}.tar", [i, i + 5])
    write_shard(tmp_path / "val-0.tar", [10])
    images = load_images(str(tmp_path / "train-*.tar"), streaming=streaming)
    assert seen(images, [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]) == [0, 2, 1, 0, 2, 1, 0, 2, 1, 0]
    shard = write_shard(tmp_path / "a.tar", [4, 5], "webp")
    images = load_images(shard, streaming=streaming)
    assert seen(images, [4, 5]) == [1, 2]
    assert [row["name"] for row in images] == [f"{shard}:00000{i}.webp" for i in (0, 1)]


@pytest.mark.parametrize("streaming", [False, True])
def test_several_sources_are_read_as_one(tmp_path, streaming):
    shards = [write_shard(tmp_path / f"{i}.tar", [i], labels=i < 2) for i in (1, 0, 2)]
    images = load_images(shards, streaming=streaming)
    assert seen(images, [1, 0, 2]) == [1, 0, None]
    folders = [write_folder(tmp_path / name, cat=[seed], dog=[seed + 1]) for name, seed in (("b", 3), ("a", 5))]
    assert seen(load_images(folders, streaming=streaming), [3, 4, 5, 6]) == [0, 1, 0, 1]


def test_a_folder_may_hold_shards_or_parquet(tmp_path):
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "train-0.tar", [7, 8])
    assert seen(load_images(str(tmp_path / "shards")), [7, 8]) == [1, 2]
    (tmp_path / "parquet").mkdir()
    columns = {"img": [{"bytes": encoded(picture(3)), "path": None}], "fine_label": [4]}
    kinds = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(5)})
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "parquet" / "train.parquet")
    images = load_images(tmp_path / "parquet")
    assert seen(images, [3]) == [4] and images[0]["name"] == "row 0"


def test_a_shuffled_stream_gives_every_row_once_an_epoch(tmp_path):
    shards = [write_shard(tmp_path / f"{i}.tar", range(4 * i, 4 * i + 4)) for i in range(2)]
    images = load_images(shards, streaming=True)

    def names(seed):
        stream = images.shuffled(seed, buffer_size=3)
        return [[next(stream)["name"] for _ in range(8)] for _ in range(2)]

    first = names(0)
    assert first == names(0) and first != names(1) and first[0] != first[1]
    rows = [f"{shard}:{i:06d}.png" for shard in shards for i in range(4)]
    assert all(sorted(epoch) == rows for epoch in [*first, *names(1)])


def test_a_hub_id_is_looked_up_by_datasets(monkeypatch):
    found = datasets.Dataset.from_dict({"image": [{"bytes": encoded(picture(1)), "path": None}]}, features=KINDS)
    monkeypatch.setattr(datasets, "load_dataset", Mock(return_value=found))
    assert seen(load_images("owner/name"), [1]) == [None]
    load_images(["owner/name-v1.5:a.b", "name"], split="test", streaming=True)
    assert datasets.load_dataset.call_args_list == [
        call(path="owner/name", name=None, split="train", streaming=False),
        call(path="owner/name-v1.5", name="a.b", split="test", streaming=True),
        call(path="name", name=None, split="test", streaming=True),
    ]
    error = datasets.exceptions.DatasetNotFoundError("Dataset 'owner/none'\ndoesn't exist on the Hub.")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    refused("owner/none", "Dataset 'owner/none' doesn't exist on the Hub.")


def test_nothing_there_is_refused(tmp_path, monkeypatch):
    for name in (str(tmp_path / "none"), "none.tar", "none/a.tar", "none/*", "./none", "a/b/none"):
        refused(name, "there is no such file, folder or pattern")
    with pytest.raises(ValueError, match="no source was given"):
        load_images([])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"hieratok_hf\[eval\]"):
        load_images(str(tmp_path))


def test_nothing_in_it_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), "doesn't contain any data files")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    refused(str(tmp_path / "text"), "no column of them in [")
    with tarfile.open(tmp_path / "text.tar", "w") as archive:
        archive.add(tmp_path / "text" / "a.txt", "a.txt")
    refused(str(tmp_path / "text.tar"), "it has no rows")
    tarfile.open(tmp_path / "empty.tar", "w").close()
    refused(str(tmp_path / "empty.tar"), "it has no rows")
    write_folder(tmp_path / "data" / "train", cat=[0])
    refused(str(tmp_path / "data"), "nope", split="nope")


def test_a_data_set_without_rows_is_refused():
    with pytest.raises(ValueError, match="No images found in here: it has no rows"):
        Images(datasets.Dataset.from_dict({"image": []}, features=KINDS), "here")
    stream = datasets.IterableDataset.from_generator(lambda: iter(()), features=KINDS)
    with pytest.raises(ValueError, match="No images found in here: it has no rows"):
        next(Images(stream, "here").shuffled(0))


def test_files_of_the_wrong_kind_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    refused(str(tmp_path / "a.txt"), "must be a folder, a data set or a tar shard in webdataset style")
    (tmp_path / "garbage.tar").write_bytes(b"garbage" * 300)
    refused(str(tmp_path / "garbage.tar"), "No images found in")


def test_sources_that_do_not_go_together_are_refused(tmp_path):
    columns = {"img": [{"bytes": encoded(picture(3)), "path": None}]}
    (tmp_path / "parquet").mkdir()
    table = datasets.Dataset.from_dict(columns, features=datasets.Features({"img": datasets.Image()}))
    table.to_parquet(tmp_path / "parquet" / "train.parquet")
    pair = [str(tmp_path / "parquet"), write_folder(tmp_path / "data", cat=[0])]
    refused(pair, "must have their images and labels in the same columns")
    refused([write_shard(tmp_path / "a.tar", [1]), write_folder(tmp_path / "two", cat=[0], dog=[1])], "do not go")
    folders = [write_folder(tmp_path / last, cat=[0], **{last: [1]}) for last in ("dog", "fox")]
    refused(folders, "do not go together")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, streaming):
    folder = write_folder(tmp_path / "data", cat=[0, 1])
    (tmp_path / "data" / "cat" / "1.png").write_bytes(encoded(picture(1))[:200])
    shard = write_shard(tmp_path / "a.tar", [0, 1])
    data = (tmp_path / "a.tar").read_bytes()
    start = data.index(b"\x89PNG", data.index(b"000001.png"))
    (tmp_path / "a.tar").write_bytes(data[:start] + b"no image" + data[start + 8 :])
    for source, message in (
        (folder, r"data/cat/1\.png': cannot be decoded \("),
        (shard, r"/a\.tar:000001\.png': is no"),
    ):
        good, bad = load_images(source, streaming=streaming)
        assert (np.asarray(image_of(good)) == noise(10, 12, seed=0)).all()
        with pytest.raises(ImageError, match=rf"^'.*{message}"):
            image_of(bad)


def test_sizes_are_those_of_the_images_as_they_stand(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "cat"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, size in enumerate([(20, 30), (8, 8), (5, 90), (40, 20)]):
        Image.new("RGB", size).save(folder / f"{i}.jpg", exif=exif if i == 3 else b"")
    (folder / "4.png").write_bytes(b"no image")
    shard = write_shard(tmp_path / "a.tar", [0, 1])
    for chunk in (1000, 2):
        monkeypatch.setattr(image_dataset, "_HEADERS_AT_A_TIME", chunk)
        images = load_images(str(tmp_path / "data"))
        assert images.read_sizes().tolist() == [[30, 20], [8, 8], [90, 5], [40, 20], [1, 1]]
        assert load_images(shard).read_sizes().tolist() == [[10, 12]] * 2
        assert images.read_sizes(3).tolist() == [[30, 20], [8, 8], [90, 5]]
    with pytest.raises(ValueError, match="is a stream"):
        load_images(str(tmp_path / "data"), streaming=True).read_sizes()


def test_batches_are_decoded_ahead(tmp_path):
    entries = list(enumerate(load_images(write_folder(tmp_path / "data", cat=range(3), dog=[3]))))
    entries[1][1]["image"] = {"bytes": None, "path": None}

    batches = iter([entries[:2], entries[1:2], entries[2:], []])
    found = decode_ahead(batches, (10, 10), 2)
    first = next(found)
    assert batches.__length_hint__() == 2 and first["rows"] == [0] and first["labels"] == [0]
    assert first["levels"].tolist() == [noise(10, 12, seed=0)[:, 1:11].tolist()]
    name = entries[1][1]["name"]
    assert first["skipped"] == [(1, name, f"{name!r}: is empty (0 bytes)")]
    second, third, _ = found
    assert second["rows"] == [] and second["levels"].shape == (0, 10, 10, 3)
    assert third["rows"] == [2, 3] and third["labels"] == [0, 1] and third["levels"].dtype == torch.uint8


def test_an_npz_file_of_images_is_read_bit_for_bit(tmp_path):
    path, levels = tmp_path / "samples.npz", np.stack([noise(6, 8, seed=i) for i in range(5)])
    np.savez(path, levels, np.array([3, 0, 2, 1, 9]))
    images = load_images(str(path))
    assert len(images) == 5 and [row["label"] for row in images] == [3, 0, 2, 1, 9] and images.class_names == []
    for row, expected in zip(images, levels):
        np.testing.assert_array_equal(np.asarray(image_of(row)), expected)
    assert images[1]["name"] == f"{str(path)!r}:1" and images.read_sizes().tolist() == [list(levels.shape[1:3])] * 5
    fingerprint = images.fingerprint
    np.savez(path, arr_0=levels[::-1])
    again = load_images([str(path)])
    assert again.fingerprint != fingerprint and again[0]["label"] is None
    np.testing.assert_array_equal(np.asarray(image_of(again[4])), levels[0])


NOT_IMAGES = {
    "no images": {"arr_1": np.zeros(2, int)},
    "floats": {"arr_0": np.zeros((2, 4, 4, 3))},
    "grey": {"arr_0": np.zeros((2, 4, 4), np.uint8)},
    "channels first": {"arr_0": np.zeros((2, 3, 4, 4), np.uint8)},
    "none": {"arr_0": np.zeros((0, 4, 4, 3), np.uint8)},
    "labels": {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)},
    "names": {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array(["a", "b"])},
}


@pytest.mark.parametrize("arrays", NOT_IMAGES.values(), ids=NOT_IMAGES)
def test_an_npz_file_of_anything_else_is_refused(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz' must hold .* as `arr_[01]`"):
        load_images(str(tmp_path / "a.npz"))


def test_an_npz_file_goes_alone_and_has_one_split(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, np.zeros((2, 4, 4, 3), np.uint8))
    for source, split in (([str(path)] * 2, "train"), (str(path), "test")):
        with pytest.raises(ValueError, match="must be the only source, and its split train"):
            load_images(source, split=split)
    with pytest.raises(ValueError, match="no such file"):
        load_images(str(tmp_path / "b.npz"))
