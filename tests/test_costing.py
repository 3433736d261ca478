"""Measured cost curves: against masked models, resumed layer by layer, used and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from masking import masked
from places import CALIBRATION, MODEL
from test_bad_input import TEXT, no_model  # noqa: F401  # a fixture

import moe_fair
from moe_fair.cli import main
from moe_fair.core.cost_curves import CHANGES, depths_to_measure
from moe_fair.core.plan import Plan
from moe_fair.core.ranking import block_order
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.moe.criteria import criterion
from moe_fair.pipelines import moe as pipeline
from moe_fair.pipelines.removal_costs import measure_curves, share


@pytest.fixture(scope="module")
def recipe(settings: dict[str, object]) -> Recipe:
    return Recipe(model=str(MODEL), curve_samples=4, **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path, recipe: Recipe
) -> tuple[Statistics, Path]:
    """Curves of taylor-sq, and the folder in which each layer's measurements lie."""
    work = tmp_path_factory.mktemp("curves")
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    base = Statistics.load(statistics_folder)
    return measure_curves(recipe, source, text, base, "taylor-sq", work), work


@pytest.mark.slow
def test_costs_are_those_of_masked_models(
    measured: tuple[Statistics, Path], recipe: Recipe
) -> None:
    statistics, _ = measured
    source = pipeline.open_model(recipe)
    text = share(pipeline.calibration_set(recipe, source, print), 4)
    model = source.load("float32", "cpu").eval()
    scores = criterion("taylor-sq")(statistics)

    def loss() -> float:
        total, count = 0.0, 0
        for batch in text.batches(4):
            with torch.no_grad():
                logits = model(input_ids=batch.input_ids).logits[:, :-1].double()
            picked = logits.log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])
            total, count = total - float(picked.sum()), count + picked.numel()
        return total / count

    whole = loss()
    for g, which in ((statistics.groups[0], 7), (statistics.groups[4], 3)):
        order = block_order(scores.values[g.name].numpy()).tolist()
        depth = depths_to_measure(g)[which]
        with masked(model, {g.name: sorted(order[depth:])}):
            change = loss() - whole
        found = float(statistics.constants[g.name][CHANGES][which])
        assert found == pytest.approx(change, abs=2e-6)
        assert abs(found) > 1e-4


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_measurement_goes_on_at_the_missing_layer(
    measured: tuple[Statistics, Path], statistics_folder: Path, recipe: Recipe
) -> None:
    statistics, work = measured
    files = sorted(work.iterdir())
    assert len(files) == len(statistics.groups)
    before = [f.read_bytes() for f in files]
    files[2].unlink()
    files[4].write_text(files[4].read_text()[:50])  # damaged
    said: list[str] = []
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    base = Statistics.load(statistics_folder)
    again = measure_curves(recipe, source, text, base, "taylor-sq", work, said.append)
    assert "4 layers were done before" in said[0]
    assert [f.read_bytes() for f in files] == before
    for g in statistics.groups:
        assert torch.equal(again.constants[g.name][CHANGES], statistics.constants[g.name][CHANGES])
    other = recipe.with_settings({"curve_samples": 3})
    said.clear()
    measure_curves(other, source, text, base, "taylor-sq", work, said.append)
    assert "done before" not in said[0]


def test_the_share_takes_every_domain(recipe: Recipe) -> None:
    source = pipeline.open_model(recipe)
    text = pipeline.calibration_set(recipe, source, print)
    part = share(text, 4)
    assert len(part.sequences) == 4
    assert {d for _, d in part.sequences} == {d for _, d in text.sequences}
    assert share(text, 8) == share(text, 99) == text


@pytest.mark.slow
def test_plans_use_saved_curves(
    measured: tuple[Statistics, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured[0].save(tmp_path / "stats")
    run = ["plan", str(tmp_path / "stats"), "--experts", "40", "--removal", "taylor-sq"]
    with pytest.raises(SystemExit):
        main([*run, "--allocate", "curves", "-o", str(tmp_path / "plan.json")])
    plan = Plan.load(tmp_path / "plan.json")
    assert sum(len(g.kept) for g in plan.groups) == 240
    assert plan.explanation["predicted_change"] == pytest.approx(
        sum(plan.explanation["predicted_change_of"].values())
    )
    uniform = moe_fair.plan(measured[0], experts=40, removal="taylor-sq", allocate="uniform")
    assert plan.kept != uniform.kept
    with pytest.raises(SystemExit):
        main([*run, "--allocate", "tod-curves"])
    assert "tod-curves on taylor-sq against taylor, tolerance" in capsys.readouterr().out
    fisher = moe_fair.plan(measured[0], experts=40, allocate="fisher")
    assert (fisher.allocator, fisher.removal) == ("fisher", "taylor-sq")


def test_curves_of_another_score_are_refused(
    measured: tuple[Statistics, Path],
    statistics_folder: Path,
    tmp_path: Path,
    fails: Callable[..., str],
) -> None:
    measured[0].save(tmp_path / "stats")
    run = ["--experts", "40", "--allocate", "curves"]
    said = fails("plan", tmp_path / "stats", *run, "--removal", "reap")
    assert "hold the cost curves of taylor-sq, and the plan needs those of reap" in said
    assert "calibrate MODEL --curves reap" in said
    assert "hold no cost curves" in fails("plan", statistics_folder, *run)
    fisher = ["--experts", "40", "--allocate", "fisher", "--method", "reap"]
    said = fails("plan", statistics_folder, *fisher)
    assert "--allocate fisher chooses the experts itself, as taylor-sq counts them" in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["prune", "--experts", "40", "--allocate", "curves", "--engine", "streaming"],
         "cost curves run the whole model in memory, and the engine is streaming (as asked)"),
        (["calibrate", "--curves", "reap", "--max-memory", "1MB"], "do not fit in"),
        (["calibrate", "--curves", "raep"], "did you mean 'reap'"),
        (["calibrate", "--curves", "reap", "--curve-samples", "0"], "--curve-samples 0 is below 1"),
        (["prune", "--experts", "40", "--allocate", "fisher", "--no-taylor"], "--no-taylor"),
        (["calibrate", "--alone", "--engine", "streaming"],
         "removals of single experts run the whole model in memory, and the engine is streaming"),
        (["prune", "--experts", "40", "--method", "counterfactual-measured", "--max-memory", "1MB"],
         "or a criterion that needs none (counterfactual)"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)  # fmt: skip
def test_what_cannot_be_measured_is_said_before_the_model_loads(
    given: list[str],
    said: str,
    tmp_path: Path,
    fails: Callable[..., str],
) -> None:
    command, *rest = given
    assert said in fails(command, MODEL, *TEXT, *rest, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_prune_measures_what_it_needs(tmp_path: Path, statistics_folder: Path) -> None:
    settings = {
        "allocate": "curves", "removal": "frequency", "experts": 40, "repair": "none",
        "curve_samples": 2, "engine": "resident",
    }  # fmt: skip
    done = moe_fair.prune(str(MODEL), tmp_path / "out", statistics=statistics_folder, **settings)
    saved = Statistics.load(tmp_path / "out" / "moe_fair")
    assert saved.metadata["curves"]["removal"] == "frequency"
    assert saved.metadata["curves"]["sequences"] == 2
    again = moe_fair.plan(saved, allocate="curves", removal="frequency", experts=40)
    assert again.kept == done.plan.kept
    assert str(CALIBRATION) in saved.metadata["calibration"]["calibration"]
