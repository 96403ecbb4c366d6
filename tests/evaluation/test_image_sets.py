"""Tests of `image_sets`: figures against NumPy, torchmetrics and torch-fidelity; statistics; several processes."""

import numpy as np
import pytest
import torch
from helpers import images, noise, tiny_vision_model
from transformers import ViTConfig, ViTModel

from hieratok_hf.evaluation import image_sets
from hieratok_hf.evaluation.image_sets import (
    FrechetDistance,
    InceptionScore,
    RowCollector,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
    read_statistics,
)
from hieratok_hf.evaluation.vision_features import VisionFeatures
from hieratok_hf.utils.images import from_uint8, to_uint8

GOOD = torch.zeros(1, 3, 16, 16)


def random_features(count, features=16, seed=0, shift=0.0):
    """Correlated features, so that a covariance is not one of noise."""
    mixing = noise(features, features, seed=100)
    return noise(count, features, seed=seed) @ mixing + shift


def of_levels(count, side, seed=0):
    """Images that 8 bits can hold."""
    return from_uint8(to_uint8(images(count, 3, side, side, seed=seed)))


def statistics_of(features):
    values = features.double().numpy()
    return Statistics(*(torch.from_numpy(x) for x in (values.mean(0), np.cov(values, rowvar=False))))


