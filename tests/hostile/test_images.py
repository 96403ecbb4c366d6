"""
Image files that are hostile or odd, by every door that takes one: the picture that it shows, or one line that names
the file, at once, and nothing made, run or left open.
"""

import gzip
import io
import os
import socket
import struct
import subprocess
import tracemalloc
import zlib
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import noise, png
from PIL import Image

from hieratok_hf import HieraTokImageProcessor, HieraTokImageProcessorPil, ImageError, open_image
from hieratok_hf.data.image_dataset import image_of
from hieratok_hf.utils.images import decode_image

RED = Image.new("RGB", (24, 16), (255, 0, 0))


def made(image=RED, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(kind, data, content=None):
    """A PNG file with a chunk more behind its header."""
    content = content or made()
    return content[:33] + chunk(kind, data) + content[33:]


def tiff(tags, data=b"\0" * 64, order="<", next_ifd=0):
    """A TIFF file of entries `(tag, type, values)` by hand; the strip lies at 8."""
    code = {1: "B", 2: "s", 3: "H", 4: "I", 12: "d"}
    entries, more, at = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, kind, values in sorted(tags):
        packed = values if kind == 2 else struct.pack(f"{order}{len(values)}{code[kind]}", *values)
        if len(packed) > 4:
            place, more = struct.pack(order + "I", at + len(more)), more + packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack(order + "HHI", tag, kind, len(values)) + place
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", next_ifd) + more


def grey_tiff(bits, data, photometric=1, width=2, height=1, sample_format=1, **other):
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [bits]), (259, 3, [1]), (262, 3, [photometric])]
    tags += [(273, 4, [8]), (277, 3, [1]), (278, 4, [height]), (279, 4, [len(data)]), (339, 3, [sample_format])]
    return tiff(tags, data, **other)


def webp_canvas(width, height):
    """A WebP file that says it has a large canvas, with a small frame."""
    small = made(RED, "WEBP", lossless=True)
    body = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3]
    body += struct.pack("<I", height - 1)[:3] + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    frame = b"\0" * 6 + struct.pack("<I", 23)[:3] + struct.pack("<I", 15)[:3] + b"\0" * 4 + small[12:]
    body += b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def jpeg_of_size(width, height):
    content = made(kind="JPEG")
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def bmp(width, height, bits=24, compression=0, data=b""):
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 14 + len(head) + len(data), 0, 0, 14 + len(head)) + head + data


def text_bomb(kind):
    packed = zlib.compress(b"x" * 70_000_000)
    if kind == b"iTXt":
        return with_chunk(kind, b"Comment\0\1\0\0\0" + packed)
    return with_chunk(kind, (b"icc\0\0" if kind == b"iCCP" else b"Comment\0\0") + packed)


