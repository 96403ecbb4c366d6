"""Whatever a user types is heeded, or refused in one line that names it, before anything is written."""

import importlib.util
import re

import pytest
from helpers import tree
from image_files import noise
from PIL import Image
from scripts import load_script

from hieratok_hf import pretrained

SCRIPTS = {
    "tokenizer": ("cli", "train", "--data {0}/images --output {0}/out"),
    "dit": ("cli", "train_dit", "--data {0}/images --output {0}/out --class_names a b"),
    "dit_of_latents": ("cli", "train_dit", "--latents {0}/latents --output {0}/out"),
    "reconstruct": ("cli", "reconstruct", "{0}/images/a.png --output {0}/out"),
    "generate": ("cli", "generate", "--output {0}/out/sheet.png"),
    "evaluate": ("cli", "evaluate", "--data {0}/images --no_fid --no_ssim"),
    "evaluate_dit": ("cli", "evaluate_generation", "--samples 2"),
    "latents": ("cli", "latents", "--data {0}/images"),
    "cache": ("cli", "cache", "--data {0}/images --output {0}/out"),
    "app": ("cli", "app", ""),
    "convert": ("cli", "convert_checkpoint", "{0}/model {0}/out"),
    "convert_tiny": ("cli", "convert_checkpoint", f"{pretrained('hieratok-tiny')} {{0}}/out"),
    "detok": ("cli", "convert_detok", "{0}/out --weights {0}/images/a.png"),
    "export": ("cli", "export", "hieratok-tiny {0}/out"),
    "push": ("cli", "push", "{0}/model someone/name"),
}
HUGE = "9" * 400
DEEP = "[" * 50_000

