"""Conversion of l-DeTok's weights, against a plain computation of that architecture."""

import argparse
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import images, noise
from PIL import Image
from safetensors.torch import save_file
from scripts import forget_processes, records
from torch.nn import functional as F

pytest.importorskip("datasets", reason="images are read through it")

from transformers import AutoImageProcessor

from hieratok_hf import AutoencoderHieraTok, HieraTokModel
from hieratok_hf.cli import train
from hieratok_hf.cli.main import parse

NORMS = ("ln_pre.weight", "ln_post.weight", "norm1.weight", "norm2.weight")
pytestmark = pytest.mark.usefixtures("script_surroundings")


@pytest.fixture
def script(load_conversion):
    return load_conversion("convert_detok")


# Shape letters: B batch, N tokens, D width, A heads, d channels of a head (64), C latent channels, p patch size.


def published_shapes(encoder, decoder, patch=16, channels=16, side=16):
    """Names and shapes of a checkpoint whose sides have so many blocks and such a width."""
    shapes = {
        "encoder.patch_embed.0.weight": (encoder[1], 3, patch, patch),
        "encoder.patch_embed.0.bias": (encoder[1],),
        "encoder.latent_head.weight": (2 * channels, encoder[1]),
        "encoder.latent_head.bias": (2 * channels,),
        "decoder.decoder_embed.weight": (decoder[1], channels),
        "decoder.decoder_embed.bias": (decoder[1],),
        "decoder.mask_token": (1, 1, decoder[1]),
        "decoder.ffn.1.weight": (3 * patch**2, decoder[1], 1, 1),
        "decoder.ffn.1.bias": (3 * patch**2,),
        "decoder.conv_out.weight": (3, 3, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    for name, (depth, width) in {"encoder": encoder, "decoder": decoder}.items():
        shapes[f"{name}.positional_embedding"] = (1, side**2, width)
        shapes |= {f"{name}.{norm}.weight": (width,) for norm in ("ln_pre", "ln_post")}
        hidden = int(2 / 3 * 4 * width)
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
        for block in (f"{name}.transformer.{i}" for i in range(depth)):
            shapes |= {f"{block}.{norm}.weight": (width,) for norm in ("norm1", "norm2")}
            shapes |= {f"{block}.{linear}.weight": shape for linear, shape in linears.items()}
            shapes |= {f"{block}.{linear}.bias": shape[:1] for linear, shape in linears.items()}
    return shapes


def random_weights(encoder=(2, 64), decoder=(1, 128), patch=4, channels=4, seed=0, **sizes):
    """Weights that keep values about 1 and let every tensor count."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in published_shapes(encoder, decoder, patch, channels, **sizes).items():
        fan = math.prod(shape[1:]) if len(shape) in (2, 4) else 16
        weights[key] = torch.randn(shape, generator=generator) / math.sqrt(fan) + key.endswith(NORMS)
    return weights


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def angles(grid):
    """`(N, d)`: first half of the channels by the row, second by the column, the frequency list twice in each."""
    frequencies = 2 * math.pi * 7 * 10000 ** -torch.linspace(0, 1, 16)
    twice = torch.cat([frequencies, frequencies])
    height, width = (max(n - 1, 1) for n in grid)
    rows = (torch.arange(grid[0]) / height)[:, None, None] * twice
    columns = (torch.arange(grid[1]) / width)[None, :, None] * twice
    return torch.cat([rows.expand(*grid, 32), columns.expand(*grid, 32)], dim=-1).flatten(0, 1)


def turned(x, angle):
    """Queries or keys `(B, A, N, d)`, pairs of neighbouring channels turned by `(N, d)`."""
    out = torch.empty_like(x)
    even, odd = x[..., 0::2], x[..., 1::2]
    out[..., 0::2] = even * angle[:, 0::2].cos() - odd * angle[:, 0::2].sin()
    out[..., 1::2] = odd * angle[:, 1::2].cos() + even * angle[:, 1::2].sin()
    return out


def blocks(weights, side, x, grid):
    """The part `(B, N, D)` to `(B, N, D)` that both sides have: positions, norm, blocks, norm."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    table = weights[f"{side}.positional_embedding"]
    n = math.isqrt(table.shape[1])
    if grid != (n, n):
        squares = table.reshape(1, n, n, -1).permute(0, 3, 1, 2)
        table = F.interpolate(squares, grid, mode="bilinear").flatten(2).transpose(1, 2)
    x = norm(x + table, weights[f"{side}.ln_pre.weight"])
    angle = angles(grid)
    for i in range(len([key for key in weights if key.startswith(f"{side}.transformer") and "norm1" in key])):
        block = f"{side}.transformer.{i}"
        projected = linear(f"{block}.attn.qkv", norm(x, weights[f"{block}.norm1.weight"]))
        query, key, value = projected.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)
        attended = (turned(query, angle) @ turned(key, angle).mT / 8).softmax(-1) @ value
        x = x + linear(f"{block}.attn.proj", attended.transpose(1, 2).flatten(2))
        a, b = linear(f"{block}.mlp.w12", norm(x, weights[f"{block}.norm2.weight"])).chunk(2, -1)
        x = x + linear(f"{block}.mlp.w3", F.silu(a) * b)
    return norm(x, weights[f"{side}.ln_post.weight"])


def plain_moments(weights, pixel_values):
    """Images `(B, 3, H, W)` to mean and log-variance `(B, 2C, h, w)`."""
    kernel = weights["encoder.patch_embed.0.weight"]
    x = F.conv2d(pixel_values, kernel, weights["encoder.patch_embed.0.bias"], stride=kernel.shape[-1])
    grid = tuple(x.shape[-2:])
    x = blocks(weights, "encoder", x.flatten(2).transpose(1, 2), grid)
    x = F.linear(x, weights["encoder.latent_head.weight"], weights["encoder.latent_head.bias"])
    return x.transpose(1, 2).unflatten(2, grid)


def plain_images(weights, latents):
    """Latents `(B, C, h, w)` to images `(B, 3, H, W)`."""
    grid = tuple(latents.shape[-2:])
    x = latents.flatten(2).transpose(1, 2)
    x = F.linear(x, weights["decoder.decoder_embed.weight"], weights["decoder.decoder_embed.bias"])
    x = blocks(weights, "decoder", x, grid)
    x = F.conv2d(x.transpose(1, 2).unflatten(2, grid), weights["decoder.ffn.1.weight"], weights["decoder.ffn.1.bias"])
    p = math.isqrt(x.shape[1] // 3)
    x = x.unflatten(1, (p, p, 3)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)
    return F.conv2d(x, weights["decoder.conv_out.weight"], weights["decoder.conv_out.bias"], padding=1)


@torch.no_grad()
def results(model, weights, grid):
    """Moments and images by a converted model, and by the plain computation."""
    config = model.config
    pixel_values = images(2, 3, grid[0] * config.patch_size, grid[1] * config.patch_size)
    latents = noise(2, config.latent_channels, *grid)
    found = model.encode(pixel_values).moments, model.decode(latents).reconstruction
    return found, (plain_moments(weights, pixel_values), plain_images(weights, latents))


SIZES = [
    pytest.param({}, id="two sides of other sizes"),
    pytest.param({"encoder": (1, 128), "decoder": (2, 64), "patch": 8, "channels": 6}, id="the other way round"),
    pytest.param({"side": 8}, id="smaller images"),
]


@pytest.mark.parametrize("sizes", SIZES)
def test_moments_and_images_are_those_of_the_plain_computation(script, sizes):
    weights = random_weights(**sizes)
    model = script.convert(weights)
    side = sizes.get("side", 16)
    assert model.config.sample_size == side * sizes.get("patch", 4)
    assert model.config.scale_factors == (1,) and model.config.downsampling == "learned"
    state = {key: x for key, x in model.state_dict().items() if key != "core.decoder.scale_embedding"}
    raw = script.detok_key_map().to_raw(state)
    del weights["decoder.mask_token"]
    torch.testing.assert_close(raw, weights, atol=0, rtol=0)  # and back, to the bit
    found, expected = results(model, weights, (side, side))
    assert all(0.3 < x.std() < 3 for x in expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [(12, 20), (1, 3)])
def test_other_grids_resample_the_positions(script, grid):
    weights = random_weights()
    torch.testing.assert_close(*results(script.convert(weights), weights, grid), atol=1e-5, rtol=0)


WIDTHS = {"S": (8, 512), "B": (12, 768), "L": (24, 1024)}


@pytest.mark.parametrize("pair", ["BB", "SL"])
def test_published_sizes_are_read_off_the_shapes(script, pair):
    shapes = published_shapes(*(WIDTHS[letter] for letter in pair))
    config = script.configuration({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert (config.patch_size, config.latent_channels, config.sample_size) == (16, 16, 256)
    for side, letter in zip(("encoder", "decoder"), pair):
        sizes = [getattr(config, f"{side}_{name}") for name in ("num_layers", "hidden_size", "num_heads")]
        assert sizes == [*WIDTHS[letter], WIDTHS[letter][1] // 64]
    with torch.device("meta"):
        state = HieraTokModel(config).state_dict()
    del state["core.decoder.scale_embedding"], shapes["decoder.mask_token"]
    assert {key: tuple(x.shape) for key, x in script.detok_key_map().to_raw(state).items()} == shapes
    assert pair != "BB" or round(sum(map(math.prod, shapes.values())) / 1e6) == 172


@pytest.fixture
def data(tmp_path):
    """Images of 64 x 64 pixels in the order of their brightness, which makes the first of them unlike the rest."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        levels = rng.normal(10 * i, 20, (16, 16, 3)).repeat(4, 0).repeat(4, 1)
        Image.fromarray(levels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:02}.png")
    return folder


def published_file(path, weights, **more):
    """A file as the training writes it."""
    args = argparse.Namespace(model="detok_BB", gamma=3.0, epochs=200, tags=["a"])
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 199, "args": args, **more}, path)
    return path


def run(script, weights, output, *options):
    return script.main([str(output), "--weights", str(weights), *map(str, options)])


def loaded_cores(folder):
    """What both libraries load from a folder."""
    return [loader.from_pretrained(folder).core for loader in (HieraTokModel, AutoencoderHieraTok)]


@torch.no_grad()
def test_folded_latents_are_normalised_and_images_stay(script, tmp_path, data, capsys):
    weights = random_weights()
    file = published_file(tmp_path / "detok.pth", weights)
    assert run(script, file, tmp_path / "out", "--dry_run") == 0 and not (tmp_path / "out").exists()
    assert "decoder 1 x 128" in capsys.readouterr().out
    assert run(script, file, tmp_path / "out", "--data", data, "--max_images", 24) == 0
    said = capsys.readouterr().out
    assert "encoder 2 x 64, decoder 1 x 128" in said and "24 images" in said

    seen = [np.asarray(Image.open(path)) for path in sorted(data.iterdir())]
    seen = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2) / 127.5 - 1
    mean, logvar = plain_moments(weights, seen).chunk(2, 1)
    shift, scale = mean.mean((0, 2, 3))[:, None, None], mean.std((0, 2, 3))[:, None, None]
    assert shift.abs().max() > 0.1
    for core in loaded_cores(tmp_path / "out"):
        posterior = core.encode(seen)
        torch.testing.assert_close(posterior.mode(), (mean - shift) / scale, atol=1e-4, rtol=0)
        torch.testing.assert_close(posterior.logvar, logvar - 2 * scale.log(), atol=1e-4, rtol=0)
        made = core.decode(posterior.mode()[:4])
        torch.testing.assert_close(made, plain_images(weights, mean[:4]), atol=1e-4, rtol=0)
    processed = AutoImageProcessor.from_pretrained(tmp_path / "out")(Image.new("RGB", (70, 66)), return_tensors="pt")
    assert processed.pixel_values.shape == (1, 3, 64, 68)


def test_images_are_taken_from_all_over_the_data(script, tmp_path, data):
    def mean_of(count, folder):
        args = parse("convert detok", ["out", "--data", str(folder), "--max_images", str(count)])
        return script.fold(script.convert(random_weights()).core, args)[0]

    (tmp_path / "first").mkdir()
    for path in sorted(data.iterdir())[:8]:
        (tmp_path / "first" / path.name).write_bytes(path.read_bytes())
    everywhere = mean_of(24, data)
    some, first = ((mean - everywhere).norm() for mean in (mean_of(8, data), mean_of(8, tmp_path / "first")))
    assert 1e-3 < some < 0.5 * first


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), [("plain.safetensors", []), ("ema.pth", ["--ema"])])
def test_every_kind_of_file_gives_the_same_folder(script, tmp_path, name, options):
    weights = random_weights()
    save_file({key: x for key, x in weights.items() if key != "decoder.mask_token"}, tmp_path / "plain.safetensors")
    published_file(tmp_path / "ema.pth", {key: x + 1 for key, x in weights.items()}, model_ema=weights)
    pixel_values = images(1, 3, 64, 64)
    expected = plain_moments(weights, pixel_values)
    assert run(script, tmp_path / name, tmp_path / "out", *options) == 0
    for core in loaded_cores(tmp_path / "out"):
        torch.testing.assert_close(core.encode_moments(pixel_values)[0], expected, atol=1e-5, rtol=0)


def test_a_file_of_the_hub_is_fetched_at_its_revision(script, tmp_path, monkeypatch):
    download = Mock(return_value=str(published_file(tmp_path / "cached.pth", random_weights())))
    monkeypatch.setattr(script, "hf_hub_download", download)
    argv = ["someone/some-model/part/file.pth", tmp_path / "out", "--revision", "v1"]
    assert run(script, *argv) == 0 and (tmp_path / "out" / "config.json").is_file()
    download.assert_called_once_with("someone/some-model", "part/file.pth", revision="v1")


def test_half_precision_is_converted_in_float32_and_written_where_asked_for(script, tmp_path):
    half = {key: x.bfloat16() for key, x in random_weights().items()}
    weights = {key: x.float() for key, x in half.items()}
    torch.testing.assert_close(*results(script.convert(half), weights, (16, 16)), atol=1e-5, rtol=0)
    file = published_file(tmp_path / "detok.pth", half)
    assert run(script, file, tmp_path / "out", "--dtype", "bfloat16") == 0
    model = HieraTokModel.from_pretrained(tmp_path / "out")
    assert {x.dtype for x in model.state_dict().values()} == {torch.bfloat16}
    found, expected = results(model, weights, (16, 16))
    for x, y in zip(found, expected):
        assert (x.float() - y).norm() < 0.1 * y.norm()


def without(start):
    return lambda weights: [weights.pop(key) for key in list(weights) if key.startswith(start)]


def reshaped(key, change):
    return lambda weights: weights.update({key: change(weights[key])})


QKV = "decoder.transformer.0.attn.qkv.weight"
PATCHES, HEAD = "encoder.patch_embed.0.weight", "encoder.latent_head.weight"
BROKEN = {
    "no qkv": (without(QKV), QKV),
    "no decoder": (without("decoder"), "'decoder.decoder_embed.weight' is missing"),
    "block left out": (without("encoder.transformer.0."), "encoder.transformer.0.attn.qkv.weight"),
    "fused parts": (reshaped(QKV, lambda x: x[:-1]), f"{QKV}: found (383, 128), expected (384, 128)"),
    "another width": (reshaped(PATCHES, lambda x: x[:40]), "multiple of 64"),
    "no image": (reshaped(PATCHES, lambda x: x.flatten(1)), "must have 4 dimensions"),
    "patches that are no squares": (reshaped(PATCHES, lambda x: x[..., :2, :]), "patch_embed.0"),
    "a patch of three": (reshaped(PATCHES, lambda x: x[..., :3, :3]), "power of two"),
    "positions of no square": (reshaped("encoder.positional_embedding", lambda x: x[:, :-1]), "square of positions"),
    "moments of other channels": (reshaped(HEAD, lambda x: x[:-2]), "two rows for 4 channels"),
    "infinite": (reshaped(HEAD, lambda x: x * math.inf), HEAD),
}


@pytest.mark.parametrize("broken, said", BROKEN.values(), ids=BROKEN)
def test_broken_weights_are_told_and_leave_nothing(script, tmp_path, capsys, broken, said):
    weights = random_weights()
    broken(weights)
    file = published_file(tmp_path / "detok.pth", weights)
    assert run(script, file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == [file]


def test_options_that_cannot_be_followed_are_told(script, tmp_path, data, capsys):
    file = published_file(tmp_path / "detok.pth", random_weights())
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "none").mkdir()
    large = {key: 1e5 * x if key.startswith("decoder.decoder_embed") else x for key, x in random_weights().items()}
    published_file(tmp_path / "large.pth", large)
    out = tmp_path / "out"
    for argv, said in [
        ([tmp_path, out], "--weights"),
        ([file, out, "--ema"], "no averaged weights"),
        ([file, tmp_path / "file"], "OUTPUT"),
        ([file, out, "--data", tmp_path / "none"], "No images found"),
        ([tmp_path / "large.pth", out, "--dtype", "float16"], "try --dtype float32"),
    ]:
        assert run(script, *argv) == 2
        error = capsys.readouterr().err.splitlines()[-1]  # after the bars of saving and loading
        assert error.startswith("error: ") and said in error
        assert not out.exists() and (tmp_path / "file").read_text() == "in the way"
    for options in (["--max_images", "5"], ["--data", str(data), "--max_images", "0"]):
        with pytest.raises(SystemExit, match="2"):
            run(script, file, out, *options)


def test_a_folder_that_loads_otherwise_is_not_written(script, tmp_path, monkeypatch, capsys):
    file = published_file(tmp_path / "detok.pth", random_weights())
    load = AutoencoderHieraTok.from_pretrained

    def other(*arguments, **options):
        model = load(*arguments, **options)
        model.core.decoder.positions.grid.data.zero_()
        return model

    monkeypatch.setattr(AutoencoderHieraTok, "from_pretrained", other)
    assert run(script, file, tmp_path / "out") == 2
    assert "differs from the checkpoint" in capsys.readouterr().err and list(tmp_path.iterdir()) == [file]


def test_training_goes_on_with_several_scales(script, tmp_path, data):
    file = published_file(tmp_path / "detok.pth", random_weights())
    assert run(script, file, tmp_path / "twin", "--data", data) == 0
    forget_processes()
    options = "--scale_factors 8 4 2 1 --crop_sizes 64 --batch_size 4 --steps 2 --lr 1e-4 --statistics_batches 4"
    argv = ["--model", tmp_path / "twin", "--data", data, "--output", tmp_path / "out", "--log_every", 1]
    assert train.main([*map(str, argv), *options.split()]) == 0
    assert [math.isfinite(record["loss"]) for record in records(tmp_path / "out")] == [True, True]
    vae = AutoencoderHieraTok.from_pretrained(tmp_path / "out")
    assert vae.config.scale_factors == (8, 4, 2, 1) and vae.config.rotary_pairing == "detok"
    assert vae.core.decoder.scale_embedding.shape == (4, 128) and vae.core.decoder.scale_embedding.abs().sum() > 0
    assert [x.shape[-1] for x in vae.core.decode_scales(noise(1, 4, 16, 16))] == [8, 16, 32, 64]
