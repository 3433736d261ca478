"""Safetensors files written byte by byte, read back by the library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_fair.engines.shard_writer import write_shards
from moe_fair.engines.shards import shard_files, stored_tensors

TENSORS = {
    "a": torch.arange(24).view(6, 4).to(torch.bfloat16),
    "b": torch.arange(5, dtype=torch.int8),
    "c": torch.randn(1, 6),
    "d": torch.randn(3, 2, 2).to(torch.float8_e4m3fn),
    "e": torch.tensor(2.5),
}


@pytest.fixture
def stored(tmp_path: Path) -> list:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return stored_tensors(tmp_path / "model.safetensors")


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in shard_files(folder) for k, v in load_file(f).items()}


@pytest.mark.parametrize("most", [1, 40, 10**9])
def test_copied_tensors_are_the_same(stored: list, tmp_path: Path, most: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    copied: list[int] = []
    write_shards(stored, out, max_shard_bytes=most, advance=copied.append)
    back = read(out)
    assert back.keys() == TENSORS.keys()
    for name, t in TENSORS.items():
        assert back[name].dtype == t.dtype
        assert torch.equal(
            back[name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)
        )
    assert sum(copied) == sum(t.nbytes for t in TENSORS.values())
    assert (len(shard_files(out)) > 1) == (most < 10**9)


def test_taken_rows_and_columns(stored: list, tmp_path: Path) -> None:
    by_name = {t.name: t for t in stored}
    rows, columns = by_name["a"].take([0, 1, 4]), by_name["c"].take([5, 2], dim=1)
    assert [len(t.pieces) for t in (rows, columns)] == [2, 2]
    write_shards([rows, columns.renamed("x")], _folder(tmp_path), max_shard_bytes=10**9)
    back = read(tmp_path / "cut")
    assert torch.equal(back["a"], TENSORS["a"][[0, 1, 4]])
    assert torch.equal(back["x"], TENSORS["c"][:, [5, 2]])


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "cut").mkdir()
    return tmp_path / "cut"


@pytest.mark.parametrize("most", [1, 300, 700, 2000, 10**9])
def test_what_is_of_one_expert_stays_in_one_shard(tmp_path: Path, most: int) -> None:
    parts = ("gate.weight", "gate.weight_scale_inv", "up.weight", "up.weight_scale_inv")
    save_file(
        {f"layers.{i}.experts.{e}.{p}": torch.rand(10) for i in (0, 1) for e in range(7)
         for p in parts} | {"norm": torch.rand(3)},
        tmp_path / "model.safetensors",
    )  # fmt: skip
    out = _folder(tmp_path)
    write_shards(stored_tensors(tmp_path / "model.safetensors"), out, max_shard_bytes=most)
    where: dict[str, set[str]] = {}
    for file in out.glob("*.safetensors"):
        for t in stored_tensors(file):
            where.setdefault(t.name.split(".gate")[0].split(".up")[0], set()).add(file.name)
    assert all(len(files) == 1 for files in where.values())
    assert most > 2000 or len(list(out.glob("*.safetensors"))) > 1
