"""Tests of bad input: every refusal and its exact message, through the core, both wrappers and both loaders."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers.models import attention_dispatch
from helpers import TINY, noise, random_core, tiny
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError
from transformers import AutoModel

from hieratok_hf import (
    AutoencoderHieraTok,
    HieraTokAttnProcessor,
    HieraTokConfig,
    HieraTokCore,
    HieraTokModel,
    PyramidLayout,
    pretrained,
    scale_causal_attention,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
SIZES = "['hieratok-tiny', 'hieratok-tiny-16x', 'hieratok-s', 'hieratok-b', 'hieratok-l']"
NAN, INF = float("nan"), float("inf")


def refuses(message, error=ValueError):
    """The whole message, no more and no less."""
    return pytest.raises(error, match=rf"\A{re.escape(message)}\Z")


@pytest.fixture(scope="module")
def core():
    return random_core()


@pytest.fixture(scope="module")
def model(core):
    return HieraTokModel.from_core(core).eval()


@pytest.fixture(scope="module")
def vae(core):
    return AutoencoderHieraTok.from_core(core).eval()


def image_with(value, shape=(1, 3, 8, 8)):
    image = torch.zeros(shape)
    image[0, 0, -1, -1] = value
    return image


PIXELS = {
    "no-batch": (torch.zeros(3, 8, 8), "must have shape (batch, channels, height, width), got (3, 8, 8)."),
    "video": (torch.zeros(1, 3, 2, 8, 8), "must have shape (batch, channels, height, width), got (1, 3, 2, 8, 8)."),
    "scalar": (torch.tensor(0.0), "must have shape (batch, channels, height, width), got ()."),
    "grey": (torch.zeros(1, 1, 8, 8), "must have 3 channels, got 1."),
    "alpha": (torch.zeros(1, 4, 8, 8), "must have 3 channels, got 4."),
    "channels-last": (torch.zeros(1, 8, 8, 3), "must have 3 channels, got 8."),
    "uint8": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "must be floating point, got torch.uint8."),
    "int64": (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "must be floating point, got torch.int64."),
    "bool": (torch.zeros(1, 3, 8, 8, dtype=torch.bool), "must be floating point, got torch.bool."),
    "complex": (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "must be floating point, got torch.complex64."),
    "0-to-255": (image_with(255.0), "must lie in [-1, 1], got values from 0 to 255."),
    "far-below": (image_with(-20.5), "must lie in [-1, 1], got values from -20.5 to 0."),
    "empty-batch": (torch.zeros(0, 3, 8, 8), "must not be empty, got shape (0, 3, 8, 8)."),
    "no-rows": (torch.zeros(1, 3, 0, 8), "must not be empty, got shape (1, 3, 0, 8)."),
    "no-columns": (torch.zeros(1, 3, 8, 0), "must not be empty, got shape (1, 3, 8, 0)."),
    "nan": (image_with(NAN), "must be finite, got NaN or infinity."),
    "inf": (image_with(INF), "must be finite, got NaN or infinity."),
    "minus-inf": (image_with(-INF), "must be finite, got NaN or infinity."),
    "array": (np.zeros((1, 3, 8, 8), dtype=np.float32), "must be a torch.Tensor, got ndarray."),
    "list": ([[0.0]], "must be a torch.Tensor, got list."),
    "none": (None, "must be a torch.Tensor, got NoneType."),
}
ODD_SIZES = {"one-row-more": (9, 8), "one-column-less": (8, 7), "below-a-patch": (3, 3)}
PIXEL_CASES = [
    *(pytest.param(value, f"`pixel_values` {text}", id=name) for name, (value, text) in PIXELS.items()),
    *(
        pytest.param(
            torch.zeros(1, 3, *size),
            f"Height and width of `pixel_values` must be multiples of the patch size 4, got {size[0]}x{size[1]}.",
            id=name,
        )
        for name, size in ODD_SIZES.items()
    ),
]


@pytest.mark.parametrize(("value", "message"), PIXEL_CASES)
@pytest.mark.parametrize(
    "door",
    ["core.encode", "core.encode_moments", "model", "model.encode", "model.get_image_features", "vae", "vae.encode"],
)
def test_bad_pixel_values_are_refused(door, value, message, request):
    owner, _, method = door.partition(".")
    target = request.getfixturevalue(owner)
    with refuses(message):
        (getattr(target, method) if method else target)(value)


def test_overshoot_of_noise_and_resampling_is_no_bad_input(core):
    assert core.encode(torch.full((1, 3, 8, 8), 1.5)).mode().isfinite().all()


LATENTS = {
    "no-batch": (torch.zeros(4, 2, 2), "must have shape (batch, channels, height, width), got (4, 2, 2)."),
    "tokens": (torch.zeros(1, 4, 4), "must have shape (batch, channels, height, width), got (1, 4, 4)."),
    "image": (torch.zeros(1, 3, 8, 8), "must have 4 channels, got 3."),
    "moments": (torch.zeros(1, 8, 2, 2), "must have 4 channels, got 8."),
    "int64": (torch.zeros(1, 4, 2, 2, dtype=torch.int64), "must be floating point, got torch.int64."),
    "empty-batch": (torch.zeros(0, 4, 2, 2), "must not be empty, got shape (0, 4, 2, 2)."),
    "no-rows": (torch.zeros(1, 4, 0, 2), "must not be empty, got shape (1, 4, 0, 2)."),
    "nan": (image_with(NAN, (1, 4, 2, 2)), "must be finite, got NaN or infinity."),
    "inf": (image_with(INF, (1, 4, 2, 2)), "must be finite, got NaN or infinity."),
    "array": (np.zeros((1, 4, 2, 2), dtype=np.float32), "must be a torch.Tensor, got ndarray."),
    "none": (None, "must be a torch.Tensor, got NoneType."),
}


@pytest.mark.parametrize(
    ("value", "message"),
    [pytest.param(value, f"`latents` {text}", id=name) for name, (value, text) in LATENTS.items()],
)
@pytest.mark.parametrize("door", ["core.decode", "core.decode_scales", "model.decode", "vae.decode"])
def test_bad_latents_are_refused(door, value, message, request):
    owner, _, method = door.partition(".")
    with refuses(message):
        getattr(request.getfixturevalue(owner), method)(value)


@pytest.mark.parametrize("num_scales", [0, -1, 5, 1.0, 2.5, NAN, True, False, "1", [1]], ids=repr)
@pytest.mark.parametrize("door", ["core.decode", "core.decode_scales", "model.decode", "model", "vae.decode"])
def test_bad_num_scales_is_refused(door, num_scales, request):
    owner, _, method = door.partition(".")
    target = request.getfixturevalue(owner)
    value = noise(1, 4, 2, 2) if method else torch.zeros(1, 3, 8, 8)
    with refuses(f"`num_scales` must be an integer from 1 to 4, got {num_scales!r}."):
        (getattr(target, method) if method else target)(value, num_scales=num_scales)


def test_num_scales_of_the_single_scale_twin_ends_at_one():
    with refuses("`num_scales` must be an integer from 1 to 1, got 2."):
        random_core(scale_factors=(1,)).decode(noise(1, 4, 2, 2), num_scales=2)


@pytest.mark.parametrize("owner", ["core", "vae"])
def test_another_dtype_than_that_of_the_weights_is_refused_by_torch(owner, request):
    with pytest.raises(RuntimeError, match="should be the same"):
        request.getfixturevalue(owner).encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64))


POSITIVE = {
    "in_channels": 0,
    "patch_size": -4,
    "latent_channels": 0,
    "encoder_hidden_size": 0,
    "encoder_num_layers": 0,
    "encoder_num_heads": -1,
    "decoder_hidden_size": -32,
    "decoder_num_layers": 0,
    "decoder_num_heads": 0,
    "mlp_ratio": 0.0,
    "norm_eps": NAN,
    "rotary_base": -1.0,
    "rotary_scale": 0,
    "sample_size": 0,
    "initializer_range": -0.02,
    "scaling_factor": 0.0,
}
TYPOS = {"patchsize": 4, "num_layers": 2}
HEADS = "(two rotary axes of channel pairs a head)"
BROKEN_VALUES = [
    *(
        ({name: value}, f"`{name}` must be greater than 0 and finite, got {value!r}.")
        for name, value in POSITIVE.items()
    ),
    ({"learned_positions": -1}, "`learned_positions` must be finite and not negative, got -1."),
    ({"linear_path": -1}, "`linear_path` must be finite and not negative, got -1."),
    ({"kl_weight": -1e-6}, "`kl_weight` must be finite and not negative, got -1e-06."),
    ({"kl_weight": NAN}, "`kl_weight` must be finite and not negative, got nan."),
    ({"rotary_coordinates": "pixels"}, "`rotary_coordinates` must be one of ['cells', 'fraction'], got 'pixels'."),
    ({"downsampling": "max"}, "`downsampling` must be one of ['learned', 'mean'], got 'max'."),
    ({"rotary_pairing": "Proper"}, "`rotary_pairing` must be one of ['proper', 'detok'], got 'Proper'."),
    ({"patch_size": 12}, "`patch_size` must be a power of two, got 12."),
    ({"linear_path": 2}, "`linear_path` must be odd or 0, got 2."),
    *(
        (
            {"scale_factors": factors},
            f"`scale_factors` must be integers that decrease strictly and end in 1, got {tuple(factors)}.",
        )
        for factors in [(8, 4, 2), (1, 2), (2, 2, 1), (), (2, 1, 0), (0,), (2, 1, -1), (4, 1, 1), [2, 4, 1]]
    ),
    (
        {"encoder_hidden_size": 36},
        f"`encoder_hidden_size` must be a multiple of 4 * `encoder_num_heads` {HEADS}, got 36 and 2.",
    ),
    (
        {"decoder_num_heads": 3},
        f"`decoder_hidden_size` must be a multiple of 4 * `decoder_num_heads` {HEADS}, got 32 and 3.",
    ),
]
WRONG_TYPES = [
    ({"patch_size": 4.0}, "Field 'patch_size' expected int, got float (value: 4.0)"),
    ({"patch_size": "4"}, "Field 'patch_size' expected int, got str (value: '4')"),
    ({"patch_size": True}, "Field 'patch_size' expected int, got bool (value: True)"),
    ({"latent_channels": None}, "Field 'latent_channels' expected int, got NoneType (value: None)"),
    ({"qk_norm": 1}, "Field 'qk_norm' expected bool, got int (value: 1)"),
    ({"output_conv": "yes"}, "Field 'output_conv' expected bool, got str (value: 'yes')"),
    ({"linear_path": True}, "Field 'linear_path' expected int, got bool (value: True)"),
    ({"norm_eps": "1e-6"}, "Field 'norm_eps' expected float, got str (value: '1e-6')"),
    ({"downsampling": None}, "Field 'downsampling' expected str, got NoneType (value: None)"),
    ({"rotary_pairing": None}, "Field 'rotary_pairing' expected str, got NoneType (value: None)"),
    ({"sample_size": (32, 32)}, "Field 'sample_size' expected int, got tuple (value: (32, 32))"),
    ({"mlp_ratio": "4"}, "Field 'mlp_ratio' with value '4' doesn't match any type in"),
    ({"shift_factor": None}, "Field 'shift_factor' with value None doesn't match any type in"),
    ({"scale_factors": (2.0, 1.0)}, "Field 'scale_factors' with value (2.0, 1.0) doesn't match any type in"),
    ({"scale_factors": (2, True)}, "Field 'scale_factors' with value (2, True) doesn't match any type in"),
    ({"scale_factors": "21"}, "Field 'scale_factors' with value '21' doesn't match any type in"),
    ({"scale_factors": 1}, "Field 'scale_factors' with value 1 doesn't match any type in"),
]


def build(door, values):
    """A configuration or a model from broken values."""
    fields = {**TINY, **values}
    if door == "config":
        HieraTokConfig(**fields)
    elif door == "from_size":
        HieraTokConfig.from_size("hieratok-tiny", **fields)
    elif door == "core":
        HieraTokCore(HieraTokConfig(**fields))
    elif door == "model":
        HieraTokModel.from_size("hieratok-b", **fields)
    else:
        AutoencoderHieraTok(**fields)


def case_id(case):
    return "-".join(f"{name}={value}" for name, value in case.items()) if isinstance(case, dict) else ""


@pytest.mark.parametrize(("values", "message"), BROKEN_VALUES, ids=case_id)
@pytest.mark.parametrize("door", ["config", "from_size", "core", "model", "vae"])
def test_broken_configuration_values_are_refused(door, values, message):
    with refuses(message):
        build(door, values)


@pytest.mark.parametrize(("values", "message"), WRONG_TYPES, ids=case_id)
@pytest.mark.parametrize("door", ["config", "from_size", "core", "model", "vae"])
def test_wrong_types_are_refused(door, values, message):
    with pytest.raises(StrictDataclassFieldValidationError, match=re.escape(message)):
        build(door, values)


def test_every_check_of_a_positive_value_has_a_case():
    from hieratok_hf.models.configuration_hieratok import _POSITIVE

    assert set(POSITIVE) == set(_POSITIVE)


def test_a_type_is_checked_again_on_assignment():
    config = tiny()
    with pytest.raises(StrictDataclassFieldValidationError, match="Field 'patch_size' expected int, got str"):
        config.patch_size = "8"


def test_the_autoencoder_refuses_an_unknown_argument():
    with pytest.raises(TypeError, match="unexpected keyword argument 'patch'"):
        AutoencoderHieraTok(**TINY, patch=4)


@pytest.mark.parametrize("owner", [HieraTokConfig, HieraTokModel, AutoencoderHieraTok])
@pytest.mark.parametrize("size", ["hieratok-xl", "tiny", "", "HieraTok-B", None, 16])
def test_an_unknown_size_is_refused(owner, size):
    with refuses(f"`size` must be one of {SIZES}, got {size!r}."):
        owner.from_size(size)


@pytest.mark.parametrize("name", ["nope", "hieratok-b", "", "../weights", None])
def test_weights_that_do_not_ship_are_refused(name):
    with refuses(
        "`name` must be one of ['hieratok-tiny', 'hieratok-tiny-16x', 'hieratok-dit-tiny'], which ship with the "
        f"package, got {name!r}."
    ):
        pretrained(name)


def test_an_installation_without_its_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("hieratok_hf.shipped._WEIGHTS", tmp_path)
    message = f"The installed package lacks the weights of 'hieratok-tiny': '{tmp_path}/hieratok-tiny' is not there."
    with refuses(message, FileNotFoundError):
        pretrained("hieratok-tiny")


@pytest.mark.parametrize(
    ("height", "width", "factors", "message"),
    [
        (0, 4, (1,), "`height` and `width` must be at least 1 token, got 0 and 4."),
        (4, -1, (1,), "`height` and `width` must be at least 1 token, got 4 and -1."),
        (4, 4, (), "`scale_factors` must be integers that decrease strictly and end in 1, got ()."),
        (4, 4, (2, 4, 1), "`scale_factors` must be integers that decrease strictly and end in 1, got (2, 4, 1)."),
    ],
)
def test_bad_layouts_are_refused(height, width, factors, message):
    with refuses(message):
        PyramidLayout.from_grid(height, width, factors)


@pytest.mark.parametrize("num_scales", [0, 3, -1, 1.0, True, None, "2"], ids=repr)
def test_bad_truncations_are_refused(num_scales):
    with refuses(f"`num_scales` must be an integer from 1 to 2, got {num_scales!r}."):
        PyramidLayout.from_grid(4, 4, (2, 1)).truncate(num_scales)


BACKENDS = "['auto', 'reference', 'sdpa', 'sdpa_mask', 'flex', 'triton']"
SHAPES = "`query`, `key` and `value` must have one shape (batch, heads, tokens, head channels), got "


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 3, 4)], f"{SHAPES}(1, 2, 3, 4), (1, 2, 2, 4) and (1, 2, 3, 4)."),
        ([(1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 8)], f"{SHAPES}(1, 2, 3, 4), (1, 2, 3, 4) and (1, 2, 3, 8)."),
        ([(2, 3, 4)] * 3, f"{SHAPES}(2, 3, 4), (2, 3, 4) and (2, 3, 4)."),
        ([(1, 2, 4, 8)] * 3, "`layout` has 3 tokens, but `query` has 4."),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_bad_shapes_at_the_attention_door_are_refused(shapes, message, backend):
    with refuses(message):
        scale_causal_attention(
            *(torch.zeros(shape) for shape in shapes), PyramidLayout.from_grid(1, 3, (1,)), backend=backend
        )


@pytest.mark.parametrize("backend", ["flash", "SDPA", "", None])
def test_an_unknown_attention_backend_is_refused(backend, vae):
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    with refuses(f"`backend` must be one of {BACKENDS}, got {backend!r}."):
        scale_causal_attention(*tensors, PyramidLayout.from_grid(1, 3, (1,)), backend=backend)


@pytest.mark.parametrize("backend", ["flash", "SDPA", "", 1])
def test_an_unknown_backend_of_a_processor_is_refused(backend):
    with refuses(f"`backend` must be one of {BACKENDS} or None, got {backend!r}."):
        HieraTokAttnProcessor(backend=backend)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_mask", "flex", "triton"])
def test_only_the_reference_returns_weights(backend):
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    with refuses(f"`backend={backend!r}` cannot return weights; use `backend='reference'`."):
        scale_causal_attention(*tensors, PyramidLayout.from_grid(1, 3, (1,)), backend=backend, return_weights=True)


@pytest.fixture
def own_vae():
    """An autoencoder whose attention backend may be changed; diffusers also keeps it in a global."""
    registry = attention_dispatch._AttentionBackendRegistry
    active = registry._active_backend
    yield AutoencoderHieraTok.from_core(random_core())
    registry._active_backend = active


def test_a_backend_of_diffusers_that_is_not_supported_is_refused_at_the_call(own_vae):
    for processor in own_vae.attn_processors.values():
        processor._attention_backend = "sage"  # as diffusers sets it where the package is there
    message = (
        "HieraTok attends by its own function; the attention backend 'sage' is not "
        "supported. Use one of ['native', 'flex', '_native_cudnn', '_native_efficient', '_native_flash', "
        "'_native_math'], or `set_attn_processor(HieraTokAttnProcessor(backend=...))`."
    )
    with refuses(message):
        own_vae.encode(torch.zeros(1, 3, 8, 8))
    with refuses(message):
        own_vae.decode(torch.zeros(1, 4, 2, 2))
    own_vae.set_attention_backend("native")
    assert own_vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode().shape == (1, 4, 2, 2)


def test_a_backend_that_diffusers_does_not_know_is_refused(own_vae):
    with pytest.raises(ValueError, match=re.escape("`backend='nope'` must be one of the following: ")):
        own_vae.set_attention_backend("nope")


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("nope", 'Specified `attn_implementation="nope"` is not supported.'),
        ("flash_attention_2", "HieraTokModel does not support Flash Attention 2 yet."),
        ("paged|eager", "`attn_implementation` must be one of ['eager', 'sdpa', 'flex_attention', 'hieratok_auto', "),
        ("hieratok_flash", 'Specified `attn_implementation="hieratok_flash"` is not supported.'),
    ],
)
def test_an_attention_of_transformers_that_is_not_supported_is_refused(implementation, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HieraTokModel(tiny()).set_attn_implementation(implementation)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(3), torch.ones(4), "`mean` must be a tensor of shape (4,), got (3,)."),
        (torch.zeros(4), torch.ones(4, 1), "`std` must be a tensor of shape (4,), got (4, 1)."),
        (torch.tensor(0.0), torch.ones(4), "`mean` must be a tensor of shape (4,), got ()."),
        (0.0, torch.ones(4), "`mean` must be a tensor of shape (4,), got float."),
        (torch.full((4,), NAN), torch.ones(4), "`mean` must be finite, got [nan, nan, nan, nan]."),
    ],
)
def test_broken_statistics_are_refused(mean, std, message, core):
    with refuses(message):
        core.fold_latent_statistics(mean, std)


@pytest.mark.parametrize("name", TYPOS)
@pytest.mark.parametrize("cls", [HieraTokConfig, HieraTokModel, AutoencoderHieraTok])
def test_a_size_has_no_unknown_override(cls, name):
    with refuses(f"HieraTokConfig has no argument {name!r}; it has {list(HieraTokConfig.__annotations__)}."):
        cls.from_size("hieratok-tiny", **{name: TYPOS[name]})


@pytest.mark.parametrize("slicing", [False, True])
@pytest.mark.parametrize(("value", "kind"), [(None, "NoneType"), ([1.0], "list")])
def test_what_is_no_tensor_is_refused_with_slicing_too(vae, slicing, value, kind, monkeypatch):
    monkeypatch.setattr(vae, "use_slicing", slicing)
    with refuses(f"`pixel_values` must be a torch.Tensor, got {kind}."):
        vae.encode(value)
    with refuses(f"`latents` must be a torch.Tensor, got {kind}."):
        vae.decode(value)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"components": torch.eye(4, 47)}, "`components` must be a tensor of shape (4, 48), got (4, 47)."),
        ({"mean": torch.zeros(4)}, "`mean` must be a tensor of shape (48,), got (4,)."),
        ({"scale": torch.zeros(4)}, "`scale` must be finite and positive, got [0.0, 0.0, 0.0, 0.0]."),
    ],
)
def test_a_broken_linear_path_is_refused(broken, message, core):
    good = {"components": torch.eye(4, 48), "mean": torch.zeros(48), "scale": torch.ones(4)}
    with refuses(message):
        core.set_linear_path(**{**good, **broken})


@pytest.mark.parametrize("value", [0.0, -1.0, NAN])
def test_statistics_that_are_not_positive_are_refused_and_change_nothing(value):
    core = random_core()
    before = {name: weight.clone() for name, weight in core.state_dict().items()}
    with refuses(f"`std` must be finite and positive, got [1.0, {value}, 1.0, 1.0]."):
        core.fold_latent_statistics(torch.ones(4), torch.tensor([1.0, value, 1.0, 1.0]))
    assert all(torch.equal(weight, before[name]) for name, weight in core.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "choices"),
    [
        ("mean", "'learned', as the model has it"),
        ("max", "['learned', 'mean']"),
        (None, "['learned', 'mean']"),
    ],
)
def test_a_copy_with_another_downsampling_than_it_can_have_is_refused(kind, choices, core):
    with refuses(f"`downsampling` must be one of {choices}, got {kind!r}."):
        core.with_scale_factors((2, 1), kind)
    assert random_core(scale_factors=(1,)).with_scale_factors((2, 1), "mean").config.downsampling == "mean"


def test_a_linear_start_needs_a_linear_path():
    with refuses("The model has no linear path: configure it with `linear_path`."):
        random_core(linear_path=0).set_linear_path(torch.zeros(4, 48), torch.zeros(48), torch.ones(4))


@pytest.fixture(scope="module")
def saved(core, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    AutoencoderHieraTok.from_core(core).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch):
    """A checkpoint of this test's own, to be broken."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return shutil.copytree(saved, tmp_path / "checkpoint")


