"""Images and image files that tests make."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image
from scripts import ROOT

from hieratok_hf import open_image


def noise(height=32, width=48, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def crop(i, size, photograph=0):
    """The i-th of some squares that lie beside each other in a photograph of the examples."""
    left, top = 64 + 24 * (i % 4), 64 + 24 * (i // 4)
    path = sorted((ROOT / "src" / "hieratok_hf" / "example_images").glob("*.webp"))[photograph]
    return open_image(path).crop((left, top, left + size, top + size))


def png(width, height, bits, colour, rows=b"", transparency=None):
    """A PNG file's bytes written by hand, for what Pillow itself cannot write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    key = b"" if transparency is None else chunk(b"tRNS", transparency)
    signature = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return signature + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def encoded(image, kind="png"):
    """The bytes of a file of an image, without loss."""
    file = io.BytesIO()
    image.save(file, kind, lossless=True)
    return file.getvalue()


def write_shard(path, images, labels=(), kind="png"):
    """A tar shard in webdataset style, with a file of its label beside each image if there are any."""
    members = {}
    for i, image in enumerate(images):
        members[f"{i:06}.{kind}"] = encoded(image, kind)
        if labels:
            members[f"{i:06}.cls"] = str(labels[i]).encode()
    write_members(path, members)


def write_members(path, members, mode="w"):
    """A tar file of the contents of its members by name, and of members without content."""
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content) if isinstance(content, bytes) else 0
            archive.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return str(path)


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def opened(path):
    return Image.open(io.BytesIO(path.read_bytes()))  # leaves no file open where Pillow loads lazily


def pixels(image):
    assert type(image) is Image.Image and image.mode == "RGB"
    return np.array(image)
