"""Probe how much of images' classes a linear classifier can read off an encoder's features."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..models.autoencoder_adapter import Codec
from ..utils.distributed import gather

__all__ = ["linear_probe", "pool_features"]

# Shape letters: B batch, N images, D feature channels, K classes.

_PENALTIES = tuple(10.0**power for power in range(-5, 4))


@torch.no_grad()
def pool_features(codec: Codec, batches: Iterable[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """
    Average the encoder's features over the tokens, for the images of all processes in the order of the data.

    Args:
        codec (`Codec`): A HieraTok model.
        batches (iterable of dictionaries): Batches of `EvaluationBatches`.

    Returns:
        Features `(N, D)` in float32, and labels `(N,)` in int64.

    Raises:
        ValueError: The model is no HieraTok, there are no images, or one has no label.
    """
    if codec.core is None:
        raise ValueError(f"A probe needs the features of a HieraTok encoder, got {type(codec.model).__name__}.")
    weight = next(codec.core.parameters())
    found: list[tuple[int, int | None, Tensor]] = []
    for batch in batches:
        tokens = codec.core.encode_moments(batch["pixel_values"].to(weight.device, weight.dtype))[1]  # (B, h * w, D)
        found += zip(batch["rows"], batch["labels"], tokens.float().mean(1).cpu())
    found = sorted((entry for part in gather(found) for entry in part), key=lambda entry: entry[0])
    if not found:
        raise ValueError("There were no images to take features of.")
    rows, labels, features = zip(*found)
    if None in labels:
        raise ValueError(f"A probe needs labels: row {rows[labels.index(None)]} of the data has none, or no integer.")
    return torch.stack(features), torch.tensor(labels)


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, test_labels: Tensor) -> float:
    """
    Measure the accuracy of a linear classifier: ridge regression in closed form from standardised features to one-hot
    labels, its penalty the one that does best on every tenth row when fitted to the others.

    Args:
        features, test_features (`torch.Tensor` of shape `(N, D)`): Features of the images to fit, and to test.
        labels, test_labels (`torch.Tensor` of shape `(N,)`): Integers.

    Returns:
        The share of test images whose label is found, in [0, 1]; a label that was not fitted is never found.

    Raises:
        ValueError: There are fewer than ten images to fit, or they have one label only.
    """
    classes = labels.unique()
    if len(labels) < 10 or len(classes) < 2:
        raise ValueError(f"A probe needs ten images of two classes, got {len(labels)} of {len(classes)}.")
    held_out = torch.arange(len(labels)) % 10 == 9

    def predictions(rows: Tensor, penalties: Iterable[float], unseen: Tensor) -> Iterator[Tensor]:
        fitted = features[rows].double()
        mean, std = fitted.mean(0), fitted.std(0)
        std[std == 0] = 1
        fitted, unseen = (fitted - mean) / std, (unseen.double() - mean) / std
        one_hot = (labels[rows][:, None] == classes).double()  # (N, K)
        values, vectors = torch.linalg.eigh(fitted.T @ fitted / len(fitted))
        products = vectors.T @ (fitted.T @ (one_hot - one_hot.mean(0))) / len(fitted)  # (D, K)
        for penalty in penalties:
            weight = vectors @ (products / (values.clamp(min=0) + penalty)[:, None])
            yield classes[(unseen @ weight + one_hot.mean(0)).argmax(1)]

    tried = predictions(~held_out, _PENALTIES, features[held_out])
    accuracies = [(found == labels[held_out]).double().mean().item() for found in tried]
    best = _PENALTIES[accuracies.index(max(accuracies))]
    (found,) = predictions(torch.ones_like(held_out), [best], test_features)
    return (found == test_labels).double().mean().item()
