"""Tests of `latent_archive`: latents and images come back, runs go on, and what is damaged or foreign is refused."""

import json
import lzma
import math
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
from archive_files import BROKEN, SIZES, write_images
from helpers import Bomb, random_core, tree
from latent_data import tiny_kl, tiny_without_posterior
from torch.nn import functional as F

from hieratok_hf import AutoencoderHieraTok, HieraTokImageProcessorPil, open_image
from hieratok_hf.data.archive_shards import FILE_FORMATS
from hieratok_hf.data.latent_archive import LatentArchive, decode_record, write_archive
from hieratok_hf.data.manifests import write_manifest
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.choices import ARCHIVE_FORMATS
from hieratok_hf.utils.images import from_uint8, to_uint8

PATCH = 4
SMALL = {"shard_size": 4, "dtype": torch.float32}
FORMATS = [*ARCHIVE_FORMATS]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("records") / "in")


@pytest.fixture(scope="module")
def codec():
    return Codec(random_core())


@pytest.fixture(scope="module")
def whole(records, codec, tmp_path_factory):
    """An archive of all images in three shards, not to be changed."""
    folder = tmp_path_factory.mktemp("archive") / "whole"
    write_archive(codec, records, folder, model="mine", **SMALL)
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def pixel_values_of(path):
    """The values of an image in [-1, 1], its last rows and columns repeated up to whole patches."""
    values = from_uint8(torch.from_numpy(np.array(open_image(path)))).permute(2, 0, 1)[None]
    height, width = values.shape[2:]
    return F.pad(values, (0, -width % PATCH, 0, -height % PATCH), mode="replicate")


@pytest.mark.parametrize("file_format", FORMATS)
def test_latents_are_those_of_the_images_continued_to_whole_patches(file_format, codec, records, tmp_path):
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    told = []
    summary = write_archive(
        codec, records, tmp_path, file_format=file_format, progress=lambda *x: told.append(x), **SMALL
    )
    skipped = summary.pop("skipped")
    assert summary == {"records": 7, "shards": 3, "encoded": 7} and told == [(i + 1, 9) for i in range(9)]
    assert tuple(skipped) == BROKEN and "is no image" in skipped["b/text.jpg"] and str(tmp_path) not in str(skipped)
    archive = LatentArchive(tmp_path)
    assert len(archive) == 7 and archive.skipped == skipped
    assert {x.name: (x.width, x.height) for x in archive.records} == SIZES
    for record, latent in archive:
        with torch.inference_mode():
            expected = codec.encode(pixel_values_of(records / record.name))[0]
        assert torch.equal(latent, expected), record.name
        assert record.box == (0, 0, record.width, record.height)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file_format", FORMATS)
