"""Turn images into `pixel_values` and back; both backends follow transformers' `image_processing_backends.py`."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict, infer_channel_dimension_format
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from ..utils.images import convert_to_rgb, fetch_image, open_image

__all__ = ["HieraTokImageProcessor", "HieraTokImageProcessorPil"]


class HieraTokImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Name the arguments of a processor: transformers' own of images, and `size_divisor`."""

    size_divisor: int


class _HieraTokImageProcessing(BaseImageProcessor):
    """Share between both backends the defaults, checks, cropping to a divisible size, and the way back."""

    valid_kwargs = HieraTokImageProcessorKwargs
    do_convert_rgb = True
    do_resize = False
    size = {"shortest_edge": 256}
    default_to_square = False
    # torchvision replaces Lanczos by bicubic before 0.27 and on CUDA, so the two backends would disagree
    resample = PILImageResampling.BICUBIC
    do_center_crop = False
    crop_size = {"height": 256, "width": 256}
    size_divisor = 16
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]

    if TYPE_CHECKING:  # type checkers would refuse `size_divisor`, which transformers' own `__init__` does not name

        def __init__(self, **kwargs: Any): ...

    def postprocess(
        self, pixel_values: torch.Tensor | np.ndarray, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """
        Turn `pixel_values` into images: undo this processor's normalisation and clamp to [0, 1].

        Args:
            pixel_values (`torch.Tensor` or `np.ndarray` of shape `(B, 3, H, W)`): Images of any floating dtype, on any
                device, with or without gradients; in [-1, 1] with the default normalisation, values beyond are
                clamped.
            output_type (`str`, defaults to `"pil"`): `"pil"` for a list of `B` RGB images, rounded to the nearest of
                256 levels; `"np"` for a float32 array `(B, H, W, 3)` in [0, 1]; `"pt"` for a float32 tensor
                `(B, 3, H, W)` in [0, 1], detached and on the same device.

        Raises:
            TypeError: `pixel_values` is neither a tensor nor an array.
            ValueError: The rank, channels or dtype is wrong, a value is NaN or infinite, or `output_type` is unknown.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if not isinstance(pixel_values, (torch.Tensor, np.ndarray)):
            raise TypeError(f"pixel_values must be a torch tensor or a numpy array, got {type(pixel_values).__name__}")
        pixels = torch.as_tensor(pixel_values).detach()
        if not pixels.is_floating_point():
            raise ValueError(f"pixel_values must have a floating dtype, got {pixels.dtype}")
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"pixel_values must have the shape (B, 3, H, W), got {tuple(pixels.shape)}")
        if bad := int((~pixels.isfinite()).sum()):
            raise ValueError(f"pixel_values must be finite, got {bad} NaN or infinite values")
        pixels = pixels.float()
        if self.do_normalize:
            pixels = pixels * pixels.new_tensor(self.image_std).view(-1, 1, 1)
            pixels = pixels + pixels.new_tensor(self.image_mean).view(-1, 1, 1)
        if self.do_rescale:
            pixels = pixels / (255 * self.rescale_factor)
        pixels = pixels.clamp(0, 1)
        if output_type == "pt":
            return pixels
        array = pixels.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        if output_type == "np":
            return array
        return [Image.fromarray(image) for image in np.rint(array * 255).astype(np.uint8)]

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Replace paths and URLs (`http:`, `https:`, `data:`) by their images, as `open_image` reads them.

        Anything else stays as it is.

        Raises:
            ImageError: A path or URL leads to no readable image.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://", "data:")):
            return fetch_image(image_url_or_urls)
        is_path = isinstance(image_url_or_urls, (str, os.PathLike))
        return open_image(image_url_or_urls) if is_path else image_url_or_urls

    def center_crop(self, image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        """Crop `(..., H, W)` to `size`; unlike in transformers, too small an image is a `ValueError`, never padded."""
        (rows, columns), height, width = image.shape[-2:], size.height, size.width
        if not height or not width or rows < height or columns < width:
            raise ValueError(f"crop_size must fit an image of {rows} x {columns} (height x width), got {dict(size)}")
        top, left = (rows - height) // 2, (columns - width) // 2
        return image[..., top : top + height, left : left + width]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as transformers does; for code from the Hub they name the classes of both backends."""
        output = super().to_dict()
        if self._auto_class is not None:  # transformers would name the class of the current backend alone
            module = type(self).__module__.rpartition(".")[-1]
            names = [f"{module}.HieraTokImageProcessorPil", f"{module}.HieraTokImageProcessor"]
            output["auto_map"] = {**output.get("auto_map", {}), self._auto_class: names}
        return output

    def _standardize_kwargs(self, *args: Any, size_divisor: Any = None, **kwargs: Any) -> dict[str, Any]:
        if type(size_divisor) is not int or size_divisor < 1:
            raise ValueError(f"size_divisor must be a positive integer, got {size_divisor!r}")
        return {**super()._standardize_kwargs(*args, **kwargs), "size_divisor": size_divisor}

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        if isinstance(images := self.fetch_images(images), (list, tuple)):
            return [image for item in images for image in self._prepare_images_structure(item)]
        if isinstance(images, Image.Image):
            return [images]
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            expected = "PIL images, numpy arrays, torch tensors, paths or lists of them"
            raise TypeError(f"images must be {expected}, got {type(images).__name__}")
        if images.ndim not in (2, 3, 4):
            raise ValueError(f"images must be arrays of 2, 3 or 4 dimensions, got shape {tuple(images.shape)}")
        return list(images) if images.ndim == 4 else [images]

    def _channels_first(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        image_mean: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Check one image and turn it into uint8 or float32 `(C, H, W)`; C is 3 after `do_convert_rgb`."""
        if isinstance(image, Image.Image):
            image = np.array(convert_to_rgb(image) if do_convert_rgb else image)
            input_data_format = "channels_last"
        if isinstance(image, np.ndarray) and image.dtype.kind in "uif":
            # torch takes neither negative strides (a flipped or BGR view) nor a foreign byte order
            image = torch.from_numpy(image.astype(image.dtype.newbyteorder("="), order="C"))
        if image.dtype != torch.uint8 and not (isinstance(image, torch.Tensor) and image.is_floating_point()):
            raise ValueError(f"images must have the dtype uint8 or a floating one, got {image.dtype}")
        if image.is_floating_point():
            image = image.detach().float()
            if do_rescale:
                raise ValueError("images of a floating dtype must hold values in [0, 1] and need do_rescale=False")
            low, high = image.min().item(), image.max().item()
            if do_normalize and not (low >= 0 and high <= 1):  # phrased so that NaN fails
                raise ValueError(f"images of a floating dtype must hold values in [0, 1], got [{low:g}, {high:g}]")
        if image.ndim == 2:
            image, input_data_format = image[None], "channels_first"
        if input_data_format is None:
            if not {image.shape[0], image.shape[-1]} & {1, 3, 4}:
                raise ValueError(f"images must have 1, 3 or 4 channels first or last, got shape {tuple(image.shape)}")
            input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
        if input_data_format == "channels_last":
            image = image.movedim(-1, 0)
        if do_convert_rgb and image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        elif do_convert_rgb and image.shape[0] == 4:
            white = 1 if image.is_floating_point() else 255
            alpha = image[3:].float() / white
            blend = image[:3] * alpha + white * (1 - alpha)
            image = blend if image.is_floating_point() else blend.round().to(torch.uint8)
        channels = len(image_mean) if do_normalize and isinstance(image_mean, (list, tuple)) else 3
        if image.shape[0] != channels:
            rgb = f"do_convert_rgb={do_convert_rgb}"
            raise ValueError(f"images must have {channels} channels with {rgb}, got {image.shape[0]}")
        return image.contiguous()

    def _preprocess(self, images: list[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        if not images:
            raise ValueError("images must hold at least one image, got none")
        divisor, cropped = kwargs.pop("size_divisor"), []
        for image in images:
            if kwargs["do_resize"]:
                resized = self.resize(image, kwargs["size"], kwargs["resample"])
                # bicubic overshoots, and the libraries clip whole numbers alone
                image = resized if image.dtype in (np.uint8, torch.uint8) else resized.clip(image.min(), image.max())
            if kwargs["do_center_crop"]:
                image = self.center_crop(image, kwargs["crop_size"])
            rows, columns = image.shape[-2:]
            if rows < divisor or columns < divisor:
                least = f"at least size_divisor={divisor} pixels on each side"
                raise ValueError(f"images must have {least}, got {rows} x {columns} (height x width)")
            divisible = SizeDict(height=rows - rows % divisor, width=columns - columns % divisor)
            cropped.append(self.center_crop(image, divisible))
        sizes = sorted({tuple(image.shape[-2:]) for image in cropped})
        if kwargs["return_tensors"] is not None and len(sizes) > 1 and not kwargs["do_pad"]:
            hint = "set do_resize and do_center_crop, or return_tensors=None for a list"
            raise ValueError(f"images of one batch must come out at one size, got {sizes} (height, width): {hint}")
        return super()._preprocess(cropped, *args, **{**kwargs, "do_resize": False, "do_center_crop": False})


class HieraTokImageProcessor(_HieraTokImageProcessing, TorchvisionBackend):
    """
    Turn images into `pixel_values` `(B, 3, H, W)`, float32 in [-1, 1], with torchvision.

    By default an image keeps its size, but for a centre crop to the nearest smaller multiple of `size_divisor`. The
    order is RGB, resize, centre crop, crop to `size_divisor`, rescale, normalise. Without `return_tensors` the result
    is a list of `(3, H, W)`, which may differ in size. Where torchvision is not installed, the class makes
    a `HieraTokImageProcessorPil`.

    Args:
        images: PIL images, paths, uint8 arrays or tensors `(H, W)`, `(H, W, C)`, `(C, H, W)` or a batch of them with
            1, 3 or 4 channels (alpha is laid on white), or lists of these, given on a call. Arrays of floats need
            values in [0, 1] and `do_rescale=False`.
        size_divisor (`int`, defaults to 16): Height and width become multiples of it; set it to the model's patch
            size.
        do_convert_rgb (`bool`, defaults to `True`): Whether to make RGB of an image and follow its EXIF orientation;
            without it the channels are taken as they are.
        kwargs: The other arguments of transformers' `ImagesKwargs`, given here or on a call.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it, what it was and what was expected.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is HieraTokImageProcessor and not is_torchvision_available():
            return HieraTokImageProcessorPil(*args, **kwargs)
        return super().__new__(cls)

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Check one image and turn it into uint8 or float32 `(3, H, W)` on `device`; errors are those of the class."""
        return self._channels_first(image, *args, **kwargs).to(kwargs.get("device"))


class HieraTokImageProcessorPil(_HieraTokImageProcessing, PilBackend):
    """
    Turn images into `pixel_values` by Pillow and numpy alone.

    The arguments, results and errors are those of `HieraTokImageProcessor`.

    Example:

    ```python
    >>> from PIL import Image
    >>> from hieratok_hf import HieraTokImageProcessorPil
    >>> processor = HieraTokImageProcessorPil(size_divisor=8)
    >>> pixel_values = processor(Image.new("RGB", (101, 64), "white"), return_tensors="pt").pixel_values
    >>> pixel_values.shape, pixel_values.max().item()
    (torch.Size([1, 3, 64, 96]), 1.0)
    >>> processor.postprocess(pixel_values)[0].size
    (96, 64)

    ```
    """

    def process_image(self, image: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        """Check one image and turn it into uint8 or float32 `(3, H, W)`; errors are those of the class."""
        return self._channels_first(image, *args, **kwargs).cpu().numpy()

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, *args: Any, **kwargs: Any) -> np.ndarray:
        """Resize `(C, H, W)`; floats channel by channel, because transformers would truncate them to 8 bits."""
        if image.dtype == np.uint8:
            return super().resize(image, size, resample, *args, **kwargs)
        probe = np.zeros((1, *image.shape[-2:]), np.uint8)
        height, width = super().resize(probe, size, PILImageResampling.NEAREST).shape[-2:]
        return np.stack([np.asarray(Image.fromarray(plane).resize((width, height), resample)) for plane in image])