def score_by_hand(logits, splits):
    """The score of Salimans et al. in NumPy, of images in the order that torch-fidelity shuffles them to."""
    values = logits.double().numpy()[np.random.RandomState(2020).permutation(len(logits))]
    probabilities = np.exp(values - values.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    scores = []
    for i in range(splits):
        part = probabilities[i * len(values) // splits : (i + 1) * len(values) // splits]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


def shares_by_hand(features, targets, k):
    """Precision and recall of Kynkäänniemi et al. in NumPy, point by point."""

    def share(points, others):
        distances = np.linalg.norm(others[:, None] - others, axis=2)
        radii = np.sort(distances, axis=1)[:, k]  # 0 is the point itself
        return np.mean([(np.linalg.norm(others - point, axis=1) <= radii).any() for point in points])

    first, second = features.double().numpy(), targets.double().numpy()
    return share(first, second), share(second, first)


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_the_inception_score_is_that_of_its_definition(splits):
    logits = 3 * noise(101, 20)
    assert inception_score(logits, splits) == pytest.approx(score_by_hand(logits, splits), abs=1e-4)
    assert inception_score(logits)[0] > 1.5


def test_known_inception_scores():
    sure = 100 * torch.eye(5).repeat(40, 1)
    assert inception_score(sure, 1) == (pytest.approx(5), 0)
    assert inception_score(torch.zeros(30, 5)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert inception_score(noise(4, 5)) == (pytest.approx(1), pytest.approx(0, abs=1e-12))  # an image a part


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_their_definition(k, monkeypatch):
    features, targets = random_features(90), random_features(70, seed=1, shift=1.5)
    expected = shares_by_hand(features, targets, k)
    assert all(0.1 < share < 0.95 for share in expected) and expected[0] != expected[1]
    for rows in (1000, 7):
        monkeypatch.setattr(image_sets, "_ROWS_AT_A_TIME", rows)
        assert precision_recall(features, targets, k) == pytest.approx(expected, abs=1e-4)


def test_known_precision_and_recall():
    features = random_features(20)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 1000) == (0, 0)
    # Images of one kind among targets of two.
    assert precision_recall(features, torch.cat([features, features + 1000])) == (1, 0.5)
    for sets in ((features[:3], features), (features, features[:3])):
        with pytest.raises(ValueError, match="more than 3 images"):
            precision_recall(*sets)


def test_the_frechet_distance_is_that_of_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    first, second = random_features(60), random_features(50, seed=1, shift=0.5)
    identity = torch.nn.Identity()
    identity.num_features = 16
    theirs = fid.FrechetInceptionDistance(identity)
    theirs.update(first.double(), real=False)
    theirs.update(second.double(), real=True)
    found = frechet_distance(statistics_of(first), statistics_of(second))
    assert found > 1 and found == pytest.approx(float(theirs.compute()), rel=1e-6)
    # Fewer images than features: without full rank.
    few = [statistics_of(x[:5]) for x in (first, second)]
    assert frechet_distance(*few) == pytest.approx(frechet_distance(*few[::-1]), rel=1e-6)
    assert frechet_distance(few[0], few[0]) < 1e-4


def test_scores_and_shares_are_those_of_torch_fidelity():
    isc = pytest.importorskip("torch_fidelity.metric_isc", exc_type=ImportError)
    prc = pytest.importorskip("torch_fidelity.metric_prc", exc_type=ImportError)
    fid = pytest.importorskip("torch_fidelity.metric_fid", exc_type=ImportError)
    logits = 3 * noise(101, 20)
    theirs = isc.isc_features_to_metric(logits)
    assert inception_score(logits) == pytest.approx(tuple(theirs.values()), abs=1e-4)
    features, targets = random_features(90), random_features(70, seed=1, shift=1.5)
    theirs = prc.calculate_precision_recall_full(features, targets)
    assert precision_recall(features, targets) == pytest.approx(theirs, abs=1e-4)
    sets = [fid.fid_features_to_statistics(x.double()) for x in (features, targets)]
    (theirs,) = fid.fid_statistics_to_metric(*sets, verbose=False).values()
    assert frechet_distance(statistics_of(features), statistics_of(targets)) == pytest.approx(theirs, rel=1e-6)


def inception_of_random_weights(monkeypatch):
    """The real network with weights that nobody trained."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", exc_type=ImportError)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    torch.manual_seed(0)
    return FrechetDistance(suite=True)


def test_the_suite_of_inception(monkeypatch, tmp_path):
    distance = inception_of_random_weights(monkeypatch)
    assert (distance.name, distance.size, distance.num_features) == ("rFID", 299, 2048)
    pixel_values, targets = images(5, 3, 20, 20), images(4, 3, 20, 20, seed=1)
    maps = []
    distance.network.network.Mixed_6d.register_forward_hook(lambda module, given, result: maps.append(result[:, :7]))
    distance.update(pixel_values, targets)
    figures = distance.compute_all()
    assert list(figures) == ["rFID", "sFID", "IS", "IS_std", "precision", "recall"]
    assert all(np.isfinite(list(figures.values())))
    # TensorFlow has the channels last, and a block begins with what its first branch makes.
    first, second = (statistics_of(x.permute(0, 2, 3, 1).flatten(1)) for x in maps)
    assert first.mu.shape == (7 * 17 * 17,)
    assert figures["sFID"] == pytest.approx(frechet_distance(first, second), rel=1e-4, abs=1e-9)
    distance.save_statistics(tmp_path / "a.npz", distance.target_statistics())
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert {name: file[name].shape for name in file} == {
            "network": (),
            "mu": (2048,),
            "sigma": (2048, 2048),
            "mu_s": (2023,),
            "sigma_s": (2023, 2023),
        }
        np.testing.assert_allclose(file["mu_s"], second.mu, rtol=1e-5, atol=1e-7)


def small_features(seed=0):
    """A real vision model whose features are so few that some tens of images have a covariance of full rank."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=16, patch_size=4, initializer_range=0.5)
    return VisionFeatures(ViTModel(config), [0.5] * 3, [0.5] * 3)


def frechet_by_hand(features, images, targets):
    sqrtm = pytest.importorskip("scipy.linalg", reason="its matrix root is the independent computation").sqrtm
    with torch.no_grad():
        sets = [features(x, 16)[0].double().numpy() for x in (images, targets)]
    (mean_a, mean_b), (a, b) = [x.mean(0) for x in sets], [np.cov(x, rowvar=False) for x in sets]
    assert np.linalg.matrix_rank(a) == np.linalg.matrix_rank(b) == 8
    return ((mean_a - mean_b) ** 2).sum() + np.trace(a + b - 2 * sqrtm(a @ b).real)


def test_the_frechet_distance_agrees_with_scipys_matrix_root():
    targets = of_levels(48, 20)
    images = of_levels(31, 24, seed=2)  # of another number and size
    distance = FrechetDistance(small_features())
    assert (distance.name, distance.size, distance.num_features) == ("FD-ViT", 16, 8)
    for part in targets.split(20):
        distance.update(None, part)
    for part in images.split(9):
        distance.update(part, None)
    expected = frechet_by_hand(small_features(), images, targets)
    assert expected > 0.01
    assert distance.compute() == pytest.approx(expected, rel=1e-3)
    distance.reset()
    distance.update(targets, targets)
    assert 0 <= distance.compute() < 1e-6 * expected


def test_features_of_targets_that_stay_are_computed_once():
    features, seen = small_features(), []
    targets = of_levels(12, 16)
    kept = FrechetDistance(features, same_targets=True)
    features.register_forward_hook(lambda module, given, result: seen.append(len(given[0])))
    for seed, asked in ((1, [12, 12]), (2, [12])):
        images = of_levels(12, 16, seed=seed)
        once = FrechetDistance(small_features())
        once.update(images, targets)
        kept.reset()
        seen.clear()
        kept.update(images, targets)
        assert seen == asked and kept.compute() == pytest.approx(once.compute(), rel=1e-9)
    kept.reset()
    kept.update(images[:8], targets[:8])
    with pytest.raises(ValueError, match="`same_targets`"):
        kept.compute()


def test_a_frechet_distance_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="`size`"):
        FrechetDistance(size=224)
    with pytest.raises(ValueError, match="`size`"):
        FrechetDistance(small_features(), size=0)
    distance = FrechetDistance(small_features())
    with pytest.raises(ValueError, match="`targets`"):
        distance.update(GOOD, GOOD + 200)
    distance.update(GOOD, GOOD)
    with pytest.raises(ValueError, match="two images and targets or more, got 1"):
        distance.compute()


def suite_by_hand(features, pixel_values, targets, size):
    with torch.no_grad():
        sets = [features(x, size) for x in (pixel_values, targets)]
        pooled = [found for found, _ in sets]
        places = [features.to_grid(maps[2 * (len(maps) - 1) // 3], (size, size)) for _, maps in sets]
    spatial = [statistics_of(x[:, :7].permute(0, 2, 3, 1).flatten(1)) for x in places]
    name = features.name
    figures = {f"FD-{name}": frechet_distance(*map(statistics_of, pooled))}
    figures[f"sFD-{name}"] = frechet_distance(*spatial)
    return figures | dict(zip((f"precision-{name}", f"recall-{name}"), shares_by_hand(*pooled, 3)))


@pytest.mark.parametrize("make", [small_features, lambda: VisionFeatures(tiny_vision_model(), [0.5] * 3, [0.5] * 3)])
def test_the_suite_is_named_after_any_vision_model(make):
    size = 16 if make is small_features else 64
    pixel_values, targets = of_levels(30, size), from_uint8(to_uint8(0.5 * images(25, 3, size, size, seed=1)))
    distance = FrechetDistance(make(), size=size, suite=True)
    for part in pixel_values.split(8):
        distance.update(part, None)
    distance.update(None, targets)
    found, expected = distance.compute_all(), suite_by_hand(make(), pixel_values, targets, size)
    assert list(found) == list(expected) and found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert found[distance.name] == distance.compute()
    distance.reset()
    distance.update(targets, targets)
    equal = distance.compute_all()
    assert equal[f"precision-{make().name}"] == equal[f"recall-{make().name}"] == 1


def test_statistics_go_out_and_come_in_again(tmp_path):
    pixel_values, targets, path = of_levels(30, 16), of_levels(25, 16, seed=1), tmp_path / "statistics.npz"
    distance = FrechetDistance(small_features(), suite=True)
    distance.update(pixel_values, targets)
    expected, statistics = distance.compute_all(), distance.target_statistics()
    distance.save_statistics(path, statistics)
    written = path.read_bytes()
    distance.save_statistics(path, statistics)
    assert path.read_bytes() == written
    found = distance.load_statistics(path)
    assert found.keys() == {"pooled", "spatial"}
    for kind, (mu, sigma) in found.items():
        assert torch.equal(mu, statistics[kind].mu) and torch.equal(sigma, statistics[kind].sigma)

    other = FrechetDistance(small_features(), suite=True)
    other.fix_targets(found)
    for _ in range(2):  # they stay
        other.update(pixel_values, GOOD)
        without = other.compute_all()
        assert without == {name: expected[name] for name in ("FD-ViT", "sFD-ViT")}
        other.reset()
    with pytest.raises(ValueError, match=r"statistics of Inception, got those of ViT at 16 pixels"):
        read_statistics(path, "Inception")
    # As pytorch-fid has them, and with nothing known of the network.
    np.savez(tmp_path / "plain.npz", mu=statistics["pooled"].mu.float(), sigma=statistics["pooled"].sigma.float())
    plain = distance.load_statistics(tmp_path / "plain.npz")
    assert list(plain) == ["pooled"] and plain["pooled"].mu.dtype == torch.float64
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="`statistics` must be of 8 pooled features, got 3"):
        distance.fix_targets(read_statistics(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match=r"`statistics` must be of .* spatial features, got 3"):
        distance.fix_targets({**found, "spatial": read_statistics(tmp_path / "other.npz")["pooled"]})


BAD = {
    "shape": {"mu": np.zeros(3), "sigma": np.zeros((3, 2))},
    "no covariance": {"mu": np.zeros(3)},
    "negative": {"mu": np.zeros(2), "sigma": -np.eye(2)},
    "no symmetry": {"mu": np.zeros(2), "sigma": np.triu(np.ones((2, 2)))},
    "integers": {"mu": np.zeros(2, int), "sigma": np.zeros((2, 2), int)},
    "pickles": {"mu": np.array([print]), "sigma": np.zeros((1, 1))},
}


@pytest.mark.parametrize("arrays", BAD.values(), ids=BAD)
def test_files_that_are_no_statistics_are_refused(arrays, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz' (must hold (floating point|a covariance)|cannot be read)"):
        read_statistics(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["mu", "sigma", "mu_s", "sigma_s"])
def test_the_array_that_is_not_finite_is_named(name, tmp_path):
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    arrays[name][-1] = np.nan
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz' must hold finite numbers as `{name}`"):
        read_statistics(tmp_path / "a.npz")


def test_targets_that_were_shown_stay_fixed():
    targets = of_levels(25, 16, seed=1)
    distance = FrechetDistance(small_features(), same_targets=True, suite=True)
    distance.update(None, targets)
    distance.fix_targets()
    for seed in (2, 3):
        distance.reset()
        pixel_values = of_levels(12, 16, seed=seed)
        distance.update(pixel_values, GOOD)
        once = FrechetDistance(small_features(), suite=True)
        once.update(pixel_values, targets)
        assert distance.compute_all() == once.compute_all()


def test_a_collector_puts_images_in_order():
    collector = RowCollector()
    assert collector.collect() == {}
    collector.add([4, 1], a=torch.tensor([4, 1]), b=torch.tensor([[4.0], [1.0]]))
    collector.add([0, 7], a=torch.tensor([0, 7]), b=torch.tensor([[0.0], [7.0]]))
    found = collector.collect()
    assert found["a"].tolist() == [0, 1, 4, 7] and found["b"].flatten().tolist() == [0, 1, 4, 7]
    collector.reset()
    for _ in range(2):
        collector.add(None, a=torch.zeros(2))
    assert len(collector.collect()["a"]) == 4


def test_a_score_by_a_classifier_does_not_depend_on_the_order():
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64, 6)).requires_grad_(False)
    classifier.name = "Linear"
    score, pixel_values = InceptionScore(classifier), 5 * images(40, 3, 8, 8)
    score.update(pixel_values)
    expected = score.compute()
    assert list(expected) == ["IS-Linear", "IS_std-Linear"] and expected["IS-Linear"] > 1.05
    score.reset()
    for rows in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(7):
        score.update(pixel_values[rows], rows.tolist())
    assert score.compute() == pytest.approx(expected, rel=1e-5)
