"""What is missing is named with the extra that brings it, which is one of pyproject.toml."""

import re
from pathlib import Path

import pytest

from hieratok_hf.utils.extras import EXTRAS, missing_extra

tomllib = pytest.importorskip("tomllib", reason="Python has it from 3.11 on")
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def packages_of(requirements):
    """The packages of requirements, with those of the extras that they name."""
    found = set()
    for requirement in requirements:
        extra = re.fullmatch(r"hieratok_hf\[(\w+)\]", requirement)
        more = packages_of(PROJECT["optional-dependencies"][extra[1]]) if extra else set()
        found |= more or {re.split(r"[^\w-]", requirement)[0]}
    return found


@pytest.mark.parametrize("package", EXTRAS)
def test_each_package_comes_with_its_extra_and_with_all_and_not_with_the_core(package):
    for extra in (EXTRAS[package], "all"):
        assert package in packages_of([f"hieratok_hf[{extra}]"])
    assert package not in packages_of(PROJECT["dependencies"])


def test_the_line_to_install_names_what_needs_what():
    error = missing_extra("--format onnx", "onnx", "onnxscript")
    assert isinstance(error, ImportError)
    assert str(error) == "--format onnx needs onnx, onnxscript: pip install 'hieratok_hf[export]'"
