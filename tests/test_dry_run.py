"""`prune --dry-run`: the checks of a run, an estimate from one layer, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import CALIBRATION, HELDOUT, MODEL
from tiny import tiny_model
from transformers import AutoTokenizer

from moe_fair.cli import main
from moe_fair.engines.layers import LayeredModel
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.rivals import RIVALS

Fails = Callable[..., str]
TEXT = ["-c", str(CALIBRATION), "--samples", "64", "--length", "32", "--self-share", "0"]


@pytest.fixture
def dry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run `prune --dry-run --json`; a model that is loaded fails."""

    def no(*_: object) -> None:
        raise AssertionError("a dry run loads no model")

    monkeypatch.setattr(Checkpoint, "load", no)

    def run(*arguments: object) -> Any:
        with pytest.raises(SystemExit, match="0"):
            main(["prune", *map(str, arguments), "--dry-run", "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def layer_bytes(source: Checkpoint, layer: int) -> int:
    return sum(t.bytes for t in source.tensors if f".layers.{layer}." in t.name)


@pytest.mark.slow
def test_a_run_in_one_go(dry: Callable[..., Any], tmp_path: Path) -> None:
    given = [MODEL, "--experts", 40, *TEXT, "--heldout", HELDOUT, "--heldout-samples", 16]
    found = dry(*given, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    stages = {s["name"]: s for s in found["stages"]}
    tokens = [48 * 32, 64 * 32, 4 * 64 * 32, 0, 16 * 32]  # of those tried 16 judge, 48 teach
    assert [s["tokens"] for s in found["stages"]] == tokens
    assert stages["calibrate"]["passes"] == "forward and backward"
    tried = f"the model and up to {1 + len(RIVALS)} plans, forward"
    assert stages["try plans"]["passes"] == tried + ", each fitted"
    given_none = dry(*given, "--repair", "none", "-o", tmp_path / "out")
    bare = {s["name"]: s for s in given_none["stages"]}["try plans"]
    assert (bare["passes"], bare["tokens"]) == (tried, 16 * 32)
    assert stages["repair"]["passes"] == "distill, layer by layer, 3 copies, 2 epochs"
    assert all(s["seconds"] > 0 for s in found["stages"])
    assert found["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"]))
    assert (found["engine"], found["why"].split()[-2:]) == ("resident", ["on", "cpu"])
    # one layer, and no more
    assert found["bytes_read"] == layer_bytes(Checkpoint(str(MODEL)), 0)
    assert "240 of 360 experts" in found["checks"]["target"]
    assert found["disk"]["result"] < found["disk"]["free"]
    # twice the layers' text costs about twice as much
    more = dry(*given[:5], "--samples", 128, *given[7:], "-o", tmp_path / "out")
    assert more["stages"][0]["tokens"] == 2 * found["stages"][0]["tokens"]


@pytest.mark.slow
@pytest.mark.nightly
def test_what_is_there_is_not_done_again(
    dry: Callable[..., Any], tmp_path: Path, statistics_folder: Path
) -> None:
    stats = dry(MODEL, "--stats", statistics_folder, "--experts", 40, "-o", tmp_path / "out")
    assert [s["name"] for s in stats["stages"]] == ["repair", "cut and verify"]
    bare = ["--repair", "none", "-o", tmp_path / "out"]
    cut = dry(MODEL, "--stats", statistics_folder, "--experts", 40, *bare)
    assert [s["name"] for s in cut["stages"]] == ["cut and verify"]
    assert cut["bytes_read"] == 0
    streamed = dry(MODEL, "--experts", 40, *TEXT, "--engine", "streaming", *bare)
    assert streamed["engine"] == "streaming"
    assert [s["name"] for s in streamed["stages"]] == ["calibrate", "try plans", "cut and verify"]
    measured = dry(MODEL, "--experts", 40, *TEXT, "--allocate", "curves", *bare)
    assert measured["stages"][1]["passes"] == "48 removals, forward"  # eight depths a layer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--experts", 3], "the router picks top 4"),
        (["--experts", 40, "--curve-samples", 4], "--curve-samples would change nothing"),
        (["--experts", 40, "--weights", "cobol=2"], "no calibration domain 'cobol'"),
        (["--experts", 40, "--method", "fair-u", "-c", str(CALIBRATION / "python.jsonl")],
         "compares calibration domains and there are fewer than two"),
        (["--experts", 40, "--heldout", "none.txt"], "none.txt does not exist"),
        (["--experts", 40, "--allocate", "curves", "--engine", "streaming"], "cost curves run the"),
        ([], "give exactly one target"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dry_run", [["--dry-run"], []], ids=["dry", "run"])
def test_it_refuses_what_a_run_refuses(
    given: list[object], said: str, dry_run: list[str], fails: Fails, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A run does so before any weights are read, too."""

    def no(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(Checkpoint, "load", no)
    monkeypatch.setattr(LayeredModel, "_load", no)
    text = TEXT[2:] if "-c" in given else TEXT
    assert said in fails("prune", MODEL, *text, *given, *dry_run, "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_result_and_a_full_disk(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    said = fails("prune", MODEL, "--experts", 40, *TEXT, "--dry-run", "-o", tmp_path / "out")
    assert "is not empty" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "gpt_oss",
        "hy_v4",
        pytest.param("deepseek_v3", marks=pytest.mark.nightly),
        pytest.param("qwen3_vl_moe", marks=pytest.mark.nightly),
        pytest.param("llama4", marks=pytest.mark.nightly),
    ],
)
def test_other_families(kind: str, dry: Callable[..., Any], tmp_path: Path) -> None:
    """Dense first layers, groups of experts, biases, other towers, more than hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tiny_model(kind, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    found = dry(tmp_path / "model", "--ratio", 0.25, *TEXT, "-o", tmp_path / "out")
    if kind == "hy_v4":
        assert found["seconds"] is None
        assert "no estimate of the time" in found["notes"][-1]
        return
    assert all(s["seconds"] > 0 for s in found["stages"])
    assert not (tmp_path / "out").exists()


def test_the_screen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = ["-c", str(CALIBRATION), "--samples", "5", "--length", "16", "--repair", "scale"]
    with pytest.raises(SystemExit, match="0"):
        main(
            ["prune", str(MODEL), "--total", "240", *small, "--dry-run", "-o", str(tmp_path / "o")]
        )
    shown = " ".join(capsys.readouterr().out.split())  # however narrow the screen is
    for said in ("o is new", "--total 240: about 240 of 360", "resident (", "calibrate",
                 "nothing was written"):  # fmt: skip
        assert said in shown
