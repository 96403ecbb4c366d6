"""Tests of `local_images`: classes, splits, paths and links of folders, keys and labels of shards, fingerprints."""

import json
import os
import shutil

import datasets
import pytest
from image_files import encoded, write_members
from local_data import picture, refused, seen, write_folder, write_shard

from hieratok_hf.data.image_dataset import Images, load_images
from hieratok_hf.data.local_images import list_images, read_class_names

pytestmark = pytest.mark.usefixtures("script_surroundings")
KINDS = datasets.Features({"image": datasets.Image()})


def test_a_list_has_all_images_and_nothing_else(tmp_path):
    for name in ("b.PNG", "a/z.jfif", "a/b/c.webp", ".hidden.png", "a/.hidden/d.png", "notes.txt", "png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert list_images(tmp_path) == ["a/b/c.webp", "a/z.jfif", "b.PNG"]
    with pytest.raises(OSError, match="missing"):
        list_images(tmp_path / "missing")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_may_be_called_like_a_split(tmp_path, streaming):
    folder = write_folder(tmp_path, bus=[0], car=[1], train=[2])
    images = load_images(folder, streaming=streaming)
    assert seen(images, [0, 1, 2]) == [0, 1, 2] and images.class_names == ["bus", "car", "train"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "car" / "1.png").rename(tmp_path / "annotations" / "1.txt")
    assert seen(load_images(folder), [0, 2]) == [0, 1]
    write_folder(tmp_path, test=[3])
    refused(folder, "folders of splits lie beside 'bus'")  # what of it is a class?
    for name in ("bus", "train"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    assert seen(load_images(folder, split="test"), [3]) == [None]
    refused(folder, "`split` must be one of ['test'], got 'train'")


@pytest.mark.parametrize("split", ["", "test/"])
def test_an_image_beside_class_folders_takes_all_labels_with_a_warning(tmp_path, caplog, split):
    folder = write_folder(tmp_path, **{f"{split}cat": [0], f"{split}dog": [1]})
    assert seen(load_images(folder, split="test" if split else "train"), [0, 1]) == [0, 1] and not caplog.messages
    (tmp_path / split / "2.png").write_bytes(encoded(picture(2)))
    labels = [row["label"] for row in load_images(folder, split="test" if split else "train")]
    (message,) = caplog.messages
    assert labels == [None] * 3 and f"'{split}2.png'" in message and "\n" not in message


@pytest.mark.parametrize("names", [("train2017", "val2017"), ("train_images", "val_images"), ("Train", "valset")])
def test_splits_have_names_that_people_give_and_may_lie_deeper(tmp_path, names):
    train, val = names
    flat = write_folder(tmp_path / "flat", **{train: [0], val: [1]})
    deep = write_folder(tmp_path / "deep" / "a" / "images", **{f"{train}/cat": [0], f"{train}/dog": [2], val: [1]})
    for folder, known in ((flat, {0: None}), (tmp_path / "deep", {0: 0, 2: 1})):
        assert seen(load_images(folder), list(known)) == list(known.values())
        assert seen(load_images(folder, split="validation"), [1]) == [None]
    assert load_images(deep).class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["a-0.tar", "a-1.tar.gz", "a-1.tgz"])
def test_shards_beside_images_and_compressed_ones_are_refused_by_name(tmp_path, name):
    folder = write_folder(tmp_path, cat=[0])
    write_shard(tmp_path / name, [1])
    refused(folder, name)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "cat/metadata.csv", ".x.png"])
def test_other_files_beside_images_change_nothing(tmp_path, name):
    folder = write_folder(tmp_path, cat=[0, 1], dog=[2])
    (tmp_path / name).write_text(
        '{"file_name": "cat/0.png", "label": 7}\n' if "json" in name else "file_name\ncat/0.png\n"
    )
    assert seen(load_images(folder), [0, 1, 2]) == [0, 0, 1]


@pytest.mark.parametrize("name", ["set [v1]", "a::b", "per*cent?", "zwölf {x} 100%", "it's"])
def test_a_path_may_hold_what_patterns_are_made_of(tmp_path, name):
    folder = write_folder(tmp_path / name / "images", cat=[0], dog=[1])
    assert seen(load_images(folder), [0, 1]) == [0, 1]
    write_shard(tmp_path / name / "a-0.tar", [2])
    for shards in ("a-0.tar", "a-*.tar"):
        assert seen(load_images(str(tmp_path / name / shards)), [2]) == [2]
    (tmp_path / name / "text").mkdir()
    if set(name) & set("[]*:"):
        refused(str(tmp_path / name / "text"), "path must not hold")


