"""Image files of every mode, orientation and kind of damage."""

import base64
import functools
import http.server
import os
import re
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from image_files import noise, opened, pixels, png, saved
from PIL import Image, ImageFile, ImageOps

from hieratok_hf import HieraTokImageProcessorPil
from hieratok_hf.utils import images
from hieratok_hf.utils.images import (
    ImageError,
    centre_crop,
    centre_square,
    convert_to_rgb,
    decode_image,
    encode_image,
    fetch_image,
    open_image,
    read_size,
)

OPEN_FILES = Path("/proc/self/fd")  # empty where there is no /proc


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "L")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    assert image.mode == "P"
    expected = np.array([[[10, 20, 30], [200, 0, 0]], [[0, 0, 250], [200, 0, 0]]])
    assert (pixels(open_image(saved(tmp_path, image, "p.png"))) == expected).all()
    expected[0, 1] = expected[1, 1] = 255
    assert (pixels(open_image(saved(tmp_path, image, "key.png", transparency=1))) == expected).all()
    assert (pixels(open_image(saved(tmp_path, image, "key.gif", transparency=1))) == expected).all()
    half = open_image(saved(tmp_path, image, "half.png", transparency=bytes([255, 51, 255])))
    assert pixels(half)[0, 1].tolist() == [244, 204, 204]


def test_sixteen_bit_png_with_colour_key_and_in_colour(tmp_path):
    path = tmp_path / "key.png"
    path.write_bytes(png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 25700), transparency=struct.pack(">H", 1000)))
    assert pixels(open_image(path))[0].tolist() == [[255] * 3, [100] * 3]
    path.write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x1280, 0x34FF, 0xFFFF)))
    assert pixels(open_image(path))[0, 0].tolist() == [0x12, 0x34, 0xFF]  # Pillow keeps the high byte


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_alpha_is_laid_on_white(tmp_path, suffix):
    colour, alpha = noise(), noise(channels=1, seed=1)
    image = Image.fromarray(np.concatenate([colour, alpha], -1))
    path = saved(tmp_path, image, f"rgba.{suffix}", lossless=True, exact=True)
    weight = alpha / 255
    assert (pixels(open_image(path)) == np.rint(colour * weight + 255 * (1 - weight))).all()
    assert (pixels(convert_to_rgb(Image.new("LA", (4, 4), (100, 51)))) == round(100 * 0.2 + 255 * 0.8)).all()
    assert all((pixels(convert_to_rgb(Image.new(mode, (2, 2)))) == 255).all() for mode in ("RGBa", "PA"))


def test_colour_spaces(tmp_path):
    cyan, red = Image.new("CMYK", (16, 16), (255, 0, 0, 0)), Image.new("RGB", (16, 16), (255, 0, 0))
    jpeg = saved(tmp_path, cyan, "adobe.jpg")  # Pillow writes and reads Adobe's inverted values
    assert b"Adobe" in jpeg.read_bytes() and opened(jpeg).mode == "CMYK"
    # Pillow 12 cannot read the uncompressed ones that it writes.
    deflated = saved(tmp_path, red.convert("YCbCr"), "y.tiff", compression="tiff_deflate")
    lab = saved(tmp_path, Image.new("LAB", (4, 4), (136, 128, 128)), "lab.tiff")
    for image, colour, error in (
        (opened(saved(tmp_path, cyan, "cmyk.tiff")), [0, 255, 255], 0),
        (opened(jpeg), [0, 255, 255], 3),
        (red.convert("HSV"), [255, 0, 0], 2),
        (red.convert("YCbCr"), [255, 0, 0], 2),
        (opened(deflated), [255, 0, 0], 2),
        (opened(lab), [127, 127, 127], 3),
        (Image.new("RGB", (2, 2), (9, 8, 7)).convert("RGBX"), [9, 8, 7], 0),
        (Image.new("L", (2, 2), 7), [7, 7, 7], 0),
        (Image.new("1", (2, 2), 1), [255, 255, 255], 0),
    ):
        assert np.abs(pixels(convert_to_rgb(image)).astype(int) - colour).max() <= error


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, mode, dtype):
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65407, 65535]])
    path = saved(tmp_path, Image.fromarray(values.astype(dtype)), "a.png" if mode == "I;16" else "a.tiff")
    assert opened(path).mode == mode
    assert pixels(open_image(path))[..., 0].tolist() == [[0, 0, 1, 1], [127, 128, 255, 255]]
    assert (np.rint(values / 257) == pixels(open_image(path))[..., 1]).all()


def test_float_images_are_scaled_and_values_out_of_range_refused(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "f.tiff")
    assert pixels(open_image(path))[0, :, 0].tolist() == [0, 128, 255]
    for low, high, dtype in ((0, 200, np.float32), (0, np.nan, np.float32), (-1, 70000, np.int32)):
        image = Image.fromarray(np.array([[low, high]], dtype))
        with pytest.raises(ValueError, match=rf"mode '{image.mode}' .*got \["):
            convert_to_rgb(image)
        refused(saved(tmp_path, image, "x.tiff"), rf"cannot be decoded \(.*mode '{image.mode}' .*\)")


