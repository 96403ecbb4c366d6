"""Parameters and FLOPs by formulas are what PyTorch counts, for every option that changes them."""

from types import SimpleNamespace

import pytest
import torch
from helpers import DETOK, tiny
from torch.utils.flop_counter import FlopCounterMode

from hieratok_hf import SIZES, HieraTokConfig, HieraTokCore
from hieratok_hf.models.sizes import SIZE_FIELDS, count_flops, count_parameters

CONFIGS = {
    **{name: HieraTokConfig.from_size(name) for name in SIZES},
    "mean": tiny(downsampling="mean"),
    "odd scales": tiny(scale_factors=(7, 3, 1), patch_size=8, in_channels=4, mlp_ratio=2.5),
    "one scale": tiny(scale_factors=(1,), linear_path=0, output_conv=False, norm_after_blocks=False),
    "not causal": tiny(scale_causal=False, linear_path=1, encoder_num_layers=1),
    "as l-DeTok": tiny(**DETOK),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_formulas_are_what_pytorch_counts(name):
    config = CONFIGS[name]
    height, width = 5 * config.patch_size, 11 * config.patch_size
    with torch.device("meta"):
        core = HieraTokCore(config).eval()
        pixel_values = torch.empty(1, config.in_channels, height, width)

    def flops(function, *args):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = function(*args)
        return counter.get_total_flops(), result

    encode, latents = flops(lambda x: core.encode_moments(x)[0].chunk(2, dim=1)[0], pixel_values)
    scales = range(1 if config.scale_causal else len(config.scale_factors), len(config.scale_factors) + 1)
    expected = {"encode": encode, "decode": [flops(core.decode, latents, k)[0] for k in scales]}
    only_sizes = SimpleNamespace(**{field: getattr(config, field) for field in SIZE_FIELDS})
    assert count_flops(only_sizes, height, width) == expected
    sides = {"encoder": core.encoder, "decoder": core.decoder}
    counted = {side: sum(x.numel() for x in module.parameters()) for side, module in sides.items()}
    assert count_parameters(only_sizes) == counted
