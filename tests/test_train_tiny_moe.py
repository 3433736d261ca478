"""The training script: it learns, the result loads with stock classes, the seed decides it all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from places import ROOT
from processes import python
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow  # about 20 s: two trainings

SMALL = {
    "--steps": 40, "--layers": 2, "--experts": 8, "--top-k": 2, "--hidden": 32,
    "--expert-hidden": 16, "--vocab": 300, "--length": 32, "--batch-size": 8, "--lr": 0.01,
}  # fmt: skip


def train(tmp_path: Path, name: str) -> Path:
    texts = [f"--text={d}={tmp_path / d}" for d in ("numbers", "letters")]
    flags = [str(x) for pair in SMALL.items() for x in pair]
    script = ROOT / "eval" / "train_tiny_moe.py"
    python(script, "-o", tmp_path / name, *flags, *texts).check_returncode()
    return tmp_path / name


@pytest.mark.nightly
def test_it_learns_loads_and_repeats(tmp_path: Path) -> None:
    for domain, word in (("numbers", "one two three four "), ("letters", "a b c d e f g h ")):
        (tmp_path / domain).mkdir()
        for i in range(12):
            (tmp_path / domain / f"{i}.txt").write_text(f"{i}\n" + (word * (i + 5) + "\n") * 30)
    first, second = train(tmp_path, "first"), train(tmp_path, "second")
    report = json.loads((first / "training.json").read_text())
    assert report["losses"][-1][1] < 0.5 * report["losses"][0][1]
    assert set(report["heldout"]) == {"numbers", "letters"}
    a, b = (AutoModelForCausalLM.from_pretrained(x).state_dict() for x in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert tokenizer.decode(tokenizer("one two")["input_ids"]) == "one two"
    held, seen = (
        {
            json.loads(x)["text"]
            for x in (first / "text" / p / "numbers.jsonl").read_text().splitlines()
        }
        for p in ("heldout", "calibration")
    )
    assert held
    assert not held & seen
