"""What a scheduler of diffusers says of a step: how noisy the latents are, and which clean ones a model predicts."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["NoiseLevel", "noise_levels", "prediction_type_of"]


@dataclass(frozen=True)
class NoiseLevel:
    """
    What the latents of a step are made of: `signal` times clean ones and `noise` times standard normal noise.

    Attributes:
        signal, noise (`float`): The two factors, of the latents as a model is fed them.
        kind (`str`): What a model predicts from them, as `prediction_type_of` names it.
    """

    signal: float
    noise: float
    kind: str

    @property
    def share(self) -> float:
        """Of the noise: 0 is clean, 1 is noise alone. With flow matching it is the time."""
        return self.noise / (self.signal + self.noise)

    def clean(self, model_input: Tensor, prediction: Tensor) -> Tensor:
        """
        The clean latents that a prediction stands for.

        Args:
            model_input, prediction (`torch.Tensor` of shape `(B, C, h, w)`): What the model was fed, and gave.
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
    What a model must predict for a scheduler: `"flow_prediction"` (the velocity of flow matching), `"epsilon"`,
    `"v_prediction"` or `"sample"`.

    Raises:
        ValueError: `scheduler` is none of those that are known to this package.
    """
    config = getattr(scheduler, "config", {})
    name = type(scheduler).__name__
    # Those made for flow matching alone do not say so.
    kind = "flow_prediction" if name.startswith("FlowMatch") else config.get("prediction_type")
    if kind not in ("flow_prediction", "epsilon", "v_prediction", "sample"):
        raise ValueError(f"`scheduler` is a {name} of prediction type {kind!r}, which fits no transformer known here.")
    if kind == "flow_prediction" and not (name.startswith("FlowMatch") or config.get("use_flow_sigmas")):
        raise ValueError(f"`scheduler` is a {name} of prediction type {kind!r}, which needs use_flow_sigmas=True.")
    if kind != "flow_prediction" and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"`scheduler` is a {name}: neither of flow matching nor with `alphas_cumprod`.")
    return kind


def noise_levels(scheduler: Any) -> list[NoiseLevel]:
    """
    Those of the latents which each step of a scheduler begins with.

    Args:
        scheduler (`SchedulerMixin`): After `set_timesteps`.

    Raises:
        ValueError: As `prediction_type_of`.
    """
    kind = prediction_type_of(scheduler)
    if hasattr(scheduler, "sigmas"):
        # All at once: a GPU would have to wait for each.
        sigmas = scheduler.sigmas.tolist()[: len(scheduler.timesteps)]
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
