"""Hostile input to the pipeline: one error that names what was wrong, before anything is computed, written or lost."""

import json
import math
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import PipelineCallback
from helpers import images, tree
from huggingface_hub.errors import StrictDataclassError
from tiny_pipelines import FLOW, make_pipeline

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.data.local_images import read_class_names
from hieratok_hf.evaluation.generation import number_images
from hieratok_hf.evaluation.metrics import border_steps, psnr, ssim
from hieratok_hf.pipelines.class_names import label_ids, names_to_ids

NAN, INF = math.nan, math.inf
LATENTS = torch.zeros(1, 4, 2, 2)
PIXELS = torch.zeros(1, 3, 8, 8)


def ignore(pipe, step, timestep, tensors):
    return None


class Nameless(PipelineCallback):
    tensor_inputs = ["prompt_embeds"]


def gaussian(count: int = 1) -> list[torch.Generator]:
    return [torch.Generator() for _ in range(count)]


def nest(depth: int) -> list:
    nested: list = []
    for _ in range(depth):
        nested = [nested]
    return nested


def zeros_but(value: float) -> torch.Tensor:
    latents = LATENTS.clone()
    latents[0, 0, 0, 0] = value
    return latents


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


CALLS = {
    "class_labels": [
        *(
            3,
            NAN,
            10**30,
            b"\x01\x02",
            bytearray(b"\x01"),
            {1: 2},
            {1: 0.5, 2: 0.6},
            {1},
            object(),
            1j,
            [1, [2, 3]],
            "",
            "tench\0",
        ),
        *("x" * 10**5, np.array([True]), np.array("tench"), torch.tensor(True), iter([1])),
    ],
    "num_inference_steps": [0, 1.5, 10**9],  # tests/utils/test_numbers.py has what is no number
    "num_images_per_prompt": [0, 1.0],
    "guidance_scale": [0.5, NAN, INF, "3"],
    "guidance_interval": [
        *(None, 0.5, "01", b"01", (), (0, 0.5, 1), (0.8, 0.2), (-0.1, 1), (0, 1.1), (NAN, 1)),
        *({0: 1, 1: 1}, np.eye(2), (None, 1)),
    ],
    "guidance_eta": [-0.1, 1.5, None],
    "timesteps": [[], 900, "900", [NAN], [-1], [500, 900], [500, 500], [2000, 1], ["900"], np.eye(2), [None]],
    "sigmas": [[], 0.5, "1", [NAN, 0.5], [2.0, 1.0], [0.5, 1.0], [1.0, -0.5], [[1.0], [0.5]], {1.0: 0.5}],
    "eta": [-0.1, 1.5, None],
    "generator": [0, [None], gaussian(2), [0], np.random.default_rng(), torch.Generator],
    "latents": [
        *(0, LATENTS[0], LATENTS[:, :3], LATENTS.expand(2, -1, -1, -1), LATENTS.long(), LATENTS.bool()),
        *(LATENTS.to(torch.complex64), LATENTS.numpy(), LATENTS.tolist(), zeros_but(NAN), zeros_but(-INF)),
        *(LATENTS.to_sparse(), torch.zeros(0, 4, 2, 2), torch.zeros(1, 4, 2, 2, device="meta")),
    ],
    "output_type": ["jpeg", "PIL", None, ["pil"]],
    "callback_on_step_end": [
        *(1, "print", lambda *given: 1, lambda *given: [LATENTS], lambda *given: LATENTS),
        *(lambda *given: {"latents": None}, lambda *given: {"latents": LATENTS[0]}, lambda *given: {"latents": 1.0}),
    ],
    "callback_on_step_end_tensor_inputs": [None, "latents", ["noise"], ["latents", 1], 1, {"latents"}, [None]],
    "preview_scales": [0, 5, 1.5],
    "strength": [-0.1, 1.1, NAN, "1", None],
    "image": [
        *(
            0,
            "photo.png",
            b"",
            [],
            [None],
            {},
            PIXELS[0, 0],
            PIXELS[:, :2],
            PIXELS[..., :7],
            PIXELS.expand(2, 3, 8, 8),
        ),
        *([PIXELS, PIXELS], PIXELS - 1, PIXELS * NAN, PIXELS + 2, PIXELS.long(), PIXELS.bool(), PIXELS.numpy()),
        *(PIXELS.to(torch.complex64), PIXELS.to_sparse(), PIXELS.to("meta")),
        *(np.full((8, 8, 3), "a"), np.zeros((8, 8, 4)), np.full((8, 8, 3), 65535, np.uint16), np.zeros(3), [[PIXELS]]),
    ],
}


