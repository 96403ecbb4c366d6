"""Image files of every mode, orientation and kind of damage."""

import os
import re
import struct
import warnings

import numpy as np
import pytest
from image_files import noise, opened, pixels, png, saved
from PIL import Image, ImageFile, ImageOps

from hieratok_hf.utils import images as images
from hieratok_hf.utils.images import ImageError, centre_square, convert_to_rgb, decode_image, open_image


def test_grey_bilevel_and_rgb_files(tmp_path):
    grey, rgb = noise(channels=0), noise()
    assert (pixels(open_image(saved(tmp_path, Image.fromarray(rgb), "rgb.png"))) == rgb).all()
    assert (pixels(open_image(saved(tmp_path, Image.fromarray(grey), "l.png"))) == grey[..., None]).all()
    bilevel = Image.fromarray(grey > 127)
    assert bilevel.mode == "1"
    expected = np.where(grey > 127, 255, 0)[..., None]
    assert (pixels(open_image(saved(tmp_path, bilevel, "1.png"))) == expected).all()


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_alpha_is_laid_on_white(tmp_path, suffix):
    colour, alpha = noise(), noise(channels=1, seed=1)
    path = saved(
        tmp_path, Image.fromarray(np.concatenate([colour, alpha], -1)), f"rgba.{suffix}", lossless=True, exact=True
    )
    weight = alpha / 255
    assert (pixels(open_image(path)) == np.rint(colour * weight + 255 * (1 - weight))).all()


def test_grey_with_alpha(tmp_path):
    path = saved(tmp_path, Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 51)]), "la.png")
    assert (pixels(open_image(path)) == round(100 * 0.2 + 255 * 0.8)).all()


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


def test_colour_spaces(tmp_path):
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert (pixels(open_image(saved(tmp_path, cyan, "cmyk.tiff"))) == [0, 255, 255]).all()
    jpeg = saved(tmp_path, cyan, "adobe.jpg")  # Pillow writes and reads Adobe's inverted values
    assert b"Adobe" in jpeg.read_bytes() and opened(jpeg).mode == "CMYK"
    assert np.abs(pixels(open_image(jpeg)).astype(int) - [0, 255, 255]).max() <= 3
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for image in (
        red.convert("HSV"),
        red.convert("YCbCr"),
        # Pillow 12 cannot read the uncompressed ones that it writes.
        opened(saved(tmp_path, red.convert("YCbCr"), "y.tiff", compression="tiff_deflate")),
    ):
        assert np.abs(pixels(convert_to_rgb(image)).astype(int) - [255, 0, 0]).max() <= 2
    lab = opened(saved(tmp_path, Image.new("LAB", (4, 4), (136, 128, 128)), "lab.tiff"))
    assert lab.mode == "LAB"
    assert np.ptp(pixels(convert_to_rgb(lab)).astype(int)) <= 2  # a neutral colour stays grey
    assert np.abs(pixels(convert_to_rgb(lab)).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("mode", ["RGBa", "PA"])
def test_fully_transparent_images_become_white(mode):
    assert (pixels(convert_to_rgb(Image.new(mode, (2, 2)))) == 255).all()


def test_padding_channel_is_dropped():
    image = Image.new("RGB", (2, 2), (9, 8, 7)).convert("RGBX")
    assert (pixels(convert_to_rgb(image)) == [9, 8, 7]).all()


def sixteen_bit(tmp_path, mode):
    values = np.array([[0, 128, 129, 257], [32767, 32768, 65407, 65535]])
    if mode == "I;16":
        return values, saved(tmp_path, Image.fromarray(values.astype(np.uint16)), "a.png")
    if mode == "I;16B":
        return values, saved(tmp_path, Image.fromarray(values.astype(">u2")), "a.tiff")
    return values, saved(tmp_path, Image.fromarray(values.astype(np.int32)), "a.tiff")


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, mode):
    values, path = sixteen_bit(tmp_path, mode)
    assert opened(path).mode == mode
    assert pixels(open_image(path))[..., 0].tolist() == [[0, 0, 1, 1], [127, 128, 255, 255]]
    assert (np.rint(values / 257) == pixels(open_image(path))[..., 1]).all()