def test_links_are_followed_and_loops_are_not(tmp_path):
    write_folder(tmp_path / "far", cat=[0])
    folder = write_folder(tmp_path / "data", dog=[1])
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "far" / "cat")
    (tmp_path / "data" / "dog" / "up").symlink_to(tmp_path / "data")
    assert seen(load_images(folder), [0, 1]) == [0, 1]


def test_the_file_whose_name_is_not_utf_8_is_named(tmp_path):
    folder = write_folder(tmp_path, cat=[0, 1])
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "caf\udce9.png")
    refused(folder, r"caf\udce9.png' is not UTF-8")


@pytest.mark.parametrize(
    ("members", "seeds", "labels"),
    [
        # Dots in keys, with labels by their own names or by the key.
        ({f"a.{i}.png": i for i in range(8)}, range(8), [None] * 8),
        ({"a.0.png": 0, "a.0.cls": b"5", "a.1.png": 1, "a.1.cls": b"6"}, [0, 1], [5, 6]),
        ({"v1.0/a.left.png": 0, "v1.0/a.right.png": 1, "v1.0/a.cls": b"7"}, [0, 1], [7, 7]),
        ({"a.seg.png": 9, "a.png": 0, "a.cls": b"1", "b.png": 1, "b.depth.png": 8}, [0, 1], [1, None]),
        # In any order, of several kinds, with members that are nobody's business.
        ({"1.cls": b" 1\n", "0.PNG": 0, "1.png": 1, "0.cls": b"-3"}, [0, 1], [-3, 1]),
        ({"0.pth": b"x", "0.png": 0, "0.json": b"{", "0.pyd": b"x", "0.npy": b"", "1.pickle": b"x"}, [0], [None]),
        ({"._0.png": b"x", "__MACOSX": b"", ".png": b"x", "0.png": 0, "no_dot": b""}, [0], [None]),
        ({"0.label": b"3", "0.cls": b"4", "0.png": 0}, [0], [3]),
        ({"caf\udce9.png": 0}, [0], [None]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_shards_give_every_picture_its_label(tmp_path, members, seeds, labels, streaming):
    contents = {name: encoded(picture(x)) if isinstance(x, int) else x for name, x in members.items()}
    shard = write_members(tmp_path / "a.tar", contents)
    assert seen(load_images(shard, streaming=streaming), seeds) == labels


def test_a_shard_that_was_replaced_is_read_anew_whatever_its_time(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [0, 1])
    times, first = os.stat(shard), load_images(shard)
    assert seen(first, [0, 1]) == [0, 1]
    write_shard(tmp_path / "a.tar", [2, 4])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert seen(load_images(shard), [2, 4]) == [2, 1] and load_images(shard).fingerprint != first.fingerprint


def test_splits_of_folders_of_shards_and_slices(tmp_path):
    for name, seed in (("train-0", 0), ("train-1", 1), ("val-0", 2)):
        write_shard(tmp_path / f"{name}.tar", [seed, seed + 3])
    for split, seeds in (("train", [0, 3, 1, 4]), ("validation", [2, 5]), ("train[1:3]+validation", [3, 1, 2, 5])):
        seen(load_images(str(tmp_path), split=split), seeds)
    refused(str(tmp_path), "`split` must be one of ['train', 'validation'], got 'test'", split="test")
    write_shard(tmp_path / "other.tar", [7])
    refused(str(tmp_path), "shards of splits lie beside 'other.tar'")
    refused(str(tmp_path / "other.tar"), "`split` must be one of ['train']", split="validation")


def test_a_fingerprint_tells_data_from_other_data_wherever_it_lies(tmp_path):
    folder = write_folder(tmp_path / "a", cat=[0, 1], dog=[2])
    shard = write_shard(tmp_path / "a.tar", [0, 1])
    known = [load_images(source).fingerprint for source in (folder, shard, [folder, folder])]
    assert len(set(known)) == 3
    assert [load_images(x, streaming=True).fingerprint for x in (folder, shard, [folder, folder])] == known
    (tmp_path / "a").rename(tmp_path / "b")
    moved = tmp_path / "b" / "cat"
    assert load_images(str(tmp_path / "b")).fingerprint == known[0]
    changes = [
        lambda: (moved / "0.png").write_bytes(encoded(picture(7))),
        lambda: (moved / "0.png").rename(moved / "5.png"),
        lambda: moved.rename(tmp_path / "b" / "cow"),
        lambda: (tmp_path / "b" / "dog" / "9.png").write_bytes(b""),
    ]
    for change in changes:
        change()
        known.append(load_images(str(tmp_path / "b")).fingerprint)
    assert len(set(known)) == 7
    rows = [{"image": {"bytes": bytes([i]), "path": None}} for i in range(2)]
    of_hub = [datasets.Dataset.from_list(rows[:n], features=KINDS) for n in (1, 2)]
    assert Images(of_hub[0], "a").fingerprint != Images(of_hub[1], "a").fingerprint
    assert (
        Images(of_hub[1].to_iterable_dataset(), "a").fingerprint
        == Images(of_hub[1].to_iterable_dataset(), "b").fingerprint
    )


def test_names_of_a_file(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text(json.dumps({"classes": ["a", "b"], "wnids": ["n1", "n2"]}))
    assert read_class_names([str(path)]) == ["a", "b"]
    path.write_text(json.dumps(["c", "d"]))
    assert read_class_names([str(path)]) == ["c", "d"]
    assert read_class_names(["e", "f"]) == ["e", "f"]
    assert read_class_names(None) == []
    with pytest.raises(ValueError, match="'a' is there twice"):
        read_class_names(["a", "b", "a"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_names_of_a_file_in_every_encoding_of_json(tmp_path, encoding):
    path = tmp_path / "names.json"
    path.write_bytes(json.dumps(["café", "猫"], ensure_ascii=False).encode(encoding))
    assert read_class_names([str(path)]) == ["café", "猫"]


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "[1]", "not JSON", '{"classes": "ab"}', "", "[" * 10**5, "1" * 5000, '["caf\udce9"]', '[{"a": 1}]'],
)
def test_a_file_without_names_is_refused(tmp_path, content):
    path = tmp_path / "names.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"names\.json"):
        read_class_names([str(path)])


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_of_shards_have_the_names_beside_them(tmp_path, streaming, caplog):
    shards = [write_shard(tmp_path / name, [0, 4]) for name in ("a.tar", "b.tar")]
    before = load_images(shards).fingerprint
    (tmp_path / "meta.json").write_text('{"classes": ["x", "y", "z"]}')
    for source in (shards, str(tmp_path), str(tmp_path / "*.tar")):
        assert load_images(source, streaming=streaming).class_names == ["x", "y", "z"]
    assert load_images(shards).fingerprint == before
    (tmp_path / "other").mkdir()
    other = write_shard(tmp_path / "other" / "c.tar", [2])
    assert not caplog.messages
    for source, unnamed in (([*shards, other], "c.tar"), (str(tmp_path), "meta.json")):
        caplog.clear()
        assert load_images(source, streaming=streaming).class_names == []
        (message,) = caplog.messages
        assert str(tmp_path / "other" / unnamed) in message
    shutil.copy(tmp_path / "meta.json", tmp_path / "other")
    assert load_images([*shards, other]).class_names == ["x", "y", "z"]


def test_folders_of_shards_that_name_a_label_differently_are_refused(tmp_path):
    for name, names in (("one", ["x", "y"]), ("two", ["y", "x"])):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "a.tar", [0, 1])
        (tmp_path / name / "meta.json").write_text(json.dumps(names))
    for source in (str(tmp_path), [str(tmp_path / "one"), str(tmp_path / "two")]):
        with pytest.raises(ValueError, match=r"one.*two.* must name label 0 alike, got 'x' and 'y'"):
            load_images(source)


@pytest.mark.parametrize("content", ['["x"]', '{"classes": ["x", "x"]}', "no JSON", '{"n": 3}'])
def test_names_that_are_not_those_of_the_labels_are_passed_over_with_a_warning(tmp_path, content, caplog):
    shard = write_shard(tmp_path / "a.tar", [0, 1])
    (tmp_path / "meta.json").write_text(content)
    assert load_images(shard).class_names == []
    (message,) = caplog.messages
    assert "meta.json" in message or "'x'" in message
