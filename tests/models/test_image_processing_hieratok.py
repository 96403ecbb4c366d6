"""Tests of `image_processing_hieratok`: both backends, both directions, and the Auto classes."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import random_core
from image_files import noise, opened, pixels, saved
from PIL import Image
from transformers import AutoImageProcessor, dynamic_module_utils
from transformers.models.auto import image_processing_auto
from transformers.utils import is_torchvision_available

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessor, HieraTokImageProcessorPil, add_remote_code
from hieratok_hf.utils.images import ImageError

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
TORCHVISION = pytest.param(HieraTokImageProcessor, id="torchvision", marks=needs_torchvision)
both_backends = pytest.mark.parametrize("backend", [HieraTokImageProcessorPil, TORCHVISION])


@both_backends
def test_processors_follow_orientation(tmp_path, backend):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(noise()), "turned.png", exif=exif)
    for given in (opened(path), path, str(path)):
        assert backend()(given, return_tensors="pt").pixel_values.shape == (1, 3, 48, 32)


@both_backends
def test_every_kind_of_input_gives_the_same_values(backend):
    array, processor = noise(), backend()
    expected = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    chw = np.ascontiguousarray(array.transpose(2, 0, 1))
    opaque = np.concatenate([array, np.full_like(array[..., :1], 255)], -1)
    frozen = array.copy()
    frozen.flags.writeable = False
    given = [Image.fromarray(array), array, chw, torch.from_numpy(array), torch.from_numpy(chw), opaque, frozen]
    given += [[array], array[None], torch.from_numpy(chw)[None], [[array]]]
    given += [np.ascontiguousarray(array[:, ::-1])[:, ::-1]]
    for images in given:
        values = processor(images, return_tensors="pt").pixel_values
        torch.testing.assert_close(values, expected, rtol=0, atol=2e-7)
        assert values.min() >= -1 and values.max() <= 1
    floats = torch.from_numpy(chw).double().div(255).requires_grad_()
    for images in (floats, floats.detach().numpy(), floats.detach().numpy().astype(">f4")):
        values = processor(images, do_rescale=False, return_tensors="pt").pixel_values
        torch.testing.assert_close(values, expected, rtol=0, atol=3e-7)
    grey, rgba = noise(channels=0), noise(channels=4, seed=3)
    for given in (grey, grey[None], grey[..., None], torch.from_numpy(grey)):
        values = processor(given, return_tensors="pt").pixel_values
        assert (values == values[:, :1]).all() and values.shape == (1, 3, 32, 48)
    from_pil, from_array = processor([Image.fromarray(rgba), rgba], return_tensors="pt").pixel_values
    assert (from_pil == from_array).all()
    as_float = processor(rgba / 255, do_rescale=False, return_tensors="pt").pixel_values[0]
    assert (as_float - from_pil).abs().max() <= 1.01 / 255


@both_backends
def test_size_is_kept_but_for_a_centre_crop(backend):
    array = noise(37, 50)
    values = backend()(array, return_tensors="pt").pixel_values
    expected = torch.from_numpy(array[2:34, 1:49]).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(values, expected, rtol=0, atol=2e-7)
    assert backend(size_divisor=8)(array, return_tensors="pt").pixel_values.shape == (1, 3, 32, 48)
    assert backend()(array, size_divisor=1, return_tensors="pt").pixel_values.shape == (1, 3, 37, 50)
    listed = backend()([array, noise(64, 16)]).pixel_values
    assert [tuple(item.shape) for item in listed] == [(3, 32, 48), (3, 64, 16)]
    square = backend(do_resize=True, size=32, do_center_crop=True, crop_size=32)
    assert square([noise(64, 80), noise(100, 70)], return_tensors="pt").pixel_values.shape == (2, 3, 32, 32)
    exact = backend(do_resize=True, size={"height": 48, "width": 16})(noise(64, 80), return_tensors="np").pixel_values
    assert isinstance(exact, np.ndarray) and exact.shape == (1, 3, 48, 16) and exact.dtype == np.float32


@both_backends
def test_a_size_is_heeded_unless_told_otherwise(backend, tmp_path):
    backend().save_pretrained(tmp_path)
    for name, value, switch in (("size", np.int64(32), "do_resize"), ("crop_size", 32, "do_center_crop")):
        for switched, side in (({}, 32), ({switch: False}, 64)):
            options = {name: value, **switched}
            processors = [backend(**options), backend.from_pretrained(tmp_path, **options)]
            made = [processor(noise(64, 64)) for processor in processors] + [backend()(noise(64, 64), **options)]
            assert [tuple(x.pixel_values[0].shape) for x in made] == [(3, side, side)] * 3
    with pytest.raises(ValueError, match="'do_resise'"):
        backend(do_resise=True)


@both_backends
def test_resized_floats_keep_their_precision_and_range(backend):
    array = noise(64, 64)
    options = {"do_resize": True, "size": 32, "return_tensors": "pt"}
    whole = backend()(array, **options).pixel_values
    floats = backend()(array / 255, do_rescale=False, **options).pixel_values
    assert (whole - floats).abs().max() <= 3 / 255  # a level and a half: uint8 is rounded after each of two passes
    pil = HieraTokImageProcessorPil()(array, **options).pixel_values
    assert (pil - whole).abs().max() <= 3 / 127.5
    step = np.zeros((3, 32, 32), np.float32)
    step[..., 16:] = 1
    edge = backend()(step, do_rescale=False, do_resize=True, size=64, return_tensors="pt").pixel_values
    assert edge.min() == -1 and edge.max() == 1 and edge.unique().numel() > 3


ARGUMENT_ERRORS = [
    ([], {}, ValueError, "at least one image"),
    (None, {}, TypeError, "NoneType"),
    ([noise(), 7], {}, TypeError, "int"),
    (np.zeros(5, np.uint8), {}, ValueError, "dimensions.*(5,)"),
    (noise(32, 32, 7), {}, ValueError, "channels.*got 7"),
    (noise().astype(np.int64), {}, ValueError, "dtype.*torch.int64"),
    (noise() > 3, {}, ValueError, "dtype.*bool"),
    (torch.rand(3, 32, 32), {}, ValueError, "do_rescale=False"),
    (torch.full((3, 32, 32), 1.5), {"do_rescale": False}, ValueError, "[0, 1], got [1.5, 1.5]"),
    (torch.full((3, 32, 32), torch.nan), {"do_rescale": False}, ValueError, "[0, 1], got [nan, nan]"),
    (noise(15, 64), {}, ValueError, "size_divisor=16.*15 x 64"),
    (noise(32, 64), {"do_center_crop": True, "crop_size": 48}, ValueError, "crop_size.*32 x 64"),
    (Image.new("L", (32, 32)), {"do_convert_rgb": False}, ValueError, "3 channels.*do_convert_rgb"),
    ([noise(32, 32), noise(32, 48)], {"return_tensors": "pt"}, ValueError, "[(32, 32), (32, 48)]"),
    ([noise(), "none.png"], {}, ImageError, "No such file"),
]


@both_backends
@pytest.mark.parametrize(("images", "options", "kind", "text"), ARGUMENT_ERRORS)
def test_argument_errors(backend, images, options, kind, text):
    with pytest.raises(kind, match=re.escape(text).replace(r"\.\*", ".*")):
        backend()(images, **options)
    for value in (0, -8, 1.5, "16", True, None):
        with pytest.raises(ValueError, match=f"`size_divisor` .*{value!r}"):
            backend(size_divisor=value)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")
def test_without_torchvision_pillow_serves(tmp_path):
    processor = HieraTokImageProcessor(size_divisor=8)
    assert type(processor) is HieraTokImageProcessorPil and processor.size_divisor == 8
    processor.save_pretrained(tmp_path)
    assert type(HieraTokImageProcessor.from_pretrained(tmp_path)) is HieraTokImageProcessorPil


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_identical(backend, dtype):
    images = np.stack([noise(48, 32, seed=seed) for seed in (0, 10)])
    images.reshape(-1)[:256] = np.arange(256)
    processor = backend()
    values = processor(list(images), return_tensors="pt").pixel_values.to(dtype)
    assert (np.stack([pixels(image) for image in processor.postprocess(values)]) == images).all()
    for options in (
        {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    ):
        processor = backend(**options)
        (image,) = processor.postprocess(processor(images[0], return_tensors="pt").pixel_values)
        assert (pixels(image) == images[0]).all()


def test_postprocess_types_ranges_and_rounding():
    processor = HieraTokImageProcessorPil()
    values = torch.tensor([-7.0, -1.0, 0.0, 1.0, 9.0]).view(1, 1, 1, 5).repeat(2, 3, 4, 1).requires_grad_()
    tensor, array, images = (processor.postprocess(values, output_type) for output_type in ("pt", "np", "pil"))
    assert tensor.shape == (2, 3, 4, 5) and tensor.dtype == torch.float32 and not tensor.requires_grad
    assert array.shape == (2, 4, 5, 3) and array.dtype == np.float32
    assert tensor[0, 0, 0].tolist() == array[1, 3, :, 2].tolist() == [0, 0, 0.5, 1, 1]
    assert len(images) == 2 and pixels(images[1])[0, :, 1].tolist() == [0, 0, 128, 255, 255]
    nearly = torch.full((1, 3, 1, 1), 2 * 99.6 / 255 - 1)
    assert pixels(processor.postprocess(nearly)[0]).max() == 100
    assert processor.postprocess(values.detach().numpy(), "pt").equal(tensor)


POSTPROCESS_ERRORS = [
    (torch.zeros(3, 8, 8), ValueError, r"pixel_values .*got \(3, 8, 8\)"),
    (torch.zeros(1, 16, 8, 8), ValueError, r"pixel_values .*got \(1, 16, 8, 8\)"),
    (torch.full((1, 3, 1, 1), torch.nan), ValueError, "pixel_values must be finite, got 3"),
    (torch.full((1, 3, 1, 2), torch.inf), ValueError, "pixel_values must be finite, got 6"),
    (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ValueError, "pixel_values .*torch.uint8"),
    ([torch.zeros(3, 8, 8)], TypeError, "pixel_values .*list"),
    ((torch.zeros(1, 3, 8, 8),), TypeError, "one scale at a time"),
]


@pytest.mark.parametrize(("values", "kind", "text"), POSTPROCESS_ERRORS)
def test_postprocess_errors(values, kind, text):
    with pytest.raises(kind, match=text):
        HieraTokImageProcessorPil().postprocess(values)
    with pytest.raises(ValueError, match="output_type"):
        HieraTokImageProcessorPil().postprocess(torch.zeros(1, 3, 8, 8), "jpg")


@both_backends
def test_save_and_load(tmp_path, backend):
    crop = {"do_center_crop": True, "crop_size": {"height": 128, "width": 64}}
    processor = backend(size_divisor=8, do_resize=True, size=128, **crop)
    processor.save_pretrained(tmp_path)
    saved_values = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved_values["image_processor_type"] == "HieraTokImageProcessor" and "auto_map" not in saved_values
    loaded = backend.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict() and loaded.size_divisor == 8
    assert backend.from_pretrained(tmp_path, size_divisor=32).size_divisor == 32
    assert torch.equal(*(each(noise(140, 150), return_tensors="pt").pixel_values for each in (loaded, processor)))


def test_code_from_the_hub_names_both_backends_also_when_it_is_saved_again(tmp_path, monkeypatch):
    monkeypatch.setattr(image_processing_auto.IMAGE_PROCESSOR_MAPPING, "_extra_content", {})
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path / "first")
    HieraTokImageProcessorPil(size_divisor=8).save_pretrained(tmp_path / "first")
    add_remote_code(tmp_path / "first")
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules.") and loaded.size_divisor == 8
    loaded.save_pretrained(tmp_path / "again")
    pair = [f"modeling_hieratok.HieraTokImageProcessor{suffix}" for suffix in ("Pil", "")]
    assert type(loaded).__name__ == pair[is_torchvision_available()].split(".")[1]
    for folder in ("first", "again"):
        settings = json.loads((tmp_path / folder / "preprocessor_config.json").read_text())
        assert settings["auto_map"] == {"AutoImageProcessor": pair}
