"""Tests of `latent_statistics`: signals and encoders whose figures are known, and every kind of autoencoder."""

import math

import numpy as np
import pytest
import torch
from helpers import images, noise, random_core
from latent_data import tiny_dc, tiny_kl, tiny_without_posterior
from torch import nn
from torch.nn import functional as F

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.evaluation import latent_statistics as space
from hieratok_hf.evaluation.linear_probe import linear_probe
from hieratok_hf.models.autoencoder_adapter import Codec


def directions(count, dimensions):
    return noise(count, dimensions).double()


def test_power_adds_up_to_the_variance_and_is_flat_for_white_noise():
    latents = noise(5, 3, 4, 6) * torch.tensor([1.0, 2.0, 0.1]).view(3, 1, 1) + 7
    expected = latents.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(space.power(latents).mean((1, 2)), expected)
    latents = noise(4000, 2, 8, 8)
    spectrum = space.power(latents)
    frequencies, rings = space.radial_spectrum(spectrum)
    assert frequencies[0] == 0 and (frequencies.diff() > 0).all() and rings.shape == (2, len(frequencies))
    torch.testing.assert_close(rings, torch.ones_like(rings), rtol=0, atol=0.1)
    upper = sum(i * i + j * j >= 16 for i in range(8) for j in range(8))
    shares = torch.full((2,), upper / 64).double()
    torch.testing.assert_close(space.upper_half_share(spectrum), shares, rtol=0.01, atol=0)
    assert space.neighbour_correlation(latents).abs().max() < 0.01
    assert space.excess_kurtosis(latents).abs().max() < 0.05


@pytest.mark.parametrize("k", [0, 3, 4])
def test_a_cosine_has_its_energy_in_its_own_ring(k):
    # k half periods across the grid; of k = 0 each image is a constant of its own.
    wave = torch.cos(torch.pi / 8 * k * (torch.arange(8) + 0.5))
    latents = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1) * wave.expand(2, 1, 8, 8)
    spectrum = space.power(latents)
    frequencies, rings = space.radial_spectrum(spectrum)
    assert rings[0].argmax() == k and rings[0].sort().values[-2] < 1e-9
    assert spectrum[0, 0, k] / spectrum.sum() == pytest.approx(1) and space.radii(8, 8)[0, k] == k / 8
    assert space.upper_half_share(spectrum).item() == pytest.approx(float(k >= 4), abs=1e-9)
    assert frequencies[0] == 0


def test_neighbours_agree_or_alternate():
    signs = torch.tensor([1.0, -1.0])
    constant = signs.view(2, 1, 1, 1).expand(2, 1, 6, 4)
    board = (signs[torch.arange(6) % 2][:, None] * signs[torch.arange(4) % 2]).expand(2, 1, 6, 4)
    rows = signs[torch.arange(6) % 2][:, None].expand(2, 1, 6, 4)  # alike side by side, opposite one above the other
    found = space.neighbour_correlation(torch.cat((constant, board, rows), dim=1))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))


def test_kurtosis_of_known_distributions():
    uniform = torch.rand(2000, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = space.excess_kurtosis(torch.cat((uniform, uniform.round()), dim=1))
    torch.testing.assert_close(found, torch.tensor([-1.2, -2.0], dtype=torch.float64), rtol=0, atol=0.01)


def test_uniformity_tells_a_sphere_from_a_cluster():
    # On the sphere of three dimensions the mean of exp(-2 |x - y|^2) = exp(4 x.y - 4) is an integral by hand.
    assert space.uniformity(directions(2000, 3)) == pytest.approx(math.log((1 - math.exp(-8)) / 8), abs=0.03)
    assert space.uniformity(directions(500, 1000)) == pytest.approx(-4, abs=0.05)
    cluster = torch.ones(500, 3).double() + 1e-3 * directions(500, 3)
    assert -1e-4 < space.uniformity(cluster) <= 0
    lengths = torch.linspace(0.1, 9, 500).double()[:, None]
    assert space.uniformity(lengths * cluster) == pytest.approx(space.uniformity(cluster))
    two = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    assert space.uniformity(two) == pytest.approx(-4) and space.uniformity(two, t=1.0) == pytest.approx(-2)


def test_quantiles_are_those_of_every_channel_s_own_unit():
    latents = noise(300, 2, 8, 8)
    found = space.describe_latents(latents * torch.tensor([0.01, 50.0]).view(2, 1, 1) + 9)
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), correction=0, keepdim=True)
    numbers = ((latents - mean) / std).abs().numpy()
    for share, value in found["quantiles"].items():
        assert value == pytest.approx(np.quantile(numbers, float(share)), rel=1e-3)
    assert found["quantiles"]["1.0"] == pytest.approx(numbers.max(), rel=1e-3)
    assert found["quantiles"]["0.99"] == pytest.approx(2.576, abs=0.05)  # as of the normal distribution
    assert found["images"] == 300 and found["shape"] == [2, 8, 8]


