"""Files of commands: written whole, and refused before the work where they cannot be."""

import json

import pytest

from hieratok_hf.cli.outputs import check_writable, write_report
from hieratok_hf.cli.terminal import Problem


def test_reports_are_json_and_written_whole(tmp_path):
    path = tmp_path / "report.json"
    write_report(path, {"psnr": float("inf"), "rows": [{"a": float("nan"), "b": 1.5}], "path": tmp_path})
    assert json.loads(path.read_text()) == {"psnr": None, "rows": [{"a": None, "b": 1.5}], "path": str(tmp_path)}
    with pytest.raises(Problem, match=r"--json '.*missing.*' cannot be written"):
        write_report(tmp_path / "missing" / "report.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_an_output_that_cannot_be_written_is_named_before_the_work(tmp_path):
    check_writable("--json", tmp_path / "new" / "a.json")
    check_writable("--images", tmp_path / "images", folder=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "new"]
    (tmp_path / "file").touch()
    with pytest.raises(Problem, match=r"--json .*it is a folder"):
        check_writable("--json", tmp_path / "new")
    with pytest.raises(Problem, match=r"--images .*cannot be written"):
        check_writable("--images", tmp_path / "file", folder=True)
