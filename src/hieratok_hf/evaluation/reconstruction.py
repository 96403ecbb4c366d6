"""Evaluate image autoencoders, over one process or several: what they lose, what latents are like, speed."""

import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..data.image_dataset import Images, Row, decode_ahead
from ..data.training_batches import step_generator
from ..models.autoencoder_adapter import Codec
from ..models.losses import image_pyramid
from ..models.quantizing import LatentQuantizer
from ..utils.channel_statistics import add_sums, channel_statistics, channel_sums
from ..utils.distributed import gather, process_place
from ..utils.images import from_uint8, to_uint8
from .image_sets import FrechetDistance, InceptionScore, RowCollector
from .metrics import psnr, ssim
from .perceptual import PerceptualDistance

__all__ = [
    "EvaluationBatches",
    "ReconstructionMetrics",
    "evaluate",
    "evaluate_perturbed",
    "perturb",
    "throughput",
]

# Shape letters: B batch, H W pixels, S side of a square image in pixels, C latent channels, h w the latent's grid.

_MOST_REPEATS = 20
_PERTURBED_BITS = 8


class EvaluationBatches:
    """
    Iterate over this process's share of images, again and again: every image is seen once by one process.

    A batch is a dictionary of `pixel_values` `(B, 3, S, S)` in [-1, 1], and the lists `rows` and `labels`.

    Args:
        images (`Images`): The data.
        size (`int`): Side `S` that images are brought to by `centre_square`.
        batch_size (`int`, defaults to 16): Most images in a batch.
        limit (`int`, *optional*): Number of the first rows of the data to take; all unless given.
        threads (`int`, defaults to 4): Number of images to decode at a time, one batch ahead.

    Attributes:
        skipped (`dict[str, str]`): Names of images that could not be decoded, and why.

    Raises:
        ValueError: A number is not positive.
    """

    def __init__(self, images: Images, size: int, batch_size: int = 16, *, limit: int | None = None, threads: int = 4):
        for name, value in (("size", size), ("batch_size", batch_size), ("limit", limit), ("threads", threads)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.images, self.size, self.batch_size = images, size, batch_size
        self.limit, self.threads = limit, threads
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        """Count this process's batches, those of broken images too; a stream has no length."""
        return math.ceil(len(self._share()) / self.batch_size)

    def _share(self) -> range:
        length, (rank, world) = len(self.images), process_place()
        return range(length if self.limit is None else min(self.limit, length))[rank::world]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in decode_ahead(self.numbered_rows(), (self.size, self.size), self.threads):
            self.skipped |= {name: reason for _, name, reason in batch["skipped"]}
            if batch["rows"]:
                pixel_values = from_uint8(batch["levels"].permute(0, 3, 1, 2))
                yield {"pixel_values": pixel_values, "rows": batch["rows"], "labels": batch["labels"]}

    def numbered_rows(self) -> Iterator[list[tuple[int, Row]]]:
        """Iterate over the rows of the batches with their numbers, of broken images too, without decoding any."""
        entries: Iterator[tuple[int, Row]]
        if self.images.streaming:
            rank, world = process_place()
            entries = islice(enumerate(self.images), rank, self.limit, world)
        else:
            entries = ((index, self.images[index]) for index in self._share())
        while batch := list(islice(entries, self.batch_size)):
            yield batch


class ReconstructionMetrics:
    """
    Average what is measured of images against their targets, over all processes of torch.distributed.

    Args:
        ssim (`bool`, defaults to `True`): Whether to measure `ssim`, which is slow.
        lpips (`torch.nn.Module`, *optional*): The LPIPS of `load_lpips`.
        perceptual (`PerceptualDistance`, *optional*): The distance over a vision model.
        frechet (`FrechetDistance`, *optional*): The distance of the sets of all images, and what it measures beside.
        inception (`InceptionScore`, *optional*): The score of all images by a classifier.
        device (`torch.device` or `str`, defaults to `"cpu"`): Where `lpips` and `perceptual` are put and images go.
    """

    def __init__(
        self,
        *,
        ssim: bool = True,
        lpips: nn.Module | None = None,
        perceptual: PerceptualDistance | None = None,
        frechet: FrechetDistance | None = None,
        inception: InceptionScore | None = None,
        device: torch.device | str = "cpu",
    ):
        self.ssim, self.frechet, self.inception, self.device = ssim, frechet, inception, torch.device(device)
        networks = {"lpips": lpips, "perceptual": perceptual}
        self.networks = {name: network.to(self.device) for name, network in networks.items() if network is not None}
        self._sums: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Begin anew."""
        self._sums.clear()
        for metric in (self.frechet, self.inception):
            if metric is not None:
                metric.reset()

    @torch.no_grad()
    def update(self, images: Tensor, targets: Tensor, rows: Sequence[int] | None = None) -> None:
        """
        Add images, which are measured on 8 bits.

        Args:
            images, targets (`torch.Tensor` of shape `(B, 3, H, W)`): Images and what they should be, in [-1, 1].
            rows (`Sequence[int]`, *optional*): Numbers of the images, which put those of several processes in order.

        Raises:
            ValueError: `metrics.psnr` or `metrics.ssim` refuses them.
        """
        images, targets = images.to(self.device), targets.to(self.device)
        values: dict[str, Tensor] = {}
        if self.ssim:
            values["ssim"] = ssim(images, targets)
        rounded = [from_uint8(to_uint8(x)) for x in (images, targets)]
        for name, network in self.networks.items():
            values[name] = network(*rounded).flatten()
        sums = {name: value.cpu().double().sum() for name, value in values.items()}
        add_sums(self._sums, {"psnr": _psnr_sums(images, targets), **sums, "images": torch.tensor(len(images))})
        if self.frechet is not None:
            self.frechet.update(images, targets, rows)
        if self.inception is not None:
            self.inception.update(rounded[0], rows)

    def compute(self) -> dict[str, float]:
        """
        Compute the figures over the images of all processes, each of which must call this.

        Returns:
            `psnr` in decibels, the mean of each image's without those that equal their target, whose is infinite;
            `ssim`, `lpips`, `perceptual`, the figures of `frechet.compute_all()` and of `inception.compute()` where
            they are measured; `images`, how many there were, and where any equal their target `exact`, how many do.

        Raises:
            ValueError: There were no images, or for a Fréchet distance fewer than two.
        """
        sums = _total(self._sums)
        if not (count := int(sums.pop("images", 0))):
            raise ValueError("There were no images to measure.")
        if self.frechet is not None and count < 2:
            raise ValueError(f"A Fréchet distance needs two images or more, got {count}.")
        decibels = sums.pop("psnr")
        figures = {"psnr": _mean_psnr(decibels), **{name: float(value) / count for name, value in sums.items()}}
        if self.frechet is not None:
            figures |= self.frechet.compute_all()
        if self.inception is not None:
            figures |= self.inception.compute()
        exact = count - int(decibels[1])
        return {**figures, "images": count, **({"exact": exact} if exact else {})}


@torch.no_grad()
def evaluate(
    codec: Codec,
    batches: Iterable[dict[str, Any]],
    metrics: ReconstructionMetrics,
    collector: RowCollector | None = None,
) -> dict[str, Any]:
    """
    Encode and decode all images and measure them; every process calls this with its share.

    Args:
        codec (`Codec`): The autoencoder.
        batches (iterable of dictionaries): Images as `pixel_values` `(B, 3, S, S)` in [-1, 1], and their `rows`.
        metrics (`ReconstructionMetrics`): What to measure; it is reset first.
        collector (`RowCollector`, *optional*): What is given the `levels` `(B, 3, S, S)` in uint8 of each batch.

    Returns:
        The figures of `metrics.compute()`; `scales_psnr`, the mean PSNR of each scale of a HieraTok model against the
        image at its size, coarse to fine; `latent_mean` and `latent_std` of each channel.
    """
    metrics.reset()
    sums: dict[str, Tensor] = {}
    for batch in batches:
        latents = codec.encode(batch["pixel_values"])
        images = [image.float().clamp(-1, 1) for image in codec.decode_scales(latents)]
        targets = batch["pixel_values"].to(latents.device)
        metrics.update(images[-1], targets, batch.get("rows"))
        if collector is not None:
            collector.add(batch.get("rows"), levels=to_uint8(images[-1]))
        if codec.core is not None:
            pairs = zip(images, image_pyramid(targets, codec.core.config))
            add_sums(sums, {"scales": torch.stack([_psnr_sums(*pair) for pair in pairs])})
        add_sums(sums, channel_sums(latents))
    figures: dict[str, Any] = dict(metrics.compute())
    sums = _total(sums)
    if "scales" in sums:
        figures["scales_psnr"] = [_mean_psnr(decibels) for decibels in sums["scales"]]
    mean, std = channel_statistics(sums)
    return {**figures, "latent_mean": mean.tolist(), "latent_std": std.tolist()}


def perturb(
    latents: Tensor, rows: Sequence[int], amount: float, std: Tensor, quantizer: LatentQuantizer | None = None
) -> dict[str, Tensor]:
    """
    Make latents wrong, as those of a generator are, by random numbers that depend on the images' rows alone.

    Args:
        latents (`torch.Tensor` of shape `(B, C, h, w)`): Latents of images.
        rows (`Sequence[int]`): Numbers of the images.
        amount (`float`): How wrong they get, from 0 to 1.
        std (`torch.Tensor` of shape `(C,)`): The standard deviation of each channel.
        quantizer (`LatentQuantizer`, *optional*): The levels of the model, if it has some.

    Returns:
        Latents `(B, C, h, w)` by the kind of error: `noise` with normal noise of `amount * std`; and with a
        `quantizer` `replaced_levels`, of integers of 8 bits of which that share is replaced by random ones.
    """
    shape, sources = latents.shape[1:], [step_generator(0, row) for row in rows]
    noise = torch.stack([torch.randn(shape, generator=source) for source in sources]).to(latents)
    made = {"noise": latents + amount * std.to(latents)[:, None, None] * noise}
    if quantizer is not None:
        chance = torch.stack([torch.rand(shape, generator=source) for source in sources])
        other = torch.stack([torch.randint(2**_PERTURBED_BITS, shape, generator=source) for source in sources])
        tokens = quantizer.quantize(latents, _PERTURBED_BITS).cpu()
        tokens = torch.where(chance < amount, other, tokens)
        made["replaced_levels"] = quantizer.dequantize(tokens, _PERTURBED_BITS).to(latents)
    return made


@torch.no_grad()
def evaluate_perturbed(
    codec: Codec, batches: Iterable[dict[str, Any]], amounts: Sequence[float], std: Tensor
) -> dict[str, dict[str, float]]:
    """
    Measure images that are decoded from latents which `perturb` made wrong; every process calls this with its share.

    Args:
        codec (`Codec`): The autoencoder.
        batches (iterable of dictionaries): Batches of `EvaluationBatches`.
        amounts (`Sequence[float]`): How wrong the latents get, each from 0 to 1.
        std (`torch.Tensor` of shape `(C,)`): The standard deviation of each channel.

    Returns:
        The mean PSNR in decibels by the amount, `psnr_with_noise` and, of a model with levels,
        `psnr_with_replaced_levels`.
    """
    sums: dict[str, Tensor] = {}
    for batch in batches:
        latents = codec.encode(batch["pixel_values"])
        targets = batch["pixel_values"].to(latents.device)
        found: dict[str, list[Tensor]] = {}
        for amount in amounts:
            for kind, wrong in perturb(latents, batch["rows"], amount, std, codec.quantizer).items():
                images = codec.decode(wrong).float().clamp(-1, 1)
                found.setdefault(f"psnr_with_{kind}", []).append(_psnr_sums(images, targets))
        add_sums(sums, {name: torch.stack(decibels) for name, decibels in found.items()})
    names = list(map(str, amounts))
    return {name: dict(zip(names, map(_mean_psnr, decibels))) for name, decibels in _total(sums).items()}


@torch.no_grad()
def throughput(codec: Codec, pixel_values: Tensor, seconds: float = 2.0) -> dict[str, float]:
    """
    Measure the images a second of one process: the median of repeats over about `seconds`, after one not counted.

    Args:
        codec (`Codec`): The autoencoder.
        pixel_values (`torch.Tensor` of shape `(B, 3, S, S)`): A batch in [-1, 1].
        seconds (`float`, defaults to 2.0): Time to spend on each direction.

    Returns:
        The rates `encode` and `decode`, the finest scale alone; comparable on one machine and for one batch size.
    """
    latents = codec.encode(pixel_values)
    pixel_values = pixel_values.to(latents.device)
    synchronise = torch.get_device_module(latents.device).synchronize
    rates = {}
    for name, run, given in (("encode", codec.encode, pixel_values), ("decode", codec.decode, latents)):
        times: list[float] = []
        run(given)
        synchronise()
        while not times or (sum(times) < seconds and len(times) < _MOST_REPEATS):
            start = time.perf_counter()
            run(given)
            synchronise()
            times.append(time.perf_counter() - start)
        rates[name] = len(pixel_values) / statistics.median(times)
    return rates


def _psnr_sums(images: Tensor, targets: Tensor) -> Tensor:
    """Sum up the finite PSNRs of images and count them, `(2,)` in float64."""
    values = psnr(images, targets).cpu().double()
    finite = values[values.isfinite()]
    return torch.stack([finite.sum(), torch.full_like(finite.sum(), len(finite))])


def _mean_psnr(sums: Tensor) -> float:
    """Average what `_psnr_sums` gave; infinite where every image equals its target."""
    return float(sums[0] / sums[1]) if sums[1] else math.inf


def _total(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add up the sums of all processes; one that saw no images has none."""
    total: dict[str, Tensor] = {}
    for part in gather(sums):
        add_sums(total, part)
    return total
