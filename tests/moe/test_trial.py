"""Plans tried before a cut: which one is taken, and when none is.

That the losses are those of masked models is shown for every family (`flow.check_trial`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import batches, original, removals
from places import CALIBRATION, MODEL
from tiny import tiny_model

import moe_fair
from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.layer_calls import NotLayerwise
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.blocks import MoeBlock
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.rerouting import Rerouting
from moe_fair.moe.trial import trial_losses
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines import plan_selection as trials
from moe_fair.pipelines import trial_losses as losses_of_plans
from moe_fair.pipelines.rivals import RIVALS, rivals
from moe_fair.pipelines.trial_text import split_holdout, teaching_text

Fails = Callable[..., str]
PRUNE = [
    "prune", str(MODEL), "-c", str(CALIBRATION), "--samples", "64", "--length", "32",
    "--self-share", "0", "--repair", "none",
]  # fmt: skip


def test_a_router_that_does_not_look_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    source = Checkpoint(str(tmp_path))
    monkeypatch.setattr(Rerouting, "hiding", lambda *_: __import__("contextlib").nullcontext())
    engine = StreamingEngine(LoadedLayers(original(source)))
    with pytest.raises(ValueError, match="so plans cannot be tried; use --rivals none"):
        trial_losses(engine, batches(), [removals(source, True)])


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


def read(out: Path) -> Plan:
    return Plan.load(out / "moe_fair" / "plan.json")


@pytest.mark.slow
def test_the_best_of_those_tried_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that is bad on purpose loses to a rival; both losses are those of real cuts."""
    out = tmp_path / "out"
    bad = ["--experts", 20, "--method", "random", "--rivals", "taylor-sq/global,random/uniform"]
    run(*PRUNE, *bad, "-o", out)
    shown = capsys.readouterr()
    assert "held back to try plans on: 16 of 64 sequences" in shown.err
    assert "calibrating on 48 sequences" in shown.err
    assert "trying 2 plans on" in shown.err  # the other rival keeps what the method keeps
    plan = read(out)
    told = plan.explanation["trials"]
    assert told["taken"] == "taylor-sq/global"
    assert told["changes"].keys() == {"random", "taylor-sq/global"}
    assert plan.removal == "taylor-sq"
    assert "taylor-sq/global was taken" in shown.out
    assert "held-back sequences" in (out / "moe_fair" / "report.html").read_text()

    # the text that no score saw, and what a cut model loses on it
    recipe = Recipe(
        model=str(MODEL), calibration=(str(CALIBRATION),), samples=64, length=32, method="random",
        rivals=("taylor-sq/global",),
    )  # fmt: skip
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    seen, trial = split_holdout(recipe, text)
    assert trial is not None
    assert (len(seen.sequences), len(trial.sequences)) == (48, 16)
    assert set(seen.sequences) | set(trial.sequences) == set(text.sequences)
    assert [d for _, d in trial.sequences] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    # other documents, but for the one that the border falls into
    assert trial.sequences[:4] == tuple(q for q in text.sequences if q[1] == 0)[-4:]
    losses = [mean_loss(m, trial) for m in (MODEL, out)]
    assert losses[0] == pytest.approx(told["loss"], abs=2e-3)
    assert losses[1] - losses[0] == pytest.approx(told["changes"]["taylor-sq/global"], abs=5e-3)

    # the statistics know what they have not seen: planned again from them, the same is tried
    again = tmp_path / "again"
    stats = ["--stats", out / "moe_fair", "-c", CALIBRATION, "--samples", 64, "--length", 32]
    run("prune", MODEL, *stats, *bad, "--repair", "none", "-o", again)
    assert read(again).explanation == plan.explanation
    assert read(again).kept == plan.kept
    # of another text nothing is known that was not seen
    other = ["--stats", out / "moe_fair", "-c", CALIBRATION, "--samples", 72, "--length", 32]
    run("prune", MODEL, *other, *bad, "--repair", "none", "-o", tmp_path / "other")
    assert "no text is known that the statistics have not seen" in capsys.readouterr().err
    assert "trials" not in read(tmp_path / "other").explanation


@pytest.mark.slow
def test_a_plan_alone_says_that_it_was_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("calibrate", *PRUNE[1:10], "-o", tmp_path / "stats")
    assert "held back to try plans on: 16 of 64 sequences" in capsys.readouterr().err
    run("plan", tmp_path / "stats", "--experts", 40)
    assert "not tried against other plans" in capsys.readouterr().err
    run("plan", tmp_path / "stats", "--experts", 40, "--method", "reap")
    assert "not tried" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.nightly
def test_calibrate_collects_for_rivals_without_a_target(tmp_path: Path) -> None:
    """What named rivals need, and text held back for them; a wrong name is said all the same."""
    stats = tmp_path / "stats"
    run("calibrate", *PRUNE[1:10], "--rivals", "fair-u", "-o", stats)
    found = Statistics.load(stats)
    assert all("sketch" in found.view(g) for g in found.groups)
    assert found.metadata["calibration"]["held_back"] == 16