UPRIGHT = ["123/456", "321/654", "654/321", "456/123", "14/25/36", "41/52/63", "63/52/41", "36/25/14"]


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, mode):
    values, exif = np.array([[1, 2, 3], [4, 5, 6]], np.uint8), Image.Exif()
    exif[0x0112] = orientation
    plain, deep = Image.fromarray(values), Image.fromarray(values.astype(np.uint16) * 257)
    image = deep if mode == "I;16" else plain.convert(mode)
    got = open_image(saved(tmp_path, image, "turned.png", exif=exif))
    assert "/".join("".join(map(str, row)) for row in pixels(got)[..., 0]) == UPRIGHT[orientation - 1]
    assert got.getexif().get(0x0112, 1) == 1  # a second conversion must not turn it again
    assert (pixels(convert_to_rgb(got)) == pixels(got)).all()


def test_broken_exif_leaves_the_image(tmp_path):
    path = saved(tmp_path, Image.fromarray(noise()), "broken.png", exif=b"no exif at all")
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(opened(path))
    assert (pixels(open_image(path)) == noise()).all()


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_first_frame(tmp_path, suffix):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    path = saved(tmp_path, red, f"frames.{suffix}", save_all=True, append_images=[blue], lossless=True)
    assert opened(path).n_frames == 2
    assert (pixels(open_image(path)) == [255, 0, 0]).all()


