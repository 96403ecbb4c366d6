"""Tests of `processor`: what Linux tells of it, on machines of several kinds."""

from pathlib import Path

import pytest

from hieratok_hf.ops.processor import lacks_bfloat16, processor_field

CPUINFO = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: A: B\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\n"


def machine_of(text, monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr("hieratok_hf.ops.processor.Path", lambda name: path if name == "/proc/cpuinfo" else Path(name))


def test_fields_are_those_of_the_first_processor(monkeypatch, tmp_path):
    machine_of(CPUINFO.format(flags="avx2"), monkeypatch, tmp_path)
    fields = {name: processor_field(name) for name in ("vendor_id", "model name", "flags", "processor", "model")}
    expected = {"vendor_id": "AuthenticAMD", "model name": "A: B", "flags": "fpu avx2", "processor": "0", "model": ""}
    assert fields == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CPUINFO.format(flags="avx2"), True),
        (CPUINFO.format(flags="avx512f avx512_vnni"), True),
        (CPUINFO.format(flags="avx512f avx512_bf16"), False),
        (CPUINFO.format(flags="amx_bf16 amx_tile"), False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        (None, False),
    ],
)
def test_bfloat16_is_lacking_where_a_list_of_flags_has_no_instructions_for_it(text, expected, monkeypatch, tmp_path):
    machine_of(text, monkeypatch, tmp_path)
    assert lacks_bfloat16() == expected
