"""Generate images of classes by a DiT (Peebles and Xie, arXiv 2212.09748) in the latents of HieraTok."""

import atexit
import inspect
import math
import operator
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.latte.pipeline_latte import retrieve_timesteps
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..models.dit_grids import allow_any_grid
from ..models.saved_code import library_of
from ..utils.numbers import real_number, whole_number
from .call_arguments import (
    describe,
    evaluating,
    take_falling,
    take_generators,
    take_images,
    take_interval,
    take_latents,
)
from .class_names import label_ids, label_shares, names_to_ids
from .lora_adapters import LoraAdaptersMixin
from .noise_levels import PREDICTION_TYPES, NoiseLevel, noise_levels, prediction_type_of
from .pipeline_folder import PipelineFolderMixin

__all__ = ["HieraTokDiTPipeline"]

# Shape letters: B images of a call, C latent channels, h w the latent's grid, H W pixels.

_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_ROUNDING = 1e-6  # of a scheduler's noise, which is float32
# Begun in their midst they leave noise in images: LMS takes a step's number for that of the predictions that it has.
_FROM_THE_FIRST = ("LMSDiscreteScheduler", "SASolverScheduler")
_STREAMS: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


class HieraTokDiTPipeline(LoraAdaptersMixin, PipelineFolderMixin):
    """
    Generate images of named classes: a transformer denoises latents, a tokenizer decodes them.

    Args:
        vae (`AutoencoderHieraTok`): The tokenizer. Another autoencoder of diffusers with `latent_channels`,
            `scaling_factor` and, if any, `shift_factor` serves too, without previews.
        transformer (`DiTTransformer2DModel`): The denoiser. Another `ModelMixin` serves too that is called as
            `transformer(latents, timestep=..., class_labels=...)` and whose configuration names `in_channels`,
            `sample_size` and `num_embeds_ada_norm`, the number of classes; the label after the last class is that of
            no class.
        scheduler (`SchedulerMixin`): A scheduler of the kind that the transformer was trained for: of flow matching,
            or with a `prediction_type`.
        id2label (`dict[int, str]`, *optional*): Names of the classes by number; commas divide synonyms.
        prediction_type (`str`, *optional*): Name of what the transformer predicts, as `prediction_type_of` gives it;
            read from `scheduler` unless given. It is saved with the pipeline, which then refuses schedulers of another
            kind.

    Raises:
        ValueError: The parts do not fit together; the message names the sizes.

    Example:

    ```python
    >>> import torch, hieratok_hf
    >>> pipe = hieratok_hf.HieraTokDiTPipeline.from_pretrained("hieratok-dit-tiny")
    >>> pipe.set_progress_bar_config(disable=True)
    >>> images = pipe(["church", "parachute"], num_inference_steps=4, generator=torch.manual_seed(0)).images
    >>> [image.size for image in images]
    [(128, 128), (128, 128)]

    ```
    """

    # A trap: as of a component (see `AutoencoderHieraTok`), diffusers takes `__module__` for the importable library
    # that has the class. The path of this file would tie saved folders to it, and code from the Hub has another path.
    __module__ = library_of("pipeline_hieratok_dit")

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents", "clean_latents"]

    def __init__(
        self,
        vae: ModelMixin,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict | None = None,
        prediction_type: str | None = None,
    ):
        super().__init__()
        kind = prediction_type if scheduler is None else prediction_type or prediction_type_of(scheduler)
        if kind not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` must be one of {list(PREDICTION_TYPES)}, got {kind!r}.")
        names = _read_id2label({} if id2label is None else id2label)
        _check_parts(vae, transformer, names)
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.register_to_config(id2label=names, prediction_type=kind)
        self.labels = names_to_ids(names)
        factor = 8
        if vae is not None:
            factor = getattr(vae, "spatial_compression_ratio", None) or 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        if transformer is not None:
            allow_any_grid(transformer)  # before it is compiled

    @property
    def num_classes(self) -> int:
        """Return the number of classes of the transformer, which is also the label of no class."""
        return self.transformer.config.num_embeds_ada_norm

    @property
    def id2label(self) -> dict[int, str]:
        """Return the names of the classes by number."""
        return dict(self.config.id2label)

    @property
    def guidance_scale(self) -> float:
        """Return the guidance scale of the call that is running or was the last."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Return how often the transformer is asked in the call that is running or was the last."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Tell whether the steps that are left are skipped; a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    def get_label_ids(self, label: int | str | Sequence[int | str]) -> list[int]:
        """Find the numbers of classes by name or number; a `ValueError` offers the names that are near a wrong one."""
        return label_ids(label, self.labels, self.num_classes)

    def __call__(
        self,
        class_labels: int | str | Mapping[int | str, float] | Sequence[int | str | Mapping[int | str, float]],
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_images_per_prompt: int = 1,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        preview_scales: int | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float = 0.6,
        guidance_eta: float = 1.0,
    ) -> ImagePipelineOutput | Any:
        """
        Generate images of classes, from noise or from images.

        With guidance (Ho and Salimans, arXiv 2207.12598), the prediction is
        `p(no class) + guidance_scale * (p(class) - p(no class))`.

        An image between classes follows the mean of their predictions `p(class)`, weighted by their shares, for each
        of which the transformer is asked (Liu et al., arXiv 2206.01714).

        Args:
            class_labels (`int`, `str`, `dict` or a list of them): Classes by number or name, and for an image between
                classes a dictionary of their shares, which add up to 1, as `{"church": 0.7, "tench": 0.3}`.
            num_inference_steps (`int`, defaults to 50): Number of the scheduler's steps, at most its
                `num_train_timesteps`.
            guidance_scale (`float`, defaults to 4.0): Scale of classifier-free guidance, at least 1. A scale of 1 is
                none, and asks the transformer half as much.
            guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`): Shares of noise, from 0 for clean to 1
                for noise alone, between which guidance acts (Kynkäänniemi et al., arXiv 2404.07724).
            num_images_per_prompt (`int`, defaults to 1): Number of images of each class, one after the other.
            timesteps, sigmas (`list[int]` and `list[float]`, *optional*): Timesteps, or noise levels, of the scheduler
                in place of `num_inference_steps`, where it takes them; they fall.
            eta (`float`, defaults to 0.0): Weight, from 0 to 1, of the noise that DDIM adds in a step (arXiv
                2010.02502).
            generator (`torch.Generator` or one for each image, *optional*): Source of all noise. With one for each,
                an image does not depend on those beside it.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): Standard normal noise to begin with, or to
                add to `image`; drawn from `generator` unless given.
            output_type (`str`, defaults to `"pil"`): Form of the images: `"pil"`, `"np"` `(B, H, W, 3)` or `"pt"`
                `(B, 3, H, W)`, both in [0, 1], or `"latent"` for latents that are not decoded.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end (`Callable`, *optional*): Function that is called as
                `callback(pipe, step, timestep, tensors)` after each step and returns a dictionary, whose `"latents"`
                replace those of the step, or `None`. A `PipelineCallback` of diffusers names its tensors itself, and a
                callback may set `pipe._guidance_scale`.
            callback_on_step_end_tensor_inputs (`Sequence[str]`, defaults to `("latents",)`): Names of the tensors that
                the callback gets: `"latents"`, and `"clean_latents"`, the clean ones that the transformer predicts.
            preview_scales (`int`, *optional*): Number of the tokenizer's scales by which the predicted clean latents
                are decoded for the callback, which gets them as `"preview"`: `(B, 3, H / f, W / f)` in [0, 1], where
                `f` is the factor of the last of the scales. There are no previews unless given.
            height, width (`int`, *optional*): Size of the images in pixels, multiples of the tokenizer's patch times
                the transformer's; that of the transformer's `sample_size` unless given. A transformer that was trained
                on squares alone makes poor images of other shapes.
            image (`PIL.Image.Image`, `numpy.ndarray`, `torch.Tensor` or a list of them, *optional*): Images to begin
                with rather than with noise alone: one for all labels, or one for each. Of a `PIL.Image.Image` the
                middle is cut and resized to `height` and `width`. Arrays `(H, W, 3)` or `(B, H, W, 3)` and tensors
                `(3, H, W)` or `(B, 3, H, W)` have that size, and are in [0, 1] or 8-bit levels in uint8.
            strength (`float`, defaults to 0.6): Share of the steps, from 0 to 1, that are taken from `image` on, at
                least one: the latents of `image`, without noise of their own, get the noise with which the first of
                these steps begins (SDEdit, arXiv 2108.01073). Flow matching by Euler leaves nothing of it at 1.
            guidance_eta (`float`, defaults to 1.0): Share, from 0 to 1, that is kept of the part of guidance along the
                predicted clean latents (adaptive projected guidance, Sadat et al., arXiv 2410.02416). Less of it keeps
                colours natural at high scales.

        Returns:
            `images`, `num_images_per_prompt` of each class.

        Raises:
            ValueError: An argument is not as above, or the scheduler is not of the transformer's kind.
        """
        call = {name: value for name, value in locals().items() if name not in ("self", "return_dict")}
        *_, images = self._generate(SimpleNamespace(**call))
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """
        Generate images as a call with the same arguments does, and show them while they are made.

        Who stops early leaves the pipeline as it was. It makes one call at a time: another one ends the stream.

        Args:
            args, kwargs: Arguments of `__call__`. `preview_scales` needs no callback here; unless it is given,
                previews are as large as the images.

        Yields:
            Previews in the form of `output_type`, one each time that the transformer was asked but the last: its
            predicted clean latents, decoded. Then the images that the call returns.

        Raises:
            ValueError: An argument is not as the call takes it; raised with the first preview.
            RuntimeError: The pipeline was called before the stream ended.
        """
        call = inspect.signature(self.__call__).bind(*args, **kwargs)
        call.apply_defaults()
        stream = self._generate(SimpleNamespace(**call.arguments), streams=True)
        _STREAMS.add(stream)
        return stream

    @torch.no_grad()
    def _generate(self, call: SimpleNamespace, streams: bool = False) -> Generator[Any, None, None]:
        """Yield the previews of a stream, if it is one, and the images of a call with these arguments."""
        self.check_inputs(call.output_type)
        classes = label_shares(call.class_labels, self.labels, self.num_classes)
        most_steps = self.scheduler.config.num_train_timesteps
        num_inference_steps = whole_number("num_inference_steps", call.num_inference_steps, 1, most_steps)
        num_images_per_prompt = whole_number("num_images_per_prompt", call.num_images_per_prompt, 1)
        guidance_scale, eta = real_number("guidance_scale", call.guidance_scale, 1), real_number("eta", call.eta, 0, 1)
        strength = real_number("strength", call.strength, 0, 1)
        guidance_eta = real_number("guidance_eta", call.guidance_eta, 0, 1)
        lowest, highest = take_interval(call.guidance_interval)
        times = take_falling("timesteps", call.timesteps, most_steps)
        # The noise of flow matching is a share.
        most_noise = 1 if self.config.prediction_type == "flow_prediction" else math.inf
        noise = take_falling("sigmas", call.sigmas, most_noise)
        callback, tensor_inputs = call.callback_on_step_end, call.callback_on_step_end_tensor_inputs
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            tensor_inputs = callback.tensor_inputs
        self._check_callback(callback, tensor_inputs)
        scales: dict[str, int] = {}
        if call.preview_scales is not None:
            is_seen = callback is not None or (streams and call.output_type != "latent")
            scales["num_scales"] = self._check_preview_scales(call.preview_scales, is_seen)

        device, channels = self._execution_device, self.transformer.config.in_channels
        count = len(classes) * num_images_per_prompt
        # An image between classes is asked for once for each of them: a row has its image, its class and the share.
        rows = [(i, *pair) for i in range(count) for pair in classes[i // num_images_per_prompt].items()]
        owners, labels, shares = (torch.tensor(column, device=device) for column in zip(*rows))
        no_labels = torch.full((count,), self.num_classes, device=device)
        generator = take_generators(call.generator, count)
        grid = self._take_grid(call.height, call.width)
        pixel_values = None if call.image is None else self._take_images(call.image, len(classes), grid)
        latents = self.prepare_latents(count, generator, call.latents, grid)
        steps = len(times or noise or range(num_inference_steps))
        if times is None and noise is None and isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            # Its own last step would begin with hardly any noise; as in diffusers' pipelines, steps are even.
            noise = [1 - i / num_inference_steps for i in range(num_inference_steps)]
        if times is not None and self.scheduler.config.get("use_flow_sigmas"):
            raise ValueError("`timesteps` cannot be given to a scheduler with use_flow_sigmas=True: give it `sigmas`.")
        # Some schedulers calculate with them.
        given_sigmas: Any = None if noise is None else np.array(noise, dtype=np.float32)
        running = self._running = object()  # the scheduler now forgets another stream
        retrieve_timesteps(self.scheduler, num_inference_steps, device, times, given_sigmas)
        levels, timesteps = noise_levels(self.scheduler), self.scheduler.timesteps
        if times is not None:
            self._check_given_timesteps(times, levels)
        # Schedulers of the second order ask twice in a step, but in the last.
        order = getattr(self.scheduler, "order", 1)
        name, has_all = type(self.scheduler).__name__, len(timesteps) == (steps - 1) * order + 1
        if pixel_values is not None and (name in _FROM_THE_FIRST or not has_all):
            raise ValueError(f"`image` cannot be given to a {name}, which must begin with its first step.")
        self._guidance_scale, self._interrupt = guidance_scale, False
        try:
            if pixel_values is None:
                latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
            else:
                first = (steps - max(1, round(strength * steps))) * order
                levels, timesteps = levels[first:], timesteps[first:]
                clean_latents = self._encode(pixel_values)
                clean_latents = clean_latents.repeat_interleave(count // len(clean_latents), 0)
                latents = self._add_noise(clean_latents, latents, first)
            self._num_timesteps = len(timesteps)
            accepted = inspect.signature(self.scheduler.step).parameters
            extra = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}

            for i, (t, level) in enumerate(zip(self.progress_bar(timesteps), levels)):
                if self.interrupt:
                    continue
                scaled = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    scaled = self.scheduler.scale_model_input(latents, t)
                guided = self.guidance_scale > 1 and lowest - _ROUNDING <= level.share <= highest + _ROUNDING
                model_input = torch.cat([scaled[owners], scaled]) if guided else scaled[owners]
                with evaluating(self.transformer):
                    predictions = self.transformer(
                        model_input.to(self.transformer.dtype),
                        timestep=t.to(device).expand(len(model_input)),
                        class_labels=torch.cat([labels, no_labels]) if guided else labels,
                        return_dict=False,
                    )[0]
                if predictions.shape[2:] != latents.shape[2:]:
                    made = tuple(predictions.shape[2:])
                    raise ValueError(
                        f"`height` and `width` do not suit `transformer`: of a grid {grid} it makes {made}."
                    )
                predictions = predictions[:, :channels].float()
                weighted = shares[:, None, None, None] * predictions[: len(rows)]
                prediction = torch.zeros_like(weighted[:count]).index_add(0, owners, weighted)
                if guided:
                    unconditional = predictions[len(rows) :]
                    difference = prediction - unconditional
                    combined = unconditional + self.guidance_scale * difference
                    if guidance_eta < 1:
                        # Clean latents are linear in predictions, so their differences have one direction.
                        parallel = _part_along(difference, level.clean(scaled, prediction))
                        combined -= (self.guidance_scale - 1) * (1 - guidance_eta) * parallel
                    prediction = combined
                latents = self.scheduler.step(prediction, t, latents, **extra, return_dict=False)[0]
                if callback is None and not streams:
                    continue

                clean_latents = level.clean(scaled, prediction)
                if callback is not None:
                    values = {"latents": latents, "clean_latents": clean_latents}
                    tensors = {name: values[name] for name in tensor_inputs}
                    if scales:
                        preview = self._decode(clean_latents, **scales)
                        tensors["preview"] = (preview / 2 + 0.5).clamp(0, 1)
                    latents = take_latents(callback(self, i, t, tensors), latents)
                if streams and i + 1 < self.num_timesteps:
                    yield self._make_images(clean_latents, call.output_type, **scales)
                    if self._running is not running:
                        raise RuntimeError(
                            "The pipeline was called again before its stream ended, which cannot go on."
                        )

            yield self._make_images(latents, call.output_type)
        finally:
            self.maybe_free_model_hooks()

    def check_inputs(self, output_type: str) -> None:
        """Raise `ValueError` with the name of the part, or of the argument of `__call__`, that cannot serve."""
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is None: a pipeline without one makes no images.")
        if output_type not in _OUTPUT_TYPES or (self.vae is None and output_type != "latent"):
            wanted = list(_OUTPUT_TYPES) if self.vae is not None else "'latent' without a `vae`"
            raise ValueError(f"`output_type` must be one of {wanted}, got {output_type!r}.")
        if self.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError("`scheduler` has use_dynamic_shifting=True, by the length of a prompt: give it False.")
        if (kind := prediction_type_of(self.scheduler)) != (expected := self.config.prediction_type):
            flow = ", use_flow_sigmas=True" if expected == "flow_prediction" else ""
            raise ValueError(
                f"`scheduler` is a {type(self.scheduler).__name__} for a transformer of prediction type {kind!r}, "
                f"this one's is {expected!r}: give the scheduler's `from_config` prediction_type={expected!r}{flow}, "
                "if it can have it, or take another scheduler."
            )

    def _check_callback(self, callback: Any, tensor_inputs: Any) -> None:
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be a function, got {callback!r}.")
        known = self._callback_tensor_inputs
        if not isinstance(tensor_inputs, list | tuple) or any(name not in known for name in tensor_inputs):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {known}, got {tensor_inputs!r}.")

    def _check_preview_scales(self, preview_scales: Any, is_seen: bool) -> int:
        if not is_seen:
            raise ValueError("`preview_scales` needs a `callback_on_step_end`, or a stream of images, to show them.")
        if self.vae is None or "num_scales" not in inspect.signature(self.vae.decode).parameters:
            raise ValueError(f"`preview_scales` needs a tokenizer with scales, `vae` is a {type(self.vae).__name__}.")
        return whole_number("preview_scales", preview_scales, 1, len(self.vae.config.scale_factors))

    def _check_given_timesteps(self, timesteps: list[float], levels: list[NoiseLevel]) -> None:
        """Refuse times that the scheduler does not take as they are, or to which it does not give their noise."""
        given, taken = np.array(timesteps), self.scheduler.timesteps.cpu().numpy()
        same = given.shape == taken.shape and np.allclose(given, taken, rtol=0, atol=0.01)
        if same and self.config.prediction_type == "flow_prediction":
            noise = np.array([level.noise for level in levels])
            same = np.allclose(given, noise * self.scheduler.config.num_train_timesteps, rtol=0, atol=0.01)
        if not same:
            name = type(self.scheduler).__name__
            raise ValueError(f"`timesteps` cannot be given to this {name}, which takes others or moves their noise.")

    def _take_grid(self, height: Any, width: Any) -> tuple[int, int]:
        """Find the latent's grid for a height and width in pixels, where given, or raise `ValueError`."""
        config, grid = self.transformer.config, []
        for name, pixels in (("height", height), ("width", width)):
            if pixels is None:
                grid.append(config.sample_size)
                continue
            if self.vae is None:
                raise ValueError(f"`{name}` must be None without a `vae`, whose pixels it counts, got {pixels!r}.")
            factor = self.image_processor.config.vae_scale_factor
            unit = factor * (config.get("patch_size") or 1)
            if whole_number(name, pixels, 1) % unit:
                raise ValueError(f"`{name}` must be a multiple of {unit} pixels, got {pixels}.")
            grid.append(int(pixels) // factor)
        allow_any_grid(self.transformer)
        return grid[0], grid[1]

    def _take_images(self, image: Any, count: int, grid: tuple[int, int]) -> Tensor:
        if self.vae is None:
            raise ValueError("`image` must be None without a `vae`, which encodes it.")
        factor = self.image_processor.config.vae_scale_factor
        return take_images(image, count, (grid[0] * factor, grid[1] * factor))

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """
        Draw the noise to begin with, in float32, or take `latents` `(B, C, h, w)` if they are given.

        Args:
            batch_size (`int`): The number of images.
            generator (`torch.Generator` or one for each image, *optional*): Source of the noise.
            latents (`torch.Tensor` of shape `(B, C, h, w)`, *optional*): The noise.
            grid (`tuple[int, int]`, *optional*): The height and width of the latents; the transformer's
                `sample_size` unless given.

        Raises:
            ValueError: `latents` do not suit `batch_size` images or the grid.
        """
        config = self.transformer.config
        shape = (batch_size, config.in_channels, *(grid or (config.sample_size, config.sample_size)))
        if latents is None:
            return randn_tensor(shape, generator, self._execution_device, torch.float32)
        is_usable = isinstance(latents, Tensor) and latents.is_floating_point() and not latents.is_meta
        if not is_usable or latents.shape != shape:
            raise ValueError(
                f"`latents` must be a tensor of floating point of shape {shape}, got {describe(latents)}."
            )
        latents = latents.to(self._execution_device, torch.float32)
        if latents.layout != torch.strided or not latents.isfinite().all():
            raise ValueError("`latents` must be dense and finite.")
        return latents

    def _add_noise(self, clean_latents: Tensor, noise: Tensor, first: int) -> Tensor:
        """Add to clean latents `(B, C, h, w)` as much noise as the scheduler's step number `first` begins with."""
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        time = self.scheduler.timesteps[first : first + 1]
        if hasattr(self.scheduler, "scale_noise"):  # of flow matching
            return self.scheduler.scale_noise(clean_latents, time, noise)
        return self.scheduler.add_noise(clean_latents, noise, time)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """Encode images `(B, 3, H, W)` in [-1, 1] to their likeliest latents, as the transformer knows them."""
        config = self.vae.config
        encoded = self.vae.encode(pixel_values.to(self._execution_device, self.vae.dtype), return_dict=False)[0]
        raw = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (raw.float() - (config.get("shift_factor") or 0.0)) * config.scaling_factor

    def _make_images(self, latents: Tensor, output_type: str, **scales: int) -> Any:
        if output_type == "latent":
            return latents.to(self.transformer.dtype)
        return self.image_processor.postprocess(self._decode(latents, **scales), output_type)

    def _decode(self, latents: Tensor, **scales: int) -> Tensor:
        """Decode latents, as the transformer knows them, to images of about [-1, 1]."""
        config = self.vae.config
        raw = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return self.vae.decode(raw.to(self.vae.dtype), return_dict=False, **scales)[0]


@atexit.register
def _close_streams() -> None:
    """Close the streams that were not read to their end, while what they clean up by is still there."""
    for stream in list(_STREAMS):
        with suppress(ValueError):  # of one that another thread is in
            stream.close()


def _part_along(difference: Tensor, direction: Tensor) -> Tensor:
    """Project each `(C, h, w)` of a difference `(B, C, h, w)` onto that of a direction of the same shape."""
    units = F.normalize(direction.flatten(1)).view_as(direction)
    return (difference * units).sum((1, 2, 3), keepdim=True) * units


def _read_id2label(id2label: Any) -> dict[int, str]:
    if not isinstance(id2label, Mapping):
        raise ValueError(f"`id2label` must be a dictionary of names by number, got {id2label!r}.")
    names: dict[int, str] = {}
    for key, name in id2label.items():
        try:
            number = operator.index(int(key) if isinstance(key, str) else key)  # JSON makes text of the numbers
        except (TypeError, ValueError):
            raise ValueError(f"`id2label` must have whole numbers for keys, got {key!r}.") from None
        if not isinstance(name, str):
            raise ValueError(f"`id2label` must name the class {number} by a text, got {name!r}.")
        names[number] = name
    return names


def _check_parts(vae: Any, transformer: Any, id2label: Mapping[int, str]) -> None:
    """Raise `ValueError` unless a transformer denoises a tokenizer's latents and has the classes that are named."""
    sizes = ("in_channels", "sample_size", "num_embeds_ada_norm")
    needed: dict[str, tuple[str, ...]] = {"vae": ("latent_channels", "scaling_factor"), "transformer": sizes}
    for name, part in {"vae": vae, "transformer": transformer}.items():
        for key in needed[name]:
            if part is not None and not hasattr(getattr(part, "config", None), key):
                raise ValueError(f"`{name}` is a {type(part).__name__}, whose configuration lacks {key!r}.")
    if vae is None or transformer is None:
        return
    channels, config = vae.config.latent_channels, transformer.config
    if (taken := config.in_channels) != channels:
        raise ValueError(f"`transformer` takes latents of {taken} channels, those of `vae` have {channels}.")
    # As many again are a predicted variance, which is not used.
    if (given := config.get("out_channels") or channels) not in (channels, 2 * channels):
        raise ValueError(f"`transformer` must give {channels} channels or twice as many, it gives {given}.")
    side, patch = config.sample_size, config.get("patch_size") or 1
    if side % patch:
        raise ValueError(f"`transformer` has a sample size of {side}, which is no multiple of its patch size {patch}.")
    last = config.num_embeds_ada_norm - 1
    if wrong := [key for key in id2label if not 0 <= key <= last]:
        raise ValueError(f"`id2label` names the class {wrong[0]}, `transformer` has the classes 0 to {last}.")
