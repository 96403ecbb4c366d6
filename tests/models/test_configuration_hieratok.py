"""Tests of `configuration_hieratok`: named sizes, round trips, and that both libraries agree on every default."""

import dataclasses
import inspect
import json

import pytest
from helpers import TINY, tiny
from transformers import AutoConfig

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig, HieraTokCore
from hieratok_hf.models.configuration_hieratok import DOWNSAMPLING, complete_saved


@pytest.mark.parametrize(
    ("size", "encoder", "decoder", "patch_size", "latent_channels"),
    [
        ("hieratok-tiny", (2, 128, 4), (4, 128, 4), 8, 16),
        ("hieratok-tiny-16x", (3, 160, 5), (6, 160, 5), 16, 16),
        ("hieratok-s", (8, 512, 8), (8, 512, 8), 16, 16),
        ("hieratok-b", (12, 768, 12), (12, 768, 12), 16, 16),
        ("hieratok-l", (12, 768, 12), (24, 1024, 16), 16, 32),
    ],
)
def test_named_sizes_are_those_of_the_table(size, encoder, decoder, patch_size, latent_channels):
    config = HieraTokConfig.from_size(size)
    assert (config.encoder_num_layers, config.encoder_hidden_size, config.encoder_num_heads) == encoder
    assert (config.decoder_num_layers, config.decoder_hidden_size, config.decoder_num_heads) == decoder
    assert (config.patch_size, config.latent_channels) == (patch_size, latent_channels)
    assert (config.scale_factors, config.downsampling) == ((8, 4, 2, 1), "learned")


def test_from_size_replaces_only_what_is_given():
    config = HieraTokConfig.from_size("hieratok-l", scale_factors=(1,), qk_norm=True)
    expected = {**HieraTokConfig.from_size("hieratok-l").model_fields, "scale_factors": (1,), "qk_norm": True}
    assert config.model_fields == expected
    assert HieraTokConfig() == HieraTokConfig.from_size("hieratok-b")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 2**31) for name in ("patch_size", "encoder_hidden_size", "decoder_num_layers", "sample_size")),
        *(
            (name, 10**400)
            for name in ("in_channels", "mlp_ratio", "rotary_base", "learned_positions", "coarse_weight")
        ),
        *((name, 2**16) for name in ("patch_size", "encoder_hidden_size", "learned_positions")),
        ("linear_path", 2**16 - 1),
        ("scale_factors", (10**6, 1)),
        ("scale_factors", (2**13, 1)),
        ("scale_factors", tuple(range(300, 0, -1))),
        ("mlp_ratio", 1e9),
    ],
)
def test_sizes_beyond_any_memory_are_told_before_it_is_asked_for(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        HieraTokConfig(**{name: value})


def test_weights_are_counted_about_as_the_model_has_them():
    for overrides in ({"learned_positions": 5}, {"scale_factors": (8, 5, 1)}, {"downsampling": "mean"}):
        config = tiny(**overrides)
        parameters = HieraTokCore(config).parameters()
        counted, there = sum(config._count_weights().values()), sum(x.numel() for x in parameters if x.ndim > 1)
        assert there == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
def test_json_keeps_every_value_also_that_of_the_default_downsampling(downsampling, tmp_path):
    config = tiny(scale_factors=[3, 1], kl_weight=0.5, rotary_pairing="detok", downsampling=downsampling)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["downsampling"] == downsampling
    written = [json.loads(config.to_json_string(use_diff=use_diff)) for use_diff in (True, False)]
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HieraTokConfig)
    for again in (loaded, *map(HieraTokConfig.from_dict, written), HieraTokConfig(**config.model_fields)):
        assert again.model_fields == config.model_fields and again.scale_factors == (3, 1)
    assert loaded == HieraTokConfig.from_dict(written[1]) != AutoConfig.from_pretrained(tmp_path, kl_weight=0.25)
    assert AutoencoderHieraTok.from_config(config.model_fields).config.downsampling == downsampling


@pytest.mark.parametrize("library", ["transformers_version", "_diffusers_version"])
def test_a_configuration_from_before_there_was_a_choice_is_one_of_averages(library, tmp_path):
    old = {**TINY, library: "1.0.0", "model_type": "hieratok"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    loaded = [HieraTokConfig.from_dict(old), HieraTokConfig.from_pretrained(tmp_path)]
    loaded += [AutoConfig.from_pretrained(tmp_path), AutoencoderHieraTok.from_config(old).config]
    assert [config.downsampling for config in loaded] == ["mean"] * 4
    assert "downsampling" not in old
    # What no library has saved are arguments, and those that say what they mean are taken at their word.
    assert HieraTokConfig.from_dict(TINY).downsampling == "learned"
    assert AutoencoderHieraTok.from_config(TINY).config.downsampling == "learned"
    assert complete_saved({**old, "downsampling": "learned"})["downsampling"] == "learned"
    assert HieraTokConfig.from_pretrained(tmp_path, downsampling="learned").downsampling == "learned"


def test_autoencoder_has_the_fields_and_defaults_of_the_configuration_in_order():
    parameters = inspect.signature(AutoencoderHieraTok.__init__).parameters
    own = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    fields = {field.name: field.default for field in dataclasses.fields(HieraTokConfig)}
    assert list(own) == list(HieraTokConfig.__annotations__)
    assert not [name for name in own if "_std" in name]  # which the suite of transformers overwrites
    for name, default in own.items():
        assert default == fields[name] and type(default) is type(fields[name]), name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("num_channels", "in_channels"),
        ("image_size", "sample_size"),
        ("hidden_size", "encoder_hidden_size"),
        ("num_attention_heads", "encoder_num_heads"),
    ],
)
def test_aliases_read_and_write_the_field(alias, name):
    config = HieraTokConfig(**{**TINY, alias: 8})
    assert getattr(config, alias) == getattr(config, name) == 8
    setattr(config, alias, 4)
    assert getattr(config, name) == 4 and alias not in config.to_dict()
    assert config.num_hidden_layers == config.encoder_num_layers + config.decoder_num_layers == 4
