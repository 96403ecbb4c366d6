"""Count the parameters of a configuration and what it computes for an image, by formulas, without importing torch."""

import math
from typing import Any

__all__ = ["SIZE_FIELDS", "count_flops", "count_parameters", "scale_grids"]

SIZE_FIELDS: dict[str, type] = {
    **dict.fromkeys(("in_channels", "patch_size", "latent_channels"), int),
    "scale_factors": list,
    "downsampling": str,
    "scale_causal": bool,
    **dict.fromkeys(("encoder_hidden_size", "encoder_num_layers", "encoder_num_heads"), int),
    **dict.fromkeys(("decoder_hidden_size", "decoder_num_layers", "decoder_num_heads"), int),
    **dict.fromkeys(("learned_positions", "linear_path"), int),
    "mlp_ratio": float,
    "qk_norm": bool,
    "output_conv": bool,
    **dict.fromkeys(("norm_before_blocks", "norm_after_blocks"), bool),
}
"""Fields of a `HieraTokConfig` that decide its sizes, each with the type that it usually has in JSON."""


def count_parameters(config: Any) -> dict[str, int]:
    """
    Count the parameters of both sides.

    Args:
        config (`HieraTokConfig`): A configuration, or any object with its `SIZE_FIELDS`.

    Returns:
        The numbers by the names `"encoder"` and `"decoder"`.
    """
    channels, latent = config.in_channels * config.patch_size**2, config.latent_channels
    encoder = _blocks_parameters(config, "encoder")
    encoder += (channels + 1) * config.encoder_hidden_size + (config.encoder_hidden_size + 1) * 2 * latent
    encoder += config.linear_path**2 * channels * latent

    width = config.decoder_hidden_size
    decoder = _blocks_parameters(config, "decoder")
    decoder += (latent + 1) * width + len(config.scale_factors) * width + (width + 1) * channels
    if config.downsampling == "learned":
        decoder += sum((latent * factor**2 + 1) * width for factor in config.scale_factors[:-1])
    if config.linear_path:
        numbers = sum(_square_numbers(config, factor) for factor in config.scale_factors)
        decoder += (latent * config.linear_path**2 + 1) * numbers
    if config.output_conv:
        decoder += (9 * config.in_channels + 1) * config.in_channels
    return {"encoder": encoder, "decoder": decoder}


def count_flops(config: Any, height: int, width: int) -> dict[str, Any]:
    """
    Count the floating-point operations for one image, two a multiply-add, as torch's `FlopCounterMode` counts them.

    Matrix products, convolutions and attention count; where tokens see some scales alone, their pairs count.

    Args:
        config (`HieraTokConfig`): A configuration, or any object with its `SIZE_FIELDS`.
        height, width (`int`): Sides of the image in pixels, multiples of the patch size.

    Returns:
        `"encode"`, a number; and `"decode"`, a list of the numbers that decoding up to each scale takes, or of that up
        to the last one where no scale can be decoded without the finer ones.
    """
    grids = scale_grids(config, height, width)
    rows, columns = grids[-1]
    cells, latent = rows * columns, config.latent_channels
    patch, size = config.in_channels * config.patch_size**2, config.encoder_hidden_size
    encode = cells * (patch * size + 2 * latent * size + config.linear_path**2 * patch * latent)
    encode += _blocks_products(config, "encoder", cells, cells**2)

    size, decode, before, pairs, embedded = config.decoder_hidden_size, [], 0, 0, 0
    for factor, (grid_rows, grid_columns) in zip(config.scale_factors, grids):
        tokens = grid_rows * grid_columns
        before += tokens
        pairs = pairs + tokens * before if config.scale_causal else before**2
        # Blocks of the latent are convolved with one more row and column, whose results are left out.
        is_block = config.downsampling == "learned" and factor > 1
        embedded += (grid_rows + 1) * (grid_columns + 1) * factor**2 * latent if is_block else tokens * latent
        products = embedded * size + _blocks_products(config, "decoder", before, pairs) + tokens * size * patch
        if config.linear_path:
            sources = tokens if config.downsampling == "mean" else cells
            products += sources * _square_numbers(config, factor) * latent * config.linear_path**2
        if config.output_conv:
            products += 9 * config.in_channels**2 * tokens * config.patch_size**2
        decode.append(2 * products)
    return {"encode": 2 * encode, "decode": decode if config.scale_causal else decode[-1:]}


def scale_grids(config: Any, height: int, width: int) -> list[tuple[int, int]]:
    """Give the rows and columns of tokens of each scale for an image of `height` x `width` pixels, coarse to fine."""
    rows, columns = height // config.patch_size, width // config.patch_size
    return [(math.ceil(rows / factor), math.ceil(columns / factor)) for factor in config.scale_factors]


def _layers(config: Any, side: str) -> tuple[int, int, int, int]:
    """Give a side's width, its number of layers, its number of heads, and the width of its feed-forward layers."""
    size, layers, heads = (getattr(config, f"{side}_{name}") for name in ("hidden_size", "num_layers", "num_heads"))
    return size, layers, heads, int(2 / 3 * config.mlp_ratio * size)


def _blocks_parameters(config: Any, side: str) -> int:
    """Count the parameters of a side's blocks, of the norms around them and of its learned positions."""
    size, layers, heads, inner = _layers(config, side)
    block = 4 * (size + 1) * size + (size + 1) * 2 * inner + (inner + 1) * size
    block += 2 * size + (2 * (size // heads) if config.qk_norm else 0)
    norms = (config.norm_before_blocks + config.norm_after_blocks) * size
    return layers * block + norms + config.learned_positions**2 * size


def _blocks_products(config: Any, side: str, tokens: int, pairs: int) -> int:
    """Count the multiply-adds of a side's blocks, for so many tokens and pairs of a query and a key."""
    size, layers, _, inner = _layers(config, side)
    return layers * (tokens * (4 * size**2 + 3 * size * inner) + 2 * pairs * size)


def _square_numbers(config: Any, factor: int) -> int:
    """Count the numbers of the square that the linear path makes of a cell, as `HieraTokDecoder.cell_size` says."""
    divisor = 1 if config.downsampling == "mean" else math.gcd(config.patch_size, factor)
    return config.in_channels * (config.patch_size // divisor) ** 2
