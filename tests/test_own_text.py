"""`moe-fair sample` and `-c self`: the same bytes however they come about, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from places import CALIBRATION, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.core.recipe import DEFAULT_CALIBRATION, Recipe
from moe_fair.engines.processes import ALONE
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.own_source import with_own_text

Fails = Callable[..., str]
SAMPLE = ["sample", str(MODEL), "--length", "32", "--tokens", "6000", "--device", "cpu"]
SMALL: dict[str, Any] = {"samples": 8, "length": 32, "batch_size": 4}
RUN = ["--samples", "8", "--length", "32", "--batch-size", "4"]
PRUNE: dict[str, Any] = {**SMALL, "experts": 40, "repair": "none"}


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


@pytest.mark.slow
def test_self_alone_to_a_pruned_model_and_its_recipe_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No text is given: none is read from anywhere; what is kept serves a second run."""
    out, again = tmp_path / "out", tmp_path / "again"
    done = moe_fair.prune(str(MODEL), out, **PRUNE)
    assert sum(len(g.kept) for g in done.plan.groups) == 240
    recipe = yaml.safe_load((out / "moe_fair" / "recipe.yaml").read_text())
    assert recipe["calibration"] == ["self"]
    assert (out / "moe_fair" / "self.jsonl").is_file()
    run("verify", out, "--against", MODEL)
    capsys.readouterr()
    run("prune", "--recipe", out / "moe_fair" / "recipe.yaml", "-o", again)
    for name in ("plan.json", "self.jsonl", "self.yaml", "statistics.tensors"):
        kept, made = (folder / "moe_fair" / name for folder in (out, again))
        assert kept.read_bytes() == made.read_bytes(), name


@pytest.mark.slow
def test_statistics_bring_their_own_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repair reads the text that was calibrated on; it is not sampled again."""
    run("calibrate", MODEL, *RUN, "-c", CALIBRATION / "python.jsonl", "-c", "self:2",
        "-o", tmp_path / "stats")  # fmt: skip
    found = moe_fair.Statistics.load(tmp_path / "stats")
    assert found.domains == ("python", "self")
    assert found.tokens.sum() == 8 * 32
    capsys.readouterr()
    run("prune", MODEL, "--stats", tmp_path / "stats", "--experts", "40", "--repair", "scale",
        "-o", tmp_path / "out")  # fmt: skip
    said = capsys.readouterr().err
    assert f"own text: that of {tmp_path / 'stats' / 'self.jsonl'}" in said
    assert "sampling" not in said
    kept = tmp_path / "out" / "moe_fair" / "self.jsonl"
    assert kept.read_bytes() == (tmp_path / "stats" / "self.jsonl").read_bytes()


@pytest.mark.slow
def test_an_edited_text_is_not_taken_for_the_models(tmp_path: Path) -> None:
    moe_fair.calibrate(str(MODEL), tmp_path / "stats", calibration="self", **SMALL)
    file = tmp_path / "stats" / "self.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'{"text": "one more"}\n')
    moe_fair.prune(
        str(MODEL), tmp_path / "out", stats=str(tmp_path / "stats"), experts=40, repair="scale"
    )
    assert (tmp_path / "out" / "moe_fair" / "self.jsonl").read_bytes() == before


def test_a_share_of_own_text_beside_what_is_given() -> None:
    source = Checkpoint(str(MODEL))
    recipe = Recipe().with_settings({"calibration": ["a.txt:2", "b.txt"], "self_share": 0.25})
    found = with_own_text(recipe, source, lambda _: None, ALONE)
    assert found.calibration == ("a.txt:2", "b.txt", "self:1")
    assert with_own_text(found, source, lambda _: None, ALONE) == found  # as it is recorded
    none = recipe.with_settings({"self_share": 0})
    assert with_own_text(none, source, lambda _: None, ALONE).calibration == none.calibration


def test_what_does_not_fit_reads_text_as_before() -> None:
    source, said = Checkpoint(str(MODEL)), list[str]()
    recipe = Recipe().with_settings({"model": str(MODEL), "max_memory": "1MB"})
    found = with_own_text(recipe, source, said.append, ALONE)
    assert found.calibration == (DEFAULT_CALIBRATION,)
    assert said[-1].startswith("note: no calibration text is given, and the model is streamed")
    fits = with_own_text(replace(recipe, max_memory=None), source, said.append, ALONE)
    assert fits.calibration == ("self",)


def test_a_dry_run_says_what_would_be_sampled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("prune", MODEL, "--experts", "40", *RUN, "-c", CALIBRATION / "python.jsonl", "-c", "self",
        "--repair", "none", "--dry-run", "--json", "-o", tmp_path / "out")  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in found["stages"]][:2] == ["sample own text", "calibrate"]
    assert found["stages"][0]["tokens"] == 4 * 32
    assert found["stages"][0]["seconds"] > 0
    assert found["checks"]["calibration text"] == (
        "8 sequences, 256 tokens of python, self, sampled when it runs"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_that_name_is_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "self").mkdir()
    text = (CALIBRATION / "python.jsonl").read_text()
    (tmp_path / "self" / "python.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = moe_fair.calibrate(str(MODEL), calibration="self", **SMALL)
    assert found.domains == ("python",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--self-share", "0.5", "-c", "self"], "--self-share would change nothing: -c self has"),
        (["--self-share", "0.5"], "--self-share would change nothing: no other text is given"),
        (["--self-share", "1", "-c", "x.txt"], "must be 0 or more and below 1"),
        (["--server", "http://127.0.0.1:9", "-c", str(CALIBRATION)], "--server would change"),
        (["--server", "http://127.0.0.1:9", "-c", "self"], "is it running?"),
        (["-c", "self", "--max-memory", "1MB"], "do not fit in"),
        (["-c", "self", "-c", "missing.txt"], "missing.txt does not exist"),
    ],
)
def test_refusals_of_prune(given: list[str], said: str, fails: Fails, tmp_path: Path) -> None:
    line = fails("prune", MODEL, "--experts", "40", *RUN, *given, "-o", tmp_path / "out")
    assert said in line
    assert not (tmp_path / "out").exists()