def refused(path, pattern, **options):
    """The file, and, where it can be read, its content alone."""
    doors = [(open_image, (path,), str(path))]
    if path.is_file() and path.stat().st_mode & 0o400:
        doors.append((decode_image, (path.read_bytes(), "two\nlines"), "two\nlines"))
    for door, given, name in doors:
        with pytest.raises(ImageError) as caught:
            door(*given, **options)
        text = str(caught.value)
        assert "\n" not in text and re.fullmatch(re.escape(f"{name!r}: ") + pattern, text), text


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    for name in ("none.png", "two\nlines.png"):
        refused(tmp_path / name, r"cannot be read \(No such file or directory\)")
    refused(tmp_path, "is a folder, not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", r"is empty \(0 bytes\)")
    (tmp_path / "text.png").write_text("not an image")
    refused(tmp_path / "text.png", "is no image in a format that is read here: [A-Z, ]+")
    os.mkfifo(tmp_path / "pipe.png")  # which must not block
    refused(tmp_path / "pipe.png", "is a device, not a file")

    def denied(*args):  # a test run as root can read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", denied, raising=False)
    with pytest.raises(ImageError, match="Permission denied"):
        open_image(saved(tmp_path, Image.fromarray(noise()), "a.png"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_damaged_files_are_refused_and_none_stays_open(tmp_path, suffix):
    settings, before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES), set(OPEN_FILES.glob("*"))
    path = saved(tmp_path, Image.fromarray(noise(64, 64)), f"whole.{suffix}")
    data = path.read_bytes()
    kept = [open_image(path)]
    assert (pixels(decode_image(data, "a")) == pixels(kept[0])).all()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        refused(path, r"(cannot be decoded \(.+\)|is no image in a format that is read here: [A-Z, ]+)")
    assert set(OPEN_FILES.glob("*")) <= before
    assert settings == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_gigantic_headers_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10_000, 8_000, 8, 2))
    refused(path, r"is too large for max_pixels=50000000 \(10000 x 8000 pixels\)")
    path.write_bytes(png(10_000, 10_000, 8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, r"is too large for max_pixels=50000000 \(Image size .*\)")
    path.write_bytes(png(100_000, 100_000, 8, 2))
    refused(path, r"is too large for max_pixels=50000000 \(Image size .*\)")
    small = saved(tmp_path, Image.fromarray(noise(4, 5)), "small.png")
    refused(small, r"is too large for max_pixels=19 \(5 x 4 pixels\)", max_pixels=19)
    assert open_image(small, max_pixels=20).size == decode_image(small.read_bytes(), "a", max_pixels=20).size == (5, 4)


def test_a_square_is_only_cut_from_an_image_of_its_side_and_others_are_resized_with_antialiasing():
    levels = noise(32, 47)
    image = Image.fromarray(levels)
    assert np.array_equal(np.asarray(centre_square(image, 32)), levels[:, 7:39])
    upright = image.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(np.asarray(centre_square(upright, 32)), levels[:, 7:39].transpose(1, 0, 2))
    levels = noise(96, 128)
    square = np.asarray(centre_square(Image.fromarray(levels), 32))
    checked = np.asarray(Image.fromarray(levels[:, 16:112]).resize((32, 32), Image.Resampling.BICUBIC))
    inner = np.s_[2:-2, 2:-2]  # the border also draws on pixels beyond the square
    assert square.shape == (32, 32, 3) and np.array_equal(square[inner], checked[inner])
    assert square.std() < 0.5 * levels.std()  # noise averages out
    assert centre_square(Image.new("RGB", (1, 100_000), "red"), 24).getpixel((0, 23)) == (255, 0, 0)


@pytest.mark.parametrize(("shape", "box"), [((16, 32), (0, 11, 52, 37)), ((32, 16), (14, 0, 38, 48))])
def test_the_middle_is_cut_in_any_aspect(shape, box):
    image = Image.fromarray(noise(48, 52))
    crop = np.asarray(centre_crop(image, shape))
    expected = image.resize(shape[::-1], Image.Resampling.BICUBIC, box=box)
    assert crop.shape == (*shape, 3) and np.array_equal(crop, np.asarray(expected))
    thin = Image.new("RGB", (1, 100_000), "red")
    assert centre_crop(thin, (16, 64)).size == (64, 16)
    exact = centre_crop(Image.fromarray(noise(20, 40)), (20, 40))
    assert np.array_equal(np.asarray(exact), noise(20, 40))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_the_size_is_read_as_the_image_stands(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(noise(20, 30)), f"a.{suffix}", exif=exif)
    expected = open_image(path).size[::-1]
    assert expected == ((30, 20) if orientation > 4 else (20, 30))
    assert read_size(path) == read_size(path.read_bytes(), "a") == expected


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif"])
def test_the_size_is_read_of_an_image_that_is_cut_short(tmp_path, suffix):
    whole = saved(tmp_path, Image.fromarray(noise(60, 90)), f"a.{suffix}").read_bytes()
    assert read_size(whole[:-200], "a") == (60, 90)
    with pytest.raises(ImageError):
        decode_image(whole[:-200], "a")


def test_a_size_that_cannot_be_read_is_refused(tmp_path):
    for content in (b"", b"no image"):
        with pytest.raises(ImageError, match=r"^'a': is"):
            read_size(content, "a")
    with pytest.raises(ImageError, match="is a folder"):
        read_size(tmp_path)
    with warnings.catch_warnings(), pytest.raises(ImageError, match="too large"):
        warnings.simplefilter("ignore")  # Pillow's own, of many pixels
        read_size(png(10_000, 10_000, 8, 2), "a")


def url_of(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder, and the address at which its files are served."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_go_through_the_door_of_files(served, monkeypatch):
    folder, address = served
    values = np.array([[0, 257 * 9], [65535, 257 * 200]], np.uint16)
    grey = saved(folder, Image.fromarray(values), "grey.png")
    clear = saved(folder, Image.fromarray(noise(8, 8, 4)), "clear.png")
    for path in (grey, clear):
        for url in (url_of(path), f"{address}/{path.name}"):
            assert (pixels(fetch_image(url)) == pixels(open_image(path))).all()
            assert (pixels(HieraTokImageProcessorPil().fetch_images([url])[0]) == pixels(open_image(path))).all()
    (folder / "bomb.png").write_bytes(png(10_000, 8_000, 8, 2))
    Image.new("RGB", (8, 8)).save(folder / "a.eps")
    monkeypatch.setattr(images, "_MOST_BYTES", 10_000)
    (folder / "long.png").write_bytes(bytes(20_000))
    for name, reason in (("bomb.png", "too large"), ("a.eps", "no image"), ("x.png", "fetched"), ("long.png", "MiB")):
        for url in (f"{address}/{name}", *([url_of(folder / name)] if name in ("bomb.png", "a.eps") else [])):
            with pytest.raises(ImageError, match=reason) as caught:
                fetch_image(url)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "url", ["data:", "data:,", "data:image/png;base64,!", "http://", "https://[", "http://127.0.0.1:1"]
)
def test_urls_that_lead_nowhere_are_named(url):
    with pytest.raises(ImageError, match=f"^{re.escape(repr(url))}: "):
        fetch_image(url)


@pytest.mark.parametrize("suffix", ["png", "apng", "bmp", "dib", "tif", "TIFF", "jpg", "jpe", "jfif", "webp", "gif"])
def test_an_image_is_encoded_in_the_format_of_its_name(suffix):
    smooth = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
    content = encode_image(Image.fromarray(smooth), f"a.b.{suffix}")
    assert content == encode_image(Image.fromarray(smooth), f"c.{suffix}")
    found = pixels(decode_image(content, "content")).astype(int)
    exact = suffix.lower() in ("png", "apng", "bmp", "dib", "tif", "tiff")
    assert (found == smooth).all() if exact else 0 < np.abs(found - smooth).mean() < 4
    is_lossy = suffix in ("jpg", "jpe", "jfif", "webp")
    assert (
        len(encode_image(Image.fromarray(noise()), f"a.{suffix}", quality=5))
        < len(encode_image(Image.fromarray(noise()), f"a.{suffix}"))
    ) == is_lossy


def test_jpeg_keeps_its_colours_apart():
    stripes = np.zeros((16, 16, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255
    found = pixels(decode_image(encode_image(Image.fromarray(stripes), "a.jpg"), "content")).astype(int)
    assert np.abs(found - stripes).max() < 40


def test_an_image_that_a_format_cannot_hold_is_refused():
    with pytest.raises((OSError, ValueError)):
        encode_image(Image.new("RGB", (16384, 1)), "a.webp")
