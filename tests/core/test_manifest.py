"""The list of a result's files: what stands in it, and what is seen when it no longer holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from moe_fair.core.manifest import MANIFEST, check_files, sha256, write_manifest


@pytest.fixture
def result(tmp_path: Path) -> Path:
    (tmp_path / "moe_fair").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "moe_fair" / "plan.json").write_text("{}")
    (tmp_path / "moe_fair" / "report.html").write_text("drawn")
    assert write_manifest(tmp_path) == tmp_path / MANIFEST
    return tmp_path


def test_names_sizes_and_hashes(result: Path) -> None:
    raw = json.loads((result / MANIFEST).read_text())
    assert raw["format"] == "moe_fair.manifest/1"
    assert raw["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in (
            ("model.safetensors", bytes(range(256)) * 9), ("moe_fair/plan.json", b"{}")
        )
    }  # fmt: skip
    assert check_files(result) == "2 files, 2,306 bytes, as they were written (sha256)"
    assert check_files(result, hashes=False) == "2 files, 2,306 bytes, listed with their sha256"
    assert sorted(p.name for p in (result / "moe_fair").iterdir()) == [
        "manifest.json", "plan.json", "report.html",
    ]  # fmt: skip
    write_manifest(result)  # the list is not in the list
    assert json.loads((result / MANIFEST).read_text()) == raw


def test_a_file_larger_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_fair.core.manifest.CHUNK", 7)
    (tmp_path / "f").write_bytes(b"0123456789" * 3)
    assert sha256(tmp_path / "f") == hashlib.sha256(b"0123456789" * 3).hexdigest()


def test_what_is_wrong_is_named(result: Path) -> None:
    model = result / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[5] ^= 1
    model.write_bytes(data)
    check_files(result, hashes=False)
    with pytest.raises(ValueError, match=r"model\.safetensors is not as it was written \(sha256\)"):
        check_files(result)
    model.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors has 2,303 bytes and had 2,304"):
        check_files(result, hashes=False)
    model.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is missing"):
        check_files(result)


@pytest.mark.parametrize("name", ["extra.py", "a.safetensors", "x.bin", "model.index.json"])
def test_what_a_loader_would_take_is_seen(result: Path, name: str) -> None:
    (result / name).touch()
    with pytest.raises(ValueError, match=f"{name} was not there"):
        check_files(result)
    (result / name).rename(result / "notes.txt")
    check_files(result)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "format 'other', expected"),
        ({"files": {"/etc/passwd": {"bytes": 1, "sha256": "0"}}}, "lies outside"),
        ({"files": {"a/../../b": {"bytes": 1, "sha256": "0"}}}, "lies outside"),
        ({"files": {"a\0": {"bytes": 1, "sha256": "0"}}}, "lies outside"),
        ({"files": {"a": {"bytes": "1", "sha256": "0"}}}, "no size and sha256"),
        ({"files": {"a": {"bytes": 1, "sha256": 0}}}, "no size and sha256"),
        ({"files": []}, "not a list of files"),
    ],
)
def test_lists_that_are_none(result: Path, change: dict[str, object], said: str) -> None:
    raw = json.loads((result / MANIFEST).read_text())
    (result / MANIFEST).write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=said):
        check_files(result)


def test_no_list(result: Path) -> None:
    (result / MANIFEST).unlink()
    with pytest.raises(ValueError, match="removed, or pruned by an earlier version"):
        check_files(result)
