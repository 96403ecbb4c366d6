"""Hostile and careless data: folders, tar shards, sources and caches of latents that are refused by name, unharmed."""

import json
import os
import pickle
import re
import shutil
import tarfile

import pytest
import torch
from helpers import Bomb, random_core, tree
from image_files import encoded, noise, write_members
from latent_data import make_images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.data.image_dataset import image_of, load_images
from hieratok_hf.data.latent_cache import LatentCache, read_settings
from hieratok_hf.data.latent_writer import write_latents
from hieratok_hf.data.manifests import write_manifest
from hieratok_hf.utils.images import ImageError

pytestmark = pytest.mark.usefixtures("script_surroundings")
PNG = encoded(Image.fromarray(noise(8, 8)))


def refused(folder, call, message):
    """Assert that a call is refused in one line that matches the message, and changes nothing in the folder."""
    before = tree(folder)
    with pytest.raises((ValueError, FileNotFoundError, ImageError)) as caught:
        call()
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value), str(caught.value)
    assert tree(folder) == before


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def members(contents, mode="w"):
    return lambda path: write_members(path, contents, mode)


def label(content):
    return members({"000.png": PNG, "000.cls": content})


def edited(change):
    """A shard of four images whose bytes are changed."""

    def make(path):
        write_members(path, {f"{i}.png": PNG for i in range(4)})
        path.write_bytes(change(path.read_bytes()))

    return make


