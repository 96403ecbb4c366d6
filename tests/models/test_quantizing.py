"""Tests of `quantizing`: integers are the nearest levels, come back exactly, and are stored with a model."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers import images, random_core
from safetensors.torch import save

from hieratok_hf import AutoencoderHieraTok, HieraTokModel, pretrained
from hieratok_hf.models.quantizing import LatentQuantizer, coarser_tokens
from hieratok_hf.utils.choices import QUANTIZER_FILE, TOKEN_BITS

CLASSES = {"transformers": HieraTokModel, "diffusers": AutoencoderHieraTok}
CHANNELS = 4


def heavy_latents(count=64, seed=0):
    """Latents of heavy tails, each channel with its own width and middle."""
    rng = np.random.default_rng(seed)
    widths = np.array([0.1, 1.0, 3.0, 20.0])[:, None, None]
    return torch.from_numpy(rng.laplace(size=(count, CHANNELS, 9, 7)) * widths + 2 * widths).float()


@pytest.fixture(scope="module")
def quantizer():
    return LatentQuantizer.fit([heavy_latents()])


def fitted(cls, seed=0):
    """A tiny model with levels of its own latents."""
    model = cls.from_core(random_core(seed))
    model.fit_quantizer([images(2, 3, 32, 48, seed=seed), images(1, 3, 16, 16, seed=seed + 1)])
    return model


@pytest.mark.parametrize("bits", TOKEN_BITS)
def test_a_latent_becomes_the_number_of_its_nearest_level(bits, quantizer):
    latents = heavy_latents(8, seed=1)
    tokens = quantizer.quantize(latents, bits)
    levels = quantizer.levels[bits]
    assert levels.shape == (CHANNELS, 2**bits) and tokens.dtype == torch.int64 and tokens.shape == latents.shape
    distances = (latents.unsqueeze(-1) - levels[:, None, None]).abs()  # (B, C, h, w, levels)
    chosen = distances.gather(-1, tokens.unsqueeze(-1))[..., 0]
    assert (chosen <= distances.amin(-1) * (1 + 1e-5) + 1e-6).all()
    found = quantizer.dequantize(tokens, bits)
    assert torch.equal((found - latents).abs(), chosen)
    assert torch.equal(quantizer.quantize(found, bits), tokens)
    assert torch.equal(quantizer.dequantize(tokens.to(torch.uint16), bits), found)


def test_levels_lie_as_densely_as_a_power_of_the_density():
    def exponential(places, width):
        """Values at shares of an exponential distribution between 0 and 10."""
        return -width * torch.log1p(-places * -torch.expm1(torch.tensor(-10 / width, dtype=torch.float64)))

    values = exponential(torch.linspace(0, 1, 1_000_001, dtype=torch.float64), 1.0)
    levels = LatentQuantizer.fit([values[None, None, None]]).levels[6][0].double()
    expected = exponential((torch.arange(64, dtype=torch.float64) + 0.5) / 64, 5.0)
    assert torch.allclose(levels, expected, atol=0.12)  # an even density is 3 off


@pytest.mark.parametrize(("bits", "most"), [(4, 0.05), (6, 0.004), (8, 0.0006)])
def test_the_error_falls_with_the_bits(bits, most, quantizer):
    latents = heavy_latents(32, seed=2)
    error = quantizer.dequantize(quantizer.quantize(latents, bits), bits) - latents
    assert (error.square().mean((0, 2, 3)) < most * latents.var((0, 2, 3))).all()


def test_halves_and_what_lies_outside(quantizer):
    levels = quantizer.levels[2]
    between = ((levels[:, :1] + levels[:, 1:2]) / 2)[None, :, :, None]
    assert (quantizer.quantize(between, 2) == 0).all()
    assert (quantizer.quantize(torch.nextafter(between, torch.tensor(torch.inf)), 2) == 1).all()
    assert quantizer.quantize(torch.full((1, CHANNELS, 1, 2), 1e9), 8).unique().tolist() == [255]
    assert quantizer.quantize(torch.full((1, CHANNELS, 1, 2), -1e9), 8).unique().tolist() == [0]


def test_integers_do_not_depend_on_dtype_layout_or_threads(quantizer):
    latents = heavy_latents(4, seed=3).bfloat16()
    tokens = quantizer.quantize(latents, 6)
    assert torch.equal(quantizer.quantize(latents.double(), 6), tokens)
    assert torch.equal(quantizer.quantize(latents.to(memory_format=torch.channels_last), 6), tokens)
    assert torch.equal(quantizer.dequantize(tokens.to(torch.uint8), 6), quantizer.dequantize(tokens, 6))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert torch.equal(quantizer.quantize(latents, 6), tokens)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("factors", [(8, 4, 2, 1), (6, 3, 1), (1,)])
def test_coarse_tokens_are_rounded_means_of_their_blocks(factors):
    tokens = torch.randint(0, 64, (2, 3, 11, 8), generator=torch.Generator().manual_seed(0))
    maps = coarser_tokens(tokens, factors)
    assert len(maps) == len(factors) and torch.equal(maps[-1], tokens)
    for factor, found in zip(factors, maps):
        padded = np.pad(tokens.numpy(), ((0, 0), (0, 0), (0, -11 % factor), (0, -8 % factor)), mode="edge")
        for row, column in np.ndindex(*found.shape[2:]):
            block = padded[:, :, row * factor : (row + 1) * factor, column * factor : (column + 1) * factor]
            expected = np.floor(block.mean((2, 3)) + 0.5)
            assert np.array_equal(found[:, :, row, column].numpy(), expected)


def test_both_classes_give_the_same_integers_and_images_and_store_them(tmp_path):
    pixel_values = images(2, 3, 32, 20)
    for first in CLASSES:
        model = fitted(CLASSES[first])
        model.save_pretrained(tmp_path / first)
        found = []
        for cls in CLASSES.values():
            loaded = cls.from_pretrained(tmp_path / first)
            tokens = loaded.tokenize(pixel_values, 5)
            assert tokens.shape == (2, CHANNELS, 8, 5) and 0 <= tokens.min() < tokens.max() <= 31
            with torch.no_grad():
                found.append((tokens, loaded.detokenize(tokens, bits=5)[0]))
            assert torch.equal(loaded.tokenize(pixel_values), model.tokenize(pixel_values, bits=8))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (tmp_path / "diffusers" / QUANTIZER_FILE).read_bytes() == (
        tmp_path / "transformers" / QUANTIZER_FILE
    ).read_bytes()


def test_what_is_decoded_is_what_the_integers_stand_for():
    model = fitted(AutoencoderHieraTok)
    pixel_values = images(1, 3, 32, 48)
    with torch.no_grad():
        latents = model.encode(pixel_values).latent_dist.mode()
        tokens = model.tokenize(pixel_values, 8)
        assert torch.equal(tokens, model.quantizer.quantize(latents, 8))
        rounded = model.quantizer.dequantize(tokens, 8)
        assert 0 < (rounded - latents).std() < 0.02 * latents.std()
        assert torch.equal(model.detokenize(tokens).sample, model.decode(rounded).sample)
        assert torch.equal(model.detokenize(tokens, num_scales=2).sample, model.decode(rounded, num_scales=2).sample)
    maps = model.tokenize(pixel_values, 8, return_scales=True)
    assert [tuple(x.shape[2:]) for x in maps] == [(1, 2), (2, 3), (4, 6), (8, 12)] and torch.equal(maps[-1], tokens)


def test_low_precision_goes_in_and_comes_out():
    model = fitted(HieraTokModel).to(torch.bfloat16)
    tokens = model.tokenize(images(1, 3, 16, 16))
    assert model.detokenize(tokens).reconstruction.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", CLASSES.values())
def test_a_model_without_levels_says_how_to_make_some(cls, tmp_path):
    cls.from_core(random_core()).save_pretrained(tmp_path)
    model = cls.from_pretrained(tmp_path)
    assert not (tmp_path / QUANTIZER_FILE).exists() and model.quantizer is None
    for call in (lambda: model.tokenize(images(1, 3, 16, 16)), lambda: model.detokenize(torch.zeros(1, 4, 2, 2))):
        with pytest.raises(ValueError, match=r"fit_quantizer.*hieratok fit-quantizer"):
            call()


def test_levels_of_other_weights_do_not_stay_in_a_folder(tmp_path):
    fitted(AutoencoderHieraTok).save_pretrained(tmp_path)
    fitted(HieraTokModel, seed=1).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert HieraTokModel.from_pretrained(tmp_path, variant="fp16").quantizer is not None
    HieraTokModel.from_core(random_core(1)).save_pretrained(tmp_path)
    assert not (tmp_path / QUANTIZER_FILE).exists()


def test_levels_are_pushed_and_come_from_the_hub(hub_here):
    models = {"with": fitted(HieraTokModel), "without": HieraTokModel.from_core(random_core(1))}
    for name, model in models.items():
        model.push_to_hub(f"org/{name}")
    for cls in CLASSES.values():
        found = cls.from_pretrained("org/with").quantizer
        assert found is not None and torch.equal(found.levels[8], models["with"].quantizer.levels[8])
        assert cls.from_pretrained("org/without").quantizer is None
    models["without"].push_to_hub("org/with")
    assert QUANTIZER_FILE not in hub_here.files("org/with")


def spoiled(**changes):
    levels = {f"levels_{bits}": torch.arange(2.0**bits).expand(CHANNELS, -1).contiguous() for bits in TOKEN_BITS}
    return save({name: value for name, value in {**levels, **changes}.items() if value is not None})


DAMAGED = {
    "no safetensors": b"\x80\x04levels",
    "levels that miss": spoiled(levels_3=None),
    "other channels": spoiled(levels_3=torch.arange(8.0)[None]),
    "another dtype": spoiled(levels_3=torch.arange(8.0).expand(CHANNELS, -1).double().contiguous()),
    "another number": spoiled(levels_3=torch.arange(7.0).expand(CHANNELS, -1).contiguous()),
    "no order": spoiled(levels_3=torch.zeros(CHANNELS, 8)),
    "no numbers": spoiled(levels_3=torch.full((CHANNELS, 8), torch.nan)),
    "too few dimensions": spoiled(levels_3=torch.tensor(1.0)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_refused_by_name(content, tmp_path):
    AutoencoderHieraTok.from_core(random_core()).save_pretrained(tmp_path)
    (tmp_path / QUANTIZER_FILE).write_bytes(spoiled())
    assert LatentQuantizer.read(tmp_path / QUANTIZER_FILE).levels[8].shape == (CHANNELS, 256)
    (tmp_path / QUANTIZER_FILE).write_bytes(content)
    for cls in CLASSES.values():
        with pytest.raises(ValueError, match=f"{QUANTIZER_FILE}' is no file of levels") as caught:
            cls.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        assert cls.from_pretrained(tmp_path, load_quantizer=False).quantizer is None


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / QUANTIZER_FILE).open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match="too large"):
        LatentQuantizer.read(tmp_path / QUANTIZER_FILE)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / QUANTIZER_FILE)
    with pytest.raises(ValueError, match="is no file"):
        LatentQuantizer.read(tmp_path / QUANTIZER_FILE)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_levels_of_other_channels_are_refused(cls, tmp_path):
    cls.from_core(random_core()).save_pretrained(tmp_path)
    LatentQuantizer.fit([heavy_latents()[:, :3]]).write(tmp_path / QUANTIZER_FILE)
    with pytest.raises(ValueError, match=f"{QUANTIZER_FILE}' must have levels of 4 channels, got 3; delete it"):
        cls.from_pretrained(tmp_path)


def test_a_folder_in_the_place_of_levels_stays_and_does_no_harm(tmp_path):
    (tmp_path / QUANTIZER_FILE).mkdir()
    for _ in range(2):
        HieraTokModel.from_core(random_core()).save_pretrained(tmp_path)
        assert HieraTokModel.from_pretrained(tmp_path).quantizer is None
    with pytest.raises(ValueError, match=f"room for the file '{QUANTIZER_FILE}'"):
        fitted(HieraTokModel).save_pretrained(tmp_path)


BAD = {
    "no integers": (torch.zeros(1, CHANNELS, 2, 2), 6, "`tokens` must be a tensor of integers, got torch.float32"),
    "booleans": (torch.zeros(1, CHANNELS, 2, 2).bool(), 6, "`tokens`.*torch.bool"),
    "no tensor": ([[1]], 6, "`tokens`.*got list"),
    "other channels": (torch.zeros(1, 3, 2, 2, dtype=torch.long), 6, r"`tokens`.*\(B, 4, h, w\), got \(1, 3, 2, 2\)"),
    "nothing": (torch.zeros(0, CHANNELS, 2, 2, dtype=torch.long), 6, "`tokens`.*got"),
    "too large": (torch.full((1, CHANNELS, 2, 2), 64), 6, "`tokens` of 6 bits must be from 0 to 63, got 64 to 64"),
    "negative": (torch.full((1, CHANNELS, 2, 2), -1), 6, "`tokens` of 6 bits.*got -1"),
    "no such bits": (torch.zeros(1, CHANNELS, 2, 2, dtype=torch.long), 9, "`bits`.*from 1 to 8, got 9"),
    "bits that are no number": (torch.zeros(1, CHANNELS, 2, 2, dtype=torch.long), True, "`bits`.*got True"),
    "a share of bits": (torch.zeros(1, CHANNELS, 2, 2, dtype=torch.long), 6.0, "`bits`.*got 6.0"),
}


@pytest.mark.parametrize(("tokens", "bits", "message"), BAD.values(), ids=BAD)
def test_integers_that_cannot_be_are_refused(tokens, bits, message, quantizer):
    with pytest.raises(ValueError, match=message):
        quantizer.dequantize(tokens, bits)


def test_bad_arguments_of_fitting_and_tokenizing():
    model = fitted(HieraTokModel)
    with pytest.raises(ValueError, match=r"`bits`.*got 0"):
        model.tokenize(images(1, 3, 16, 16), bits=0)
    with pytest.raises(ValueError, match="multiples of the patch size"):
        model.tokenize(images(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"`latents`.*\(B, 4, h, w\)"):
        model.quantizer.quantize(torch.zeros(1, 3, 2, 2), 6)
    for latents, message in (
        ([], "must not be empty"),
        ([torch.zeros(1, 4, 5, 5)], "several values"),
        ([torch.randn(1, 4, 1, 1)], "several values"),
        ([torch.randint(0, 2, (9, 4, 9, 9)) + 2.0**23], "more different values"),
        (torch.randn(2, 4, 9, 9), r"shape \(B, C, h, w\), got \(4, 9, 9\)"),
        ([torch.randn(2, 4, 9, 9), torch.randn(2, 3, 9, 9)], r"shape \(B, 4, h, w\), got \(2, 3, 9, 9\)"),
        ([torch.full((1, 4, 9, 9), torch.inf)], "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentQuantizer.fit(latents)


@pytest.mark.parametrize("name", ["hieratok-tiny", "hieratok-tiny-16x"])
def test_what_ships_has_levels(name, tmp_path):
    model = HieraTokModel.from_pretrained(name)
    pixel_values = images(1, 3, 64, 64)
    tokens = model.tokenize(pixel_values, 8)
    with torch.no_grad():
        plain, rounded = model(pixel_values).reconstruction, model.detokenize(tokens).reconstruction
    assert 0 < (plain - rounded).square().mean().sqrt() < 0.02
    # Without them, the folder is as it was before there were any.
    folder = shutil.copytree(pretrained(name), tmp_path / name)
    (folder / QUANTIZER_FILE).unlink()
    with torch.no_grad():
        assert torch.equal(HieraTokModel.from_pretrained(folder)(pixel_values).reconstruction, plain)
