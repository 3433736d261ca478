"""The first command of the README as it is typed: model and data set from a (loopback) Hub."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet
import pytest
import yaml
from hub import Hub, serving
from places import CALIBRATION, MODEL
from processes import python
from tiny import tiny_model
from transformers import AutoTokenizer

from moe_fair.core.plan import Plan
from moe_fair.core.recipe import DEFAULT_CALIBRATION

NAME = "Qwen/Qwen1.5-MoE-A2.7B-Chat"
TYPED = ["-m", "moe_fair", "prune", NAME, "--experts", "40"]
RESULT = "Qwen1.5-MoE-A2.7B-Chat-40-experts"


@pytest.fixture
def hub() -> Iterator[Hub]:
    """With a data set that is read where the model cannot sample its own text."""
    texts = [
        json.loads(line)["text"]
        for file in sorted(CALIBRATION.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    rows = pyarrow.table({"text": texts, "meta": [{"pile_set_name": "x"}] * len(texts)})
    file = io.BytesIO()
    pyarrow.parquet.write_table(rows, file)
    found = Hub()
    place = "data/train-00000-of-00001-4746b8785c874cc7.parquet"
    found.add(f"datasets/{DEFAULT_CALIBRATION}", {place: file.getvalue()})
    with serving(found):
        yield found


def typed(hub: Hub, model: Path, home: Path, *more: str) -> tuple[str, Path]:
    """Serve a model under the name and run the command; what it said, and the result."""
    hub.add(NAME, {f.name: f.read_bytes() for f in model.iterdir() if f.is_file()})
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    mine |= {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    place = home / "here"
    place.mkdir()
    done = python(*TYPED, *more, env=mine, cwd=place, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert hub.unknown == []
    assert f"output: {RESULT}\n" in done.stderr
    assert [p.name for p in place.iterdir()] == [RESULT]
    return done.stdout, place / RESULT


@pytest.mark.slow
@pytest.mark.nightly
def test_the_reference_model(hub: Hub, tmp_path: Path) -> None:
    said, out = typed(hub, MODEL, tmp_path, "--samples", "16", "--length", "64")
    assert "240 of 360 experts kept (40 per layer)" in said
    plan = Plan.load(out / "moe_fair" / "plan.json")
    assert sum(len(g.kept) for g in plan.groups) == 240
    assert (plan.recipe["model"], plan.recipe["calibration"]) == (NAME, ["self"])
    recipe = yaml.safe_load((out / "moe_fair" / "recipe.yaml").read_text())
    assert (recipe["model"], recipe["calibration"]) == (NAME, ["self"])


def narrow(folder: Path) -> Path:
    """A model so narrow that all defaults take a minute."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = tiny_model(
        "qwen2_moe", vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_experts=44,
        num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8,
        intermediate_size=16, num_attention_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--samples", "32", "--length", "64"), (32, 64)),
        pytest.param((), (512, 512), marks=pytest.mark.nightly),
    ],
    ids=["little text", "all defaults"],
)
def test_a_narrow_model(
    hub: Hub, tmp_path: Path, more: tuple[str, ...], text: tuple[int, int]
) -> None:
    said, out = typed(hub, narrow(tmp_path / "model"), tmp_path, *more)
    assert "40 of 44 experts kept (40 per layer)" in said
    plan = Plan.load(out / "moe_fair" / "plan.json")
    assert (plan.recipe["model"], plan.recipe["calibration"]) == (NAME, ["self"])
    assert (plan.recipe["samples"], plan.recipe["length"]) == text
    assert sum(len(g.kept) for g in plan.groups) == 40
