"""The notebooks: each runs from top to bottom, and what is kept in the file is what running it gives."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))
FIGURE = re.compile(r"(\d+(?:\.\d+)?) ?(?:dB|%|[kMG]i?B|bytes|m?s|seconds?|minutes?|times)(?!\w)")
"""A number with a unit: what somebody measured."""
SHORTER = {
    "num_inference_steps=25": "num_inference_steps=3",
    '"num_inference_steps": 25, **guidance': '"num_inference_steps": 3, **guidance',
    "steps = [1, 4, 8, 12, 18, 25]": "steps = [1, 2, 3]",
    "--steps 100 --lr 2e-3 --warmup_steps 10": "--steps 11 --lr 2e-3 --warmup_steps 2",
}
"""Fewer steps give outputs of the same kinds."""
every = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def kinds(cell):
    """What kinds of outputs a cell has; how a stream is cut into pieces is chance."""
    found = []
    for output in cell.get("outputs", []):
        kind = [output.output_type, output.get("name", ""), *sorted(output.get("data", {}))]
        if not (found and kind == found[-1] and output.output_type == "stream"):
            found.append(kind)
    return found


@every
def test_it_runs_and_gives_outputs_of_the_kinds_that_are_kept(path, tmp_path, monkeypatch):
    here = tmp_path / "examples"
    shutil.copytree(EXAMPLES, here, ignore=shutil.ignore_patterns("__pycache__", "*.ipynb"))
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
    folders = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR", "HF_DATASETS_CACHE")
    for name, value in (environment | {name: str(tmp_path / name) for name in folders}).items():
        monkeypatch.setenv(name, value)
    kept, run = (nbformat.read(path, as_version=4) for _ in range(2))
    for cell, steps in itertools.product(run.cells, SHORTER):
        cell.source = cell.source.replace(steps, SHORTER[steps])
    resources = {"metadata": {"path": str(here / "notebooks")}}
    nbclient.NotebookClient(run, timeout=280, kernel_name="python3", resources=resources).execute()
    for i, (expected, cell) in enumerate(zip(kept.cells, run.cells, strict=True)):
        assert kinds(cell) == kinds(expected), f"cell {i}: {cell.source}"
        assert all(kind[1] != "stderr" for kind in kinds(cell)), f"cell {i}"
    caches = ("__pycache__", ".ipynb_checkpoints")
    after = {file for file in here.rglob("*") if file.is_file() and not set(caches) & set(file.parts)}
    assert after == set(before) and all(file.read_bytes() == data for file, data in before.items())


@every
def test_what_is_kept_was_run_in_order_and_says_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/" in kind for cell in code for kinds_ in kinds(cell) for kind in map(str, kinds_)) >= 3
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    assert max(len(cell.source.splitlines()) for cell in code) <= 16
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.language_info == {"name": "python"}
    assert not any("execution" in cell.metadata for cell in code)
    text = path.read_text()
    assert not re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/", json.dumps(json.loads(text), ensure_ascii=False))
    assert len(text) < 1_500_000


@every
def test_the_text_has_no_figures_that_no_cell_prints(path):
    cells = nbformat.read(path, as_version=4).cells
    streams = [x.text for cell in cells for x in cell.get("outputs", []) if x.output_type == "stream"]
    told = {number for cell in cells if cell.cell_type == "markdown" for number in FIGURE.findall(cell.source)}
    assert told <= set(re.findall(r"\d+(?:\.\d+)?", "\n".join(streams)))


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_badges_open_the_notebooks_in_colab(tmp_path):
    shutil.copytree(EXAMPLES / "notebooks", tmp_path / "examples" / "notebooks")
    make = ["make", "-f", EXAMPLES.parent / "Makefile", "badges", f"BIN={Path(sys.executable).parent}", "READY="]
    assert subprocess.run(make, cwd=tmp_path, capture_output=True).returncode == 2
    for name in ("me/old", "me/new"):
        subprocess.run([*make, f"GITHUB={name}"], cwd=tmp_path, check=True, capture_output=True)
    for path in NOTEBOOKS:
        badge, *others = nbformat.read(tmp_path / "examples" / "notebooks" / path.name, as_version=4).cells
        assert f"/github/me/new/blob/main/examples/notebooks/{path.name})" in badge.source
        assert others == nbformat.read(path, as_version=4).cells


def test_the_documentation_has_the_figures_of_the_fine_tuning():
    book = nbformat.read(EXAMPLES / "notebooks" / "04_fine_tune.ipynb", as_version=4)
    told = [
        output.text
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "fine-tuned:" in output.get("text", "")
    ]
    art, photographs = (re.findall(r"([\d.]+) dB, SSIM ([\d.]+)", text) for text in told)
    for name, here, there in zip(("hieratok-tiny", "fine-tuned"), art, photographs, strict=True):
        assert " | ".join([f"| {name}", *here, *there]) in (EXAMPLES.parent / "docs" / "training.md").read_text()
