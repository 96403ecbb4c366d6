"""The soak: what each row watches, and that growth is told from the third look on."""

import json

import pytest
from scripts import report_in

pytest.importorskip("datasets", reason="images are read through it")
pytestmark = pytest.mark.usefixtures("script_surroundings")


def test_growth_begins_at_the_third_look(bench):
    watch = bench.MemoryWatch()
    for mib in (50, 80, 100, 104, 103):
        watch.add("resident_mib", mib * 2**20)
    assert watch.figures() == {"resident_mib": [50, 80, 100, 104, 103], "held_mib": [], "resident_growth": 0.03}


@pytest.mark.parametrize(("name", "counted"), [("sizes", "images"), ("training", "steps")])
def test_a_row_looks_ten_times_at_this_process(bench, name, counted):
    row = getattr(bench, name)(10)
    assert row[counted] == 10 and len(row["resident_mib"]) == len(row["held_mib"]) == 10
    assert all(0 < held <= 1.1 * resident for held, resident in zip(row["held_mib"], row["resident_mib"]))
    held = []
    held.append(bytearray(2**26))  # what is in use is held
    watch = bench.MemoryWatch()
    watch.look()
    assert watch.looks["held_mib"][0] > row["held_mib"][-1] + 32


def test_the_page_is_visited_and_leaves_nothing(bench):
    pytest.importorskip("gradio", reason="it is a page of Gradio")
    row = bench.page(10, largest=96)
    assert len(row["resident_mib"]) == 10 and row["results"] > 10
    assert row["files_of_visitors"] == 0 and not row["folder_left_at_the_end"]


def test_rows_are_recorded_in_a_table(bench, monkeypatch, tmp_path, capsys):
    looks = {"resident_mib": [1.0, 2.0, 4.0, 5.0], "held_mib": [], "resident_growth": 0.25}
    monkeypatch.setattr(bench, "in_fresh_process", lambda script, given, seconds: {"given": given, **looks})
    assert bench.main(["--rows", "page", "sizes", "--json"]) == 0
    assert "| page | 4, 5, +25.0 % | - |" in capsys.readouterr().out
    report = report_in(tmp_path / "results")
    assert json.dumps(report["rows"]["sizes"]["given"]) == '["--row", "sizes", "--count", 1000]'
