"""Classes by number or by name."""

import numpy as np
import pytest
import torch

from hieratok_hf.pipelines.class_names import label_ids, label_shares, names_to_ids

NAMES = names_to_ids({0: "tench, Tinca tinca", 1: "English_springer", 2: "church", 3: "French horn"})


def test_every_synonym_has_the_number_of_its_class():
    synonyms = {"tench": 0, "Tinca tinca": 0, "English_springer": 1, "church": 2, "French horn": 3}
    assert {**synonyms, "tench, Tinca tinca": 0} == NAMES
    assert names_to_ids({0: "boot, shoe", 1: "shoe", 2: "boot, hat"}) == {
        "boot, shoe": 0,
        "shoe": 1,
        "boot, hat": 2,
        "hat": 2,
    }


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("church", [2]),
        ("english SPRINGER", [1]),
        ("french_horn", [3]),
        ("  tinca   tinca ", [0]),
        (3, [3]),
        (range(3), [0, 1, 2]),
        (torch.tensor([3, 1]), [3, 1]),
        ([np.int64(1), torch.tensor(0)], [1, 0]),
        ([["church"], [0, "tench"], 1], [2, 0, 0, 1]),  # diffusers batches lists of lists
    ],
)
def test_names_and_numbers(given, expected):
    assert label_ids(given, NAMES, 4) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("church", [{2: 1}]),
        (torch.tensor([3, 1]), [{3: 1}, {1: 1}]),
        ({"church": 0.7, 0: 0.3}, [{2: 0.7, 0: 0.3}]),
        ([1, {"tench": 0.5, "tinca_tinca": 0.5}, [{3: 1, 2: 0}]], [{1: 1}, {0: 1}, {3: 1}]),
        (dict.fromkeys(range(3), 1 / 3), [{0: 1 / 3, 1: 1 / 3, 2: 1 / 3}]),
    ],
)
def test_shares_of_classes(given, expected):
    assert label_shares(given, NAMES, 4) == expected


@pytest.mark.parametrize(
    "given", [[], {}, {0: 1, 1: 1}, {0: 0.5}, {0: 1.5, 1: -0.5}, {0: "1"}, {4: 1}, [{"horn": 1}], {0: {1: 1}}, [0, []]]
)
def test_shares_that_are_refused(given):
    with pytest.raises(ValueError, match="class_labels"):
        label_shares(given, NAMES, 4)


@pytest.mark.parametrize("share", [-0.5, 1.5, "half", float("nan")])
def test_the_share_that_cannot_be_is_named(share):
    with pytest.raises(ValueError, match=r"`class_labels`: the share of 'church' must be .* from 0 to 1, got"):
        label_shares([{0: 1}, {1: 0.5, "church": share}], NAMES, 4)


@pytest.mark.parametrize(
    "given", [4, -1, 1.0, None, True, [0, 4], "4", torch.tensor([1.5]), [], [[]], torch.tensor([])]
)
def test_what_is_no_class_is_refused(given):
    with pytest.raises(ValueError, match="class_labels"):
        label_ids(given, NAMES, 4)


def test_names_that_differ_in_case_alone_are_kept_apart():
    names = names_to_ids({0: "Cardigan, Cardigan Welsh corgi", 1: "cardigan", 2: "crane", 3: "crane, machine"})
    wholes = {"Cardigan, Cardigan Welsh corgi": 0, "crane, machine": 3}
    assert names == {**wholes, "Cardigan": 0, "Cardigan Welsh corgi": 0, "cardigan": 1, "crane": 2, "machine": 3}
    assert label_ids(["Cardigan", "cardigan", "crane", "Crane"], names, 4) == [0, 1, 2, 2]
    with pytest.raises(ValueError, match=r"'CARDIGAN' is the name of several classes: \[0, 1\]; give a number"):
        label_ids("CARDIGAN", names, 4)
    # What two classes share, and neither is called by, names none of them.
    assert names_to_ids({0: "a, shared", 1: "b, shared"}) == {"a, shared": 0, "a": 0, "b, shared": 1, "b": 1}


def test_near_names_are_offered():
    with pytest.raises(ValueError, match="'chruch' is no class of this pipeline; did you mean 'church'"):
        label_ids("chruch", NAMES, 4)
    with pytest.raises(ValueError, match="did you mean 'French horn'"):
        label_ids("horn", NAMES, 4)
    with pytest.raises(ValueError, match="there are 'tench', 'Tinca tinca'"):
        label_ids("xyz", NAMES, 4)
    with pytest.raises(ValueError, match="it has no names"):
        label_ids("church", {}, 4)