# Script, arguments, and what the error names.
ROWS = [
    *[("tokenizer", f"--{name} {value}", name) for name, values in {
        "clip": "-1 0 nan inf",
        "lr": "-1 inf 1e400 fast",
        "ema": "1 -0.1",
        "weight_decay": "-1",
        "steps": f"0 1.5 {HUGE}",
        "warmup_steps": "-1",
        "decay_steps": "-1",
        "linear_steps": "-1",
        "seed": f"-1 {HUGE}",
        "batch_size": "0 2147483647",
        "crop_sizes": "0 -8 2147483640",
        "aspect_buckets": "0.9 nan inf 1e9 wide",
        "num_workers": "-1 100000",
        "scale_factors": "0 -2",
        "perceptual_weight": "-1 nan",
        "latent_noise": "-1",
        "size": "hieratok-xl",
        "mixed_precision": "fp8",
        "report_to": "telepathy",
        "model": "hieratok-b",
        "keep": "0",
    }.items() for value in values.split()],
    ("tokenizer", "--scale_factors 1000000 1", "scale_factors"),
    ("tokenizer", "--crop_scale 1 0.5", "crop_scale"),
    ("tokenizer", "--crop_scale -1 1", "crop_scale"),
    ("tokenizer", "--crop_scale 0 nan", "crop_scale"),
    *[("tokenizer", f"--config {value}", "config") for value in (
        "[]", "4", "null", "{", DEEP, '{"patch_size":"4"}', '{"patch_size":NaN}', '{"patch_size":1e400}',
        f'{{"patch_size":{HUGE}}}', '{"latent_channel":32}', '{"scale_factors":{}}', '{"scale_factors":[]}',
        '{"encoder_num_layers":1000000000}', '{"decoder_hidden_size":67108864}', '{"qk_norm":[[]]}',
    )],
    ("tokenizer", '--model hieratok-tiny --config {"latent_channels":32}', "config"),
    ("tokenizer", "--model hieratok-tiny --size hieratok-tiny", "size"),
    ("tokenizer", "--model hieratok-tiny --linear_steps 5", "linear_steps"),
    *[("tokenizer", option, option.split()[0]) for option in (
        "--fid_size 64", "--validation_size 64", "--validation_fid", "--validation_every 5", "--validation_split test",
        "--adversarial_start 5", "--discriminator_lr 0.1", "--vision_model x", "--allow_changes",
        "--bucket_step 16", "--bucket_step 0 --aspect_buckets 2", "--aspect_buckets --streaming",
    )],
    ("tokenizer", "--output {0}/model", "output"),
    ("tokenizer", "--output {0}/images/a.png", "output"),
    ("tokenizer", "--output {0}/model --resume", "output"),
    *[("dit", f"--{option}", option.split()[0]) for option in (
        "config []", "time_shift 0", "time_std -1", "time_mean nan", "class_dropout 1", "guidance_scale 0.5",
        "image_size 2147483647", "patch_size 0", "transformer x --size dit-b", 'transformer x --config {"a":1}',
        "transformer x --patch_size 2", 'config {"num_layers":1000000000}', 'config {"num_layers":"2"}',
        "output {0}/model", "vae hieratok-l",
    )],
    *[("dit_of_latents", f"--{option}", option.split()[0]) for option in (
        "split test", "streaming", "image_size 64", "num_workers 2", "crop_scale 0.5 1", "export_dtype int8",
        "aspect_buckets 2",
    )],
    *[("reconstruct", option, option.split()[0]) for option in (
        "--size 0", f"--size {HUGE}", "--device meta", "--device toaster", "--device cuda:99", "--device cpu:1",
        "--json {0}/images/a.png", "--json {0}/notes.json", "--json {0}/images", "--json {0}/out/a_reconstruction.png",
        "--json {0}/notes.json/x", "--model hieratok-b", "--dtype int8", "--output {0}/taken",
        "--json {0}/images/a.png --overwrite", "--json /dev/null", "--output {0}/taken/a_reconstruction.png",
    )],
    *[("generate", option, option.split()[0]) for option in (
        "--output {0}/notes.png", "--output {0}/x.jpg", "--rows 2147483647", "--steps 1000000000", "--seed -1",
        "--guidance_interval -1 2", "--guidance_scale nan", "--model hieratok-s", "--previews 0",
    )],
    *[("evaluate", option, option.split()[0]) for option in (
        "--size 2147483647", "--json {0}/notes.json", "--max_images 0", "--fid_size 9", "--device meta",
        "--compare hieratok-l", "--perturb 0", "--perturb 0.1 nan",
    )],
    *[("latents", option, option.split()[0]) for option in (
        "--size 2147483647", "--json {0}/notes.json", "--max_images 0", "--device meta", "--compare hieratok-l",
        "--plot {0}/notes.png", "--plot {0}/x.jpg", "--plot {0}/images/a.png --overwrite --data {0}/images/a.png",
    )],
    *[("evaluate_dit", option, option.split()[0]) for option in (
        "--classifier_labels 5-3", "--fid_size 9", "--reference_split x", "--streaming", "--save {0}/images",
        "--json {0}/notes.json",
    )],
    *[("cache", option, option.split()[0]) for option in (
        "--threads 1000000000", "--seed -1", "--size 2147483647", "--shard_size 0", "--max_images 0", "--device meta",
        "--bucket_step 16", "--aspect_buckets 0.5", "--bucket_step 48 --aspect_buckets 2",
    )],
    *[("app", option, option.split()[0]) for option in (
        "--port 99999", "--port -1", "--model hieratok-b", "--device meta",
    )],
    *[("convert", option, option.split()[0]) for option in (
        "--override []", f"--override {DEEP}", "--scale_factors 0", "--size hieratok-xl", "--to_raw --shard_size 5GB",
    )],
    ("convert_tiny", '--override {"patch_size":"4"}', "patch_size"),
    ("convert_tiny", '--override {"encoder_num_layers":1000000000}', "configuration"),
    ("convert_tiny", "--scale_factors 1000000 1", "configuration"),
    *[("detok", option, option.split()[0]) for option in (
        "--split x", "--images 5", "--device cpu", "--revision x",
    )],
    *[("export", option, option.split()[0]) for option in (
        "--num_scales 0", f"--num_scales {HUGE}", "--num_scales 9", "--dtype int4",
    )],
    *[("push", option, option.split()[0]) for option in (
        "--no_card --license mit", "--no_card --tags x", "--result_name x",
    )],
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("script_surroundings")
loaded = {}


def script(name):
    folder, file, base = SCRIPTS[name]
    if file == "app":
        pytest.importorskip("gradio")
    if file == "export" and not importlib.util.find_spec("onnxruntime"):
        pytest.skip("it needs onnxruntime")
    if file not in loaded:
        loaded[file] = load_script(folder, file)
    return loaded[file], base


@pytest.fixture
def place(tmp_path):
    """Somebody's files, of which none may be lost, and no other may be made."""
    for name in ("images", "out", "taken", "model"):
        (tmp_path / name).mkdir()
    Image.fromarray(noise(64, 64)).save(tmp_path / "images" / "a.png")
    for name in ("notes.json", "notes.png", "taken/a_reconstruction.png", "model/config.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("name", "given", "named"), ROWS, ids=[f"{i}-{x[0]} {x[1][:30]}" for i, x in enumerate(ROWS)])
def test_what_cannot_be_is_told_in_one_line(name, given, named, place, capsys):
    module, base = script(name)
    before = tree(place)
    arguments = [text.replace("{0}", str(place)) for text in (base + " " + given).split()]
    try:
        status = module.main(arguments)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "error: " in line]
    assert status == 2 and len(lines) == 1, lines
    assert named.lstrip("-") in lines[0].partition("error: ")[2] and len(lines[0]) < 1500
    assert tree(place) == before