def test_sixteen_bit_png_with_colour_key_and_in_colour(tmp_path):
    path = tmp_path / "key.png"
    path.write_bytes(png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 1000, 25700), transparency=struct.pack(">H", 1000)))
    assert pixels(open_image(path))[0].tolist() == [[255] * 3, [100] * 3]
    path.write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x1280, 0x34FF, 0xFFFF)))
    assert pixels(open_image(path))[0, 0].tolist() == [0x12, 0x34, 0xFF]  # Pillow keeps the high byte


def test_float_images(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "f.tiff")
    assert pixels(open_image(path))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([[0, 200]], np.float32), "image of mode 'F' must hold values in [0, 1], got [0.0, 200.0]"),
        (np.array([[0, np.nan]], np.float32), "image of mode 'F' must hold values in [0, 1], got [nan, nan]"),
        (np.array([[-1, 70000]], np.int32), "image of mode 'I' must hold values in [0, 65535], got [-1, 70000]"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, array, text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        convert_to_rgb(Image.fromarray(array))
    path = saved(tmp_path, Image.fromarray(array), "x.tiff")
    with pytest.raises(ImageError, match=f"^{re.escape(f'{str(path)!r}: cannot be decoded ({text})')}$"):
        open_image(path)


UPRIGHT = {
    1: "123/456",
    2: "321/654",
    3: "654/321",
    4: "456/123",
    5: "14/25/36",
    6: "41/52/63",
    7: "63/52/41",
    8: "36/25/14",
}


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, mode):
    values = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = (
        Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    )
    path = saved(tmp_path, image, "turned.png", exif=exif)
    got = open_image(path)
    assert ["".join(map(str, row)) for row in pixels(got)[..., 0]] == UPRIGHT[orientation].split("/")
    assert (pixels(got) == pixels(convert_to_rgb(ImageOps.exif_transpose(opened(path))))).all()
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


def test_input_is_not_changed():
    image = Image.fromarray(noise())
    copy = convert_to_rgb(image)
    copy.putpixel((0, 0), (1, 2, 3))
    assert copy is not image and (np.array(image) == noise()).all()


def refused(path, pattern, **options):
    with pytest.raises(ImageError) as caught:
        open_image(path, **options)
    text = str(caught.value)
    assert "\n" not in text and re.fullmatch(re.escape(f"{str(path)!r}: ") + pattern, text), text


def test_missing_folder_empty_and_foreign_files(tmp_path):
    refused(tmp_path / "none.png", r"cannot be read \(No such file or directory\)")
    refused(tmp_path / "two\nlines.png", r"cannot be read \(No such file or directory\)")
    refused(tmp_path, "is a folder, not a file")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", r"is empty \(0 bytes\)")
    (tmp_path / "text.png").write_text("not an image")
    refused(tmp_path / "text.png", "is no image in a format that Pillow reads")
    with pytest.raises(TypeError, match=r"expected str, bytes or os\.PathLike object, not int"):
        open_image(3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "is a device, not a file")


def test_unreadable_file(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(noise()), "a.png")

    def denied(*args):  # a test run as root can read every file
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", denied, raising=False)
    refused(path, r"cannot be read \(Permission denied\)")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "webp", "bmp", "tiff"])
def test_truncated_files(tmp_path, suffix):
    path = saved(tmp_path, Image.fromarray(noise(64, 64)), f"whole.{suffix}")
    data = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        refused(path, r"(cannot be decoded \(.+\)|is no image in a format that Pillow reads)")
    if suffix in ("png", "jpg"):
        refused(path, r"cannot be decoded \(image file is truncated.*\)")


