"""Lists of the images in folders and tar shards, which are read where they lie: no copy of them can be out of date."""

import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..utils.images import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import datasets

__all__ = [
    "LABELS",
    "Listing",
    "common_names",
    "is_image",
    "list_folder",
    "list_images",
    "list_shards",
    "read_class_names",
]

LABELS = ("label", "labels", "cls", "class", "fine_label")
"""Names of columns and members that hold labels; the first that is there counts."""

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_LONGEST_LABEL = 64  # bytes of a member that holds a label
_logger = logging.getLogger(__name__)


class Listing(NamedTuple):
    """
    Rows of images that are not read yet: columns `image`, whose bytes are missing, and `label`, of tar shards also
    `__url__`, `__offset__` and `__size__`, where the bytes lie; a SHA-256 of the names below the folder, the sizes and
    the labels of all rows; and the names of the labels, where they are known.
    """

    dataset: "datasets.Dataset"
    digest: str
    classes: Sequence[str]


class _Image(NamedTuple):
    path: str  # of a tar shard the member's name
    size: int
    label: Any = None
    shard: str | None = None
    offset: int | None = None


def is_image(name: str) -> bool:
    """Tell whether a name ends as those of images do."""
    return _suffix(name) in IMAGE_SUFFIXES


def list_images(folder: str | os.PathLike[str]) -> list[str]:
    """
    List all images in a folder and below it by their paths in it, with `/` between the parts, in a fixed order.

    Hidden files and folders are passed over, and links are followed.

    Raises:
        OSError: The folder or one in it cannot be read.
        ValueError: A name is not UTF-8.
    """
    return [path.replace(os.sep, "/") for path in _files_below(os.fspath(folder), IMAGE_SUFFIXES)]


def list_folder(folder: str, split: str) -> Listing | None:
    """
    List a split of a folder of images or tar shards, `None` where it holds neither.

    Folders that are named like splits, such as `train`, `val2017` or `test_images`, are splits where no other folder
    holds images, and classes beside others; folders that hold all images are passed through before, as the `images` of
    `images/train`. Where images lie at several depths, none has a label, and a warning says so. Files beside the
    images, such as `metadata.jsonl`, and hidden files are passed over.

    Raises:
        OSError: A folder in it cannot be read.
        ValueError: There is no such split, splits lie beside other folders, images beside shards, a shard is
            compressed, a label is named differently in two folders of shards, or a name is not UTF-8.
    """
    images, shards = (list(_files_below(folder, kinds)) for kinds in (IMAGE_SUFFIXES, (".tar", ".tgz", ".gz")))
    if packed := [path for path in shards if path.lower().endswith((".tgz", ".tar.gz"))]:
        raise ValueError(f"{packed[0]!r} is a compressed shard: unpack it to a .tar file")
    shards = [path for path in shards if _suffix(path) == ".tar"]
    if images and shards:
        raise ValueError(
            f"{images[0]!r} lies beside shards such as {shards[0]!r}: give a pattern of shards, or a folder of images"
        )
    if images:
        below = _below_single_folders(images)
        tops = {path.partition(os.sep)[:2] for path in below.values()}
        found = {_split_of(name) if is_folder else "" for name, is_folder in tops}
        if "" in found and len(found) > 2:
            other = min(name for name, _ in tops if not _split_of(name))
            raise ValueError(f"folders of splits lie beside {other!r}: give the folder of a split itself")
        splits: dict[str, dict[str, list[str]]] = {}
        for path, part in below.items():
            top, *inner = part.split(os.sep)
            split_of, place = ("train", [top, *inner]) if "" in found else (_split_of(top), inner)
            splits.setdefault(split_of, {})[path] = place[:-1]
        depths = {name: {*map(len, places.values())} for name, places in splits.items()}
        for places in splits.values():
            high, *_, low = sorted((*places, *places), key=lambda path: len(places[path]))
            if len(places[high]) < len(places[low]):
                _logger.warning(f"{folder!r}: {high!r} lies less deep than {low!r}, so that no image has a label.")
        with_classes = {name for name, found in depths.items() if len(found) == 1 and found != {0}}
        classes = sorted({place[-1] for name in with_classes for place in splits[name].values()})
        if len(classes) == 1:
            classes, with_classes = [], set()
        listed: dict[str, list[_Image]] = {}
        for name, places in splits.items():
            for path, place in places.items():
                full = os.path.join(folder, path)
                # A link to nothing is left out where the image is decoded, as what is no image.
                size = os.path.getsize(full) if os.path.exists(full) else -1
                label = classes.index(place[-1]) if name in with_classes else None
                listed.setdefault(name, []).append(_Image(full, size, label))
        return _listing(_choose(listed, split), folder, classes or None)
    if shards:
        words = {path: re.split(r"[-._ \d/\\]+", path.lower()) for path in shards}
        named = {path: next((_SPLITS[word] for word in words[path] if word in _SPLITS), "") for path in shards}
        if "" in named.values() and any(named.values()):
            other = next(path for path in shards if not named[path])
            raise ValueError(f"shards of splits lie beside {other!r}: give a pattern of shards")
        parts: dict[str, list[_Image]] = {}
        for path in shards:
            parts.setdefault(named[path] or "train", []).extend(_shard_images(os.path.join(folder, path)))
        return _listing(_choose(parts, split), folder)
    return None