def test_smaller_dtypes_round_and_are_refused_where_a_format_has_none(
    file_format, dtype, codec, records, whole, tmp_path
):
    options = {"file_format": file_format, "dtype": dtype}
    if dtype == torch.bfloat16 and file_format != "safetensors":
        with pytest.raises(ValueError, match=f"`dtype`.*{file_format}"):
            write_archive(codec, records, tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()
        return
    write_archive(codec, records, tmp_path, **options)
    for (_, latent), (_, exact) in zip(LatentArchive(tmp_path), LatentArchive(whole), strict=True):
        assert torch.equal(latent, exact.to(dtype))


def test_a_decoded_image_has_its_size_and_is_what_the_model_makes_of_it(codec, records, whole):
    scales = codec.core.config.scale_factors
    for record, latent in LatentArchive(whole):
        with torch.no_grad():
            expected = codec.core.decode_scales(codec.encode(pixel_values_of(records / record.name)))
        for count in (None, *range(1, len(scales) + 1)):
            image = decode_record(codec, record, latent, count)
            made, factor = (expected[count - 1], scales[count - 1]) if count else (expected[-1], 1)
            width, height = (math.ceil(side / factor) for side in (record.width, record.height))
            levels = to_uint8(made[0, :, :height, :width]).permute(1, 2, 0).numpy()
            assert image.size == (width, height) and np.array_equal(np.asarray(image), levels)


def test_a_crop_is_that_of_the_image_processor(codec, records, tmp_path):
    summary = write_archive(codec, records, tmp_path, fit="crop", **SMALL)
    assert {*summary["skipped"]} == {*BROKEN, "c 1/dot.png"} and "4 pixels" in summary["skipped"]["c 1/dot.png"]
    processor = HieraTokImageProcessorPil(size_divisor=PATCH)
    for record, latent in LatentArchive(tmp_path):
        image = open_image(records / record.name)
        pixel_values = processor(image, return_tensors="pt").pixel_values
        with torch.inference_mode():
            torch.testing.assert_close(latent, codec.encode(pixel_values)[0], rtol=1e-4, atol=1e-5)
        assert np.array_equal(np.asarray(image.crop(record.box)), processor.postprocess(pixel_values)[0])
        assert decode_record(codec, record, latent).size == (pixel_values.shape[3], pixel_values.shape[2])


def test_tiles_are_those_of_the_model(records, tmp_path):
    vae = AutoencoderHieraTok.from_core(random_core())
    vae.enable_tiling(16, 16)
    codec = Codec(vae)
    write_archive(codec, records, tmp_path, **SMALL)
    archive, plain = LatentArchive(tmp_path), Codec(random_core())
    assert archive.settings["tiling"]
    for record, latent in archive:
        pixel_values = pixel_values_of(records / record.name)
        with torch.no_grad():
            expected, whole = vae.encode(pixel_values).latent_dist.mode(), plain.encode(pixel_values)
            small = vae.decode(expected, num_scales=2).sample
        assert torch.equal(latent, expected[0]) and torch.equal(expected, whole) == (max(pixel_values.shape) <= 16)
        width, height = (math.ceil(side / codec.core.config.scale_factors[1]) for side in record.box[2:])
        levels = to_uint8(small[0, :, :height, :width]).permute(1, 2, 0).numpy()
        assert np.array_equal(np.asarray(decode_record(codec, record, latent, 2)), levels)
    with pytest.raises(ValueError, match="another archive: tiling True, not False"):
        write_archive(plain, records, tmp_path, **SMALL)


def test_a_latent_of_another_shape_is_refused(codec, records, tmp_path, monkeypatch):
    monkeypatch.setattr(Codec, "encode", lambda self, pixel_values: torch.zeros(1, 4, 7, 7))
    with pytest.raises(ValueError, match=r"'a\.png' cannot be encoded: .*\(4, 8, 12\), got \(4, 7, 7\)"):
        write_archive(codec, records, tmp_path)


@pytest.mark.parametrize("model", [tiny_kl, tiny_without_posterior])
def test_any_autoencoder_of_diffusers_keeps_the_sizes(model, records, tmp_path):
    codec = Codec(model())
    write_archive(model(), records, tmp_path)
    archive = LatentArchive(tmp_path)
    archive.check_encoder(codec)
    assert {x.name: decode_record(codec, x, latent).size for x, latent in archive} == SIZES
    with pytest.raises(ValueError, match="`num_scales=1`"):
        decode_record(codec, *next(iter(archive)), 1)


def test_a_run_goes_on_with_what_is_missing_or_damaged(codec, records, whole, copy):
    (copy / "shard-00000.json").unlink()
    shard = copy / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=r"unfinished.*3 shards.*0"):
        LatentArchive(copy)
    moved = shutil.copytree(records, copy.parent / "moved")  # where the images lie does not count
    summary = write_archive(codec, moved, copy, model="under another name", **SMALL)
    assert tree(copy) == tree(whole) and summary["encoded"] == 6 and summary["records"] == 7
    assert write_archive(codec, records, copy, **SMALL)["encoded"] == 0 and tree(copy) == tree(whole)


CHANGES = {"dtype": torch.float16, "fit": "crop", "shard_size": 5, "file_format": "webdataset"}


@pytest.mark.parametrize("name", [*CHANGES, "encoder", "images"])
def test_another_archive_is_not_gone_on_with(name, codec, records, whole, copy):
    other = Codec(random_core(seed=1)) if name == "encoder" else codec
    if name == "images":
        records = shutil.copytree(records, copy.parent / "changed")
        content = bytearray((records / "c 1/é.bmp").read_bytes())
        content[-1] ^= 1
        (records / "c 1/é.bmp").write_bytes(content)
    options = {name: CHANGES[name]} if name in CHANGES else {}
    with pytest.raises(ValueError, match=f"another archive: {name} "):
        write_archive(other, records, copy, **{**SMALL, **options})
    assert tree(copy) == tree(whole)


def test_an_archive_knows_its_encoder(codec, whole):
    archive, other = LatentArchive(whole), random_core()
    with torch.no_grad():
        next(other.decoder.parameters()).add_(1)
        archive.check_encoder(Codec(other))
        next(other.encoder.parameters()).add_(1)
    with pytest.raises(ValueError, match="encoder"):
        archive.check_encoder(Codec(other))
    assert archive.settings["model"] == "mine"


BAD = {
    "shard_size": {"shard_size": 0},
    "threads": {"threads": 0},
    "file_format": {"file_format": "zip"},
    "fit": {"fit": "stretch"},
    "dtype": {"dtype": torch.float64},
}