LOADERS = {
    "model": HieraTokModel.from_pretrained,
    "auto": AutoModel.from_pretrained,
    "vae": AutoencoderHieraTok.from_pretrained,
}
every_loader = pytest.mark.parametrize("loader", LOADERS)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@every_loader
def test_an_unbroken_checkpoint_loads(loader, folder, core):
    loaded = LOADERS[loader](folder).state_dict()
    assert all(torch.equal(loaded[f"core.{name}"], weight) for name, weight in core.state_dict().items())


CORRUPTIONS = {
    "zero-byte": (lambda raw: b"", "header too small"),
    "five-byte": (lambda raw: raw[:5], "header too small"),
    "half": (lambda raw: raw[: len(raw) // 2], "incomplete metadata, file not fully covered"),
    "one-byte-short": (lambda raw: raw[:-1], "incomplete metadata, file not fully covered"),
    "one-byte-long": (lambda raw: raw + b"\0", "incomplete metadata, file not fully covered"),
    "garbage": (lambda raw: b"\xff" * 4096, "header too large"),
    "header-not-json": (lambda raw: raw[:8] + b"x" + raw[9:], "header"),
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@every_loader
def test_corrupt_weights_are_refused(loader, corruption, folder):
    corrupt, message = CORRUPTIONS[corruption]
    path = folder / WEIGHTS
    path.write_bytes(corrupt(path.read_bytes()))
    if loader == "vae":
        expected = pytest.raises(
            OSError, match=f"Unable to load weights from checkpoint file for .*{re.escape(WEIGHTS)}"
        )
    else:
        expected = pytest.raises(SafetensorError, match=f"Error while deserializing header: .*{message}")
    with expected:
        LOADERS[loader](folder)


@every_loader
def test_a_pointer_of_git_lfs_instead_of_weights_is_refused(loader, folder):
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    error, message = (OSError, "git-lfs") if loader == "vae" else (SafetensorError, "header too large")
    with pytest.raises(error, match=message):
        LOADERS[loader](folder)


@every_loader
def test_missing_weights_are_refused(loader, folder):
    (folder / WEIGHTS).unlink()
    message = (
        "Error no file named diffusion_pytorch_model" if loader == "vae" else f"No such file or directory.*{WEIGHTS}"
    )
    with pytest.raises(OSError, match=message):
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    "values",
    [
        {"latent_channels": 8},
        {"decoder_hidden_size": 64},
        {"encoder_hidden_size": 64},
        {"patch_size": 8},
        {"scale_factors": [2, 1]},
        {"linear_path": 1},
        {"mlp_ratio": 2.0},
        {"downsampling": "mean"},
    ],
    ids=case_id,
)
@every_loader
def test_sizes_that_disagree_with_the_weights_are_refused(loader, values, folder):
    change_config(folder, **values)
    if loader == "vae":
        expected = pytest.raises(ValueError, match=r"core\..* expected shape torch\.Size\(.*but got torch\.Size\(")
    else:
        expected = pytest.raises(RuntimeError, match="You set `ignore_mismatched_sizes` to `False`")
    with expected:
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"patch_size": 3}, "`patch_size` must be a power of two, got 3."),
        (
            {"scale_factors": [4, 2]},
            "`scale_factors` must be integers that decrease strictly and end in 1, got (4, 2).",
        ),
        ({"downsampling": "max"}, "`downsampling` must be one of ['learned', 'mean'], got 'max'."),
        ({"rotary_pairing": "none"}, "`rotary_pairing` must be one of ['proper', 'detok'], got 'none'."),
        ({"norm_eps": 0.0}, "`norm_eps` must be greater than 0 and finite, got 0.0."),
    ],
    ids=case_id,
)
@every_loader
def test_broken_values_in_a_file_are_refused(loader, values, message, folder):
    change_config(folder, **values)
    with refuses(message):
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    "values", [{"patch_size": "4"}, {"qk_norm": None}, {"scale_factors": [2.0, 1.0]}], ids=case_id
)
@every_loader
def test_wrong_types_in_a_file_are_refused(loader, values, folder):
    change_config(folder, **values)
    with pytest.raises(StrictDataclassFieldValidationError, match=f"Field '{next(iter(values))}'"):
        LOADERS[loader](folder)


