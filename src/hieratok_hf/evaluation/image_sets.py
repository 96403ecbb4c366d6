"""
Compare sets of images by features, as the evaluation suite of ADM does: Fréchet distances over pooled features (FID,
Heusel et al., 2017) and over features with places (sFID, Nash et al., 2021), the Inception Score (Salimans et al.,
2016), precision and recall (Kynkäänniemi et al., 2019); and exchange statistics of features.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.channel_statistics import add_sums
from ..utils.distributed import gather
from ..utils.images import from_uint8
from ..utils.npz import list_npz, read_npz, write_npz
from ..utils.numbers import whole_number
from .metrics import to_levels
from .vision_features import VisionFeatures

__all__ = [
    "FrechetDistance",
    "InceptionScore",
    "RowCollector",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "precision_recall",
    "read_statistics",
]

# Shape letters: B batch, N M images of two sets, F features, L labels of a classifier, H W pixels, h w a grid.

_SPATIAL_CHANNELS = 7
_NEIGHBOURS = 3
_SPLITS = 10
_SHUFFLE_SEED = 2020  # that of torch-fidelity
_ROWS_AT_A_TIME = 1000  # of a table of distances


class Statistics(NamedTuple):
    """Hold the mean `mu` `(F,)` and the covariance `sigma` `(F, F)` of features, both in float64 on the CPU."""

    mu: Tensor
    sigma: Tensor


def frechet_distance(first: Statistics, second: Statistics) -> float:
    r"""
    Compute the Fréchet distance between two Gaussians,
    \(|\mu_1 - \mu_2|^2 + \mathrm{tr}(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})\).

    Args:
        first, second (`Statistics`): Mean and covariance of equally many features.
    """
    values, vectors = torch.linalg.eigh(first.sigma)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Similar to the product of both, and symmetric.
    products = torch.linalg.eigvalsh(root @ second.sigma @ root)
    traces = first.sigma.trace() + second.sigma.trace() - 2 * products.clamp(min=0).sqrt().sum()
    # Rounding takes that of equal sets below zero.
    return max(0.0, float((first.mu - second.mu).square().sum() + traces))


def inception_score(logits: Tensor, splits: int = _SPLITS) -> tuple[float, float]:
    r"""
    Compute the Inception Score \(\exp E_x KL(p(y|x) \| p(y))\) as torch-fidelity does: of parts of the images, in an
    order that is shuffled and always the same.

    Args:
        logits (`torch.Tensor` of shape `(N, L)`): Logits of a classifier.
        splits (`int`, defaults to 10): Number of parts; no more than there are images.

    Returns:
        The mean and the standard deviation (of all parts, not of a sample of them) of the parts' scores.
    """
    count = len(logits)
    logits = logits[np.random.RandomState(_SHUFFLE_SEED).permutation(count)].double().log_softmax(1)
    scores = []
    for log_probabilities in logits.tensor_split([i * count // splits for i in range(1, splits)]):
        if len(log_probabilities):
            probabilities = log_probabilities.exp()
            divergence = probabilities * (log_probabilities - probabilities.mean(0).log())
            scores.append(divergence.sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(features: Tensor, targets: Tensor, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """
    Compute the share of images that lie among the targets, and of targets that lie among the images: within the
    distance from one of them to its nearest neighbour number `neighbours`.

    Args:
        features (`torch.Tensor` of shape `(N, F)`): Features of the images.
        targets (`torch.Tensor` of shape `(M, F)`): Features of the targets.
        neighbours (`int`, defaults to 3): Which of the nearest neighbours in the own set reaches farthest.

    Raises:
        ValueError: A set has no such neighbours.
    """
    if (least := min(len(features), len(targets))) <= neighbours:
        raise ValueError(f"Precision and recall need more than {neighbours} images in each set, got {least}.")
    # In float32, distances by products of matrices are off by as much as neighbours differ.
    first, second = features.double(), targets.double()

    def share_within(points: Tensor, others: Tensor) -> float:
        radii = [torch.cdist(x, others).kthvalue(neighbours + 1).values for x in others.split(_ROWS_AT_A_TIME)]
        limits = torch.cat(radii)
        hits = [(torch.cdist(x, others) <= limits).any(1) for x in points.split(_ROWS_AT_A_TIME)]
        return float(torch.cat(hits).double().mean())

    return share_within(first, second), share_within(second, first)


class RowCollector:
    """Collect tensors of images, batch by batch and over all processes, in the order of the images' numbers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self._rows: list[int] = []
        self._parts: list[dict[str, Tensor]] = []

    def add(self, rows: Sequence[int] | None, **tensors: Tensor) -> None:
        """
        Add tensors of `B` images by name.

        Args:
            rows (`Sequence[int]`, *optional*): Numbers of the images; the next of this process unless given.
            tensors (`torch.Tensor` of shape `(B, ...)`): Anything of the images.
        """
        self._parts.append({name: tensor.cpu() for name, tensor in tensors.items()})
        first, count = len(self._rows), len(next(iter(tensors.values())))
        self._rows += range(first, first + count) if rows is None else rows

    def collect(self) -> dict[str, Tensor]:
        """Join the tensors `(N, ...)` of all processes, each of which must call this; nothing where none has any."""
        rows, parts = zip(*gather((self._rows, self._parts)))
        order = torch.tensor([row for part in rows for row in part]).argsort(stable=True)
        joined = [part for process in parts for part in process]
        return {name: torch.cat([part[name] for part in joined])[order] for name in (joined[0] if joined else ())}