def transposed(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return made(kind="JPEG", exif=exif)


def cut(content, share):
    return content[: int(len(content) * share)]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 16\n%%EndComments\n(made) (w) file closefile\n%%EOF\n"
SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
PNG, JPEG = made(), made(kind="JPEG")
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

# Of each what its error says, `None` for the red picture, or the first and the last pixel of its first row.
NO_IMAGE, LARGE, BROKEN = "is no image", "is too large", "cannot be decoded"
FILES = {
    # formats that nobody means, by their contents
    **{
        kind: (made(RED.convert(mode), kind), NO_IMAGE)
        for kind, mode in {
            "ICO": "RGB", "ICNS": "RGB", "EPS": "RGB", "PDF": "RGB", "PPM": "RGB", "TGA": "RGB", "PCX": "RGB",
            "JPEG2000": "RGB", "SGI": "RGB", "DDS": "RGB", "XBM": "1", "IM": "RGB", "MSP": "1", "SPIDER": "F",
        }.items()
    },
    "program": (EPS, NO_IMAGE),
    "svg": (SVG, NO_IMAGE),
    "page": (b"<html><img src='x.png'></html>", NO_IMAGE),
    "gzip": (gzip.compress(PNG), NO_IMAGE),
    "zeros": (bytes(1000), NO_IMAGE),
    # what is cut short or says something else than it has
    **{f"{kind} cut": (cut(made(kind=kind, lossless=True), 0.6), BROKEN) for kind in ("PNG", "JPEG", "BMP")},
    "TIFF cut": (cut(made(kind="TIFF"), 0.6), BROKEN),
    "WEBP cut": (cut(made(kind="WEBP", lossless=True), 0.6), BROKEN),
    "GIF cut": (cut(made(kind="GIF"), 0.3), NO_IMAGE),
    "signature": (PNG[:8], NO_IMAGE),
    "no rows": (png(100, 100, 8, 2), BROKEN),
    "no width": (png(0, 5, 8, 2), NO_IMAGE),
    "no height": (jpeg_of_size(24, 0), NO_IMAGE),
    "bits": (png(1, 1, 3, 2, b"\0\0"), NO_IMAGE),
    "colours": (png(1, 1, 8, 9, b"\0\0"), NO_IMAGE),
    "check sum": (PNG[:29] + b"\0\0\0\0" + PNG[33:], NO_IMAGE),
    "no palette": (png(1, 1, 8, 3, b"\0\0"), (BLACK, BLACK)),
    "no frame": (b"GIF89a" + struct.pack("<HH", 4, 4) + b"\0\0\0;", NO_IMAGE),
    "no size": (bmp(0, 0), NO_IMAGE),
    "no tags": (tiff([]), NO_IMAGE),
    "tags without end": (tiff([(256, 4, [2]), (257, 4, [1]), (273, 4, [8] * 100_000)]), (WHITE, WHITE)),
    "loop of pages": (grey_tiff(8, b"\0\xff" + bytes(62), next_ifd=72), (BLACK, WHITE)),
    "frames that are not there": (with_chunk(b"acTL", struct.pack(">II", 2**31, 0)), None),
    "orientation 0": (transposed(0), None),
    "orientation 255": (transposed(255), None),
    "broken exif": (with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), None),
    "rubbish at the end": (PNG + bytes(1000), None),
    # what would take all memory
    "PNG bomb": (png(100_000, 100_000, 8, 2), LARGE),
    "PNG of 60 million": (png(10_000, 6_000, 8, 2), LARGE),
    "PNG beyond 2**31": (png(2**31, 1, 8, 2), LARGE),
    "JPEG bomb": (jpeg_of_size(65_500, 65_500), LARGE),
    "WEBP bomb": (webp_canvas(16_383, 16_383), LARGE),
    "TIFF bomb": (grey_tiff(8, bytes(64), width=100_000, height=100_000), LARGE),
    "BMP bomb": (bmp(2**31 - 1, 2**31 - 1), LARGE),
    "GIF bomb": (b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0," + bytes(20), LARGE),
    "compressed text": (text_bomb(b"zTXt"), BROKEN),
    "international text": (text_bomb(b"iTXt"), BROKEN),
    "colour profile": (text_bomb(b"iCCP"), BROKEN),
    "long text": (with_chunk(b"tEXt", b"a\0" + b"x" * 3_000_000), None),
    # what is seldom, and must not come out as another picture
    "animated": (made(kind="PNG", save_all=True, append_images=[RED.point(lambda x: 255 - x)]), None),
    "several pictures": (made(kind="MPO", save_all=True, append_images=[RED.point(lambda x: 255 - x)]), None),
    "upside down": (bmp(2, -1, data=b"\0\0\0\xff\xff\xff\0\0"), (BLACK, WHITE)),
    "CMYK": (made(Image.new("CMYK", (24, 16), (0, 255, 255, 0)), "JPEG"), None),
    "16 bits": (grey_tiff(16, struct.pack("<2H", 0, 65535)), (BLACK, WHITE)),
    "16 bits, big end first": (grey_tiff(16, struct.pack(">2H", 0, 65535), order=">"), (BLACK, WHITE)),
    "white is zero": (grey_tiff(8, b"\0\xff", photometric=0), (WHITE, BLACK)),
    "white is zero, 16 bits": (grey_tiff(16, struct.pack("<2H", 0, 65535), photometric=0), (WHITE, BLACK)),
    "white is zero, floats": (grey_tiff(32, struct.pack("<2f", 0, 1), 0, sample_format=3), (WHITE, BLACK)),
    "12 bits": (grey_tiff(12, b"\x00\x0f\xff"), (BLACK, WHITE)),
    "no number": (grey_tiff(32, struct.pack("<2f", 0, np.nan), sample_format=3), BROKEN),
    "below zero": (grey_tiff(16, struct.pack("<2h", -5, 9), sample_format=2), BROKEN),
    "beyond 16 bits": (grey_tiff(32, struct.pack("<2I", 0, 70_000)), BROKEN),
}  # fmt: skip


def by_path(path):
    return open_image(path)


def by_content(path):
    return decode_image(path.read_bytes(), str(path))


def by_row(path):
    return image_of({"image": {"bytes": None, "path": str(path)}, "name": path.name, "label": None})


def by_processor(kind):
    def door(path):
        processor = kind(size_divisor=1)
        return processor.postprocess(processor(str(path), return_tensors="pt").pixel_values)[0]

    return door


def by_data_url(path):
    processor = HieraTokImageProcessorPil(size_divisor=1)
    url = "data:image/png;base64," + b64encode(path.read_bytes()).decode()
    return processor.postprocess(processor(url, return_tensors="pt").pixel_values)[0]


DOORS = {"path": by_path, "content": by_content, "row": by_row, "processor": by_processor(HieraTokImageProcessor)}
DOORS |= {"processor of Pillow": by_processor(HieraTokImageProcessorPil), "data URL": by_data_url}


@pytest.fixture
def no_processes(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("reading a picture started a process")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def check(door, path, expected):
    """The picture, or one line of `ImageError`, with little memory, nothing open and nothing made."""
    open_files, there = set(os.listdir("/proc/self/fd")), sorted(path.parent.iterdir())
    tracemalloc.start()
    try:
        if isinstance(expected, str):
            with pytest.raises(ImageError, match=expected) as caught:
                door(path)
            message = str(caught.value)
            assert "\n" not in message and len(message) < 1500
            assert path.name in message or message.startswith("'data:")
        else:
            image = door(path)
            if expected is None:
                assert image.size == RED.size and np.abs(np.array(image).astype(int) - [255, 0, 0]).max() <= 3
            else:
                assert (image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))) == expected
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()
    # What earlier tests left open may be closed in between.
    assert set(os.listdir("/proc/self/fd")) <= open_files and sorted(path.parent.iterdir()) == there


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_picture_or_one_line(name, tmp_path, no_processes):
    content, expected = FILES[name]
    path = tmp_path / "picture.png"  # whatever it is
    path.write_bytes(content)
    for door in DOORS.values():
        check(door, path, expected)


