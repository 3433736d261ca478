"""The recipe beside a result does the same again; settings are honoured or refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from places import CALIBRATION, HELDOUT, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.core.recipe_file import load_recipe
from moe_fair.pipelines.unused_settings import Run, unused

Fails = Callable[..., str]
SMALL = ["-c", str(CALIBRATION), "--samples", "8", "--length", "64", "--batch-size", "4"]
REDRAWN = {"report.html"}


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([str(a) for a in arguments])


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a result but its report; of the manifest that lists them nothing is new."""
    found = {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }
    return {n: b for n, b in found.items() if Path(n).name not in REDRAWN}


def again(out: Path) -> dict[str, object]:
    """Run a result's recipe; its files must be the same. The recipe's settings."""
    other = out.with_name(out.name + "-again")
    run("prune", "--recipe", out / "moe_fair" / "recipe.yaml", "-o", other)
    one, two = files(out), files(other)
    assert one.keys() == two.keys()
    assert [n for n in one if one[n] != two[n]] == []
    found = yaml.safe_load((out / "moe_fair" / "recipe.yaml").read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.slow
def test_a_result_made_in_one_go(tmp_path: Path) -> None:
    run("prune", MODEL, "--experts", 40, *SMALL, "--repair", "scale", "-o", tmp_path / "out",
        "--heldout", HELDOUT, "--heldout-samples", 4)  # fmt: skip
    found = again(tmp_path / "out")
    assert found["experts"] == 40
    assert (found["samples"], found["length"], found["batch_size"]) == (8, 64, 4)
    assert len(str(found["calibration_digest"])) == len(str(found["heldout_digest"])) == 64
    recipe = load_recipe(tmp_path / "out" / "moe_fair" / "recipe.yaml")
    assert recipe == Recipe().with_settings(recipe.to_dict())
    # what was never used is not there
    assert not {"curve_samples", "fresh", "stats", "plan", "curves"} & found.keys()


@pytest.mark.slow
@pytest.mark.parametrize("repair", [["--repair", "scale"], pytest.param([], id="default")])
@pytest.mark.nightly
def test_a_result_from_statistics(repair: list[str], tmp_path: Path) -> None:
    """They were made with another batch size and seed than this run's; the text is theirs."""
    stats = tmp_path / "stats"
    run("calibrate", MODEL, *SMALL, "--seed", 5, "-o", stats)
    run("prune", MODEL, "--stats", stats, "--experts", 40, *repair, "-o", tmp_path / "out")
    found = again(tmp_path / "out")
    assert found["calibration"] == [str(CALIBRATION)]
    assert (found["samples"], found["length"], found["seed"]) == (8, 64, 5)
    assert (found["experts"], found["stats"]) == (40, "statistics.tensors")
    shutil.rmtree(stats)
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "out", moved)
    again(moved)


@pytest.mark.slow
def test_a_result_from_a_plan(tmp_path: Path, statistics_folder: Path) -> None:
    plan = tmp_path / "plan.json"
    run("plan", statistics_folder, "--experts", 40, "--method", "reap", "-o", plan)
    out = tmp_path / "out"
    run("prune", MODEL, "--plan", plan, "--repair", "scale", "-o", out)
    found = again(out)
    assert (found["experts"], found["method"], found["plan"]) == (40, "reap", "plan.json")
    assert (found["samples"], found["length"]) == (8, 64)
    made = moe_fair.Plan.load(out / "moe_fair" / "plan.json")
    assert sum(len(g.kept) for g in made.groups) == 240
    run("verify", out, "--against", MODEL)


@pytest.mark.slow
@pytest.mark.nightly
def test_a_rivals_plan_and_merged_experts(tmp_path: Path) -> None:
    text = ["-c", CALIBRATION, "--samples", 64, "--length", 32]
    run("prune", MODEL, "--experts", 20, *text, "--method", "random", "--rivals",
        "taylor-sq/global", "--repair", "none", "-o", tmp_path / "out")  # fmt: skip
    assert again(tmp_path / "out")["rivals"] == ["taylor-sq/global"]
    stats = ["--stats", tmp_path / "out" / "moe_fair"]
    run("prune", MODEL, *stats, "--experts", 20, "--method", "random", "--rivals",
        "taylor-sq/global", "--repair", "none", "-o", tmp_path / "two")  # fmt: skip
    again(tmp_path / "two")
    run("calibrate", MODEL, *text, "--for", "merge", "-o", tmp_path / "for-merge")
    stats = ["--stats", tmp_path / "for-merge"]
    run("prune", MODEL, *stats, "--experts", 45, "--reduce", "merge", "-o", tmp_path / "merged")
    found = again(tmp_path / "merged")
    assert (found["reduce"], found["repair"]) == ("merge", "none")
    assert "calibration" not in found  # no text was run