class InceptionScore:
    """
    Measure the Inception Score of images by a classifier, over all processes of torch.distributed.

    Args:
        classifier (`ImageClassifier`): The classifier.
    """

    def __init__(self, classifier: Any):
        self.classifier, self._logits = classifier, RowCollector()

    def reset(self) -> None:
        """Begin anew."""
        self._logits.reset()

    def update(self, pixel_values: Tensor, rows: Sequence[int] | None = None) -> None:
        """Add images as `pixel_values` `(B, 3, H, W)` in [-1, 1], and their numbers."""
        self.count(self.classifier(pixel_values), rows)

    def count(self, logits: Tensor, rows: Sequence[int] | None = None) -> None:
        """Add images by `logits` `(B, L)` of the classifier, and their numbers."""
        self._logits.add(rows, logits=logits.float())

    def compute(self) -> dict[str, float]:
        """
        Compute the score of the images of all processes, each of which must call this.

        Returns:
            The mean and the standard deviation of `inception_score`, as `"IS-MobileNetV2"` and `"IS_std-MobileNetV2"`
            of a classifier of that name.
        """
        return _name_score(self._logits.collect()["logits"], f"-{self.classifier.name}")


def _name_score(logits: Tensor, label: str) -> dict[str, float]:
    return dict(zip((f"IS{label}", f"IS_std{label}"), inception_score(logits)))


