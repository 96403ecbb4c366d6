"""Show what a pipeline of diffusers is making while it works, by the coarse scales of a tokenizer, as TAESD's."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ..models.autoencoder_hieratok import AutoencoderHieraTok
from ..utils.files import write_whole
from ..utils.images import to_uint8
from .noise_levels import prediction_type_of, read_noise_levels

__all__ = ["HieraTokPreviewer"]

# Shape letters: B batch, C latent channels, h w the latent's grid, N packed tokens, f factor of the last scale.


class HieraTokPreviewer:
    """
    Decode a small image of the clean latents that a pipeline predicts, every few of its steps.

    It is a `callback_on_step_end` of the pipelines that have one, and shows the second step and later ones. `watch`
    serves every pipeline, `DiTPipeline` and PixArt's too, and every step. What the pipeline packs is unpacked, also
    the 2x2 cells of Flux and FLUX.2, and its VAE's statistics are taken out, which needs no decoding by that VAE.

    Args:
        vae (`AutoencoderHieraTok`): A tokenizer of the pipeline's latents, such as `hieratok train --teacher` makes;
            it may be the pipeline's own VAE.
        num_scales (`int`, defaults to 2): Scales that are decoded, coarse to fine: 2 of `(8, 4, 2, 1)` make images of
            a quarter of the size.
        every (`int`, defaults to 5): Steps from one image to the next; the last step has one too.
        show (`Callable` or path, *optional*): A function that is called with the list of PIL images and the number of
            the step, from 0, or a file that is written anew each time. Unless given, a notebook shows them in the
            cell's output.

    Attributes:
        images (`list[PIL.Image.Image]`): The newest images, one for each of the batch.

    Raises:
        ValueError: `vae` is no such tokenizer, a number is out of range, or later, the latents have another number of
            channels, or the pipeline has a scheduler that `noise_levels` does not know.

    Example:

    ```python
    >>> import diffusers
    >>> from hieratok_hf import AutoencoderHieraTok, HieraTokPreviewer
    >>> vae = AutoencoderHieraTok.from_size("hieratok-tiny")
    >>> previewer = HieraTokPreviewer(vae, num_scales=2, every=2)
    >>> transformer = diffusers.DiTTransformer2DModel(2, 8, 16, 16, num_layers=1, sample_size=8, patch_size=1)
    >>> pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    >>> pipe.set_progress_bar_config(disable=True)
    >>> with previewer.watch(pipe):
    ...     image = pipe([1], num_inference_steps=4).images[0]
    >>> image.size, previewer.images[0].size
    ((64, 64), (16, 16))

    ```
    """

    def __init__(
        self,
        vae: AutoencoderHieraTok,
        num_scales: int = 2,
        every: int = 5,
        show: Callable[[list[Image.Image], int], Any] | str | os.PathLike[str] | None = None,
    ):
        config = getattr(vae, "config", None)
        if not isinstance(config, dict) or "scale_factors" not in config:
            raise ValueError(f"`vae` must be an AutoencoderHieraTok, got a {type(vae).__name__}.")
        most = len(config["scale_factors"])
        if not 1 <= num_scales <= most:
            raise ValueError(f"`num_scales` must be from 1 to {most}, got {num_scales}.")
        if every < 1:
            raise ValueError(f"`every` must be positive, got {every}.")
        self.vae, self.num_scales, self.every, self.show = vae, num_scales, every, show
        self.images: list[Image.Image] = []
        self._hooks = ExitStack()
        self._watched: Any = None
        self._timesteps: Tensor | None = None  # of the one run that is watched as a callback
        self._places: Tensor | None = None
        self._display_id = ""

    def __call__(self, pipe: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Serve as `callback_on_step_end`: watch the pipeline until its last step."""
        if self._watched is not pipe.scheduler:
            self._attach(pipe)
            self._timesteps = pipe.scheduler.timesteps
        if step + 1 >= pipe.num_timesteps and self._timesteps is not None:
            self._detach()
        return callback_kwargs

    @contextmanager
    def watch(self, pipe: Any) -> Iterator["HieraTokPreviewer"]:
        """Show the steps of all calls of a pipeline within it, by the scheduler that it has at the start."""
        self._attach(pipe)
        try:
            yield self
        finally:
            self._detach()

    def _attach(self, pipe: Any) -> None:
        """Look at what the scheduler is given in each step, and at the places of packed tokens."""
        self._detach()
        scheduler = self._watched = pipe.scheduler
        prediction_type_of(scheduler)
        if not hasattr(scheduler.step, "looks"):
            scheduler.step = _with_looks(scheduler.step)
        step, look = scheduler.step, partial(self._look_once, pipe)
        step.looks.append(look)

        def leave() -> None:
            step.looks.remove(look)
            if not step.looks:
                del scheduler.step
                if scheduler.step != step.__wrapped__:  # which another tool had put there
                    scheduler.step = step.__wrapped__

        def keep_places(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            self._places = kwargs.get("img_ids")

        self._hooks.callback(leave)
        denoiser = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
        self._hooks.callback(denoiser.register_forward_pre_hook(keep_places, with_kwargs=True).remove)

    def _detach(self) -> None:
        self._hooks.close()
        self._watched = self._timesteps = self._places = None

    def _look_once(self, pipe: Any, *given: Any) -> None:
        """Look, and no more in a run that an error ends, of which no callback comes to the last step."""
        try:
            self._look(pipe, *given)
        except BaseException:
            if self._timesteps is not None:
                self._detach()
            raise

    @torch.no_grad()
    def _look(self, pipe: Any, model_output: Tensor, timestep: Any, sample: Tensor) -> None:
        """Show a step if it is one of those to show, from what `scheduler.step` is given."""
        scheduler = pipe.scheduler
        if self._timesteps is not None and self._timesteps is not scheduler.timesteps:
            self._detach()  # an interrupted run had not come to its last step
            return
        timesteps = scheduler.timesteps.tolist()
        steps = list(dict.fromkeys(timesteps))  # a step of two calls of the model stands there twice
        number = steps.index(float(timestep))
        if (number + 1) % self.every and number + 1 < len(steps):
            return
        level = read_noise_levels(scheduler)[timesteps.index(float(timestep))]
        if hasattr(scheduler, "scale_model_input"):
            sample = scheduler.scale_model_input(sample, timestep)
        clean = level.clean(sample.float(), model_output.float())
        if isinstance(pipe, DiTPipeline) and len(clean) % 2 == 0:
            # Its guidance denoises everything twice.
            clean = clean.chunk(2)[0] if torch.equal(*sample.chunk(2)) else clean
        latents = self._unpack(clean, getattr(pipe, "vae", None) or self.vae)
        weight = next(self.vae.parameters())
        images = self.vae.decode(latents.to(weight), num_scales=self.num_scales).sample
        factor = self.vae.config["scale_factors"][self.num_scales - 1]
        # A coarse cell may reach beyond the image.
        height, width = (-(-side * self.vae.config["patch_size"] // factor) for side in latents.shape[2:])
        levels = to_uint8(images[..., :height, :width]).permute(0, 2, 3, 1).cpu().numpy()
        self.images = [Image.fromarray(image) for image in levels]
        self._show(number)

    def _unpack(self, latents: Tensor, vae: Any) -> Tensor:
        """Bring what a pipeline works on to `(B, C, h, w)` as its VAE decodes it."""
        statistics = getattr(vae, "bn", None)
        is_packed = latents.ndim == 3
        if is_packed:
            if self._places is None:
                raise ValueError(f"Latents of shape {tuple(latents.shape)} are packed, and no `img_ids` tell how.")
            places = self._places.reshape(-1, self._places.shape[-1])
            # Places of images that are given to look at come after those of what is made.
            rows, columns = (int(x) + 1 for x in places[: latents.shape[1], 1:3].amax(0))
            latents = latents.transpose(1, 2).unflatten(2, (rows, columns))
        if statistics is not None:
            std = (statistics.running_var + vae.config.batch_norm_eps).sqrt()
            latents = latents * std.to(latents)[:, None, None] + statistics.running_mean.to(latents)[:, None, None]
        if is_packed:
            latents = F.pixel_shuffle(latents, 2)
        if statistics is not None:
            return latents
        of = vae.config.get
        mean, std = of("latents_mean"), of("latents_std")
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(x)[:, None, None] for x in (mean, std))
            return latents * std / (of("scaling_factor") or 1.0) + mean
        return latents / (of("scaling_factor") or 1.0) + (of("shift_factor") or 0.0)

    def _show(self, number: int) -> None:
        if callable(self.show):
            self.show(self.images, number)
            return
        sheet = make_image_grid(self.images, 1, len(self.images))
        if self.show is not None:
            with write_whole(self.show) as file:
                sheet.save(file, format="png")
        elif "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
            from IPython.display import display

            last, self._display_id = self._display_id, f"{id(self)}-{shell.execution_count}"
            display(sheet, display_id=self._display_id, update=self._display_id == last)


def _with_looks(take_step: Callable[..., Any]) -> Any:
    """Wrap `scheduler.step` once for all who watch, so that they may end in any order."""

    @wraps(take_step)  # pipelines look at which arguments it has
    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        # First, because some schedulers count their steps.
        for look in tuple(looks):
            look(model_output, timestep, sample)
        return take_step(model_output, timestep, sample, *args, **kwargs)

    looks = step.looks = []  # type: ignore[attr-defined]
    return step