def list_shards(paths: Sequence[str], split: str) -> Listing:
    """
    List the images of tar shards, whose only split is `"train"`.

    A member's key is its name up to the first dot, as webdataset has it. Of a key with a member such as `key.png` that
    is the image; of one without, each image is one of its own. A label is the integer in a member that is named like
    the image up to the last dot, else like its key. The names of the labels are those of a `meta.json` beside the
    shards, which `read_class_names` takes; one that cannot name all labels is passed over, and a warning says so.
    Nothing else is read.

    Raises:
        ValueError: A shard is damaged or compressed, or a label is no integer of 64 bits, or is named differently in
            two folders; the message names it.
    """
    images = [image for path in paths for image in _shard_images(path)]
    return _listing(_choose({"train": images}, split), "")


def read_class_names(given: Sequence[str] | None) -> list[str]:
    """
    Read the names of classes that are given themselves, or as the path of one JSON file: a list of names, or an object
    with such a list under `classes`.

    Raises:
        ValueError: The file holds no such list, or a name is there twice.
        OSError: The file cannot be read.
    """
    if not given:
        return []
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ValueError(f"Class names must be a list of texts, got {given!r}.")
    names: Any = list(given)
    if len(given) == 1 and given[0].endswith(".json"):
        try:
            content = json.loads(Path(given[0]).read_bytes())  # which tells the encoding from the first bytes
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{given[0]!r} must hold JSON: {error}") from error
        names = content.get("classes") if isinstance(content, dict) else content
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{given[0]!r} must hold a list of names, or an object with one under 'classes'.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Class names must differ, {twice[0]!r} is there twice.")
    return names


def _files_below(folder: str, suffixes: Collection[str]) -> Iterator[str]:
    """Iterate over the relative paths of files in their order; links are followed, hidden names are not."""

    def fail(error: OSError) -> None:
        raise error

    def is_loop(path: str) -> bool:
        above = os.path.realpath(os.path.dirname(path)) + os.sep
        return os.path.islink(path) and above.startswith(os.path.join(os.path.realpath(path), ""))

    found = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name) and not is_loop(os.path.join(place, name))]
        names = [name for name in files if not _is_hidden(name) and _suffix(name) in suffixes]
        found += [os.path.relpath(os.path.join(place, name), folder) for name in names]
    for path in sorted(found):
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the name {path!r} is not UTF-8: rename it") from error
        yield path


def _below_single_folders(paths: list[str]) -> dict[str, str]:
    """Shorten paths by the folders that all of them lie in, down to one of a split, as `images` of `images/train`."""
    below = {path: path for path in paths}
    while len(tops := {path.partition(os.sep)[:2] for path in below.values()}) == 1:
        ((top, is_folder),) = tops
        if not is_folder or _split_of(top):
            break
        below = {path: part.partition(os.sep)[2] for path, part in below.items()}
    return below


def _split_of(folder: str) -> str:
    """Tell the split that a folder is named for, such as `train2017` or `test_images`, and `""` for any other."""
    word = re.fullmatch(r"([a-z]+?)[-_. ]?(images?|imgs|set|data)?[-_. ]?\d*", folder.lower())
    return _SPLITS.get(word[1], "") if word else ""


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _choose(splits: dict[str, list[_Image]], split: str) -> list[_Image]:
    """Give the rows of a split, or of slices as `datasets` writes them, such as `"train[:10%]+test"`."""
    import datasets

    try:
        lengths = {name: len(images) for name, images in splits.items()}
        chosen = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"`split` must be one of {sorted(splits)}, got {split!r}") from error
    return [image for part in chosen for image in splits[part.splitname][part.from_ : part.to]]