@pytest.mark.slow
@pytest.mark.nightly
def test_measured_costs_are_in_the_statistics(tmp_path: Path, statistics_folder: Path) -> None:
    run("prune", MODEL, "--stats", statistics_folder, "--experts", 30, "--allocate", "curves",
        "--curve-samples", 2, "--repair", "none", "-o", tmp_path / "out")  # fmt: skip
    again(tmp_path / "out")
    run("prune", MODEL, *SMALL, "--experts", 30, "--method", "counterfactual-measured",
        "--curve-samples", 2, "--repair", "none", "-o", tmp_path / "alone")  # fmt: skip
    assert again(tmp_path / "alone")["curve_samples"] == 2


@pytest.mark.slow
@pytest.mark.nightly
def test_statistics_again(tmp_path: Path) -> None:
    run("calibrate", MODEL, *SMALL, "-o", tmp_path / "a")
    run("calibrate", "--recipe", tmp_path / "a" / "recipe.yaml", "-o", tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.slow
@pytest.mark.nightly
def test_the_text_of_this_run_is_what_was_asked_for(
    tmp_path: Path, statistics_folder: Path
) -> None:
    """--samples, --length and --seed beside --stats: the repair runs on that text."""
    for name, more in {"theirs": [], "other": ["--seed", 3, "--samples", 10]}.items():
        run("prune", MODEL, "--stats", statistics_folder, "--experts", 40, "--repair", "scale",
            *more, "-o", tmp_path / name)  # fmt: skip
    found = again(tmp_path / "other")
    assert (found["seed"], found["samples"], found["length"]) == (3, 10, 64)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("theirs", "other")]
    assert weights[0] != weights[1]


@pytest.mark.slow
def test_text_that_has_changed_is_refused(tmp_path: Path, fails: Fails) -> None:
    text = tmp_path / "text.txt"
    text.write_text((CALIBRATION / "python.jsonl").read_text()[:60_000])
    given = ["-c", text, "--samples", 4, "--length", 64]
    run("prune", MODEL, "--experts", 40, *given, "--repair", "none", "-o", tmp_path / "out")
    run("calibrate", MODEL, *given, "-o", tmp_path / "stats")
    text.write_text("Other words. " + text.read_text())
    recipe = tmp_path / "out" / "moe_fair" / "recipe.yaml"
    said = fails("prune", "--recipe", recipe, "-o", tmp_path / "two")
    assert "the calibration text is not the one of the recipe's calibration_digest" in said
    assert "remove the line calibration_digest" in said
    lines = recipe.read_text().splitlines(keepends=True)
    (tmp_path / "edited.yaml").write_text("".join(x for x in lines if "_digest" not in x))
    run("prune", "--recipe", tmp_path / "edited.yaml", "-o", tmp_path / "two")
    stats = ["prune", MODEL, "--stats", tmp_path / "stats", "--experts", 40]
    said = fails(*stats, "-o", tmp_path / "four")
    assert "is not that which the statistics were made from" in said
    run(*stats, "--repair", "none", "-o", tmp_path / "four")  # no text is needed


@pytest.mark.slow
@pytest.mark.nightly
def test_text_that_has_changed_and_is_asked_for(tmp_path: Path) -> None:
    """With a setting of the text, or by its name."""
    text = tmp_path / "text.txt"
    text.write_text((CALIBRATION / "python.jsonl").read_text()[:60_000])
    given = ["-c", text, "--samples", 4, "--length", 64]
    run("prune", MODEL, "--experts", 40, *given, "--repair", "none", "-o", tmp_path / "out")
    run("calibrate", MODEL, *given, "-o", tmp_path / "stats")
    text.write_text("Other words. " + text.read_text())
    recipe = tmp_path / "out" / "moe_fair" / "recipe.yaml"
    run("prune", "--recipe", recipe, "--seed", 1, "-o", tmp_path / "three")
    stats = ["prune", MODEL, "--stats", tmp_path / "stats", "--experts", 40]
    run(*stats, "--repair", "scale", "-c", text, "--samples", 5, "-o", tmp_path / "five")


