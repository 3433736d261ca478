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
from moe_fair.moe.self_text import DOCUMENTS, Written
from moe_fair.pipelines.opening import calibration_set
from moe_fair.pipelines.own_source import calibration_text, with_own_text

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
@pytest.mark.nightly
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
@pytest.mark.nightly
def test_an_edited_text_is_not_taken_for_the_models(tmp_path: Path) -> None:
    moe_fair.calibrate(str(MODEL), tmp_path / "stats", calibration="self", **SMALL)
    file = tmp_path / "stats" / "self.jsonl"
    before = file.read_bytes()
    file.write_bytes(before + b'{"text": "one more"}\n')
    moe_fair.prune(
        str(MODEL), tmp_path / "out", stats=str(tmp_path / "stats"), experts=40, repair="scale"
    )
    assert (tmp_path / "out" / "moe_fair" / "self.jsonl").read_bytes() == before


def test_own_text_beside_what_is_given() -> None:
    """Unasked a quarter on top; none where that is little, recorded without, or not wanted."""
    source, said = Checkpoint(str(MODEL)), list[str]()
    given = {"model": str(MODEL), "calibration": ["a.txt:2", "b.txt"]}

    def share(settings: dict[str, Any], **earlier: object) -> float | None:
        recipe = Recipe().with_settings({**given, **settings})
        found = with_own_text(recipe, source, said.append, ALONE, earlier=earlier)
        assert (found.calibration, found.samples) == (recipe.calibration, recipe.samples)
        recorded = replace(found, calibration_digest="0" * 64)
        assert with_own_text(recorded, source, lambda _: None, ALONE) == recorded
        return found.self_share

    assert share({}) == 0.25
    assert said == [
        "own text: 128 samples beside the 512 of the text that is given (--self-share 0 for none)"
    ]
    assert share({"samples": 29}) == 0.25  # 7.25 samples are 8
    assert share({"samples": 28}) is None
    assert share({"method": "reap"}) is None
    assert share({"self_share": 0}) == 0
    assert share({"samples": 8, "self_share": 0.5}) == 0.5
    assert share({}, calibration=["a.txt:2", "b.txt"]) is None
    assert share({"calibration_digest": "0" * 64}) is None
    said.clear()
    assert share({"max_memory": "1MB"}) is None
    assert said == ["note: no own text beside the text that is given: the model is streamed here"]


@pytest.mark.slow
def test_the_given_text_stays_and_own_text_comes_on_top(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And statistics made of both are used with both, where the text is named again."""
    text = ["-c", CALIBRATION / "python.jsonl", *RUN]
    run("calibrate", MODEL, *text, "--self-share", "0.5", "-o", tmp_path / "stats")
    found = moe_fair.Statistics.load(tmp_path / "stats")
    assert found.domains == ("python", "self")
    recipe = Recipe().with_settings(
        {**SMALL, "model": str(MODEL), "calibration": [str(CALIBRATION / "python.jsonl")]}
    )
    source, own = Checkpoint(str(MODEL)), tmp_path / "stats" / "self.jsonl"
    alone = calibration_set(recipe, source, lambda _: None)
    both = calibration_set(replace(recipe, self_share=0.5), source, lambda _: None, own)
    assert both.sequences[:8] == alone.sequences
    assert [d for _, d in both.sequences[8:]] == [1] * 4
    assert found.tokens.sum() == both.tokens
    capsys.readouterr()
    run("prune", MODEL, "--stats", tmp_path / "stats", *text, "--experts", "40",
        "--repair", "scale", "-o", tmp_path / "out")  # fmt: skip
    assert f"own text: that of {own}" in capsys.readouterr().err
    recorded = yaml.safe_load((tmp_path / "out" / "moe_fair" / "recipe.yaml").read_text())
    assert recorded["self_share"] == 0.5


def test_a_model_that_writes_nothing_reads_what_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Own text that nobody asked for ends no run."""
    source, said = Checkpoint(str(MODEL)), list[str]()
    text = {"model": str(MODEL), "calibration": [str(CALIBRATION / "python.jsonl")], "length": 16}
    recipe = Recipe().with_settings({**text, "samples": 32})
    mixed = with_own_text(recipe, source, said.append, ALONE)
    assert mixed.self_share == 0.25
    nothing = Written([], loops=DOCUMENTS, unended=0, missing=DOCUMENTS)
    monkeypatch.setattr("moe_fair.pipelines.own_text.write_batch", lambda *_, **__: nothing)
    found, kept = calibration_text(mixed, source, None, said.append, ALONE)
    assert found == calibration_set(recipe, source, said.append)
    assert kept == {}
    assert said[-1].startswith("note: the text that is given is read alone:")
    with pytest.raises(ValueError, match="wrote nothing that can be used"):
        calibration_text(replace(recipe, calibration=("self",)), source, None, print, ALONE)

    def unknown(*_: object) -> None:
        raise ValueError("nothing says where a document starts")

    monkeypatch.setattr("moe_fair.pipelines.own_text.find_author", unknown)
    assert with_own_text(recipe, source, said.append, ALONE) == recipe
    assert said[-1].endswith("nothing says where a document starts")


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
        (["--self-share", "-1", "-c", "x.txt"], "--self-share -1 must be 0 or more"),
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
