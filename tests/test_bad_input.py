"""Tests of bad input: every refusal names the argument, at the core, both wrappers and both loaders."""

import json
import re
from contextlib import contextmanager
from operator import attrgetter
from types import SimpleNamespace

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
NAN, INF = float("nan"), float("inf")


def refuses(*parts, error=ValueError):
    """An error whose message has these parts in this order, the argument's name first."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.fixture(scope="module")
def owners():
    """A core and both wrappers of it; `attrgetter` finds them and their methods by names as `vae.encode`."""
    core = random_core()
    wrappers = {"model": HieraTokModel.from_core(core).eval(), "vae": AutoencoderHieraTok.from_core(core).eval()}
    return SimpleNamespace(core=core, **wrappers)


def zeros_but(value, shape=(1, 3, 8, 8)):
    tensor = torch.zeros(shape)
    tensor[0, 0, -1, -1] = value
    return tensor


PIXELS = {
    "no-batch": (torch.zeros(3, 8, 8), "shape"),
    "scalar": (torch.tensor(0.0), "shape"),
    "grey": (torch.zeros(1, 1, 8, 8), "3 channels"),
    "uint8": (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "floating point"),
    "complex": (torch.zeros(1, 3, 8, 8, dtype=torch.complex64), "floating point"),
    "0-to-255": (zeros_but(255.0), "[-1, 1]"),
    "empty-batch": (torch.zeros(0, 3, 8, 8), "empty"),
    "no-rows": (torch.zeros(1, 3, 0, 8), "empty"),
    "nan": (zeros_but(NAN), "finite"),
    "minus-inf": (zeros_but(-INF), "finite"),
    "array": (np.zeros((1, 3, 8, 8), dtype=np.float32), "torch.Tensor"),
    "one-row-more": (torch.zeros(1, 3, 9, 8), "patch size 4"),
}
ENCODERS = ["core.encode_moments", "core.encode", "vae", "vae.encode"]
ENCODERS += ["model", "model.encode", "model.get_image_features"]
LATENTS = {
    "tokens": (torch.zeros(1, 4, 4), "shape"),
    "moments": (torch.zeros(1, 8, 2, 2), "4 channels"),
    "int64": (torch.zeros(1, 4, 2, 2, dtype=torch.int64), "floating point"),
    "empty-batch": (torch.zeros(0, 4, 2, 2), "empty"),
    "nan": (zeros_but(NAN, (1, 4, 2, 2)), "finite"),
    "array": (np.zeros((1, 4, 2, 2), dtype=np.float32), "torch.Tensor"),
}
DECODERS = ("core.decode", "core.decode_scales", "model.decode", "vae.decode")


@pytest.mark.parametrize("case", PIXELS)
def test_bad_pixel_values_are_refused(case, owners):
    value, part = PIXELS[case]
    for door in ENCODERS if case in ("nan", "uint8", "array") else ENCODERS[:1]:
        with refuses("`pixel_values`", part):
            attrgetter(door)(owners)(value)


def test_overshoot_is_no_bad_input_and_another_dtype_is_refused(owners):
    assert owners.core.encode(torch.full((1, 3, 8, 8), 1.5)).mode().isfinite().all()
    with refuses("`pixel_values`", "torch.float32", "torch.float64"):
        owners.core.encode(torch.zeros(1, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("case", LATENTS)
@pytest.mark.parametrize("door", DECODERS)
def test_bad_latents_are_refused(door, case, owners):
    value, part = LATENTS[case]
    with refuses("`latents`", part):
        attrgetter(door)(owners)(value)


def test_what_is_no_tensor_is_refused_with_slicing_too(owners, monkeypatch):
    monkeypatch.setattr(owners.vae, "use_slicing", True)
    for name, method in (("pixel_values", owners.vae.encode), ("latents", owners.vae.decode)):
        with refuses(f"`{name}`", "torch.Tensor", "list"):
            method([1.0])


@pytest.mark.parametrize("door", ["model", *DECODERS])
def test_bad_num_scales_is_refused(door, owners):
    value = torch.zeros(1, 3, 8, 8) if door == "model" else noise(1, 4, 2, 2)
    for num_scales in (0, 5, 1.0, NAN, True, "1"):
        with refuses("`num_scales`", "1 to 4", repr(num_scales)):
            attrgetter(door)(owners)(value, num_scales=num_scales)


POSITIVE = {
    *("in_channels", "patch_size", "latent_channels", "mlp_ratio", "norm_eps", "rotary_base", "rotary_scale"),
    *("sample_size", "initializer_range", "scaling_factor"),
    *(f"{side}_{size}" for side in ("encoder", "decoder") for size in ("hidden_size", "num_layers", "num_heads")),
}
BROKEN_VALUES = [
    *((name, value) for name in sorted(POSITIVE) for value in map(type(getattr(tiny(), name)), (0, -1))),
    *(("norm_eps", NAN), ("kl_weight", NAN), ("rotary_base", INF), ("learned_positions", -1)),
    *(("coarse_weight", -0.5), ("shift_factor", INF)),
    *(("linear_path", -1), ("linear_path", 2), ("rotary_coordinates", "pixels"), ("rotary_pairing", "Proper")),
    *(("downsampling", "max"), ("patch_size", 12), ("encoder_hidden_size", 36), ("decoder_num_heads", 3)),
    *(("scale_factors", factors) for factors in [(8, 4, 2), (1, 2), (2, 2, 1), (), (2, 1, 0), (2, 1, -1), [2, 4, 1]]),
]
WRONG_TYPES = [
    *(("patch_size", value) for value in (4.0, "4", True)),
    *(("latent_channels", None), ("qk_norm", 1), ("output_conv", "yes"), ("norm_eps", "1e-6")),
    *(("downsampling", None), ("sample_size", (32, 32)), ("shift_factor", None)),
    *(("scale_factors", value) for value in ((2.0, 1.0), (2, True), "21", 1)),
]
DOORS = {
    "from_size": lambda fields: HieraTokConfig.from_size("hieratok-tiny", **fields),
    "core": lambda fields: HieraTokCore(HieraTokConfig(**fields)),
    "model": lambda fields: HieraTokModel.from_size("hieratok-b", **fields),
    "vae": lambda fields: AutoencoderHieraTok(**fields),
}


@pytest.mark.parametrize(("name", "value"), BROKEN_VALUES)
def test_broken_configuration_values_are_refused(name, value):
    with refuses(f"`{name}`"):
        HieraTokConfig(**{**TINY, name: value})


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES)
def test_wrong_types_are_refused(name, value):
    with refuses(f"'{name}'", error=StrictDataclassFieldValidationError):
        HieraTokConfig(**{**TINY, name: value})


@pytest.mark.parametrize("door", DOORS)
def test_broken_configurations_are_refused_at_every_door(door):
    with refuses("`patch_size`", "12"):
        DOORS[door]({**TINY, "patch_size": 12})
    with refuses("'patch_size'", error=StrictDataclassFieldValidationError):
        DOORS[door]({**TINY, "patch_size": "4"})
    with refuses("'patch_size'", error=StrictDataclassFieldValidationError):
        tiny().patch_size = "8"  # on assignment too


@pytest.mark.parametrize("owner", [HieraTokConfig, HieraTokModel, AutoencoderHieraTok])
def test_an_unknown_size_or_argument_is_refused(owner):
    for size in ("hieratok-xl", "", None, 16):
        with refuses("`size`", repr(size)):
            owner.from_size(size)
    with refuses("no argument 'patchsize'"):
        owner.from_size("hieratok-tiny", patchsize=4)
    if owner is AutoencoderHieraTok:
        with refuses("'patch'", error=TypeError):
            owner(**TINY, patch=4)


def test_weights_that_do_not_ship_are_refused():
    for name in ("nope", "hieratok-b", "../weights", None):
        with refuses("`name`", "'hieratok-tiny'", repr(name)):
            pretrained(name)


def test_bad_layouts_are_refused():
    for height, width in ((0, 4), (4, -1)):
        with refuses("`height` and `width`", f"{height} and {width}"):
            PyramidLayout.from_grid(height, width, (1,))
    for factors in ((), (2, 4, 1)):
        with refuses("`scale_factors`", str(factors)):
            PyramidLayout.from_grid(4, 4, factors)
    for num_scales in (0, 3, 1.0, True, None):
        with refuses("`num_scales`", "1 to 2", repr(num_scales)):
            PyramidLayout.from_grid(4, 4, (2, 1)).truncate(num_scales)


LAYOUT = PyramidLayout.from_grid(1, 3, (1,))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_shapes_at_the_attention_door_are_refused(backend):
    for part, *shapes in (
        ("`key`", (1, 2, 3, 4), (1, 2, 2, 4), (1, 2, 3, 4)),
        ("`value`", (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 8)),
        ("one shape", *[(2, 3, 4)] * 3),
        ("`layout` has 3 tokens", *[(1, 2, 4, 8)] * 3),
    ):
        with refuses(part):
            scale_causal_attention(*map(torch.zeros, shapes), LAYOUT, backend=backend)


def test_backends_that_there_are_not_or_that_give_no_weights_are_refused():
    tensors = [torch.zeros(1, 2, 3, 4)] * 3
    for backend in ("flash", "SDPA", "", 1):
        with refuses("`backend`", repr(backend)):
            scale_causal_attention(*tensors, LAYOUT, backend=backend)
        with refuses("`backend`", "or None", repr(backend)):
            HieraTokAttnProcessor(backend=backend)
    for backend in ("sdpa", "sdpa_mask", "flex", "triton"):
        with refuses(f"`backend={backend!r}`", "weights"):
            scale_causal_attention(*tensors, LAYOUT, backend=backend, return_weights=True)


def test_a_backend_of_diffusers_that_is_not_supported_is_refused(monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # diffusers also keeps it in a global
    vae = AutoencoderHieraTok.from_core(random_core())
    for processor in vae.attn_processors.values():
        processor._attention_backend = "sage"  # as diffusers sets it where the package is there
    for method, tensor in ((vae.encode, torch.zeros(1, 3, 8, 8)), (vae.decode, torch.zeros(1, 4, 2, 2))):
        with refuses("'sage' is not supported", "'native'", "set_attn_processor"):
            method(tensor)
    with refuses("`backend='nope'`"):
        vae.set_attention_backend("nope")
    vae.set_attention_backend("native")
    assert vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mode().shape == (1, 4, 2, 2)


@pytest.mark.parametrize("implementation", ["nope", "flash_attention_2", "paged|eager", "hieratok_flash"])
def test_an_attention_of_transformers_that_is_not_supported_is_refused(implementation):
    with pytest.raises(ValueError, match=r"attn_implementation|Flash Attention 2"):
        HieraTokModel(tiny()).set_attn_implementation(implementation)


def test_broken_statistics_are_refused_and_change_nothing():
    core = random_core()
    before = {name: weight.clone() for name, weight in core.state_dict().items()}
    zeros, ones = torch.zeros(4), torch.ones(4)
    for mean, std, name in (
        (torch.zeros(3), ones, "mean"),
        (0.0, ones, "mean"),
        (torch.full((4,), NAN), ones, "mean"),
        (zeros, torch.ones(4, 1), "std"),
        *((zeros, torch.tensor([1.0, value, 1.0, 1.0]), "std") for value in (0.0, -1.0, NAN)),
    ):
        with refuses(f"`{name}`"):
            core.fold_latent_statistics(mean, std)
    assert all(torch.equal(weight, before[name]) for name, weight in core.state_dict().items())


def test_a_broken_linear_path_or_downsampling_is_refused(owners):
    good = {"components": torch.eye(4, 48), "mean": torch.zeros(48), "scale": torch.ones(4)}
    for name, value in (("components", torch.eye(4, 47)), ("mean", torch.zeros(4)), ("scale", torch.zeros(4))):
        with refuses(f"`{name}`"):
            owners.core.set_linear_path(**{**good, name: value})
    with refuses("`linear_path`"):
        random_core(linear_path=0).set_linear_path(**good)
    for kind in ("mean", "max", None):
        with refuses("`downsampling`", repr(kind)):
            owners.core.with_scale_factors((2, 1), kind)
    assert random_core(scale_factors=(1,)).with_scale_factors((2, 1), "mean").config.downsampling == "mean"


@pytest.fixture
def folder(owners, tmp_path, monkeypatch):
    """A checkpoint to be broken."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    owners.vae.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