PATHS = {
    "zero byte": lambda folder: "a\0picture.png",
    "no text": lambda folder: "\ud800picture.png",
    "no name": lambda folder: str(folder) + "/picture.png/",
    "too long": lambda folder: "picture.png" * 1000,
    "a content": lambda folder: "picture.png" + b64encode(noise(400, 400)).decode(),
    "address": lambda folder: "file:///picture.png",
    "pipe": lambda folder: made_at(folder, os.mkfifo),
    "socket": lambda folder: made_at(folder, lambda path: socket.socket(socket.AF_UNIX).bind(path)),
    "link to itself": lambda folder: made_at(folder, lambda path: os.symlink(path, path)),
    "link to a device": lambda folder: made_at(folder, lambda path: os.symlink("/dev/zero", path)),
    "terabyte": lambda folder: made_at(folder, lambda path: sparse(path, JPEG[:4])),
    "terabyte of WebP": lambda folder: made_at(folder, lambda path: sparse(path, made(kind="WEBP"))),
}


def made_at(folder, make):
    make(str(folder / "picture.png"))
    return str(folder / "picture.png")


def sparse(path, content):
    Path(path).write_bytes(content)
    os.truncate(path, 2**40)


@pytest.mark.parametrize("kind", PATHS)
def test_a_path_that_leads_to_no_picture_is_named(kind, tmp_path):
    path = PATHS[kind](tmp_path)
    there = sorted(tmp_path.iterdir())
    for door in ("path", "row", "processor", "processor of Pillow"):
        with pytest.raises(ImageError, match=r"picture\.png") as caught:
            DOORS[door](Path(path) if path.startswith(str(tmp_path)) and not path.endswith("/") else Text(path))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 1500
    assert sorted(tmp_path.iterdir()) == there


class Text(str):
    """A path that `pathlib` would change."""

    name = "row"


def test_names_that_are_not_utf8_are_read_and_named(tmp_path):
    for name, content in ((b"\xff.png", PNG), (b"\xfe\n.png", b"no picture")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(content)
    good, bad = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    for path in (good, os.fsencode(good)):
        assert open_image(path).size == RED.size
    for path in (bad, os.fsencode(bad)):
        with pytest.raises(ImageError, match=r"xfe|dcfe") as caught:
            open_image(path)
        str(caught.value).encode("ascii")  # so that every terminal shows it


INPUTS = {
    "content": PNG,
    "buffer": io.BytesIO(PNG),
    "row of a data set": {"bytes": PNG, "path": None},
    "nothing": None,
    "nothing in a list": [[None]],
    "number": 5,
    "generator": (x for x in ()),
    "no pixels": np.zeros((0, 4, 3), np.uint8),
    "no height": Image.new("I", (5, 0)),
    "objects": np.array([[None]]),
    "words": np.array([["a"]]),
    "16 bits": np.ones((8, 8, 3), np.uint16),
    "complex": np.ones((8, 8, 3), np.complex64),
    "records": np.zeros((8, 8), [("r", "u1")]),
    "no numbers": np.full((8, 8, 3), np.nan, np.float32),
    "five dimensions": np.zeros((1, 1, 8, 8, 3), np.uint8),
    "sparse": torch.zeros(3, 8, 8).to_sparse(),
    "without values": torch.zeros(3, 8, 8, device="meta"),
    "nested": torch.nested.nested_tensor([torch.zeros(3, 8)]),
    "16 bits on torch": torch.zeros(3, 8, 8, dtype=torch.uint16),
    "URL of a program": "data:image/png;base64," + b64encode(EPS).decode(),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("processor", [HieraTokImageProcessor, HieraTokImageProcessorPil])
def test_what_is_no_image_is_named(processor, kind):
    given, rescale = INPUTS[kind], kind not in ("no floats", "no numbers", "sparse", "without values", "nested")
    named = r"^images? (of a floating dtype )?must|^'(data|http):"
    with pytest.raises((TypeError, ValueError), match=named) as caught:
        processor(size_divisor=1)(given, return_tensors="pt", do_rescale=rescale)
    assert "\n" not in str(caught.value)
