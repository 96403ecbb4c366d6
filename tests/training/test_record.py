"""Tests of `record`: what a training was is told whole, and nothing of where it lay on a machine."""

import json

from hieratok_hf import __version__
from hieratok_hf.training.record import write_record


def test_it_tells_everything_but_the_places_on_the_machine(tmp_path):
    arguments = {"steps": 7, "seed": 1, "model": "/home/me/base", "teacher": "org/sd", "vae": None, "lr": 0.5}
    arguments |= {"validation_data": ["/home/me/kodak"], "config": {"x": "../y"}}
    data = {"names": ["/home/me/a/0.tar", "b"], "images": None, "fingerprint": "f"}
    write_record(tmp_path, "hieratok train", arguments, data, 6, 5400.0, {"cpu": "c"})
    record = json.loads((tmp_path / "training.json").read_text())
    assert "/home" not in json.dumps(record) and record["arguments"]["config"] == {"x": "y"}
    assert record["data"] == {"names": ["a/0.tar", "b"], "images": None, "fingerprint": "f"}
    assert record["parents"] == {"model": "base", "teacher": "org/sd"}
    assert (record["hours"], record["steps"], record["seed"]) == (1.5, 6, 1)
    assert record["versions"].keys() == {"hieratok_hf", "torch", "diffusers", "transformers"}
    assert record["versions"]["hieratok_hf"] == __version__ and record["machine"] == {"cpu": "c"}
