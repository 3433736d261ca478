"""One process's model over several places: the same statistics from disk, main memory and again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from places import CALIBRATION, MODEL
from tiny import tiny_model

import moe_fair
from moe_fair.cli import main
from moe_fair.core.units import Statistics

SMALL = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]


def calibrate(output: Path, model: Path, *more: object) -> Statistics:
    arguments = ["calibrate", model, *SMALL, *more, "-o", output]
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])
    return Statistics.load(output)


def half_on_disk(folder: Path, layers: int, **other: Any) -> Path:
    places = {f"model.layers.{i}": "disk" for i in range(0, layers, 2)}
    file = folder / "map.json"
    file.write_text(json.dumps({"": "cpu", **places, **other}))
    return file


def close(a: Statistics, b: Statistics) -> None:
    """Weights that come from another place in memory may be summed in another order."""
    for group, sums in a.sums.items():
        for name, t in sums.items():
            scale = t.abs().max()
            torch.testing.assert_close(b.sums[group][name], t, atol=1e-4 * scale, rtol=0)
        assert a.constants[group].keys() == b.constants[group].keys() != set()
        for name, t in a.constants[group].items():
            torch.testing.assert_close(b.constants[group][name], t, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    calibrate(tmp_path / "plain", MODEL)
    calibrate(tmp_path / "again", MODEL, "--checkpointing")
    a, b = (tmp_path / x / "statistics.safetensors" for x in ("plain", "again"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_gradients_go_through_layers_on_disk(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = calibrate(tmp_path / "plain", MODEL)
    spread = calibrate(tmp_path / "disk", MODEL, "--device-map", half_on_disk(tmp_path, 6))
    said = capsys.readouterr().err
    assert "engine: resident (spread by --device-map" in said
    assert "3 on disk" in said
    assert "each layer runs twice" in said
    close(plain, spread)
    assert moe_fair.plan(spread, experts=40).kept == moe_fair.plan(plain, experts=40).kept


@pytest.mark.slow
def test_all_on_disk_and_auto(tmp_path: Path) -> None:
    plain = calibrate(tmp_path / "plain", MODEL, "--no-counterfactual")
    (tmp_path / "map.yaml").write_text('"": disk\n')
    for given in (tmp_path / "map.yaml", "auto"):
        output = tmp_path / f"of-{Path(given).stem}"
        close(plain, calibrate(output, MODEL, "--no-counterfactual", "--device-map", given))


@pytest.mark.slow
def test_a_router_bias_on_disk(tmp_path: Path) -> None:
    """A correction bias is a buffer, which accelerate leaves where the layer computes."""
    model = tmp_path / "model"
    tiny_model("deepseek_v3", vocab_size=4096).save_pretrained(model)
    for file in MODEL.glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    plain = calibrate(tmp_path / "plain", model)
    close(plain, calibrate(tmp_path / "disk", model, "--device-map", half_on_disk(tmp_path, 4)))


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (None, [], "neither auto nor balanced nor a file"),
        ("[", [], "is not YAML that can be used: line 1"),
        ("- 1", [], "write module: device"),
        ('{"": 1.5}', [], "names no device"),
        ('{"": "moon"}', [], "is no device"),
        ('{"": "cuda:77"}', [], "is not among this machine's"),
        ('{"": "cpu", "model.layer.0": "cpu"}', [], "the model has no module 'model.layer.0'"),
        ('{"model.layers": "cpu"}', [], "no device for model.embed_tokens"),
        ('{"": "cpu"}', ["--engine", "streaming"], "--device-map is for the resident engine"),
    ],
)  # fmt: skip
def test_bad_maps(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    more: list[str],
    said: str,
) -> None:
    if content is not None:
        (tmp_path / "map").write_text(content)
    given = ["--device-map", str(tmp_path / "map"), *more, "-o", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        main(["calibrate", str(MODEL), *SMALL, *given])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
