"""Turn images into `pixel_values` and back; both backends follow transformers' `image_processing_backends.py`."""

import os
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from ..shipped import resolve_model
from ..utils.files import write_whole
from ..utils.images import convert_to_rgb, fetch_image, open_image
from ..utils.numbers import plain_numbers, whole_number
from .configuration_hieratok import refuse_misspelt

__all__ = ["HieraTokImageProcessor", "HieraTokImageProcessorPil"]


class HieraTokImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Name the arguments of a processor: transformers' own of images, and `size_divisor`."""

    size_divisor: int


_SWITCHES = {"size": "do_resize", "crop_size": "do_center_crop", "pad_size": "do_pad"}


def _with_switches(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Switch on what a size is given for, where the arguments do not say whether to do it; make sizes plain."""
    kwargs |= {name: plain_numbers(kwargs[name]) for name in _SWITCHES if name in kwargs}
    on = {switch: True for name, switch in _SWITCHES.items() if kwargs.get(name) is not None}
    return {**on, **kwargs}


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

    def __init__(self, **kwargs: Any):
        refuse_misspelt(kwargs, self.valid_kwargs.__annotations__, type(self).__name__)
        super().__init__(**_with_switches(kwargs))

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read saved settings as transformers does; a name of `SHIPPED` is in the package, unless a folder has it."""
        return super().get_image_processor_dict(resolve_model(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a processor of saved settings; a size among `kwargs` switches on what it is for, as in `__init__`."""
        return super().from_dict(image_processor_dict, **_with_switches(kwargs))

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Turn images into `pixel_values`, with the arguments and errors of the class."""
        return super().preprocess(images, *args, **_with_switches(kwargs))

    def postprocess(
        self, pixel_values: torch.Tensor | np.ndarray, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        """
        Turn `pixel_values` into images: undo this processor's normalisation and clamp to [0, 1].

        Args:
            pixel_values (`torch.Tensor` or `np.ndarray` of shape `(B, 3, H, W)`): Images of any floating dtype, on any
                device; in [-1, 1] with the default normalisation.
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
            hint = " (give one scale at a time)" if isinstance(pixel_values, (list, tuple)) else ""
            got = f"{type(pixel_values).__name__}{hint}"
            raise TypeError(f"pixel_values must be a torch tensor or a numpy array, got {got}")
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
        """Replace paths by their images, as `open_image` reads them and with its errors, and URLs as transformers."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str) and image_url_or_urls.startswith(("http://", "https://", "data:")):
            return fetch_image(image_url_or_urls)
        is_path = isinstance(image_url_or_urls, (str, os.PathLike))
        return open_image(image_url_or_urls) if is_path else image_url_or_urls

    def center_crop(self, image: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        """Crop `(..., H, W)` to `size`; unlike in transformers, too small an image is a `ValueError`, never padded."""
        rows, columns = image.shape[-2:]
        height, width = size.height or 0, size.width or 0
        if not (0 < height <= rows and 0 < width <= columns):
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

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write the settings to a file, whole or not at all."""
        with write_whole(json_file_path) as file:
            file.write(self.to_json_string().encode())

    def _standardize_kwargs(self, *args: Any, size_divisor: Any = None, **kwargs: Any) -> dict[str, Any]:
        size_divisor = whole_number("size_divisor", size_divisor, 1)
        plain = {name: plain_numbers(value) for name, value in kwargs.items()}
        settings = super()._standardize_kwargs(*args, **plain)
        if settings["do_resize"]:
            if any(side < 1 for side in dict(settings["size"]).values()):
                raise ValueError(f"size must be of positive sides, got {dict(settings['size'])}")
            if isinstance(settings["resample"], int) and settings["resample"] not in [*PILImageResampling]:
                raise ValueError(f"resample must be one of {[*PILImageResampling]}, got {settings['resample']}")
        positive = {"rescale_factor": "do_rescale", "image_std": "do_normalize"}
        for name, switch in {**positive, "image_mean": "do_normalize"}.items():
            values = np.ravel(np.asarray(settings[name], dtype=float))  # None becomes NaN
            if settings[switch] and not (np.isfinite(values).all() and (name not in positive or (values > 0).all())):
                kind = "positive and finite" if name in positive else "finite"
                raise ValueError(f"{name} must be {kind}, got {settings[name]!r}")
        return {**settings, "size_divisor": size_divisor}

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        try:
            images = self.fetch_images(images)
        except RecursionError as error:
            raise ValueError("images must not be lists that hold themselves") from error
        if isinstance(images, (list, tuple)):
            return [image for item in images for image in self._prepare_images_structure(item)]
        if isinstance(images, Image.Image):
            return [images]
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            raise TypeError(f"images must be images, arrays, tensors, paths or lists of them, got {type(images)}")
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
        if image.layout != torch.strided or image.is_nested or image.is_meta or not image.numel():
            kind = "nested" if image.is_nested else f"{image.layout}, {image.device}, {tuple(image.shape)}"
            raise ValueError(f"images must be dense tensors of at least one pixel, got {kind}")
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
            input_data_format = "channels_first" if image.shape[0] in (1, 3, 4) else "channels_last"
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
            raise ValueError(f"images must have {channels} channels, 1 or 4 with do_convert_rgb, got {image.shape[0]}")
        return image.contiguous()

    def _preprocess(self, images: list[Any], *args: Any, **kwargs: Any) -> BatchFeature:
        if not images:
            raise ValueError("images must hold at least one image, got none")
        divisor = kwargs.pop("size_divisor")
        cropped = []
        for image in images:
            if kwargs["do_resize"]:
                resized = self.resize(image, kwargs["size"], kwargs["resample"])
                # bicubic overshoots, and the libraries clip whole numbers alone
                image = resized if image.dtype in (np.uint8, torch.uint8) else resized.clip(image.min(), image.max())
            if kwargs["do_center_crop"]:
                image = self.center_crop(image, kwargs["crop_size"])
            rows, columns = image.shape[-2:]
            if rows < divisor or columns < divisor:
                raise ValueError(f"images must be as large as size_divisor={divisor}, got {rows} x {columns} pixels")
            divisible = SizeDict(height=rows - rows % divisor, width=columns - columns % divisor)
            cropped.append(self.center_crop(image, divisible))
        sizes = sorted({tuple(image.shape[-2:]) for image in cropped})
        if kwargs["return_tensors"] is not None and len(sizes) > 1 and not kwargs["do_pad"]:
            hint = "set do_resize and do_center_crop, or return_tensors=None"
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
        size_divisor (`int`, defaults to 16): Height and width become multiples of it; the model's patch size.
        do_convert_rgb (`bool`, defaults to `True`): Whether to make RGB of an image and follow its EXIF orientation;
            without it the channels are taken as they are.
        kwargs: The other arguments of transformers' `ImagesKwargs`, given here or on a call; `size` without
            `do_resize` resizes, and `crop_size` without `do_center_crop` crops.

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
