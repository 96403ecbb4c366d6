"""Tests of `npz`: arrays bit for bit, and files that are none, damaged, pickled or too large."""

import zipfile

import numpy as np
import psutil
import pytest
from helpers import Bomb

from hieratok_hf.utils.npz import list_npz, read_npz, write_npz


def test_arrays_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "arr_0": rng.integers(0, 256, (3, 4, 5, 3), np.uint8),
        "mu": rng.normal(size=7),
        "network": np.array("é"),
    }
    arrays["mu"][:2] = np.nan, -0.0
    write_npz(tmp_path / "a.npz", **arrays)
    assert list_npz(tmp_path / "a.npz") == list(arrays)
    with np.load(tmp_path / "a.npz") as plain:
        for found in (read_npz(tmp_path / "a.npz", list(arrays)), dict(plain)):
            for name, array in arrays.items():
                assert found[name].dtype == array.dtype and found[name].tobytes() == array.tobytes()
    assert list(read_npz(tmp_path / "a.npz", ["mu", "sigma"])) == ["mu"]
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    assert read_npz(tmp_path / "b.npz", ["arr_0"])["arr_0"].tobytes() == arrays["arr_0"].tobytes()


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "good.npz", a=np.zeros(1000))
    content = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "damaged.npz").write_bytes(content[:200] + b"x" * 300 + content[500:])
    (tmp_path / "short.npz").write_bytes(content[:400])
    np.savez(tmp_path / "pickled.npz", a=np.array([Bomb(tmp_path / "victim")]))
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("a.npy", b"no array")
    for name in ("missing.npz", "array.npy", "damaged.npz", "short.npz", "pickled.npz", "other.npz", "."):
        with pytest.raises(ValueError, match=r"is no \.npz file|cannot be read"):
            read_npz(tmp_path / name, ["a"])
    assert not (tmp_path / "victim").exists()
    np.savez(tmp_path / "large.npz", a=np.zeros(1, [(f"field {i}", "f4") for i in range(1000)]))
    with pytest.raises(ValueError, match=r"large\.npz' cannot be read: Header[^.\n]*large[^.\n]*\.?$"):
        read_npz(tmp_path / "large.npz", ["a"])
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 5000}))
    with pytest.raises(ValueError, match=r"good\.npz.*'a' needs .* of memory"):
        read_npz(tmp_path / "good.npz", ["a"])
