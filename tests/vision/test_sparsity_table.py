"""The script behind the figures on sparse weights, at a fraction of its size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vision.test_digits_scripts import run

from moe_fair.vision.zoo import vgg_small

pytestmark = pytest.mark.slow


@pytest.mark.nightly
def test_measured_once_and_drawn(tmp_path: Path) -> None:
    nets, table, picture = tmp_path / "nets", tmp_path / "table.jsonl", tmp_path / "table.png"
    nets.mkdir()
    torch.manual_seed(0)
    save_file(vgg_small().state_dict(), nets / "vgg_small-0.safetensors")
    asked = ["--nets", nets, "--rules", "erk", "rr", "--plain", "rr", "-o", table]
    run("sparsity_table.py", *asked, "--sparsities", "0.9")
    screen = run("sparsity_table.py", *asked, "--sparsities", "0.9", "0.99", "--plot", picture)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert [(r["rule"], r["sparsity"]) for r in rows] == [
        ("erk", 0.9), ("rr", 0.9), ("erk", 0.99), ("rr", 0.99)
    ]  # fmt: skip
    assert ["plain" in r for r in rows] == [False, True, False, True]
    assert all(0 <= r[k] <= 1 for r in rows for k in ("dense", "none", "shrunk"))
    cell = f"{100 * rows[1]['shrunk']:.2f} ± 0.00"
    part = screen[screen.index("| matched, shrunk |") :].splitlines()
    assert cell in next(x for x in part if x.startswith("| rr |"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert screen.endswith(run("sparsity_table.py", "--table", *asked))