def mean_loss(model: Path, text: CalibrationSet) -> float:
    from moe_fair.engines.resident import ResidentEngine

    loaded = Checkpoint(str(model)).load("float32")
    pairs = list(ResidentEngine(loaded).losses(text.batches(8)))
    return float(sum((x * w).sum() for x, w in pairs) / sum(w.sum() for _, w in pairs))


def test_what_loses_least_is_taken_and_a_tie_is_the_methods() -> None:
    """However small the difference; its standard error, paired by sequences, is told."""
    base = torch.full((6,), 10.0, dtype=torch.float64)
    own = base + 1
    near = own + torch.tensor([0.5, -0.6, 0.4, -0.5, 0.3, -0.2], dtype=torch.float64)
    assert near.sum() < own.sum()
    assert taken(base, own, near) == "rival"
    assert taken(base, own, own + 0.01) == "own"
    assert taken(base, own, own) == "own"
    difference = near - own
    n = len(difference)
    by_hand = float(difference.std(correction=1)) * n**0.5 / 50
    assert trials._stderr(difference, 50) == pytest.approx(by_hand, rel=1e-12)


def taken(*losses: torch.Tensor) -> str:
    tokens = 60.0
    own, rival = (
        trials.Tried(
            name,
            None,  # type: ignore[arg-type]
            trials._change(x, losses[0], tokens),
            trials._stderr(x - losses[1], tokens),
        )
        for name, x in (("own", losses[1]), ("rival", losses[2]))
    )
    return trials.best_of([own, rival]).name


@pytest.mark.slow
def test_what_a_killed_run_measured_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics_folder: Path
) -> None:
    recipe = Recipe(
        model=str(MODEL), calibration=(str(CALIBRATION),), samples=8, length=32, experts=30
    )
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    statistics = Statistics.load(statistics_folder)
    home = tmp_path / "work" / "trials.json"
    said: list[str] = []

    def best(**settings: Any) -> Plan:
        chosen = recipe.with_settings(settings)
        return trials.best_plan(pipeline.plan, chosen, source, statistics, text, home, said.append)

    first = best()
    assert first.explanation["trials"]["changes"].keys() >= {"second-order", "fair"}
    measured = json.loads(home.read_text())
    with monkeypatch.context() as m:
        m.setattr(losses_of_plans, "trial_losses", None)  # would fail
        assert best() == first
    home.write_text(home.read_text()[:-40])
    assert best() == first
    assert json.loads(home.read_text()) == measured
    # what weighs more in the scores weighs more here, and what has no weight decides nothing
    more = best(weights={"python": 20.0}).explanation["trials"]
    assert more["changes"] != first.explanation["trials"]["changes"]
    alone = replace(text, sequences=tuple(q for q in text.sequences if q[1] == 1))
    source_of = recipe.with_settings({"weights": {text.domains[0]: 1.0, text.domains[1]: 0.0}})
    tried = trials.best_plan(pipeline.plan, source_of, source, statistics, alone, home)
    assert "trials" not in tried.explanation
    assert said.count(said[0]) >= 2


@pytest.mark.slow
def test_domains_without_weight_leave_no_trace(tmp_path: Path, statistics_folder: Path) -> None:
    """The trial with a weight of 0 is that on the text without the domain, standard errors too."""
    recipe = Recipe(
        model=str(MODEL), calibration=(str(CALIBRATION),), samples=8, length=32, experts=30
    )
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    statistics = Statistics.load(statistics_folder)
    plans = [
        trials.Tried(m, pipeline.plan(statistics, recipe.with_settings({"method": m})))
        for m in ("second-order", "random", "reap")
    ]
    zero = {text.domains[0]: 0.0, text.domains[3]: 0.0, text.domains[2]: 2.0}
    weighed = recipe.with_settings({"weights": zero})
    said: list[str] = []
    home = tmp_path / "a.json"
    found = trials.try_plans(weighed, source, text, plans, home, said.append)
    less = replace(text, sequences=tuple(q for q in text.sequences if q[1] in (1, 2)))
    want = trials.try_plans(weighed, source, less, plans, tmp_path / "b.json")
    told, direct = (x.explanation["trials"] for x in (found, want))
    assert told["sequences"] == direct["sequences"] == 4
    assert told["tokens"] == direct["tokens"]
    for name in told["stderr"]:
        assert told["changes"][name] == pytest.approx(direct["changes"][name], rel=1e-6)
        assert told["stderr"][name] == pytest.approx(direct["stderr"][name], rel=1e-6)
    # and by hand, from the losses that were measured
    stored = json.loads(home.read_text())
    losses, counts = (torch.tensor(stored[k], dtype=torch.float64) for k in ("losses", "counts"))
    domains = [b.domain for b in text.batches(recipe.batch_size) for _ in b.sequence_ids]
    rows = [(i, 2.0 if d == 2 else 1.0) for i, d in enumerate(domains) if d in (1, 2)]
    d = torch.stack([w * (losses[2, i] - losses[1, i]) for i, w in rows])
    by_hand = (
        float(d.std(correction=1)) * len(d) ** 0.5 / sum(w * float(counts[i]) for i, w in rows)
    )
    assert told["stderr"]["random"] == pytest.approx(by_hand, rel=1e-9)
    only = recipe.with_settings({"weights": dict.fromkeys(text.domains[:3], 0.0)})
    one = replace(text, sequences=text.sequences[:7])
    assert trials.try_plans(only, source, one, plans, home, said.append) is plans[0].plan
    assert "whose weight is 0" in said[-1]


