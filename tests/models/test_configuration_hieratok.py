"""Tests of `configuration_hieratok`: round trips, and that both libraries agree on every default."""

import dataclasses
import inspect
import json

import pytest
from helpers import TINY, tiny
from transformers import AutoConfig

from hieratok_hf import AutoencoderHieraTok, HieraTokConfig
from hieratok_hf.models.configuration_hieratok import complete_saved
from hieratok_hf.utils.choices import DOWNSAMPLING


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
        ("scale_factors", (10**6, 1)),
    ],
)
def test_sizes_beyond_any_memory_are_told_before_it_is_asked_for(name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        HieraTokConfig(**{name: value})


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


def test_the_names_of_transformers_read_and_write_the_fields():
    aliases = {"num_channels": "in_channels", "image_size": "sample_size", "hidden_size": "encoder_hidden_size"}
    for alias, name in {**aliases, "num_attention_heads": "encoder_num_heads"}.items():
        config = HieraTokConfig(**{**TINY, alias: 8})
        assert getattr(config, alias) == getattr(config, name) == 8
        setattr(config, alias, 4)
        assert getattr(config, name) == 4 and alias not in config.to_dict()
    assert config.num_hidden_layers == config.encoder_num_layers + config.decoder_num_layers == 4


@pytest.mark.parametrize("name", ["latent_channel", "scale_factor", "patchsize", "foo"])
def test_an_argument_that_does_not_exist_is_refused_and_kept_in_files(name, tmp_path, caplog):
    with pytest.raises(ValueError, match=repr(name)):
        HieraTokConfig(**TINY, **{name: 8})
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 8}))
    for load in (HieraTokConfig.from_pretrained, AutoConfig.from_pretrained):
        caplog.clear()
        assert getattr(load(tmp_path), name) == 8  # somebody's own entry, or a mistake
        assert [repr(name) in message for message in caplog.messages] == ([] if name == "foo" else [True])
    vae = AutoencoderHieraTok.from_config(AutoencoderHieraTok.load_config(tmp_path))
    assert vae.config[name] == 8 and HieraTokConfig.from_pretrained(tmp_path).latent_channels == 4
    if name != "foo":
        for load in (HieraTokConfig.from_pretrained, AutoencoderHieraTok.from_config):
            with pytest.raises(ValueError, match=repr(name)):
                load(tmp_path if load == HieraTokConfig.from_pretrained else tiny().model_fields, **{name: 8})


def test_what_transformers_gave_every_model_changes_nothing(caplog):
    old = {"use_cache": False, "torchscript": False, "pruned_heads": {}, "is_decoder": False}
    config = HieraTokConfig(**TINY, **old)
    assert config.model_fields == tiny().model_fields and not caplog.messages


def test_everything_that_libraries_have_in_a_configuration_is_an_argument(tmp_path):
    AutoencoderHieraTok(**TINY).save_pretrained(tmp_path)
    loaded = HieraTokConfig.from_pretrained(tmp_path)
    again = HieraTokConfig(**loaded.to_dict(), num_labels=3, torch_dtype="float32", tie_word_embeddings=False)
    assert again.model_fields == loaded.model_fields and again._class_name == "AutoencoderHieraTok"
    assert HieraTokConfig.from_pretrained(tmp_path, num_channels=1, kl_weight=2.0).in_channels == 1
    with pytest.raises(ValueError, match="`downsampling`"):
        HieraTokConfig.from_pretrained(tmp_path, downsampling="bogus")
