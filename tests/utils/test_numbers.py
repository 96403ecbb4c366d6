"""Numbers of numpy and in tensors, at every door of the package; and what is no number."""

import json
from decimal import Decimal

import numpy as np
import pytest
import torch
from helpers import TINY, images, noise, random_core
from PIL import Image
from tiny_pipelines import make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokImageProcessorPil, PyramidLayout
from hieratok_hf.training.flow_matching import dit_from_size
from hieratok_hf.utils.numbers import real_number, whole_number

KINDS = {"numpy": np.int64, "tensor": torch.tensor, "array": np.array}


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), np.array(3), torch.tensor(3), torch.tensor([3])])
def test_whole_numbers(value):
    number = whole_number("steps", value, 1, 3)
    assert type(number) is int and number == 3
    for least, most in ((4, None), (1, 2)):
        with pytest.raises(ValueError, match="`steps`"):
            whole_number("steps", value, least, most)


@pytest.mark.parametrize(
    "value",
    [
        *(None, "3", b"3", 3.0, True, 3j, [3], {}, object(), float("nan"), np.float64(3), np.True_, np.array([3, 4])),
        *(torch.tensor(3.0), torch.tensor(True), torch.tensor([3, 4]), torch.empty(0, dtype=torch.int64)),
    ],
)
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(ValueError, match="`steps`"):
        whole_number("steps", value, 0)


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.array(0.5), torch.tensor(0.5), Decimal("0.5")])
def test_real_numbers(value):
    number = real_number("share", value, 0, 1)
    assert type(number) is float and number == 0.5
    for least, most in ((0.6, 1), (0, 0.4)):
        with pytest.raises(ValueError, match="`share`"):
            real_number("share", value, least, most)


@pytest.mark.parametrize(
    "value", [None, "0.5", b"1", True, 1j, [0.5], float("nan"), float("inf"), 10**400, torch.ones(2), object()]
)
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(ValueError, match="`share`"):
        real_number("share", value, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_every_kind_are_taken_at_every_door(kind):
    number = KINDS[kind]
    core = random_core()
    vae = AutoencoderHieraTok.from_core(core)
    latents = noise(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(core.decode(latents, number(2)), core.decode(latents, 2))
        assert torch.equal(vae.decode(latents, num_scales=number(2)).sample, core.decode(latents, 2))
        vae.enable_tiling(number(64), number(64), number(32), number(32))
        assert vae.encode(images(1, 3, 96, 64)).latent_dist.mode().shape == (1, 4, 24, 16)
    layout = PyramidLayout.from_grid(4, 4, (number(2), number(1)))
    assert layout == PyramidLayout.from_grid(4, 4, (2, 1)) and hash(layout)
    assert layout.truncate(number(1)).scale_factors == (2,)
    assert core.with_scale_factors((number(2), number(1))).config.scale_factors == (2, 1)
    image = Image.new("RGB", (33, 40))
    processor = HieraTokImageProcessorPil(size_divisor=number(8), do_resize=True, size={"shortest_edge": number(16)})
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)
    json.dumps(processor.to_dict())
    sizes = {"in_channels": number(4), "sample_size": number(2), "num_classes": number(3)}
    json.dumps(dict(dit_from_size("dit-tiny", **sizes, num_layers=1).config))


@pytest.mark.parametrize(
    "values",
    [
        {"patch_size": np.int64(8)},
        {"scale_factors": np.array([2, 1])},
        {"scale_factors": (torch.tensor(2), np.int32(1))},
        {"norm_eps": np.float32(0.5), "kl_weight": np.float16(0.5), "mlp_ratio": torch.tensor(2.0)},
        {"qk_norm": np.True_, "encoder_num_layers": torch.tensor(1)},
    ],
    ids=repr,
)
def test_configurations_hold_plain_numbers(values, tmp_path):
    plain = {"patch_size": 8, "scale_factors": (2, 1), "norm_eps": 0.5, "kl_weight": 0.5, "mlp_ratio": 2.0}
    plain |= {"qk_norm": True, "encoder_num_layers": 1}
    expected = HieraTokConfig(**{**TINY, **{name: plain[name] for name in values}})
    assert HieraTokConfig(**{**TINY, **values}).model_fields == expected.model_fields
    changed = HieraTokConfig(**TINY)
    for name, value in values.items():
        setattr(changed, name, value)
    assert changed.to_json_string() == expected.to_json_string()
    vae = AutoencoderHieraTok(**{**TINY, **values})
    vae.save_pretrained(tmp_path)
    assert AutoencoderHieraTok.from_pretrained(tmp_path).core.config.model_fields == expected.model_fields


def test_the_pipeline_s_call_takes_them():
    pipe = make_pipeline()
    drawn = {"latents": noise(2, 4, 2, 2), "output_type": "pt"}
    plain = {"class_labels": [1, 2], "num_inference_steps": 2, "guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)}
    expected = pipe(**plain, **drawn).images
    for kind in (np.array, torch.tensor):
        assert torch.equal(pipe(**{name: kind(value) for name, value in plain.items()}, **drawn).images, expected)
    for given in ({"sigmas": np.array([1.0, 0.5])}, {"timesteps": torch.tensor([1000, 500])}):
        assert torch.equal(pipe([1, 2], guidance_scale=np.float32(2), **given, **drawn).images, expected)
    previews = []

    def keep(pipe, step, timestep, tensors):
        previews.append(tensors["preview"].shape)

    pipe(np.int64(1), 1, num_images_per_prompt=np.int64(2), callback_on_step_end=keep, preview_scales=np.int64(1))
    assert [shape[0] for shape in previews] == [2]