@pytest.mark.parametrize(("name", "options"), BAD.items(), ids=BAD)
def test_bad_arguments_are_named_and_nothing_is_written(name, options, codec, records, tmp_path):
    with pytest.raises(ValueError, match=f"`{name}`"):
        write_archive(codec, records, tmp_path / "new", **options)
    assert not [*tmp_path.iterdir()]


def test_sources_and_folders_that_will_not_do(codec, records, tmp_path):
    (tmp_path / "empty").mkdir()
    for source, error in (("empty", ValueError), ("missing", FileNotFoundError)):
        with pytest.raises(error, match=source):
            write_archive(codec, tmp_path / source, tmp_path / "new")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "shard-00000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"strange.*archive\.json"):
        write_archive(codec, records, tmp_path / "strange")
    with pytest.raises(FileNotFoundError, match=r"archive\.json"):
        LatentArchive(tmp_path / "empty")


def test_parquet_without_pyarrow_says_what_to_install(codec, records, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    write_archive(codec, records, tmp_path / "archive", file_format="parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"hieratok_hf\[eval\]"):
        write_archive(codec, records, tmp_path / "new", file_format="parquet")
    with pytest.raises(ImportError, match=r"hieratok_hf\[eval\]"):
        LatentArchive(tmp_path / "archive")
    assert not (tmp_path / "new").exists()


def test_latents_that_are_not_finite_name_the_image(records, tmp_path):
    core = random_core()
    with torch.no_grad():
        core.encoder.head.bias += 1e6
    with pytest.raises(ValueError, match=r"'a\.png' is not finite in float16: try another `dtype`"):
        write_archive(core, records, tmp_path)


def change_facts(folder, **changes):
    """Change what the first shard says of itself, with a checksum that fits."""
    path = folder / "shard-00000.json"
    facts = json.loads(path.read_text())
    del facts["checksum"]
    write_manifest(path, {**facts, **changes})
    return facts


NAMES = ["../a.png", "/etc/a.png", "b/../../a.png", "a", "", ".", "b//a.png", "b/./a.png", "a\0.png", "a.png/", 7]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_or_to_no_image_are_refused(name, copy):
    first, *others = change_facts(copy)["records"]
    change_facts(copy, records=[{**first, "name": name}, *others])
    with pytest.raises(ValueError, match=r"shard-00000\.json' is damaged: .*'records'"):
        LatentArchive(copy)


@pytest.mark.parametrize("name", ["b/upright.jpg", "b/upright.jpg/a.png"])
def test_two_images_of_one_place_are_refused(name, copy):
    first, *others = change_facts(copy)["records"]
    change_facts(copy, records=[{**first, "name": name}, *others])
    with pytest.raises(ValueError, match="is damaged: two"):
        LatentArchive(copy)


@pytest.mark.parametrize("box", [[0, 0, 49, 32], [5, 0, 5, 32], [0, 0, 48], [0, -1, 48, 32], None])
def test_parts_that_an_image_does_not_have_are_refused(box, copy):
    first, *others = change_facts(copy)["records"]
    change_facts(copy, records=[{**first, "box": box}, *others])
    with pytest.raises(ValueError, match=r"shard-00000\.json' is damaged: .*'records'"):
        LatentArchive(copy)


def test_facts_of_another_place_or_number_are_refused(copy):
    facts = change_facts(copy)
    change_facts(copy, records=facts["records"][1:])
    with pytest.raises(ValueError, match="4 rows, got 3"):
        LatentArchive(copy)
    shutil.copy(copy / "shard-00001.json", copy / "shard-00000.json")
    with pytest.raises(ValueError, match="another place"):
        LatentArchive(copy)


@pytest.mark.parametrize("name", ["archive.json", "shard-00000.json", "shard-00000.safetensors"])
def test_no_changed_byte_goes_unnoticed(name, whole, copy):
    content, random = (whole / name).read_bytes(), np.random.default_rng(0)
    blank = b" \n"  # between entries of JSON one is as good as another
    places = [i for i in random.permutation(len(content)).tolist() if content[i] not in blank][:40]
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << int(random.integers(7))
        if json_equal(bytes(changed), content):
            continue
        (copy / name).write_bytes(changed)
        with pytest.raises(ValueError, match=name.partition(".")[0]):
            list(LatentArchive(copy))


def json_equal(one, other):
    """Whether both are JSON of one value, as `1E3` and `1e3`."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("file_format", FORMATS)
def test_contents_that_are_damaged_or_of_other_shapes_are_named(file_format, codec, records, tmp_path):
    if file_format == "parquet":
        pytest.importorskip("pyarrow")
    write_archive(codec, records, tmp_path, file_format=file_format, **SMALL)
    archive, shard = LatentArchive(tmp_path), tmp_path / f"shard-00000{FILE_FORMATS[file_format].suffix}"
    entries = list(archive)[: len(change_facts(tmp_path)["records"])]
    of_shard, latents = [record for record, _ in entries], [latent for _, latent in entries]

    def told(content):
        shard.write_bytes(content)
        change_facts(tmp_path, content=f"{zlib.crc32(content):08x}")
        with pytest.raises(ValueError, match=f"shard '.*{shard.name}' is damaged: ") as caught:
            list(LatentArchive(tmp_path))
        return str(caught.value)

    pack = FILE_FORMATS[file_format].pack
    whole = pack(of_shard, latents)
    told(b""), told(b"no shard"), told(whole[: len(whole) // 2])
    assert "a.png" in told(pack(of_shard, [latents[0][:, 1:].contiguous(), *latents[1:]]))
    assert "a.png" in told(pack(of_shard, [x.half() for x in latents]))
    if file_format == "webdataset":
        array = np.empty(1, object)
        array[0] = Bomb(tmp_path / "made")
        told(pack(of_shard, [type("", (), {"numpy": lambda self: array})(), *latents[1:]]))
        assert not (tmp_path / "made").exists()
    shard.write_bytes(b"x")
    with pytest.raises(ValueError, match="another checksum"):
        list(archive)


@pytest.fixture(scope="module")
def tokenizer():
    model = AutoencoderHieraTok.from_core(random_core())
    model.fit_quantizer([torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1])
    return model


@pytest.mark.parametrize("bits", [1, 5, 8])
def test_integers_are_those_of_the_model_and_come_back(bits, tokenizer, records, tmp_path):
    summary = write_archive(tokenizer, records, tmp_path, bits=bits, shard_size=4)
    assert (summary["records"], summary["shards"]) == (7, 3)
    archive = LatentArchive(tmp_path)
    assert (archive.settings["bits"], archive.settings["dtype"]) == (bits, "uint8")
    for (record, stored), (_, latent) in zip(archive.iterate_stored(), archive, strict=True):
        expected = tokenizer.tokenize(pixel_values_of(records / record.name), bits)
        assert stored.dtype == torch.uint8 and torch.equal(stored, expected[0])
        assert torch.equal(latent, tokenizer.quantizer.dequantize(expected, bits)[0])
    before = tree(tmp_path)
    assert write_archive(tokenizer, records, tmp_path, bits=bits, shard_size=4)["encoded"] == 0
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match=f"another archive.*bits {bits}, not 2"):
        write_archive(tokenizer, records, tmp_path, bits=2, shard_size=4)


@pytest.mark.parametrize("model", [tiny_kl, random_core])
def test_integers_need_levels(model, records, tmp_path):
    with pytest.raises(ValueError, match=r"`bits` needs .*`hieratok fit-quantizer`"):
        write_archive(model(), records, tmp_path / "new", bits=6)
    assert not list(tmp_path.iterdir())


def test_bits_out_of_range_are_named(tokenizer, records, tmp_path):
    with pytest.raises(ValueError, match=r"`bits`.*from 1 to 8, got 9"):
        write_archive(tokenizer, records, tmp_path / "new", bits=9)
    assert not list(tmp_path.iterdir())


def test_integers_with_other_levels_or_damage_are_refused(tokenizer, records, tmp_path):
    write_archive(tokenizer, records, tmp_path, bits=6)
    levels, shard = tmp_path / "quantizer.safetensors", tmp_path / "shard-00000.xz"
    for path, content, message in (
        (levels, AutoencoderHieraTok.from_pretrained("hieratok-tiny").quantizer.to_bytes(), "levels of another"),
        (levels, b"levels", "no file of levels"),
        (levels, None, "cannot be read"),
        (shard, shard.read_bytes()[:-1], "another checksum"),
    ):
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path.name}' .*{message}|{message}"):
            list(LatentArchive(tmp_path))
        path.write_bytes(whole)
    # Whoever changes a shard can also change the checksum beside it.
    archive = LatentArchive(tmp_path)
    stored = [tokens for _, tokens in archive.iterate_stored()]
    too_large = FILE_FORMATS["tokens"].pack(archive.records, [torch.full_like(stored[0], 64), *stored[1:]])
    for content, message in ((too_large, "integers of 6 bits, got 64"), (lzma.compress(b"no tensors"), "")):
        shard.write_bytes(content)
        change_facts(tmp_path, content=f"{zlib.crc32(content):08x}")
        with pytest.raises(ValueError, match=rf"shard-00000\.xz' is damaged.*{message}"):
            list(LatentArchive(tmp_path))