class FrechetDistance:
    """
    Measure the distance between the features of all images and of their targets, each set taken as one Gaussian
    (Heusel et al., 2017), in float64 and over all processes of torch.distributed.

    Args:
        features (`VisionFeatures`, *optional*): The model whose pooled features count; unless given the Inception
            network of the published figures, which torch-fidelity loads.
        size (`int`, *optional*): Side in pixels that images are resized to, `features.image_size` unless given. The
            Inception network always takes 299.
        same_targets (`bool`, defaults to `False`): Whether every round, from one `reset` to the next, has the same
            targets, so that their features are computed in the first alone.
        suite (`bool`, defaults to `False`): Whether `compute_all` gives more figures. The features of all images are
            then held in memory.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where to compute; it must know float64.

    Attributes:
        name (`str`): `"rFID"`, or for other features `"FD-"` and their name: such figures are no FID.
        size (`int`): Side in pixels that images are resized to.
        num_features (`int`): Features of an image; as many images or fewer have a covariance without full rank.
        network (`torch.nn.Module`): The network, from levels in uint8 to features.
        given (mapping of `Statistics`): Statistics that `fix_targets` was given.

    Raises:
        ImportError: torch-fidelity is not installed, for the Inception network.
        ValueError: `size` is not positive, nothing that the model takes, or was given for the Inception network; or
            the layers of the model have no places, for a `suite`.
    """

    def __init__(
        self,
        features: VisionFeatures | None = None,
        *,
        size: int | None = None,
        same_targets: bool = False,
        suite: bool = False,
        device: torch.device | str = "cpu",
    ):
        if size is not None and features is None:
            raise ValueError(f"`size` must be left out for the Inception network, got {size}.")
        size = size if size is None else whole_number("size", size, 1)
        self._label = "" if features is None else f"-{features.name}"
        self.name = "rFID" if features is None else f"FD-{features.name}"
        self.size = 299 if features is None else size or features.image_size
        self.same_targets, self.suite, self.device = same_targets, suite, torch.device(device)
        network = _Inception() if features is None else _VisionNetwork(features, self.size, suite)
        self.network = network.to(self.device)
        blank = torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8, device=self.device)
        try:
            self._sizes = {kind: found.shape[1] for kind, found in self.network(blank).items()}
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.name} takes no images of {self.size} x {self.size} pixels: {reason}") from error
        self.num_features: int = self._sizes["pooled"]
        self._sets = {"images": _FeatureSet(suite), "targets": _FeatureSet(suite)}
        self.given: Mapping[str, Statistics] = {}
        self._knows_targets = self._is_fixed = False

    def update(self, images: Tensor | None, targets: Tensor | None, rows: Sequence[int] | None = None) -> None:
        """
        Add images to both sets, or to one alone: the other is then `None`.

        Args:
            images, targets (`torch.Tensor` of shape `(B, 3, H, W)`, *optional*): Images in [-1, 1], clamped and
                rounded as by `psnr`; their numbers and sizes may differ.
            rows (`Sequence[int]`, *optional*): Numbers of the images, which put those of several processes in order.

        Raises:
            ValueError: As `psnr`.
        """
        given = {"images": images, "targets": targets}
        levels = {name: to_levels(name, tensor) for name, tensor in given.items() if tensor is not None}
        for name, values in levels.items():
            if name == "images" or not self._knows_targets:
                self._sets[name].add(self.network(values.byte().to(self.device)), rows)

    def fix_targets(self, statistics: Mapping[str, Statistics] | None = None) -> None:
        """
        Compare with the targets that were added so far from now on; targets of later updates are passed over.

        Args:
            statistics (mapping of `Statistics`, *optional*): Statistics of `"pooled"` features and, for the distance
                over features with places, of `"spatial"` ones, to take instead of those of the targets.

        Raises:
            ValueError: The statistics are of another number of features.
        """
        statistics = statistics or {}
        for kind in self._sizes.keys() & statistics.keys():
            if (found := len(statistics[kind].mu)) != self._sizes[kind]:
                raise ValueError(f"`statistics` must be of {self._sizes[kind]} {kind} features, got {found}.")
        self.given, self._knows_targets, self._is_fixed = statistics, True, True

    def target_statistics(self) -> dict[str, Statistics]:
        """Give the statistics of the targets of all processes, each of which must call this, by kind of feature."""
        return dict(self.given or self._sets["targets"].statistics())

    def save_statistics(self, path: str | os.PathLike[str], statistics: Mapping[str, Statistics]) -> None:
        """
        Write statistics to an `.npz` file, as pytorch-fid and the suite of ADM exchange them: `mu` and `sigma` in
        float64, `mu_s` and `sigma_s` of features with places; and the name of the network as `network`.

        Raises:
            OSError: The file cannot be written.
        """
        arrays = {"network": np.array(self._network_name())}
        for kind, found in statistics.items():
            suffix = "_s" if kind == "spatial" else ""
            arrays |= {f"mu{suffix}": found.mu.numpy(), f"sigma{suffix}": found.sigma.numpy()}
        write_npz(path, **arrays)

    def load_statistics(self, path: str | os.PathLike[str]) -> dict[str, Statistics]:
        """Read statistics as `read_statistics` does; `ValueError` also where they are of another network."""
        return read_statistics(path, self._network_name())

    def compute(self) -> float:
        """
        Compute the distance over the images of all processes, each of which must call this.

        Raises:
            ValueError: There are fewer than two images or targets; or with `same_targets`, another round had more or
                fewer targets than this one.
        """
        return self._distances("pooled")["pooled"]

    def compute_all(self) -> dict[str, float]:
        """
        Compute all figures over the images of all processes, each of which must call this.

        Returns:
            The distance under `name`. Of a suite also the distance over features with places, `"sFID"`; the Inception
            Score, `"IS"` and `"IS_std"`; `"precision"` and `"recall"`. With features of another model the name is
            `"sFD-MobileNetV2"`, `"precision-MobileNetV2"` and so on, and there is no score. What given statistics say
            nothing about is left out.

        Raises:
            ValueError: As `compute`, or there are too few images for precision and recall.
        """
        if not self.suite:
            return {self.name: self.compute()}
        distances = self._distances("pooled", "spatial")
        figures = {self.name: distances["pooled"]}
        if "spatial" in distances:
            figures[f"s{'FD' if self._label else 'FID'}{self._label}"] = distances["spatial"]
        images, targets = (self._sets[name].kept.collect() for name in ("images", "targets"))
        if "logits" in images:
            figures |= _name_score(images["logits"], self._label)
        if targets:
            shares = precision_recall(images["pooled"].to(self.device), targets["pooled"].to(self.device))
            figures |= dict(zip((f"precision{self._label}", f"recall{self._label}"), shares))
        return figures

    def reset(self) -> None:
        """Begin a new round."""
        self._knows_targets = self._is_fixed or (self.same_targets and self._sets["targets"].count > 0)
        self._sets["images"].reset()
        if not self._knows_targets:
            self._sets["targets"].reset()

    def _distances(self, *kinds: str) -> dict[str, float]:
        counts = {name: sum(gather(found.count)) for name, found in self._sets.items()}
        if self.same_targets and not self._is_fixed and len(set(counts.values())) > 1:
            told = " and ".join(map(str, counts.values()))
            raise ValueError(f"`same_targets` needs the same targets in every round, got {told}.")
        if self.given:
            counts.pop("targets")
        if min(counts.values()) < 2:
            raise ValueError(f"A Fréchet distance needs two images and targets or more, got {min(counts.values())}.")
        images, targets = self._sets["images"].statistics(), self.target_statistics()
        return {kind: frechet_distance(images[kind], targets[kind]) for kind in kinds if kind in targets}

    def _network_name(self) -> str:
        return f"{self._label[1:]} at {self.size} pixels" if self._label else "Inception"