def shown(value):
    return repr(value).partition(" at 0x")[0][:40]  # an address differs in every process of the tests


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in CALLS.items() for value in values], ids=shown
)
def test_a_call_is_refused_by_the_argument_s_name(pipe, name, value, monkeypatch):
    if name != "callback_on_step_end":
        monkeypatch.setattr(pipe.transformer, "forward", None)  # nothing is computed before
    given = {"num_inference_steps": 1, "callback_on_step_end": ignore, "output_type": "pt"}
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipe(**{"class_labels": [1], **given, name: value})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timesteps": [900, 100], "sigmas": [1.0, 0.5]}, "`timesteps` or `sigmas`"),
        ({"preview_scales": 1}, "`callback_on_step_end`"),
        ({"callback_on_step_end": Nameless(cutoff_step_ratio=0.5)}, "`callback_on_step_end_tensor_inputs`"),
        ({"class_labels": [0, 1], "generator": gaussian(3)}, "`generator`"),
        ({"class_labels": [0, 1], "num_images_per_prompt": 2, "generator": gaussian(2)}, "`generator`"),
        ({"num_images_per_prompt": 2, "latents": LATENTS}, "`latents`"),
    ],
)
def test_arguments_that_do_not_go_together(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1], **given})


UNET = diffusers.UNet2DModel(
    block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
)
PARTS = [
    ({"vae": "folder"}, "`vae` is a str"),
    ({"vae": torch.nn.Linear(1, 1)}, "`vae` is a Linear"),
    ({"vae": AutoencoderHieraTok}, "`vae`"),
    ({"vae": "transformer", "transformer": "vae"}, "`vae` is a DiTTransformer2DModel"),
    ({"transformer": UNET}, "`transformer` is a UNet2DModel"),
    ({"transformer": 1}, "`transformer` is a int"),
    ({"scheduler": "ddim"}, "`scheduler` is a str"),
    ({"scheduler": diffusers.DDIMScheduler}, "`scheduler`"),
    ({"scheduler": diffusers.DDIMScheduler(), "prediction_type": "noise"}, "`prediction_type`"),
    ({"scheduler": None}, "`prediction_type`"),
    ({"prediction_type": ["epsilon"]}, "`prediction_type`"),
    *(({"id2label": x}, "`id2label`") for x in (["a"], "a", 1, {"a": "b"}, {1.5: "b"}, {-1: "b"}, {0: 1}, {0: ["b"]})),
]


@pytest.mark.parametrize(("changes", "message"), PARTS, ids=shown)
def test_parts_are_refused_by_name(pipe, changes, message):
    names = {"vae": pipe.vae, "transformer": pipe.transformer}
    parts = {name: names.get(value, value) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        HieraTokDiTPipeline(**{**pipe.components, **parts})


@pytest.mark.parametrize("missing", ["vae", "transformer", "scheduler"])
def test_a_pipeline_without_a_part_says_so(missing):
    pipe = make_pipeline()
    setattr(pipe, missing, None)
    with pytest.raises(ValueError, match=f"`{missing}`"):
        pipe([0], 1)
    if missing == "vae":
        with pytest.raises(ValueError, match="`vae`"):
            pipe([0], 1, output_type="latent", callback_on_step_end=ignore, preview_scales=1)


def test_only_a_pipeline_with_the_parts_becomes_another():
    for source in ("folder", None, 1, {}, diffusers.DDPMPipeline):
        with pytest.raises(ValueError, match="`pipeline`"):
            HieraTokDiTPipeline.from_pipe(source)
    with pytest.raises(ValueError, match=r"`pipeline` .*'vae'"):
        HieraTokDiTPipeline.from_pipe(diffusers.DDIMPipeline(UNET, diffusers.DDIMScheduler()))


SCHEDULERS = [
    (diffusers.DPMSolverMultistepInverseScheduler(), {}),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {}),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"timesteps": [1000, 500]}),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), {"timesteps": [1000, 600, 500]}),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.3), {"timesteps": [1000, 500]}),
    (diffusers.DPMSolverMultistepScheduler(**FLOW), {"timesteps": [999, 500]}),
    (diffusers.SASolverScheduler(**FLOW), {}),
    (diffusers.FlowMatchHeunDiscreteScheduler(), {"sigmas": [1.0, 0.5]}),
    (diffusers.DDIMScheduler(), {"timesteps": [900, 100]}),
    (diffusers.DDPMScheduler(), {"timesteps": [900.5, 100]}),
    (diffusers.DDPMScheduler(num_train_timesteps=100), {"num_inference_steps": 101}),
    (diffusers.LCMScheduler(), {"num_inference_steps": 60}),
    (diffusers.PNDMScheduler(), {"image": PIXELS}),
    (diffusers.PNDMScheduler(skip_prk_steps=True), {"image": PIXELS}),
    (diffusers.LMSDiscreteScheduler(), {"image": PIXELS}),
    (diffusers.SASolverScheduler(), {"image": PIXELS}),
]


@pytest.mark.parametrize(("scheduler", "given"), SCHEDULERS, ids=shown)
def test_a_scheduler_that_would_not_end_at_an_image_is_refused(pipe, scheduler, given, monkeypatch):
    own = HieraTokDiTPipeline(pipe.vae, pipe.transformer, scheduler)
    monkeypatch.setattr(own.transformer, "forward", None)
    with pytest.raises(ValueError, match=r"scheduler|timesteps|num_inference_steps|`image`"):
        own([0], **{"num_inference_steps": 8, **given})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_pipeline().save_pretrained(folder)
    return folder


