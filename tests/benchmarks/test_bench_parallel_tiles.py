"""The benchmark of tiles that processes share."""

import socket

from scripts import report_in


def test_directions_are_timed_and_compared(bench, monkeypatch, tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert bench.main(["--side", "320", "--repeats", "1", "--json"]) == 0
    report = report_in(tmp_path / "results")
    assert [row["direction"] for row in report["rows"]] == ["encode", "decode"]
    for row in report["rows"]:
        assert row["equal"] and row["times_as_fast"] > 0 and row["at_most"] > 0
    assert "| 1 processes |" in capsys.readouterr().out
