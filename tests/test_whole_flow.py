"""The stages together: the same seed gives the same bytes, one at a time or in one go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from places import CALIBRATION, HELDOUT, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.pipelines import moe as pipeline

SMALL = ["-c", str(CALIBRATION), "--samples", "8", "--length", "64", "--batch-size", "4"]


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


@pytest.mark.slow
def test_one_go_equals_the_stages_byte_for_byte(tmp_path: Path) -> None:
    scale = ["--repair", "scale"]  # the quickest; the default is in the test of held-out losses
    run("prune", MODEL, "--experts", 40, *SMALL, *scale, "-o", tmp_path / "one")
    run("calibrate", MODEL, *SMALL, "-o", tmp_path / "stats")
    run("plan", tmp_path / "stats", "--experts", 40, "-o", tmp_path / "plan.json")
    run("prune", MODEL, "--plan", tmp_path / "plan.json", *scale, "-o", tmp_path / "planned")
    run(
        "prune",
        MODEL,
        "--stats",
        tmp_path / "stats",
        "--experts",
        40,
        *scale,
        "-o",
        tmp_path / "stated",
    )
    plan = (tmp_path / "one" / "moe_fair" / "plan.json").read_bytes()
    for other in ("planned", "stated"):
        assert (tmp_path / other / "moe_fair" / "plan.json").read_bytes() == plan
        for name in ("model.safetensors", "config.json"):
            same = (tmp_path / other / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
            assert same, (other, name)
    assert (tmp_path / "plan.json").read_bytes() == plan
    made = (tmp_path / "stats" / "statistics.safetensors").read_bytes()
    assert (tmp_path / "one" / "moe_fair" / "statistics.tensors").read_bytes() == made
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.slow
def test_engines_give_the_same_bytes(tmp_path: Path) -> None:
    for engine in ("resident", "streaming"):
        run("calibrate", MODEL, *SMALL, "--engine", engine, "-o", tmp_path / engine)
    a, b = (tmp_path / e / "statistics.safetensors" for e in ("resident", "streaming"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_another_seed_draws_other_text(statistics_folder: Path, settings: dict[str, Any]) -> None:
    other = moe_fair.calibrate(str(MODEL), seed=1, **settings)
    first = moe_fair.plan(statistics_folder, experts=40)
    second = moe_fair.plan(other, experts=40)
    assert first.fingerprint["calibration"] != second.fingerprint["calibration"]
    assert first.kept != second.kept


@pytest.mark.slow
def test_held_out_losses_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    heldout = ["--heldout", HELDOUT, "--heldout-samples", 8]
    run("prune", MODEL, "--experts", 20, *SMALL, *heldout, "--repair", "none", "-o", out, "--json")
    shown = json.loads(capsys.readouterr().out)
    written = json.loads((out / "moe_fair" / "heldout.json").read_text())
    assert shown["heldout"] == written
    assert shown["output"] == str(out)
    assert sum(shown["kept"].values()) == 120
    assert written["original"]["mean"] < written["pruned"]["mean"] < 8
    assert set(written["original"]["domains"]) == {
        "javascript", "python", "reference-manuals", "rust-docs",
    }  # fmt: skip
    assert written["original"]["tokens"] == 8 * 63


def test_the_screen_and_the_file_agree(
    statistics_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("plan", statistics_folder, "--experts", 40, "--json", "-o", tmp_path / "plan.json")
    assert capsys.readouterr().out == (tmp_path / "plan.json").read_text()
    run("plan", statistics_folder, "--experts", 15, "--method", "fair")
    screen = capsys.readouterr().out
    for said in ("ToD", "null depth", "90 of 360 experts kept", "parameters: 8.05 M ->", "ceiling"):
        assert said in screen
    assert "expert parallel: 1, 3, 5, 15 devices divide every layer evenly" in screen
    run("plan", statistics_folder, "--experts", 37)
    screen = capsys.readouterr().out
    assert "expert parallel: no number of devices divides every layer evenly" in screen
    run("plan", statistics_folder, "--experts", 40, "--multiple-of", 8)
    assert "expert parallel: 1, 2, 4, 8 devices divide every layer" in capsys.readouterr().out


def test_domain_weights_change_the_plan(statistics_folder: Path) -> None:
    plain = moe_fair.plan(statistics_folder, experts=30)
    weighted = moe_fair.plan(statistics_folder, experts=30, weights={"python": 20})
    assert plain.kept != weighted.kept
    with pytest.raises(ValueError, match="no calibration domain 'cobol'"):
        moe_fair.plan(statistics_folder, experts=30, weights={"cobol": 2})
    # a weight of 0 leaves a domain out; the others stay 1
    without = moe_fair.plan(statistics_folder, experts=30, weights={"python": 0})
    others = ("javascript", "reference-manuals", "rust-docs")
    ones = {"python": 0, **dict.fromkeys(others, 1)}
    assert without.kept == moe_fair.plan(statistics_folder, experts=30, weights=ones).kept
    assert without.groups[0].removal != plain.groups[0].removal
    with pytest.raises(ValueError, match=r"no calibration domain 'pyton' \(did you mean 'python'"):
        moe_fair.plan(statistics_folder, experts=30, weights={"pyton": 0})
    with pytest.raises(ValueError, match="every weight is 0"):
        moe_fair.plan(statistics_folder, experts=30, weights=dict.fromkeys(ones, 0))


def test_a_tolerance_alone_sets_the_depths(statistics_folder: Path) -> None:
    plans = [moe_fair.plan(statistics_folder, tolerance=a) for a in (0.0, 0.1, 0.5)]
    totals = [sum(len(g.kept) for g in p.groups) for p in plans]
    assert totals[0] >= totals[1] > totals[2]
    for p, a in zip(plans, (0.0, 0.1, 0.5), strict=True):
        assert p.tolerance == a
        assert all(g.tod is not None and g.tod <= a for g in p.groups)


@pytest.mark.slow
def test_nothing_half_written_takes_the_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics_folder: Path
) -> None:
    write = pipeline.write_model

    def stops(*arguments: Any, **more: Any) -> None:
        write(*arguments, **more)
        raise OSError("No space left on device")

    given = ["--stats", statistics_folder, "--experts", 40, "--repair", "none"]
    prune = ["prune", MODEL, *given, "-o", tmp_path / "out"]
    with monkeypatch.context() as m:
        m.setattr(pipeline, "write_model", stops)
        with pytest.raises(SystemExit, match="2"):
            main([str(a) for a in prune])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "stale.safetensors").touch()
    run(*prune)
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    assert (tmp_path / "out" / "moe_fair" / "plan.json").is_file()