STATS = ["--stats", "STATS", "--experts", 40]
PLAN = ["--plan", "PLAN"]
REFUSED: list[tuple[list[object], str, str]] = [
    (["--experts", 40, *SMALL, "--curve-samples", 4], "--curve-samples", "no removals"),
    (["--experts", 40, *SMALL, "--heldout-samples", 4], "--heldout-samples", "no --heldout"),
    (["--experts", 40, *SMALL, "--rivals", "none", "--trial-samples", 20], "--trial-samples",
     "no plan is tried"),
    (["--experts", 40, *SMALL, "--method", "reap", "--trial-samples", 20], "--trial-samples",
     "no plan is tried"),
    (["--experts", 40, *SMALL, "--engine", "resident", "--max-memory", "1GB"], "--max-memory",
     "--engine is given"),
    (["--experts", 40, *SMALL, "--engine", "streaming", "--checkpointing"], "--checkpointing",
     "streaming runs"),
    (["--experts", 40, *SMALL, "--revision", "main"], "--revision", "no revisions"),
    ([*STATS, "--no-taylor"], "--taylor", "the statistics are there"),
    ([*STATS, "--u-score"], "--u-score", "the statistics are there"),
    ([*STATS, "--save-every", 4], "--save-every", "nothing is measured"),
    ([*STATS, "--trial-samples", 20], "--trial-samples", "what is held back"),
    ([*STATS, "--repair", "none", "--samples", 4], "--samples", "no calibration text"),
    ([*STATS, "--repair", "none", "--dtype", "bfloat16"], "--dtype", "no text is run"),
    ([*STATS, "--repair", "scale", "--device-map", "auto"], "--device-map", "nothing is calib"),
    ([*PLAN, "--method", "reap"], "--method", "the --plan has its own"),
    ([*PLAN, "--min-experts", 9], "--min-experts", "the --plan has its own"),
    ([*PLAN, "--rivals", "reap"], "--rivals", "the --plan is there"),
    ([*PLAN, "--repair", "none", "-c", str(CALIBRATION), "--seed", 4], "--seed",
     "no calibration text"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "option", "why"), REFUSED, ids=str)
def test_what_would_change_nothing_is_refused(
    given: list[object], option: str, why: str, fails: Fails, tmp_path: Path,
    statistics_folder: Path,
) -> None:  # fmt: skip
    made = moe_fair.plan(statistics_folder, experts=40)
    made.save(tmp_path / "plan.json")
    names = {"STATS": statistics_folder, "PLAN": tmp_path / "plan.json"}
    filled = [names.get(str(g), g) for g in given]
    said = fails("prune", MODEL, *filled, "-o", tmp_path / "out")
    assert option in said
    assert why in said
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


@pytest.mark.slow
def test_what_an_earlier_stage_has_honoured_is_allowed(
    tmp_path: Path, statistics_folder: Path
) -> None:
    """One recipe for calibrate and prune --stats."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"calibration: {CALIBRATION}\nsamples: 8\nlength: 64\nbatch_size: 4\nexperts: 40\n"
        "repair: none\nrivals: [none]\n"
    )
    run("prune", MODEL, "--recipe", recipe, "--stats", statistics_folder, "-o", tmp_path / "out")
    run("plan", statistics_folder, "--recipe", recipe, "-o", tmp_path / "plan.json")
    run("prune", MODEL, "--recipe", recipe, "--plan", tmp_path / "plan.json", "-o", tmp_path / "b")


def test_eval_takes_no_option_that_it_does_not_use(fails: Fails, tmp_path: Path) -> None:
    tasks = ["eval", MODEL, "--tasks", "local"]
    agreement = ["eval", MODEL, "--agreement", "--baseline", MODEL, "--heldout", HELDOUT]
    assert "--length is for --agreement" in fails(*tasks, "--length", 64)
    assert "--heldout is for --agreement" in fails(*tasks, "--heldout", HELDOUT)
    assert "--limit is for --tasks" in fails(*agreement, "--limit", 4)
    assert "--log-samples is for --tasks" in fails(*agreement, "--log-samples")


def test_explicit_and_default_are_told_apart(tmp_path: Path) -> None:
    assert not Recipe().given
    assert Recipe(samples=9).given == {"samples"}
    recipe = Recipe().with_settings({"samples": 512, "experts": 40})
    assert recipe.given == {"samples", "experts"}
    assert recipe == Recipe(experts=40)
    assert recipe.with_settings({"ratio": 0.5}).given == {"samples", "ratio"}
    (tmp_path / "r.yaml").write_text("samples: 512\nplan: p.json\n")
    loaded = load_recipe(tmp_path / "r.yaml")
    assert loaded.given == {"samples", "plan"}
    assert loaded.plan == str(tmp_path / "p.json")
    assert loaded.with_settings({"stats": "s"}).plan is None
    noted = Recipe(calibration_digest="x", heldout_digest="y")
    assert noted.with_settings({"seed": 1}).calibration_digest is None
    assert noted.with_settings({"length": 9}).heldout_digest is None
    assert noted.with_settings({"seed": 1}).heldout_digest == "y"


def test_the_table_names_settings() -> None:
    assert unused(Recipe(engine="streaming"), Run()).keys() <= Recipe.__dataclass_fields__.keys()