@pytest.mark.parametrize(
    "content", [b"", b'{"patch_size": 4,', b"\xff\xfe\x00", b"patch_size: 4"], ids=["empty", "cut", "binary", "yaml"]
)
@every_loader
def test_malformed_json_is_refused(loader, content, folder):
    path = folder / "config.json"
    path.write_bytes(content)
    with pytest.raises(OSError, match=f"'{re.escape(str(path))}' is not a valid JSON file"):
        LOADERS[loader](folder)


@every_loader
def test_a_missing_config_is_refused(loader, folder):
    (folder / "config.json").unlink()
    # Without a configuration a transformers class takes its defaults, which the weights do not fit.
    errors = {
        "auto": (ValueError, "Unrecognized model in"),
        "model": (RuntimeError, "`ignore_mismatched_sizes`"),
        "vae": (OSError, "Error no file named config.json found in"),
    }
    error, message = errors[loader]
    with pytest.raises(error, match=message):
        LOADERS[loader](folder)


@every_loader
def test_a_folder_that_does_not_exist_is_refused(loader, folder):
    with pytest.raises(OSError, match=re.escape(str(folder / "nope"))):
        LOADERS[loader](folder / "nope")


@pytest.mark.parametrize("owner", ["model", "vae"])
def test_saving_onto_a_file_is_refused_and_leaves_it_alone(owner, tmp_path, request):
    path = tmp_path / "file"
    path.write_text("precious")
    with refuses(f"`save_directory` must be a folder, got the file '{path}'."):
        request.getfixturevalue(owner).save_pretrained(path)
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("owner", ["model", "vae"])
def test_saving_below_a_file_is_refused(owner, tmp_path, request):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NotADirectoryError, match="Not a directory"):
        request.getfixturevalue(owner).save_pretrained(tmp_path / "file" / "folder")
