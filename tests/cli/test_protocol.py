"""Tests of `protocol`: hashes of weights, and what became different from an earlier report."""

import json
from argparse import Namespace

import pytest
import torch

pytest.importorskip("datasets", reason="images are read through it")

from hieratok_hf.cli.protocol import compare_with_protocol
from hieratok_hf.data.latent_cache import digest_of


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))


def digest(model):
    return digest_of(model.state_dict().items())


def test_a_hash_tells_weights_apart_and_not_where_they_come_from():
    one, other = network(), network()
    other.load_state_dict(dict(reversed(one.state_dict().items())))
    assert digest(one) == digest(other.to(memory_format=torch.channels_last))
    digests = {digest(x) for x in (one, network(1), network().bfloat16(), network()[:1])}
    other[0].bias.data[0] = torch.nextafter(other[0].bias[0].detach(), torch.tensor(9.0))
    assert len({*digests, digest(other)}) == 5


def test_every_difference_is_told_but_for_speeds_and_words(tmp_path):
    report = {
        "settings": {"json": "a.json"},
        "protocol": {"options": {"model": "a"}, "versions": {"torch": "1"}},
        "notes": ["one"],
        "models": [{"psnr": 30.1, "ssim": float("inf"), "std": [0.5, 0.25], "images_per_second": {"encode": 7.5}}],
    }
    args = Namespace(protocol=tmp_path / "a.json")
    assert compare_with_protocol(Namespace(protocol=None), report) == []
    args.protocol.write_text(json.dumps({**report, "models": [{**report["models"][0], "ssim": None}]}))
    same = ["all figures are those of --protocol, to the last digit"]
    assert compare_with_protocol(args, report) == same
    report["notes"], report["settings"] = [], {}
    report["models"][0]["images_per_second"] = {"encode": 7.4}
    assert compare_with_protocol(args, report) == same
    report["models"][0]["std"][1], report["protocol"]["versions"]["torch"] = 0.25000000000000006, "2"
    del report["models"][0]["psnr"]
    report["images"] = 3
    assert set(compare_with_protocol(args, report)) == {
        "models.0.psnr was 30.1 in --protocol, is not there",
        "models.0.std.1 was 0.25 in --protocol, is 0.25000000000000006",
        "protocol.versions.torch was 1 in --protocol, is 2",
        "images was not there in --protocol, is 3",
    }
