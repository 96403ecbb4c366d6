"""Tests of `linear_probe`: what is linear is found, noise is not, ridge regression by another way, and refusals."""

import numpy as np
import pytest
import torch
from helpers import images, noise, random_core

from hieratok_hf.evaluation.linear_probe import _PENALTIES, linear_probe, pool_features
from hieratok_hf.models.autoencoder_adapter import Codec


def clusters(count, features=12, classes=3, spread=0.3, seed=0):
    """Noise about one centre a class, the classes' numbers neither from zero nor in a row."""
    labels = torch.arange(count) % classes
    centres = noise(classes, features, seed=99)
    return centres[labels] + spread * noise(count, features, seed=seed), labels * 7 + 3


def test_separate_clusters_are_told_apart_and_shuffled_labels_are_not():
    fitted, tested = clusters(120), clusters(300, seed=1)
    assert linear_probe(*fitted, *tested) == 1.0
    shuffled = fitted[1][torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    assert linear_probe(fitted[0], shuffled, *tested) < 0.7


def test_it_is_ridge_regression_with_the_penalty_that_does_best_on_every_tenth_row():
    (fitted, labels), (tested, test_labels) = clusters(90, spread=2), clusters(200, spread=2, seed=1)

    def ridge(rows, penalty, unseen):
        """By least squares on rows that the penalty appends."""
        x = fitted[rows].double().numpy()
        mean, std = x.mean(0), x.std(0, ddof=1)
        x, y = (x - mean) / std, np.eye(3)[(labels[rows].numpy() - 3) // 7]
        x_more = np.vstack([x, np.eye(x.shape[1]) * np.sqrt(penalty * len(x))])
        y_more = np.vstack([y - y.mean(0), np.zeros((x.shape[1], 3))])
        weight = np.linalg.lstsq(x_more, y_more, rcond=None)[0]
        scores = (unseen.double().numpy() - mean) / std @ weight + y.mean(0)
        return torch.from_numpy(scores.argmax(1)) * 7 + 3

    held_out = torch.arange(90) % 10 == 9
    right = [(ridge(~held_out, p, fitted[held_out]) == labels[held_out]).sum().item() for p in _PENALTIES]
    best = _PENALTIES[right.index(max(right))]
    expected = (ridge(torch.ones(90, dtype=bool), best, tested) == test_labels).double().mean().item()
    assert 0.4 < expected < 1
    assert linear_probe(fitted, labels, tested, test_labels) == pytest.approx(expected, abs=1e-12)


def test_scale_shift_and_constant_features_change_nothing():
    (fitted, labels), (tested, test_labels) = clusters(90, spread=2), clusters(200, spread=2, seed=1)
    plain = linear_probe(fitted, labels, tested, test_labels)
    fitted, tested = (
        torch.cat([x * 10 ** noise(12, seed=5) + 3, torch.full((len(x), 1), 2.5)], 1) for x in (fitted, tested)
    )
    assert linear_probe(fitted, labels, tested, test_labels) == pytest.approx(plain, abs=0.011)


def test_labels_that_were_not_fitted_count_as_missed():
    fitted, (tested, labels) = clusters(60), clusters(30, seed=1)
    labels[:15] = 1000
    assert linear_probe(*fitted, tested, labels) == 0.5


def test_too_little_to_fit_is_refused():
    features, labels = clusters(9)
    with pytest.raises(ValueError, match="ten images of two classes, got 9 of 3"):
        linear_probe(features, labels, features, labels)
    with pytest.raises(ValueError, match="ten images of two classes, got 12 of 1"):
        linear_probe(clusters(12)[0], torch.zeros(12), features, labels)


def test_pooled_features_are_means_over_the_tokens_in_the_order_of_the_rows():
    core, pixel_values = random_core(), images(5, 3, 16, 24)
    batches = [
        {"pixel_values": pixel_values[part], "rows": list(part), "labels": [row * 2 for row in part]}
        for part in ([3, 1], [0, 4, 2])
    ]
    features, labels = pool_features(Codec(core), batches)
    assert labels.tolist() == [0, 2, 4, 6, 8]
    with torch.no_grad():
        torch.testing.assert_close(features, core.encode_moments(pixel_values)[1].mean(1))


def test_pooled_features_need_images_labels_and_hieratok():
    batch = {"pixel_values": images(2, 3, 16, 16), "rows": [4, 5], "labels": [1, None]}
    with pytest.raises(ValueError, match="needs labels: row 5 "):
        pool_features(Codec(random_core()), [batch])
    with pytest.raises(ValueError, match="no images"):
        pool_features(Codec(random_core()), [])
    with pytest.raises(ValueError, match="features of a HieraTok encoder, got Linear"):
        pool_features(Codec(torch.nn.Linear(2, 2)), [batch])
