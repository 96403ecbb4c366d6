"""Code beside a model: what the package's own classes and those of a file with its code call themselves."""

import importlib.util
import json

import pytest
from helpers import random_core

from hieratok_hf import AutoencoderHieraTok, HieraTokDiTPipeline
from hieratok_hf.hub.remote_code import remote_code
from hieratok_hf.models.saved_code import OWN_CODE, add_code


def test_the_package_names_itself_and_a_file_of_code_names_itself(tmp_path):
    path = tmp_path / "some_name.py"
    path.write_text(remote_code())
    spec = importlib.util.spec_from_file_location("some_name", path)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert OWN_CODE is None and path == copy.OWN_CODE
    assert AutoencoderHieraTok.__module__ == HieraTokDiTPipeline.__module__ == "hieratok_hf"
    assert copy.AutoencoderHieraTok.__module__ == "autoencoder_hieratok"
    assert copy.HieraTokDiTPipeline.__module__ == "pipeline_hieratok_dit"
    copy.AutoencoderHieraTok(**random_core().config.model_fields).save_pretrained(tmp_path / "model")
    names = sorted(path.name for path in (tmp_path / "model").glob("*.py"))
    assert names == ["autoencoder_hieratok.py", "modeling_hieratok.py"]
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == "modeling_hieratok.HieraTokAutoModel"


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder"):
        add_code(tmp_path, "")
    assert not list(tmp_path.iterdir())
