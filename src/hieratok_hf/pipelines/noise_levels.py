"""Read from a scheduler of diffusers how noisy the latents of a step are, and which clean ones a model predicts."""

import inspect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

__all__ = ["PREDICTION_TYPES", "NoiseLevel", "noise_levels", "prediction_type_of", "read_noise_levels"]

PREDICTION_TYPES = ("flow_prediction", "epsilon", "v_prediction", "sample")
"""Names of predictions: the velocity of flow matching, the noise, `v`, or the clean sample."""

_LEFT = 0.05  # share of noise with which schedulers may end: DPM-Solver's `sigma_min` is 0.03


@dataclass(frozen=True)
class NoiseLevel:
    """
    Hold the noise level of a step: `z_t = signal * z + noise * n`, with clean latents `z` and standard normal `n`.

    Attributes:
        signal, noise (`float`): Factors of the clean latents and of the noise, in what a model is fed.
        kind (`str`): Name of what the model predicts, as `prediction_type_of` gives it.
    """

    signal: float
    noise: float
    kind: str

    @property
    def share(self) -> float:
        """Compute the share of noise: 0 is clean, 1 is noise alone. With flow matching it is the time."""
        return self.noise / (self.signal + self.noise)

    def clean(self, model_input: Tensor, prediction: Tensor) -> Tensor:
        """
        Compute the clean latents `(B, C, h, w)` from the noisy `model_input` `(B, C, h, w)` that a model was fed and
        its `prediction` `(B, C, h, w)`.
        """
        if self.kind == "flow_prediction":
            return model_input - self.noise * prediction
        if self.kind == "epsilon":
            # Noise alone says nothing of what is under it.
            return (model_input - self.noise * prediction) / max(self.signal, 1e-4)
        if self.kind == "v_prediction":
            return self.signal * model_input - self.noise * prediction
        return prediction


def prediction_type_of(scheduler: Any) -> str:
    """
    Name what a model must predict for a scheduler.

    Args:
        scheduler (`SchedulerMixin`): A scheduler of flow matching, or one with a `prediction_type`.

    Returns:
        `str`: `"flow_prediction"` (the velocity of flow matching), `"epsilon"`, `"v_prediction"` or `"sample"`.

    Raises:
        ValueError: `scheduler` is of no kind that this package knows.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if not isinstance(scheduler, SchedulerMixin) or "num_train_timesteps" not in config:
        raise ValueError(f"`scheduler` is a {name}, which is no scheduler of diffusers with `num_train_timesteps`.")
    needed = [p.name for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    if len(needed) != 3:
        raise ValueError(f"`scheduler` is a {name}, which asks for {needed} in a step.")
    if name.startswith("FlowMatch"):  # made for flow matching alone, which its configuration does not say
        return "flow_prediction"
    kind: Any = config.get("prediction_type")
    is_flow, has_flow_sigmas = kind == "flow_prediction", config.get("use_flow_sigmas")
    if is_flow and has_flow_sigmas is None:
        raise ValueError(f"`scheduler` is a {name}, which cannot do flow matching: take another scheduler.")
    if bool(has_flow_sigmas) != is_flow:
        raise ValueError(
            f"`scheduler` is a {name} with use_flow_sigmas={has_flow_sigmas} and prediction_type={kind!r}, where flow "
            f"matching needs {name}.from_config(config, use_flow_sigmas=True, prediction_type='flow_prediction')."
        )
    if not is_flow and (kind not in PREDICTION_TYPES or not hasattr(scheduler, "alphas_cumprod")):
        raise ValueError(
            f"`scheduler` is a {name} of prediction type {kind!r}: neither of flow matching nor with `alphas_cumprod`."
        )
    return kind


def noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """
    Compute the noise level with which each step of a scheduler begins, once its `set_timesteps` was called.

    Raises:
        ValueError: `scheduler` is of no kind that `prediction_type_of` knows, its noise rises from one step to the
            next, or it ends with noise.
    """
    name, levels = type(scheduler).__name__, read_noise_levels(scheduler)
    left = 0.0
    if hasattr(scheduler, "sigmas"):
        left = _level(float(scheduler.sigmas[-1]), prediction_type_of(scheduler)).share
    if any(following.share > level.share + 1e-4 for level, following in pairwise(levels)):
        raise ValueError(f"`scheduler` is a {name} whose noise rises from one step to the next.")
    if left > _LEFT:
        raise ValueError(
            f"`scheduler` is a {name} that ends with a share of noise of {left:.2f} after {len(levels)} steps: "
            "take more steps or another scheduler."
        )
    return levels


def read_noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """
    Read what `noise_levels` computes, of schedulers too that do not end with clean latents.

    Raises:
        ValueError: `scheduler` is of no kind that `prediction_type_of` knows.
    """
    kind = prediction_type_of(scheduler)
    if hasattr(scheduler, "sigmas"):
        # All at once: a GPU would have to wait for each.
        sigmas = scheduler.sigmas.tolist()[: len(scheduler.timesteps)]
        if hasattr(scheduler, "sigmas_interpol"):
            # KDPM2 asks a second time between two steps; its ancestral twin counts from the step before.
            first = 0 if "Ancestral" in type(scheduler).__name__ else 1
            sigmas[1::2] = scheduler.sigmas_interpol.tolist()[first : len(sigmas) - 1 + first : 2]
    else:
        kept = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps.tolist()]
        sigmas = [math.sqrt((1 - share) / share) if share else math.inf for share in kept]
    return [_level(sigma, kind) for sigma in sigmas]


def _level(sigma: float, kind: str) -> NoiseLevel:
    if kind == "flow_prediction":
        return NoiseLevel(1 - sigma, sigma, kind)
    if sigma == math.inf:
        return NoiseLevel(0.0, 1.0, kind)
    signal = 1 / math.hypot(1.0, sigma)
    return NoiseLevel(signal, sigma * signal, kind)