LOADERS = {
    "model": HieraTokModel.from_pretrained,
    "auto": AutoModel.from_pretrained,
    "vae": AutoencoderHieraTok.from_pretrained,
}
every_loader = pytest.mark.parametrize("loader", LOADERS)


@contextmanager
def changed_config(folder, **values):
    """Within it, the configuration of a checkpoint has other values."""
    path = folder / "config.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), **values}))
    yield
    path.write_text(good)


@every_loader
def test_an_unbroken_checkpoint_loads(loader, folder, owners):
    loaded = LOADERS[loader](folder).state_dict()
    assert all(torch.equal(loaded[f"core.{name}"], weight) for name, weight in owners.core.state_dict().items())


CORRUPTIONS = {
    "zero-byte": lambda raw: b"",
    "half": lambda raw: raw[: len(raw) // 2],
    "one-byte-long": lambda raw: raw + b"\0",
    "garbage": lambda raw: b"\xff" * 4096,
    "a pointer of git-lfs": lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@every_loader
def test_corrupt_weights_are_refused(loader, corruption, folder):
    path = folder / WEIGHTS
    path.write_bytes(CORRUPTIONS[corruption](path.read_bytes()))
    # diffusers names the file, or what would have fetched it.
    error, part = (OSError, f"{WEIGHTS}|git-lfs") if loader == "vae" else (SafetensorError, "header")
    with pytest.raises(error, match=part):
        LOADERS[loader](folder)


@every_loader
def test_missing_files_are_refused(loader, folder):
    with refuses(str(folder / "nope"), error=OSError):
        LOADERS[loader](folder / "nope")
    (folder / WEIGHTS).rename(folder / "aside")
    with refuses("diffusion_pytorch_model", error=OSError):
        LOADERS[loader](folder)
    (folder / "aside").rename(folder / WEIGHTS)
    (folder / "config.json").unlink()
    error = ValueError if loader == "auto" else OSError  # the library's own
    with refuses(str(folder), "config.json", error=error):
        LOADERS[loader](folder)


@every_loader
def test_sizes_that_disagree_with_the_weights_are_refused(loader, folder):
    error, parts = (ValueError, ("core.", "shape")) if loader == "vae" else (RuntimeError, ("mismatched",))
    sizes = {"latent_channels": 8, "decoder_hidden_size": 64, "patch_size": 8, "linear_path": 1}
    for name, value in (sizes | {"scale_factors": [2, 1], "downsampling": "mean"}).items():
        with changed_config(folder, **{name: value}), refuses(*parts, error=error):
            LOADERS[loader](folder)


@every_loader
def test_broken_values_and_types_in_a_file_are_refused(loader, folder):
    for name, value in (("patch_size", 3), ("scale_factors", [4, 2]), ("downsampling", "max"), ("norm_eps", 0.0)):
        with changed_config(folder, **{name: value}), refuses(f"`{name}`"):
            LOADERS[loader](folder)
    for name, value in (("patch_size", "4"), ("qk_norm", None), ("scale_factors", [2.0, 1.0])):
        is_refused = refuses(f"'{name}'", error=StrictDataclassFieldValidationError)
        with changed_config(folder, **{name: value}), is_refused:
            LOADERS[loader](folder)
    for content in (b"", b'{"patch_size": 4,', b"\xff\xfe\x00"):
        (folder / "config.json").write_bytes(content)
        with refuses(str(folder / "config.json"), "JSON", error=OSError):
            LOADERS[loader](folder)


@pytest.mark.parametrize("owner", ["model", "vae"])
def test_saving_onto_or_below_a_file_is_refused_and_leaves_it_alone(owner, tmp_path, owners):
    path = tmp_path / "file"
    path.write_text("precious")
    with refuses("`save_directory`", str(path)):
        getattr(owners, owner).save_pretrained(path)
    with pytest.raises(NotADirectoryError):
        getattr(owners, owner).save_pretrained(path / "folder")
    assert path.read_text() == "precious" and list(tmp_path.iterdir()) == [path]