def test_what_has_no_figures_is_refused():
    for figures, latents, message in (
        (space.describe_latents, torch.zeros(2, 4, 4), "must have shape"),
        (space.describe_latents, torch.full((2, 1, 4, 4), torch.nan), "must be finite"),
        (
            space.describe_latents,
            torch.stack((noise(2, 4, 4), torch.ones(2, 4, 4)), dim=1),
            "every channel, 1 does not",
        ),
        (space.neighbour_correlation, noise(2, 3, 1, 4), "neighbours both ways"),
        (space.uniformity, torch.zeros(3, 2), "no direction"),
        (space.uniformity, torch.ones(1, 2), "N of 2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            figures(latents)


class Averages(nn.Module):
    """An autoencoder of the averages of cells, which goes along with everything that is done to an image."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def encode(self, pixel_values):
        class Output:
            latents = F.avg_pool2d(pixel_values, 4)

        return Output

    def decode(self, latents):
        class Output:
            sample = F.interpolate(latents, scale_factor=4)

        return Output


def batches_of(pixel_values, labels, size=5):
    rows = torch.arange(len(pixel_values)).split(size)
    return [
        {"pixel_values": pixel_values[part], "rows": part.tolist(), "labels": [labels[row] for row in part]}
        for part in rows
    ]


def test_averages_go_along_and_tell_bright_images_from_dark_ones():
    pixel_values, labels = images(41, 3, 16, 16), [row % 2 * 5 for row in range(41)]
    pixel_values = pixel_values / 2 + torch.tensor(labels).view(-1, 1, 1, 1) / 10
    figures = space.measure_latents(Codec(Averages()), batches_of(pixel_values, labels), 16)
    errors = figures["equivariance_error"]
    assert list(errors) == ["mirrored", "upside_down", "shifted", "halved"] and max(errors.values()) < 1e-12
    assert figures["probe_accuracy"] == 1 and 0.5 <= figures["probe_chance"] < 0.7
    alike = space.measure_latents(Codec(Averages()), batches_of(images(41, 3, 16, 16), labels), 16)
    assert alike["probe_accuracy"] < 0.9


def test_errors_of_equivariance_are_shares_of_the_variance():
    core, pixel_values = random_core(), images(7, 3, 16, 16)
    figures = space.measure_latents(Codec(core), batches_of(pixel_values, [0] * 7, size=3), 16)
    with torch.no_grad():

        def encode(pixel_values):
            return core.encode(pixel_values).mode()

        latents = encode(pixel_values)
        pairs = {
            "mirrored": (encode(pixel_values.flip(3)), latents.flip(3)),
            "upside_down": (encode(pixel_values.flip(2)), latents.flip(2)),
            "shifted": (encode(pixel_values[:, :, 4:, 4:]), latents[:, :, 1:, 1:]),
            "halved": (encode(F.interpolate(pixel_values, scale_factor=0.5, mode="area")), F.avg_pool2d(latents, 2)),
        }
    variance = latents.var((0, 2, 3), correction=0)
    for name, (found, expected) in pairs.items():
        error = ((found - expected).square().mean((0, 2, 3)) / variance).mean().item()
        assert figures["equivariance_error"][name] == pytest.approx(error, rel=1e-4) and error > 0.01
    assert "probe_accuracy" not in figures  # of one label


def test_the_probe_is_fitted_to_a_half():
    core, pixel_values = random_core(), images(30, 3, 24, 24)
    labels = [int(row) for row in pixel_values[:, 0, :8].mean((1, 2)) > 0]
    figures = space.measure_latents(Codec(core), batches_of(pixel_values, labels, size=7), 24)
    with torch.no_grad():
        features = F.adaptive_avg_pool2d(core.encode(pixel_values).mode(), 4).flatten(1)
    known = torch.tensor(labels)
    fit, test = torch.randperm(30, generator=torch.Generator().manual_seed(0)).split(15)
    assert figures["probe_accuracy"] == linear_probe(features[fit], known[fit], features[test], known[test])
    assert figures["probe_chance"] == known[test].bincount().max().item() / 15
    unlabelled = space.measure_latents(Codec(core), batches_of(pixel_values, [*labels[:-1], None]), 24)
    assert {name for name in figures if name not in unlabelled} == {"probe_accuracy", "probe_chance"}


def test_every_autoencoder_has_the_same_figures():
    pixel_values, labels = images(24, 3, 32, 32), [row % 2 for row in range(24)]
    found = {}
    for make in (random_core, tiny_kl, tiny_without_posterior, tiny_dc):
        torch.manual_seed(0)
        found[make.__name__] = space.measure_latents(Codec(make()), batches_of(pixel_values, labels), 32)
    (names,) = {tuple(figures) for figures in found.values()}
    assert {"equivariance_error", "probe_accuracy", "quantiles"} <= set(names)
    assert all(len(figures["equivariance_error"]) == 4 for figures in found.values())


def test_sizes_that_the_model_cannot_take_are_left_out_or_refused():
    pixel_values = images(3, 3, 12, 12)
    figures = space.measure_latents(Codec(random_core()), batches_of(pixel_values, [None] * 3), 12)
    assert list(figures["equivariance_error"]) == ["mirrored", "upside_down", "shifted"]  # 6 pixels are no cells of 4
    for size, message in ((14, "multiples of the patch size 4"), (4, "two cells or more")):
        with pytest.raises(ValueError, match=message):
            space.measure_latents(Codec(random_core()), [], size)
    with pytest.raises(ValueError, match="no images"):
        space.measure_latents(Codec(random_core()), [], 8)