def in_second_header(place, content):
    start = 512 + -(-len(PNG) // 512) * 512 + place
    return edited(lambda data: data[:start] + content + data[start + len(content) :])


SHARDS = {
    # Labels that are none.
    **{f"label {content!r}"[:30]: (label(content), r"a\.tar:000\.cls must hold a label") for content in (
        b"", b"x", b"1.0", b"1e3", b"0x1", b"1 2", b"nan", b"\xff\xfe1", b"\x00", b"9223372036854775808",
        b"-9223372036854775809", b"9" * 400, b"9" * 5000, b"1" + b" " * 10**6, pickle.dumps(Bomb()),
    )},
    # Members that are no files.
    "a hard link": (members({"0.png": PNG, "1.png": special("1.png", tarfile.LNKTYPE, "0.png")}), r":1\.png is a"),
    "a link": (members({"0.png": special("0.png", tarfile.SYMTYPE, "/etc/passwd")}), r"a\.tar:0\.png is a link"),
    "a pipe": (members({"0.png": special("0.png", tarfile.FIFOTYPE)}), r"a\.tar:0\.png is a link or no plain file"),
    "a device as label": (members({"0.cls": special("0.cls", tarfile.CHRTYPE)}), r"a\.tar:0\.cls is a link"),
    "a name twice": (lambda path: [members({"0.png": PNG}, mode)(path) for mode in "wa"], r":0\.png is there twice"),
    # Archives that are damaged, or none.
    "compressed": (members({"0.png": PNG}, "w:gz"), r"a\.tar cannot be read as a tar file without compression"),
    "no bytes": (lambda path: path.write_bytes(b""), r"a\.tar"),
    "a folder": (lambda path: path.mkdir(), r"a\.tar"),
    "a pipe for a file": (os.mkfifo, r"a\.tar is no file"),
    "a device for a file": (lambda path: path.symlink_to("/dev/zero"), r"a\.tar is no file"),
    "a link to nothing": (lambda path: path.symlink_to("nothing.tar"), r"a\.tar"),
    "a link to itself": (lambda path: path.symlink_to(path), r"a\.tar"),
    "zeros": (lambda path: path.write_bytes(bytes(10240)), r"a\.tar'?:? ?(it )?has no rows"),
    "only pickles": (members({"0.pth": pickle.dumps(Bomb()), "0.pkl": b"x"}), "has no rows"),
    "cut in an image": (edited(lambda data: data[:700]), r"a\.tar cannot be read"),
    "cut in a header": (edited(lambda data: data[: 1024 + 100]), r"a\.tar cannot be read"),
    "a damaged name": (in_second_header(0, b"\xff"), r"a\.tar cannot be read.*byte"),
    "a damaged checksum": (in_second_header(150, b"9"), r"a\.tar cannot be read"),
    "a damaged size": (in_second_header(124, b"99999999999"), r"a\.tar cannot be read"),
    "a negative size": (in_second_header(124, b"\xff" * 12), r"a\.tar cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", SHARDS)
def test_hostile_shards(case, streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = SHARDS[case]
    make(tmp_path / "a.tar")
    refused(tmp_path, lambda: load_images(str(tmp_path / "a.tar"), streaming=streaming), message)


def files(**contents):
    """A folder of files; two underscores in a name stand for a slash."""

    def make(folder):
        for name, content in contents.items():
            path = folder / f"{name.replace('__', '/')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    return make


FOLDERS = {
    "nothing": (lambda folder: None, {}, r"any data files"),
    "hidden images": (lambda folder: (folder / ".a.png").write_bytes(PNG), {}, "data"),
    "splits beside a class": (files(train__a=PNG, test__a=PNG, car__a=PNG), {}, "beside 'car'"),
    "splits beside an image": (files(train__a=PNG, dev__a=PNG, a=PNG), {}, r"beside 'a\.png'"),
    "an empty split": (files(a=PNG), {"split": ""}, "`split`"),
    "half a slice": (files(a=PNG), {"split": "train[:"}, "`split`"),
    "a slice of nothing": (files(a=PNG), {"split": "train[1:]"}, "has no rows"),
    "a share beyond all": (files(a=PNG), {"split": "train[:200%]"}, "`split`"),
    "a sum with another": (files(a=PNG), {"split": "train+nope"}, "`split`"),
    "a class that is no text": (files(**{"\udcff__a": PNG, "b__a": PNG}), {}, r"udcff/a\.png' is not UTF-8"),
    "a label in a shard": (lambda folder: label(b"x")(folder / "a.tar"), {}, r"a\.tar:000\.cls must hold"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_hostile_folders(case, tmp_path):
    make, options, message = FOLDERS[case]
    make(tmp_path)
    refused(tmp_path, lambda: load_images(str(tmp_path), **options), message)


SOURCES = ["", " ", "\0", "a\0.tar", "x" * 5000, "/" + "x" * 300 + "/y", "::", "/dev/null", "/dev/zero", "..none/*"]
SOURCES += ["a[b.tar", "zip://a.zip::/etc", "a:b:c", "../" * 2000 + "x.tar", "*" * 100, "[]]*.tar", "~nobody/x.tar"]


@pytest.mark.parametrize("source", SOURCES, ids=range(len(SOURCES)))
def test_hostile_sources(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, lambda: load_images(source), "No images found in|must be a folder")


IMAGES = {
    "a pickle": pickle.dumps(Bomb()),
    "too large": PNG[:16] + (10**9).to_bytes(4, "big") * 2 + PNG[24:],
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
}


@pytest.mark.parametrize("case", IMAGES)
def test_hostile_images_are_named_where_they_are_decoded(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = IMAGES[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "0.png").write_bytes(PNG)
    sources = [str(folder)]
    if callable(make):
        make(folder / "1.png")
    else:
        (folder / "1.png").write_bytes(make)
        sources.append(write_members(tmp_path / "a.tar", {"0.png": PNG, "1.png": make}))
    for source in sources:
        images = load_images(source)
        assert len(images) == 2 and len(images.fingerprint) == 64 and image_of(images[0]).size == (8, 8)
        refused(tmp_path, lambda row=images[1]: image_of(row), r"1\.png'")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """A cache of 8 images in two shards."""
    folder = tmp_path_factory.mktemp("latents")
    images = load_images(str(make_images(folder / "images", 8, broken=None)))
    write_latents(random_core(), images, folder / "cache", size=32, shard_size=4, flips=False)
    write_latents(random_core(1), images, folder / "other", size=32, shard_size=4, flips=False)
    return folder


def settings(**changes):
    """Settings that are changed, with the right checksum; `...` for one that is missing."""

    def make(folder):
        changed = {key: value for key, value in {**read_settings(folder), **changes}.items() if value is not ...}
        write_manifest(folder / "cache.json", changed)

    return make


def text(content):
    return lambda folder: (folder / "cache.json").write_bytes(content)


def rename_class(folder):
    text((folder / "cache.json").read_bytes().replace(b'"hat"', b'"cap"'))(folder)


def shard(change):
    """The first shard with other bytes."""

    def make(folder):
        path = folder / "shard-00000.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def tensors(change):
    """The first shard with other tensors and its own facts."""

    def make(folder):
        path = folder / "shard-00000.safetensors"
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(path)), path, metadata)

    return make


def swap(folder):
    a, b, c = (folder / f"shard-{name}.safetensors" for name in ("00000", "00001", "x"))
    a.rename(c)
    b.rename(a)
    c.rename(b)


def foreign(folder):
    shutil.copy(folder.parent / "other" / "shard-00001.safetensors", folder)


def in_place_of(make):
    def replace(folder):
        path = folder / "shard-00001.safetensors"
        path.unlink()
        make(path)

    return replace


VALUES = [
    ("rows", -1), ("rows", 10**400), ("rows", 12), ("rows", 10**11), ("shard_size", 0), ("size", [32]), ("limit", 0),
    ("kind", "mean"), ("kind", []), ("flips", 1), ("flips", True), ("dtype", "int8"), ("dtype", []),
    ("latent_shape", []), ("latent_shape", [4, -8, 8]), ("latent_shape", "488"), ("latent_shape", [2**39] * 3),
    ("classes", "ab"), ("classes", [1]), ("encoder", 7), ("scaling_factor", float("nan")), ("shift_factor", 1e300),
    ("vision", []), ("vision", {}), ("vision", {"model": "a", "weights": "b", "layers": [0]}),
    ("vision", {"model": "a", "weights": "b", "layers": [[]]}), ("vision", {"model": "a", "weights": 1, "layers": []}),
    ("data", 5), ("source", []), ("format", "2"), ("precision", ...), ("seed", 1.5), ("seed", 1),
]  # fmt: skip
CACHES = {
    **{
        f"{name} {value!r}"[:40]: (settings(**{name: value}), r"cache\.json|is unfinished|shard-00000.* is damaged")
        for name, value in VALUES
    },
    "no text": (text(b"\xff\xfe"), r"cache\.json"),
    "nested": (text(b"[" * 10**5), r"cache\.json"),
    "a long number": (text(b'{"rows": ' + b"9" * 5000 + b"}"), r"cache\.json"),
    "no format": (text(b"{}"), r"cache\.json"),
    "only a format": (text(b'{"format": 2}'), r"cache\.json"),
    "an edited name": (rename_class, r"cache\.json.*its checksum is another"),
    "a long header": (shard(lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), "shard-00000"),
    "a header of text": (shard(lambda data: data[:8] + b"x" * 50 + data[58:]), "shard-00000"),
    "a pickle": (shard(lambda data: pickle.dumps(Bomb())), "shard-00000"),
    "other labels": (tensors(lambda x: {**x, "labels": x["labels"] + 1}), "shard-00000.*'labels'"),
    "other latents": (tensors(lambda x: {**x, "moments": x["moments"] + 1}), "shard-00000.*'moments'"),
    "NaN": (tensors(lambda x: {**x, "moments": x["moments"] * float("nan")}), "shard-00000.*'moments'"),
    "no rows": (tensors(lambda x: {name: x[name] for name in ("labels", "moments")}), "shard-00000"),
    "one more tensor": (tensors(lambda x: {**x, "more": torch.zeros(1)}), "shard-00000"),
    "swapped shards": (swap, "shard-00000.*another place"),
    "a shard of another encoder": (foreign, "shard-00001.*another place or cache"),
    "a folder for a shard": (in_place_of(lambda path: path.mkdir()), "unfinished"),
    "a pipe for a shard": (in_place_of(os.mkfifo), "unfinished"),
    "a link to nothing for a shard": (in_place_of(lambda path: path.symlink_to("nothing")), "unfinished"),
    "no folder": (shutil.rmtree, r"cache\.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHES)
def test_hostile_caches(case, latents, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(latents, tmp_path, dirs_exist_ok=True)
    make, message = CACHES[case]
    make(tmp_path / "cache")

    def read():
        LatentCache(tmp_path / "cache").batch(range(8))

    refused(tmp_path, read, message)


def test_the_cache_itself_is_read(latents):
    cache = LatentCache(latents / "cache")
    assert cache.batch(range(8))[1].tolist() == [0] * 4 + [1] * 4
    assert json.loads((latents / "cache" / "cache.json").read_text())["data"] != cache.fingerprint