def _shard_images(path: str) -> list[_Image]:
    images: dict[str, _Image] = {}
    labels: dict[str, dict[str, int]] = {}
    names: set[str] = set()
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no file")
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = member.name.encode(errors="surrogateescape").decode(errors="replace")
                stem, label = os.path.splitext(name)[0], _suffix(name)[1:]
                is_known = label in LABELS or is_image(name)
                if member.isdir() or _is_hidden(os.path.basename(name)) or not is_known:
                    continue
                if name in names or not member.isreg() or member.sparse is not None:
                    raise ValueError(
                        f"{path}:{name} is {'there twice' if name in names else 'a link or no plain file'}"
                    )
                names.add(name)
                if label in LABELS:
                    labels.setdefault(label, {})[stem] = _read_label(archive, member, f"{path}:{name}")
                elif stem not in images:
                    images[stem] = _Image(name, member.size, None, path, member.offset_data)
            # What is no header ends a list as zeros do.
            archive.fileobj.seek(archive.offset)
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"no header at byte {archive.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a tar file without compression: {error}") from error
    known = next((labels[kind] for kind in LABELS if kind in labels), {})
    paths = {stem: os.path.split(stem) for stem in images}
    keys = {stem: os.path.join(folder, base.partition(".")[0]) for stem, (folder, base) in paths.items()}
    return [
        image._replace(label=known.get(stem, known.get(keys[stem])))
        for stem, image in images.items()
        if stem == keys[stem] or keys[stem] not in images
    ]


def _read_label(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> int:
    file = archive.extractfile(member)
    content = file.read(_LONGEST_LABEL + 1) if file else b""
    try:
        label = int(content)
    except ValueError:
        label = 2**63
    if len(content) > _LONGEST_LABEL or not -(2**63) <= label < 2**63:
        raise ValueError(f"{name} must hold a label, an integer of 64 bits, got {content[:20]!r}")
    return label


def _listing(images: list[_Image], folder: str, classes: list[str] | None = None) -> Listing:
    import datasets

    columns: dict[str, list[Any]] = {"image": [{"bytes": None, "path": image.path} for image in images]}
    features: dict[str, Any] = {"image": datasets.Image(decode=False)}
    in_shards = any(image.shard for image in images)
    if classes or in_shards:
        columns["label"] = [image.label for image in images]
        features["label"] = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    if in_shards:
        places: dict[str, tuple[str, Callable[[_Image], Any]]] = {
            "__url__": ("string", lambda image: image.shard),
            "__offset__": ("int64", lambda image: image.offset),
            "__size__": ("int64", lambda image: image.size),
        }
        columns |= {name: list(map(get, images)) for name, (_, get) in places.items()}
        features |= {name: datasets.Value(kind) for name, (kind, _) in places.items()}
    digest = hashlib.sha256(repr(classes).encode())
    for image in images:
        name = image.path if image.shard else os.path.relpath(image.path, folder)
        digest.update(repr((name, image.size, image.label)).encode())
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return Listing(dataset, digest.hexdigest(), classes or _names_beside(images))


def common_names(named: Mapping[str, list[str]]) -> list[str]:
    """
    Take the names of the classes that all sources give, `[]` and a warning where only some give any.

    Raises:
        ValueError: Two sources give a label different names.
    """
    known = {source: names for source, names in named.items() if names}
    first, common = next(iter(known.items()), ("", []))
    for source, names in known.items():
        for label, (expected, name) in enumerate(zip_longest(common, names)):
            if name != expected:
                raise ValueError(f"{first} and {source} must name label {label} alike, got {expected!r} and {name!r}.")
    unnamed = [source for source in named if source not in known]
    if known and unnamed:
        _logger.warning(f"The classes have no names: {first} has some and {unnamed[0]} none.")
    return [] if unnamed else common


def _names_beside(images: list[_Image]) -> list[str]:
    """Read the names of the labels beside tar shards, `[]` where there are none or not in each folder."""
    labels = {image.label for image in images} - {None}
    if not labels:
        return []
    paths = {os.path.join(os.path.dirname(image.shard), "meta.json") for image in images if image.shard}
    try:
        found = {repr(path): read_class_names([path]) if os.path.isfile(path) else [] for path in sorted(paths)}
    except (OSError, ValueError) as error:
        _logger.warning(f"The classes have no names: {' '.join(str(error).split())}")
        return []
    names = common_names(found)
    if names and (beyond := labels - {*range(len(names))}):
        _logger.warning(
            f"The classes have no names: {min(found)} names {len(names)} classes, and a label is {max(beyond)}."
        )
        return []
    return names