@pytest.mark.slow
def test_nothing_is_tried_where_a_method_is_named_or_text_is_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = Recipe(model=str(MODEL))
    assert list(rivals(model)) == list(RIVALS)
    for named in (
        {"method": "reap"}, {"removal": "ean"}, {"allocate": "tod"}, {"tolerance": 0.1},
        {"reduce": "merge"}, {"rivals": ("none",)}, {"taylor": False},
    ):  # fmt: skip
        assert not rivals(model.with_settings(named)), named
    few = [*PRUNE[:5], "63", *PRUNE[6:]]
    run(*few, "--experts", 40, "-o", tmp_path / "out")
    assert "63 samples are fewer than 64" in capsys.readouterr().err
    assert "trials" not in read(tmp_path / "out").explanation


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("raep", "--rivals raep: no method 'raep' (did you mean 'reap'"),
        ("reap/tdo", "--rivals reap/tdo: no allocator 'tdo' (did you mean 'tod'"),
        ("reap/curves", "--rivals reap/curves: it needs measured costs"),
        ("", "--rivals"),
    ],
)
def test_bad_rivals(given: str, said: str, fails: Fails, tmp_path: Path) -> None:
    assert said in fails(*PRUNE, "--experts", 40, "--rivals", given, "-o", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("repair", ["none", "refit"])
def test_streamed_in_one_go(tmp_path: Path, repair: str) -> None:
    """The engines try the same plans and take the same one."""
    plans = []
    for engine in ("resident", "streaming"):
        out = tmp_path / engine
        moe_fair.prune(
            str(MODEL), out, experts=24, calibration=str(CALIBRATION), samples=64, length=16,
            repair=repair, engine=engine, rivals="reap/global", self_share=0,
        )  # fmt: skip
        plans.append(read(out))
    assert plans[0].explanation == plans[1].explanation
    assert plans[0].kept == plans[1].kept


@pytest.mark.slow
def test_plans_are_tried_as_they_will_be_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statistics_folder: Path
) -> None:
    """What was measured is found again by a run that was killed."""
    recipe = Recipe(
        model=str(MODEL), calibration=(str(CALIBRATION),), samples=64, length=16, experts=30,
        rivals=("reap", "taylor-sq/global", "frequency/uniform"),
    )  # fmt: skip
    source = pipeline.open_model(recipe)
    whole = pipeline.calibration_set(recipe, source, print)
    text = split_holdout(recipe, whole)[1]
    assert text is not None
    assert teaching_text(whole, text, "scale") is None
    assert teaching_text(whole, text, None) is None
    teaching = teaching_text(whole, text, "distill")
    assert teaching is not None
    assert len(teaching.sequences) == 48  # all that does not judge
    assert set(teaching.sequences).isdisjoint(text.sequences)
    statistics, home = Statistics.load(statistics_folder), tmp_path / "work" / "trials.json"
    said: list[str] = []

    def best(few: CalibrationSet | None, where: Path = home) -> Plan:
        return trials.best_plan(
            pipeline.plan, recipe, source, statistics, text, where, said.append, teaching=few
        )

    first = best(teaching)
    told = first.explanation["trials"]
    assert (told["sequences"], told["taught"]) == (16, 48)
    assert set(told["changes"]) == {"second-order", "reap", "taylor-sq/global", "frequency/uniform"}
    assert told["taken"] == min(told["changes"], key=told["changes"].get)
    assert "each repaired on 48: " in first.notes[-1]
    assert "trying 4 plans on 256 tokens, repaired on 768" in said[-1]
    with monkeypatch.context() as m:
        m.setattr(losses_of_plans, "repaired_losses", None)  # would fail
        assert best(teaching) == first
    untouched = best(None, tmp_path / "bare.json")
    assert "before any repair" in untouched.notes[-1]
    bare = untouched.explanation["trials"]
    assert bare["loss"] == pytest.approx(told["loss"], rel=1e-6)
    assert told["changes"]["second-order"] < bare["changes"]["second-order"]

    def no(*_: object, **__: object) -> None:
        raise NotLayerwise("it has several streams")

    monkeypatch.setattr(losses_of_plans, "repaired_losses", no)
    assert best(teaching, tmp_path / "bare.json") == untouched
    assert any("before any repair: it has several streams" in line for line in said)


def test_blocks_without_removals_are_left_alone() -> None:
    model: Any = tiny_model("qwen2_moe").eval()
    names = [b.name for b in moe_blocks(model)]
    found, _ = trial_losses(StreamingEngine(LoadedLayers(model)), batches(), [{}, {names[-1]: [0]}])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def moe_blocks(model: Any) -> list[MoeBlock]:
    from moe_fair.moe.blocks import find_blocks

    return find_blocks(model)