def read_statistics(path: str | os.PathLike[str], network: str | None = None) -> dict[str, Statistics]:
    """
    Read the statistics of features that an `.npz` file holds: `mu` and `sigma`, and `mu_s` and `sigma_s` where it has
    them, as pytorch-fid and the suite of ADM write them.

    Args:
        path (`str` or `os.PathLike`): The file.
        network (`str`, *optional*): The network that a file must be of, if it names one as `network`.

    Returns:
        Statistics by the kind of feature, `"pooled"` and `"spatial"`; none where the file has no `mu`.

    Raises:
        ValueError: There is no such file, or it holds no means and covariances, or those of another network.
    """
    named = list_npz(path)
    if "mu" not in named:
        return {}
    arrays = read_npz(path, ("network", "mu", "sigma", "mu_s", "sigma_s"))
    found = str(arrays.get("network", network))
    if network is not None and found != network:
        raise ValueError(f"{os.fspath(path)!r} must hold statistics of {network}, got those of {found}.")
    statistics = {}
    for kind, suffix in (("pooled", ""), ("spatial", "_s")):
        if f"mu{suffix}" in arrays:
            mu, sigma = (np.asarray(arrays.get(f"{name}{suffix}", 0)) for name in ("mu", "sigma"))
            for name, array in ((f"mu{suffix}", mu), (f"sigma{suffix}", sigma)):
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    expected = f"finite numbers as `{name}`, got NaN or infinity"
                    raise ValueError(f"{os.fspath(path)!r} must hold {expected}.")
            if not mu.dtype.kind == sigma.dtype.kind == "f" or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                shapes = f"{mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}"
                expected = f"floating point as `mu{suffix}` (F,) and `sigma{suffix}` (F, F)"
                raise ValueError(f"{os.fspath(path)!r} must hold {expected}, got {shapes}.")
            statistics[kind] = Statistics(*(torch.from_numpy(x.astype(np.float64)) for x in (mu, sigma)))
            if not _is_covariance(statistics[kind].sigma):
                raise ValueError(f"{os.fspath(path)!r} must hold a covariance as `sigma{suffix}`, which it is not.")
    return statistics


