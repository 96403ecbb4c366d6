"""Tests of the names to choose among."""

from hieratok_hf import SHIPPED, SIZES, HieraTokConfig
from hieratok_hf.utils.choices import DIT_SIZES, LATENT_DTYPES


def test_names_are_those_of_models_that_can_be_made():
    for size in SIZES:
        assert HieraTokConfig.from_size(size).patch_size in (8, 16)
    assert {*SHIPPED} - {*SIZES} == {"hieratok-dit-tiny"}
    assert all(
        {*values} == {"num_layers", "num_attention_heads", "attention_head_dim"} for values in DIT_SIZES.values()
    )
    assert LATENT_DTYPES["float16"] == "F16"
