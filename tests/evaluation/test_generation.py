"""Tests of `generation`: numbered images, classes found by name, and accuracy against a count by hand."""

import json

import pytest
import torch
from helpers import images
from tiny_pipelines import NAMES, make_pipeline
from transformers import ViTConfig, ViTForImageClassification

from hieratok_hf.data.training_batches import step_generator
from hieratok_hf.evaluation import generation
from hieratok_hf.evaluation.generation import ClassAccuracy, GeneratedBatches, ImageClassifier, number_images

STEPS = {"num_inference_steps": 3}
LABELS = ("background", "tench, Tinca tinca", "church, church building", "English springer", "French horn, horn")


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def tiny_classifier():
    """A real one whose weights are so large that its answers vary."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"image_size": 16, "patch_size": 4, "initializer_range": 1.0}
    return ViTForImageClassification(ViTConfig(**sizes, id2label=dict(enumerate(LABELS)))).eval()


def test_a_numbered_image_depends_on_seed_and_number_alone(pipe):
    together = number_images(pipe, range(4), 5, **STEPS)
    assert generation.image_size(pipe) == 8
    assert together.shape == (4, 3, 8, 8) and together.dtype == torch.uint8
    together, other_seed = together.int(), number_images(pipe, range(4), 6, **STEPS).int()
    alone = torch.cat([number_images(pipe, [row], 5, **STEPS) for row in (3, 1)]).int()
    assert abs(alone - together[[3, 1]]).max() <= 1  # sums of other batches are rounded otherwise
    for i in range(4):
        assert all(abs(other - together[i]).max() > 8 for other in (other_seed[i], *together[:i]))


def test_numbers_go_through_the_classes_in_turn(pipe):
    levels = number_images(pipe, [0, 4, 8], 2, **STEPS)
    generators = [step_generator(2, row) for row in (0, 4, 8)]
    expected = pipe(["tench", "English springer", "church"], generator=generators, output_type="np", **STEPS).images
    assert abs(levels.permute(0, 2, 3, 1).numpy() - 255 * expected).max() <= 0.5 + 1e-4


def test_batches_do_not_depend_on_their_size_or_on_shares(pipe):
    whole = list(GeneratedBatches(pipe, range(7), seed=1, batch_size=7, **STEPS))
    assert len(whole) == 1 and whole[0]["labels"] == [0, 1, 2, 0, 1, 2, 0]
    values = whole[0]["pixel_values"]
    torch.testing.assert_close((values + 1) * 127.5, ((values + 1) * 127.5).round(), atol=1e-4, rtol=0)
    for rank in range(2):
        share = GeneratedBatches(pipe, range(7)[rank::2], seed=1, batch_size=3, **STEPS)
        batches = list(share)
        assert len(batches) == len(share) == 2 - rank and share.seconds > 0
        rows = [row for batch in batches for row in batch["rows"]]
        assert rows == list(range(7))[rank::2]
        values = torch.cat([batch["pixel_values"] for batch in batches])
        assert (values - whole[0]["pixel_values"][rows]).abs().max() <= 1.01 / 127.5
        assert [batch["labels"] for batch in share] == [batch["labels"] for batch in batches]
    assert list(GeneratedBatches(pipe, range(0))) == []


def test_images_that_are_not_finite_are_refused():
    pipe = make_pipeline()
    list(pipe.vae.parameters())[-1].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        number_images(pipe, [0], 0, **STEPS)


def test_classes_are_found_by_name():
    names = dict(enumerate(LABELS))
    given = {0: "TENCH", 1: "english_Springer", 2: "house of god, Church  building"}
    assert generation.find_classes(given, 3, names) == [1, 3, 2]
    assert generation.find_classes(dict(enumerate(NAMES[:4])), 4, names) == [1, 3, 2, 4]
    # A name alone rather than one that another has beside its own.
    assert generation.find_classes({0: "maillot"}, 1, {0: "tank suit, maillot", 1: "maillot"}) == [1]
    same = {i: f"class {i}, thing" for i in range(1000)}
    assert generation.find_classes(same, 1000, same) == list(range(1000))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({0: "tench", 1: "trench", 2: "springer"}, "no labels of the names trench, springer$"),
        ({i: f"no {i}" for i in range(8)}, "no 0, no 1, no 2, no 3, no 4 and 3 more"),
        ({0: "tench", 2: "church"}, "no labels of the names 1$"),
        ({0: "tench", 1: "church", 2: "church building"}, "one label for several classes: church, church building$"),
        ({0: "tench", 1: "tench, church", 2: "horn"}, r"more than one label of the names tench, church \(1, 2\)$"),
    ],
)
def test_classes_that_are_not_found_are_named(names, message):
    with pytest.raises(ValueError, match=message):
        generation.find_classes(names, max(len(names), 3), dict(enumerate(LABELS)))


def test_accuracy_is_that_of_a_count_by_hand():
    model, labels = tiny_classifier(), [1, 3, 2]
    pixel_values = (images(40, 3, 16, 16) + 2 * images(40, 3, 1, 1, seed=1)).clamp(-1, 1)
    made_for = [i % 3 for i in range(40)]
    with torch.no_grad():
        logits = model(pixel_values).logits.tolist()  # of mean and standard deviation 0.5, so values stay
    among, first, counts = [0] * 3, [0] * 3, [0] * 3
    for row, label in zip(logits, made_for):
        counts[label] += 1
        among[label] += max(range(3), key=lambda i, row=row: row[labels[i]]) == label
        first[label] += max(range(5), key=row.__getitem__) == labels[label]
    assert 0 < sum(first) < sum(among) < 40
    accuracy = ClassAccuracy(ImageClassifier(model, [0.5] * 3, [0.5] * 3), labels)
    for part in (slice(0, 7), slice(7, 40)):
        accuracy.update(pixel_values[part], made_for[part])
    found = accuracy.compute()
    assert found["class_accuracy"] == pytest.approx(sum(among) / 40)
    assert found["top1_accuracy"] == pytest.approx(sum(first) / 40)
    assert found["images_per_class"] == counts
    assert found["class_accuracy_per_class"] == pytest.approx([a / n for a, n in zip(among, counts)])
    assert found["top1_accuracy_per_class"] == pytest.approx([a / n for a, n in zip(first, counts)])
    accuracy.reset()
    with pytest.raises(ValueError, match="no images to classify"):
        accuracy.compute()
    for wrong in ([], [1, 1], [5]):
        with pytest.raises(ValueError, match="`labels`"):
            ClassAccuracy(accuracy.classifier, wrong)
    accuracy.update(pixel_values[:1], [2])
    assert str(accuracy.compute()["class_accuracy_per_class"][0]) == "nan"


def test_a_saved_classifier_gets_its_own_size_and_colours(tmp_path):
    model = tiny_classifier()
    model.save_pretrained(tmp_path)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    facts = {"image_mean": mean, "image_std": std, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(facts))
    classifier = ImageClassifier.from_pretrained(tmp_path)
    assert classifier.image_size == 16 and classifier.names == dict(enumerate(LABELS))
    assert not any(parameter.requires_grad for parameter in classifier.parameters())
    flat = torch.tensor([0.3, -0.2, 0.9])
    normalised = ((flat / 2 + 0.5) - torch.tensor(mean)) / torch.tensor(std)
    with torch.no_grad():
        expected = model(normalised.view(1, 3, 1, 1).expand(1, 3, 16, 16)).logits
    for size in (8, 40):  # a flat image stays flat at any size
        found = classifier(flat.view(1, 3, 1, 1).expand(1, 3, size, size))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_resizing_is_bicubic_and_stays_in_range():
    classifier, seen = ImageClassifier(tiny_classifier(), [0.5] * 3, [0.5] * 3), []
    classifier.model.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    edges = torch.where(torch.arange(8) < 4, -1.0, 1.0).expand(1, 3, 8, 8)
    classifier(edges)
    expected = torch.nn.functional.interpolate(edges, (16, 16), mode="bicubic", antialias=True)
    assert expected.max() > 1.01
    torch.testing.assert_close(seen[0], expected.clamp(-1, 1))