def test_gigantic_headers_are_refused_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(10_000, 8_000, 8, 2))
    refused(path, r"is too large for max_pixels=50000000 \(10000 x 8000 pixels\)")
    path.write_bytes(png(10_000, 10_000, 8, 2))
    with pytest.warns(Image.DecompressionBombWarning):
        refused(path, r"is too large for max_pixels=50000000 \(10000 x 10000 pixels\)")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(path, r"is too large for max_pixels=50000000 \(Image size \(100000000 pixels\) exceeds limit .*\)")
    path.write_bytes(png(100_000, 100_000, 8, 2))
    refused(path, r"is too large for max_pixels=50000000 \(Image size \(10000000000 pixels\) exceeds limit .*\)")
    small = saved(tmp_path, Image.fromarray(noise(4, 5)), "small.png")
    refused(small, r"is too large for max_pixels=19 \(5 x 4 pixels\)", max_pixels=19)
    assert open_image(small, max_pixels=20).size == (5, 4)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_no_open_file_and_no_changed_pillow_setting(tmp_path):
    settings = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    before = len(os.listdir("/proc/self/fd"))
    kept = []
    for suffix in ("png", "jpg", "gif", "tiff", "bmp", "webp"):
        path = saved(tmp_path, Image.fromarray(noise()), f"a.{suffix}")
        kept.append(open_image(path))
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(ImageError) as caught:
            open_image(path)
        kept.append(caught)
    assert len(os.listdir("/proc/self/fd")) == before
    assert settings == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tiff"])
def test_a_files_content_gives_the_same_image_as_the_file(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if suffix == "gif" else {"exif": exif}
    path = saved(tmp_path, Image.fromarray(noise(6, 4)), f"a.{suffix}", **options)
    image = decode_image(path.read_bytes(), "a name")
    assert (pixels(image) == pixels(open_image(path))).all()
    assert image.size == ((4, 6) if suffix == "gif" else (6, 4))


def test_content_that_cannot_be_decoded_is_named(tmp_path):
    data = saved(tmp_path, Image.fromarray(noise(64, 64)), "whole.png").read_bytes()
    for content, pattern in (
        (b"", r"is empty \(0 bytes\)"),
        (b"not an image", "is no image in a format that Pillow reads"),
        (data[: len(data) // 2], r"cannot be decoded \(image file is truncated.*\)"),
        (png(100_000, 100_000, 8, 2), r"is too large for max_pixels=50000000 \(.*\)"),
    ):
        for name in ("train.tar:000001.png", "two\nlines.png"):
            with pytest.raises(ImageError) as caught:
                decode_image(content, name)
            text = str(caught.value)
            assert "\n" not in text and re.fullmatch(re.escape(f"{name!r}: ") + pattern, text), text
    with pytest.raises(ImageError, match=r"^'a': is too large for max_pixels=4095 \(64 x 64 pixels\)"):
        decode_image(data, "a", max_pixels=4095)
    assert decode_image(data, "a", max_pixels=4096).size == (64, 64)


def test_an_image_of_the_right_short_side_is_only_cut():
    levels = np.random.default_rng(0).integers(0, 256, (32, 47, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    assert np.array_equal(np.asarray(centre_square(image, 32)), levels[:, 7:39])
    upright = image.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(np.asarray(centre_square(upright, 32)), levels[:, 7:39].transpose(1, 0, 2))


def test_other_images_are_resized_with_antialiasing():
    levels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    square = centre_square(Image.fromarray(levels), 32)
    assert square.size == (32, 32)
    checked = Image.fromarray(levels[:, 16:112]).resize((32, 32), Image.Resampling.BICUBIC)
    inner = np.s_[2:-2, 2:-2]  # the border also draws on pixels beyond the square
    assert np.array_equal(np.asarray(square)[inner], np.asarray(checked)[inner])
    assert np.asarray(square).std() < 0.5 * levels.std()  # noise averages out
    assert centre_square(Image.new("RGB", (1, 100_000), "red"), 24).getpixel((0, 23)) == (255, 0, 0)