INDEX = "model_index.json"
INDICES = {
    "cut": '{"_class_name": "HieraTok',
    "list": "[]",
    "nested": "[" * 10**5,
    "binary": "\udcff\udcfe\udc80",
    "not a pipeline": "{}",
}
CHANGES = [
    *({"_class_name": value} for value in (None, [], {})),
    *({"vae": value} for value in ("hieratok_hf", [], ["hieratok_hf"], [1, 2], {"AutoencoderHieraTok": 1})),
    *({"id2label": value} for value in (["a"], {"a": "b"}, {"0": None}, {"99": "b"}, {"1" * 5000: "a"})),
    *({"scheduler": 1}, {"prediction_type": "noise"}, {"prediction_type": ["epsilon"]}),
]
FILES = {
    "vae/config.json": ["", "[]", "{}", '{"patch_size": "4"}'],
    "transformer/config.json": ["", "[]", '{"sample_size": null}'],
    "scheduler/scheduler_config.json": ["", "[]", '{"shift": "a"}'],
    "vae/diffusion_pytorch_model.safetensors": ["", "x" * 100],
    "transformer/diffusion_pytorch_model.safetensors": ["", "x" * 100],
}


def refuses_folder(folder, part):
    before = tree(folder)
    with pytest.raises((ValueError, OSError, StrictDataclassError)) as caught:
        HieraTokDiTPipeline.from_pretrained(folder)
    assert part in str(caught.value), caught.value
    assert tree(folder) == before


@pytest.mark.parametrize("case", INDICES)
def test_a_broken_index_is_named(saved, tmp_path, case):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / INDEX).write_bytes(INDICES[case].encode(errors="surrogateescape"))
    refuses_folder(folder, INDEX)


@pytest.mark.parametrize("changes", CHANGES, ids=shown)
def test_a_wrong_entry_of_the_index_is_named(saved, tmp_path, changes):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, **changes}))
    refuses_folder(folder, next(iter(changes)))


@pytest.mark.parametrize(
    ("library", "name"), [("hieratok_hf", "NoClass"), ("os", "system"), ("../evil", "Vae"), ("diffusers", "no_class")]
)
@pytest.mark.parametrize("part", ["vae", "transformer"])
def test_what_is_no_class_of_a_library_is_not_loaded(saved, tmp_path, part, library, name):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, part: [library, name]}))
    refuses_folder(folder, library if name == "Vae" else name)


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in FILES.items() for text in texts], ids=shown
)
def test_a_broken_part_is_refused(saved, tmp_path, name, text):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / name).write_text(text)
    refuses_folder(folder, "")


@pytest.mark.parametrize("name", ["vae", "transformer", "scheduler"])
def test_a_missing_part_is_named(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    shutil.rmtree(folder / name)
    refuses_folder(folder, repr(name))


def test_an_index_of_windows_is_read(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "pipeline")
    (folder / INDEX).write_bytes((folder / INDEX).read_text().encode("utf-8-sig"))
    assert HieraTokDiTPipeline.from_pretrained(folder).num_classes == 3


NAMES = names_to_ids({0: "tench, Tinca tinca", 1: "cardigan", 2: "Cardigan", 3: "a b"})
LABELS = ["tench,", "tinca", "\udcff", "ab", "a" * 10**6, "-1", ",", "tench, tinca, tench"]


@pytest.mark.parametrize("label", LABELS, ids=shown)
def test_what_is_no_name_is_refused(label):
    with pytest.raises(ValueError, match="`class_labels`"):
        label_ids(label, NAMES, 4)


@pytest.mark.parametrize(
    "given", [["no such.json"], [".json"], ["a", "b", "a"], "names", b"names", [1], [None, "a"], [["a"]], 5], ids=shown
)
def test_names_of_classes_that_cannot_be_read(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".json").mkdir()
    with pytest.raises((ValueError, OSError)):
        read_class_names(given)


PICTURE = torch.zeros(1, 3, 16, 16)
METRICS = {
    "psnr": [
        *((PICTURE, images(1, 3, 16, 8)), (PICTURE, None), (PICTURE.numpy(), PICTURE)),
        *((PICTURE.to(torch.complex64), PICTURE), (PICTURE, PICTURE.to_sparse())),
    ],
    "ssim": [(PICTURE[..., :8, :], PICTURE[..., :8, :]), (PICTURE, "images"), (PICTURE, -INF * PICTURE)],
    "border_steps": [(PICTURE, 0), (PICTURE, 16), (PICTURE, 8.5), (PICTURE.tolist(), 8)],
}


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, given) for name, rows in METRICS.items() for given in rows],
    ids=lambda value: shown(value),
)
def test_metrics_name_what_they_cannot_measure(name, given):
    pytest.importorskip("torchmetrics")
    metric = {"psnr": psnr, "ssim": ssim, "border_steps": border_steps}[name]
    with pytest.raises(ValueError, match=r"`(images|targets|patch_size)`"):
        metric(*given)


@pytest.mark.parametrize("rows", [[1.5], ["0"], [None], [-1], [True]])
def test_images_without_a_number(pipe, rows):
    with pytest.raises(ValueError, match="`rows`"):
        number_images(pipe, rows, 0, num_inference_steps=1)
