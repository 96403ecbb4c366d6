"""Evaluate class-conditional generators: numbered samples, and how often a classifier knows their classes."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from ..data.training_batches import step_generator
from ..pipelines.class_names import plain_name
from ..pipelines.pipeline_hieratok_dit import HieraTokDiTPipeline
from ..utils.distributed import gather
from ..utils.images import from_uint8
from ..utils.numbers import whole_number
from .vision_features import FrozenVisionModel

__all__ = ["ClassAccuracy", "GeneratedBatches", "ImageClassifier", "find_classes", "number_images", "image_size"]

# Shape letters: B images of a batch, H W pixels, S side of a generated image, L labels of a classifier.

_SHOWN = 5


def image_size(pipe: HieraTokDiTPipeline) -> int:
    """Return the side `S` in pixels of the images that a pipeline makes."""
    return pipe.transformer.config.sample_size * pipe.image_processor.config.vae_scale_factor


def number_images(pipe: HieraTokDiTPipeline, rows: Sequence[int], seed: int, **settings: Any) -> Tensor:
    """
    Generate images by number: image `i` is of class `i % num_classes`, and its noise is a function of `seed` and `i`,
    so that it does not depend on the images beside it.

    Args:
        pipe (`HieraTokDiTPipeline`): The pipeline.
        rows (`Sequence[int]`): Numbers of the images.
        seed (`int`): Seed of all noise.
        settings: Further arguments of the pipeline's call.

    Returns:
        `torch.Tensor` of shape `(B, 3, S, S)`: Levels in uint8, on the CPU.

    Raises:
        ValueError: The pipeline refuses an argument, or an image is not finite.
    """
    rows = [whole_number("rows", row, 0) for row in rows]
    labels = [row % pipe.num_classes for row in rows]
    generators = [step_generator(seed, row) for row in rows]
    images = pipe(labels, generator=generators, output_type="pt", **settings).images.float().cpu()
    if not images.isfinite().all():
        raise ValueError(f"the images of {pipe.transformer.dtype} weights are not finite")
    return (255 * images).round().byte()


class GeneratedBatches:
    """
    Iterate over the images of `number_images` in batches like those of `EvaluationBatches`, again and again.

    A batch is a dictionary of `pixel_values` `(B, 3, S, S)`, 8-bit levels in [-1, 1], and the lists `rows` and
    `labels`.

    Args:
        pipe (`HieraTokDiTPipeline`): The pipeline.
        rows (`Sequence[int]`): Numbers of the images.
        seed (`int`, defaults to 0): Seed of all noise.
        batch_size (`int`, defaults to 16): Most images in a batch.
        settings: Further arguments of the pipeline's call.

    Attributes:
        seconds (`float`): Time that the pipeline took in the last round.
    """

    def __init__(
        self, pipe: HieraTokDiTPipeline, rows: Sequence[int], *, seed: int = 0, batch_size: int = 16, **settings: Any
    ):
        self.pipe, self.rows, self.seed, self.batch_size = pipe, rows, seed, batch_size
        self.settings, self.seconds = settings, 0.0

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.seconds = 0.0
        for first in range(0, len(self.rows), self.batch_size):
            rows = list(self.rows[first : first + self.batch_size])
            start = time.perf_counter()
            levels = number_images(self.pipe, rows, self.seed, **self.settings)
            self.seconds += time.perf_counter() - start
            labels = [row % self.pipe.num_classes for row in rows]
            yield {"pixel_values": from_uint8(levels), "rows": rows, "labels": labels}


class ImageClassifier(FrozenVisionModel):
    """
    Classify images by a frozen classifier of transformers.

    Args:
        model (`PreTrainedModel`): Model from `pixel_values` to `logits`; its weights are frozen in place.
        mean, std (`list[float]`): Statistics of each colour in [0, 1], as the model was trained with.

    Attributes:
        names (`dict[int, str]`): Names of its labels.
    """

    _auto_class = AutoModelForImageClassification

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__(model, mean, std)
        self.names: dict[int, str] = {int(key): name for key, name in self.model.config.id2label.items()}

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """
        Compute logits `(B, L)` of `pixel_values` `(B, 3, H, W)` in [-1, 1], which are brought to `image_size`
        bicubically with antialiasing.
        """
        pixel_values, size = pixel_values.float(), (self.image_size, self.image_size)
        if pixel_values.shape[-2:] != size:
            pixel_values = F.interpolate(pixel_values, size, mode="bicubic", antialias=True).clamp(-1, 1)
        return self.model(self.normalise(pixel_values)).logits


def find_classes(id2label: Mapping[int, str], num_classes: int, classifier_names: Mapping[int, str]) -> list[int]:
    """
    Find the label of a classifier for each class by name: upper and lower case, spaces and underscores are the same,
    and of synonyms, which are divided by commas, one is enough. A class without a name is called by its number.

    Raises:
        ValueError: Classes have not one label each; the message names them.
    """
    whole, parts = defaultdict(set), defaultdict(set)
    for label, name in classifier_names.items():
        whole[plain_name(name)].add(label)
        for part in _synonyms(name):
            parts[part].add(label)
    names = [id2label.get(key, str(key)) for key in range(num_classes)]
    # Of labels that share a synonym, that with the very same name is meant.
    found = [whole[plain_name(name)] or set().union(*(parts[part] for part in _synonyms(name))) for name in names]
    if missing := [name for name, labels in zip(names, found) if not labels]:
        raise ValueError(f"the classifier has no labels of the names {_some(missing)}")
    if unclear := [f"{name} ({_some(sorted(x))})" for name, x in zip(names, found) if len(x) > 1]:
        raise ValueError(f"the classifier has more than one label of the names {_some(unclear)}")
    labels = [label for (label,) in found]
    if shared := [name for name, label in zip(names, labels) if labels.count(label) > 1]:
        raise ValueError(f"the classifier has one label for several classes: {_some(shared)}")
    return labels


class ClassAccuracy:
    """
    Count how often a classifier finds the class that an image was made for, over all processes of torch.distributed.

    Args:
        classifier (`ImageClassifier`): The classifier.
        labels (`Sequence[int]`): Its label for each class, as `find_classes` gives them.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where the classifier is put and images go.

    Raises:
        ValueError: `labels` are none, no labels of the classifier, or one is there twice.
    """

    def __init__(self, classifier: ImageClassifier, labels: Sequence[int], device: torch.device | str = "cpu"):
        known = len(classifier.names)
        if not labels or len(set(labels)) != len(labels) or not all(0 <= label < known for label in labels):
            raise ValueError(f"`labels` must be different numbers from 0 to {known - 1}, got {_some(labels)}.")
        self.classifier, self.device = classifier.to(device), torch.device(device)
        self.labels = torch.tensor(labels, device=self.device)
        self._counts = torch.zeros(3, len(labels), dtype=torch.int64)

    def reset(self) -> None:
        """Begin anew."""
        self._counts.zero_()

    def update(self, pixel_values: Tensor, classes: Sequence[int]) -> None:
        """Add images as `pixel_values` `(B, 3, H, W)` in [-1, 1], and the class that each was made for."""
        self.count(self.classifier(pixel_values.to(self.device)), classes)

    def count(self, logits: Tensor, classes: Sequence[int]) -> None:
        """Add images by `logits` `(B, L)` of the classifier, and the class that each was made for."""
        logits, made_for = logits.to(self.device), torch.tensor(classes, device=self.device)
        among = logits[:, self.labels].argmax(1) == made_for
        first = logits.argmax(1) == self.labels[made_for]
        for counts, hits in zip(self._counts, (among, first, torch.ones_like(among))):
            counts += torch.bincount(made_for[hits], minlength=len(counts)).cpu()

    def compute(self) -> dict[str, Any]:
        """
        Compute the shares over the images of all processes, each of which must call this.

        Returns:
            `class_accuracy`, of images whose class the classifier prefers among those of `labels`; `top1_accuracy`,
            among all its labels; and for each class, in lists, `images_per_class`, `class_accuracy_per_class` and
            `top1_accuracy_per_class`, NaN where there are no images.

        Raises:
            ValueError: There were no images.
        """
        among, first, count = torch.stack(gather(self._counts)).sum(0).double()
        if not count.sum():
            raise ValueError("There were no images to classify.")
        return {
            "class_accuracy": float(among.sum() / count.sum()),
            "top1_accuracy": float(first.sum() / count.sum()),
            "images_per_class": count.long().tolist(),
            "class_accuracy_per_class": (among / count).tolist(),
            "top1_accuracy_per_class": (first / count).tolist(),
        }


def _synonyms(name: str) -> list[str]:
    return [plain_name(part) for part in name.split(",") if plain_name(part)]


def _some(values: Sequence[Any]) -> str:
    """List the first, and how many more there are."""
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more