def _is_covariance(sigma: Tensor) -> bool:
    """Whether a matrix is symmetric and, but for rounding of float32, positive semidefinite."""
    if not torch.allclose(sigma, sigma.T, rtol=1e-4, atol=1e-6):
        return False
    values = torch.linalg.eigvalsh(sigma)
    return bool(values[0] >= -1e-4 * values[-1].clamp(min=0) - 1e-6)


class _FeatureSet:
    """Sum up the features of a set of images for its statistics, and keep them in a suite."""

    def __init__(self, keep: bool):
        self._keep, self.kept = keep, RowCollector()
        self.reset()

    def reset(self) -> None:
        self.count, self._sums = 0, dict[str, Tensor]()
        self.kept.reset()

    def add(self, found: dict[str, Tensor], rows: Sequence[int] | None) -> None:
        self.count += len(found["pooled"])
        for kind in {"pooled", "spatial"} & found.keys():
            values = found[kind].double()
            add_sums(self._sums, {kind: values.sum(0), f"{kind}_products": values.T @ values})
        if self._keep:
            self.kept.add(rows, **{name: found[name] for name in ("pooled", "logits") if name in found})

    def statistics(self) -> dict[str, Statistics]:
        """Compute mean and covariance of the images of all processes."""
        sums: dict[str, Tensor] = {}
        for part in gather({"count": torch.tensor(self.count), **{k: x.cpu() for k, x in self._sums.items()}}):
            add_sums(sums, part)
        statistics: dict[str, Statistics] = {}
        for kind in ("pooled", "spatial"):
            if kind in sums:
                mean = sums[kind] / sums["count"]
                products = sums[f"{kind}_products"] - sums["count"] * torch.outer(mean, mean)
                statistics[kind] = Statistics(mean, products / (sums["count"] - 1))
        return statistics


class _VisionNetwork(nn.Module):
    """Turn levels `(B, 3, H, W)` in uint8 into `pooled` features `(B, F)` and, for a suite, `spatial` ones."""

    def __init__(self, features: VisionFeatures, size: int, spatial: bool):
        super().__init__()
        self.features, self.size, self.spatial = features, size, spatial

    @torch.no_grad()
    def forward(self, levels: Tensor) -> dict[str, Tensor]:
        pooled, maps = self.features(from_uint8(levels), self.size)
        if not self.spatial:
            return {"pooled": pooled}
        # Two thirds of the way, where the Inception network has its own.
        chosen = self.features.to_grid(maps[2 * (len(maps) - 1) // 3], (self.size, self.size))
        return {"pooled": pooled, "spatial": _flatten_places(chosen)}


class _Inception(nn.Module):
    """
    Turn levels `(B, 3, H, W)` in uint8 into `pooled` features, `spatial` ones and `logits` of the Inception network of
    2015, whose images are resized as TensorFlow 1 does.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            what = f"it needs torch-fidelity (pip install torch-fidelity): {error}"
            raise ImportError(what) from error
        # The logits of the suite's score are those without bias.
        self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
        # ADM's `mixed_6/conv`.
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, given: Any, result: Tensor) -> None:
        self._spatial = _flatten_places(result)

    @torch.no_grad()
    def forward(self, levels: Tensor) -> dict[str, Tensor]:
        pooled, logits = self.network(levels)
        return {"pooled": pooled, "spatial": self._spatial, "logits": logits}


def _flatten_places(maps: Tensor) -> Tensor:
    """Flatten the first channels of `maps` `(B, C, h, w)` place by place, which is TensorFlow's order."""
    return maps[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
