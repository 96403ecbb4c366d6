"""Give the encoder to transformers as a backbone, whose feature maps detectors and segmenters are built on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput

from .configuration_hieratok import HieraTokConfig
from .core import HieraTokCore
from .modeling_hieratok import HieraTokPreTrainedModel, can_return_tuple, capture_both_sides
from .saving import WEIGHTS_STEM

if TYPE_CHECKING:
    filter_output_hidden_states = can_return_tuple  # transformers' own has no types
else:
    from transformers.backbone_utils import filter_output_hidden_states

__all__ = ["HieraTokBackbone"]


class HieraTokBackbone(BackboneMixin, HieraTokPreTrainedModel):
    """
    Compute feature maps of chosen blocks of the encoder, as a backbone of transformers.

    It loads the folders of `HieraTokModel`, of whose weights it takes those of the encoder's blocks. `"stem"` is the
    input of the first block, `"stage1"` the output of the first, and so on; the encoder's last RMSNorm is computed of
    each, so the last map holds the tokens of `HieraTokModel.get_image_features`.

    Args:
        config (`HieraTokConfig`): Sizes and options; `out_features` or `out_indices` choose the maps, the last one
            unless given.

    Raises:
        ValueError: The configuration names a map that the encoder has not, or images are not as the model takes them.

    Example:

    ```python
    >>> import torch
    >>> from hieratok_hf import HieraTokBackbone
    >>> backbone = HieraTokBackbone.from_pretrained("hieratok-tiny", out_features=["stem", "stage2"])
    >>> [tuple(map.shape) for map in backbone(torch.zeros(1, 3, 64, 96)).feature_maps], backbone.channels
    ([(1, 128, 8, 12), (1, 128, 8, 12)], [128, 128])

    ```
    """

    _keys_to_ignore_on_load_unexpected = [r"^core\.decoder\.", r"^core\.encoder\.(head|linear_path)\."]

    def __init__(self, config: HieraTokConfig):
        config.set_output_features_output_indices(config.out_features, config.out_indices)
        super().__init__(config)
        for name in ("_class_name", "_diffusers_version", "auto_map"):  # of the whole model that it was read from
            config.__dict__.pop(name, None)
        self.num_features = [config.encoder_hidden_size] * len(config.stage_names)
        self.core = HieraTokCore(config)
        # No parameter stays without a gradient, which training in several processes refuses.
        self.core.decoder = self.core.encoder.head = nn.Identity()  # type: ignore[assignment]
        self.core.encoder.linear_path = None
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BackboneOutput:
        """
        Compute the feature maps of images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): Images in [-1, 1]; sides are multiples of the patch.
            kwargs: `return_dict`, `output_hidden_states`, `output_attentions` as in every transformers model.

        Returns:
            `feature_maps`, a tuple of maps of shape `(B, D, h, w)` in the order of `out_features`; with
            `output_hidden_states=True` also the tokens of all maps before the norm, each of shape `(B, h * w, D)`.
        """
        output = self._encode(pixel_values, **kwargs)
        patch_size = self.config.patch_size
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)
        chosen = [state for name, state in zip(self.stage_names, output.hidden_states) if name in self.out_features]
        norm = self.core.encoder.norm_after
        return BackboneOutput(
            feature_maps=tuple(norm(state).transpose(1, 2).unflatten(2, grid) for state in chosen),  # (B, D, h, w)
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """
        Save the encoder alone as `PreTrainedModel.save_pretrained` does, for this class to load.

        Raises:
            ValueError: `save_directory` holds a whole model, whose weights would no longer fit its `config.json`.
        """
        if any(Path(save_directory).glob(f"{WEIGHTS_STEM}*")):
            raise ValueError(f"`save_directory` must not hold a whole model, got {str(save_directory)!r}, which does.")
        super().save_pretrained(save_directory, *args, **kwargs)

    @capture_both_sides  # the last hidden state stays what it is before the norm
    def _encode(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        _, features = self.core.encode_moments(self._to_own_dtype(pixel_values))
        return BaseModelOutput(last_hidden_state=features)
