"""Models whose layers hand on more than hidden states: found out before weights are there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import CALIBRATION, MODEL
from tiny import fused_families, tiny_config, tiny_model

from moe_fair.engines.layer_calls import NotLayerwise, check_layerwise
from moe_fair.moe.loading import auto_class

MORE = {"glm_moe_dsa", "hy_v4", "zaya"}  # as `test_families` finds by streaming every family
STREAMS = {"deepseek_v4"}


@pytest.mark.parametrize("kind", fused_families())
def test_it_is_found_out_without_weights(kind: str) -> None:
    config = tiny_config(kind)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    for several in (False, True):
        if kind in MORE or (kind in STREAMS and not several):
            with pytest.raises(NotLayerwise):
                check_layerwise(model, several=several)
        else:
            check_layerwise(model, several=several)
    assert all(p.is_meta for p in model.parameters())  # nothing was put in their place


@pytest.mark.parametrize(
    ("kind", "wanted", "said"),
    [
        ("deepseek_v4", ["--repair", "distill"], "several streams of hidden states"),
        ("hy_v4", ["--repair", "refit"], "hands the next more than hidden states"),
        ("hy_v4", ["--rivals", "reap", "--repair", "none"], "hands the next more than hidden"),
    ],
)
def test_what_was_asked_for_is_refused_before_anything_is_calibrated(
    kind: str, wanted: list[str], said: str, tmp_path: Path, fails: Callable[..., str]
) -> None:
    model = tmp_path / "model"
    tiny_model(kind, vocab_size=2048).save_pretrained(model)
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, model)
    screen = fails(
        "prune", str(model), "--experts", "6", "-c", str(CALIBRATION), "--samples", "64",
        "--length", "32", *wanted, "-o", str(tmp_path / "out"),
    )  # fmt: skip
    assert said in screen
    assert "calibrating" not in screen
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
