"""`prune --heal`: what is kept and what is not, refusals, kills, and two processes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import kept_experts
from packing import fp8
from places import CALIBRATION, MODEL
from processes import Python, port
from safetensors.torch import load_file
from test_several_processes import together
from tiny import tiny_model

from moe_fair.cli import main
from moe_fair.core.recipe import Recipe
from moe_fair.engines.processes import ALONE
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.healed_weights import check_healable
from moe_fair.moe.healing_record import Healing
from moe_fair.moe.judging import HELD_OUT
from moe_fair.pipelines.heal import heal_model
from moe_fair.pipelines.opening import calibration_set
from moe_fair.report.sources import load_healing

LINES: list[str] = []


def recipe(heal: int) -> Recipe:
    return Recipe().with_settings(
        {"model": str(MODEL), "calibration": (str(CALIBRATION),), "samples": 40, "length": 64,
         "heal": heal}
    )  # fmt: skip


def cut(folder: Path, count: int) -> Checkpoint:
    """The reference model with its first experts; returns the whole one."""
    source = Checkpoint(str(MODEL))
    write_model(source, {b.name: list(range(count)) for b in source.blocks}, folder)
    return source


def healed(
    folder: Path, count: int, change: Callable[[CalibrationSet], CalibrationSet]
) -> Healing | None:
    """The same trained on a text."""
    its = recipe(4000)
    source = cut(folder, count)
    text = change(calibration_set(its, source, LINES.append))
    return heal_model(its, source, folder, text, folder.with_name("work"), LINES.append, ALONE)


def noise(text: CalibrationSet) -> CalibrationSet:
    """What teaches is tokens drawn at random; what judges is as it was."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for i, (ids, domain) in enumerate(text.sequences):
        drawn = torch.randint(0, 4000, (len(ids),), generator=g).tolist()
        wrong = i % HELD_OUT != HELD_OUT - 1
        rows.append((tuple(drawn) if wrong else ids, domain))
    return CalibrationSet(text.domains, tuple(rows))


@pytest.mark.slow
def test_what_helps_is_kept_and_the_checkpoint_stays_stock(tmp_path: Path) -> None:
    cut(tmp_path / "cut", 30)
    found = healed(tmp_path / "healed", 30, lambda text: text)
    assert found is not None
    assert not found.refused
    assert found.agreement is not None
    for domain, before in found.before.items():
        assert found.after[domain].kl < before.kl
        assert found.after[domain].loss < before.loss
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("cut", "healed"))
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {
        n: (t.shape, t.dtype) for n, t in b.items()
    }
    same = {n for n, t in a.items() if torch.equal(t, b[n])}
    assert "model.embed_tokens.weight" in same
    assert len(same) < len(a) / 10
    names = sorted(p.name for p in (tmp_path / "cut").iterdir())
    assert sorted(p.name for p in (tmp_path / "healed").iterdir()) == names
    loaded = Checkpoint(str(tmp_path / "healed")).load()
    assert all(bool(p.isfinite().all()) for p in loaded.parameters())


@pytest.mark.slow
def test_wrong_text_is_rejected_and_nothing_is_changed(tmp_path: Path) -> None:
    """Where little is missing: where much is, predictions on any text make some of it good, and on
    a text whose tokens are only in disorder even there."""
    cut(tmp_path / "cut", 59)
    found = healed(tmp_path / "healed", 59, noise)
    assert found is not None
    assert found.refused
    assert LINES[-1].startswith(f"not healed, {found.refused} (")
    for file in (tmp_path / "cut").iterdir():
        assert (tmp_path / "healed" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heal", "-1"], "--heal -1 is below 0"),
        (["--set", "heal=1.5"], "heal"),
        (["--heal", "9000", "--save-as", "fp8"], "--save-as fp8 packs them"),
        (["--heal", "5"], "--heal 5 is less than one sequence of 64 tokens"),
        (["--heal", "9000", "--samples", "8"], "nobody would know whether it worsens"),
    ],
)
def test_refused_before_anything_is_loaded(
    options: list[str], said: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    text = ["-c", CALIBRATION, "--samples", "40", "--length", "64"]
    if "--samples" in options:
        text = [*text[:2], *text[4:]]
    line = fails("prune", MODEL, "--experts", "40", *text, *options, "-o", tmp_path / "out")
    assert said in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("places", ['{"": "disk"}', '{"": "cpu", "model.layers.1": "disk"}'])
def test_weights_that_lie_on_disk_are_refused(
    places: str, fails: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "map.json"
    file.write_text(places)
    line = fails(
        "prune", MODEL, "--experts", "40", "-c", CALIBRATION, "--samples", "40", "--length", "64",
        "--heal", "4000", "--device-map", file, "-o", tmp_path / "out",
    )  # fmt: skip
    assert line.endswith("on disk, and all weights are trained on devices; place it on one, or "
                         "leave --heal out")  # fmt: skip
    assert [f.name for f in tmp_path.iterdir()] == ["map.json"]


def test_packed_weights_are_refused(tmp_path: Path) -> None:
    fp8(tmp_path)
    with pytest.raises(
        ValueError, match=r"--heal: the weights of .* are packed .*leave --heal out"
    ):
        check_healable(Checkpoint(str(tmp_path)))
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "plain")
    check_healable(Checkpoint(str(tmp_path / "plain")))


COMMAND = [
    "prune", str(MODEL), "--experts", "30", "-c", str(CALIBRATION), "--samples", "24", "--length",
    "64", "--method", "frequency/global", "--repair", "none", "--heal", "3000",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_with_unequal_counts(tmp_path: Path) -> None:
    """The result verifies, its report shows what was done."""
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main([*COMMAND, "-o", str(out)])
    config = json.loads((out / "config.json").read_text())
    assert len(set(config["moe_fair"]["experts"].values())) > 1
    found = load_healing(out / "moe_fair" / "heal.json")
    assert found is not None
    assert found.before.keys() == {"javascript", "python", "reference-manuals", "rust-docs"}
    assert "Healing" in (out / "moe_fair" / "report.html").read_text()
    with pytest.raises(SystemExit, match="0"):
        main(["verify", str(out), "--against", str(MODEL)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.nightly
def test_its_recipe_does_it_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main([*COMMAND, "-o", str(out)])
    again = ["prune", "--recipe", str(out / "moe_fair" / "recipe.yaml"), "-o", str(tmp_path / "b")]
    with pytest.raises(SystemExit, match="0"):
        main(again)
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("out", "b")]
    assert weights[0] == weights[1]


TWO = """
import sys, json, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "moe")]
import test_healing as t
from moe_fair.engines import processes
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.healing_text import healing_text
from safetensors.torch import save_file
t.healing.STEP = 0.001
folder = Path(sys.argv[2])
original = Checkpoint(str(folder / "original")).load("float32", "cpu")
its = t.text()
team = processes.current_team()
steps = healing_text(its, 24 * 60, seed=0)
one = t.healer(Checkpoint(str(folder / "pruned")), steps, t.predicted(original, its), team=team)
one.run()
assert len(one.looks) > 1 and one.step > 1
values = {n: c.value() for n, c in one.changes.items()}
save_file(values, folder / f"{sys.argv[3]}-{team.rank}.safetensors")
looks = [[j.kl for j in look.domains.values()] for look in one.looks]
(folder / f"{sys.argv[3]}-{team.rank}.json").write_text(json.dumps(looks))
processes.finish()
"""


@pytest.mark.slow
def test_two_processes_heal_as_one(tmp_path: Path) -> None:
    tiny_model("qwen2_moe").save_pretrained(tmp_path / "original")
    source = Checkpoint(str(tmp_path / "original"))
    write_model(source, kept_experts(source, uniform=True), tmp_path / "pruned")
    tests = Path(__file__).parent

    def start(name: str, **more: str) -> Python:
        env = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        return Python(["-c", TWO, tests, tmp_path, name], tmp_path / f"log-{name}", env=env)

    where = port()
    launched: list[dict[str, str]] = [
        {"RANK": str(r), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where}
        for r in range(2)
    ]
    every = [start("one"), *(start(f"two{r['RANK']}", **r) for r in launched)]
    codes = [p.wait(timeout=400) for p in every]
    assert codes == [0, 0, 0], [f.read_text() for f in tmp_path.glob("log-*")]
    one, first, second = (
        load_file(tmp_path / f"{n}.safetensors") for n in ("one-0", "two0-0", "two1-1")
    )
    before = dict(Checkpoint(str(tmp_path / "pruned")).load("float32", "cpu").named_parameters())
    assert any(not torch.equal(t, before[n]) for n, t in one.items())
    for n, t in one.items():
        assert torch.equal(first[n], second[n]), n
        assert (t - first[n]).abs().max() <= 1e-6, n
    looks: list[Any] = [
        torch.tensor(json.loads((tmp_path / f"{n}.json").read_text())) for n in ("one-0", "two0-0")
    ]
    assert looks[0].shape[0] > 1
    assert (looks[0] - looks[1]).abs().max() <= 1e-6


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_in_two_processes(tmp_path: Path) -> None:
    said = together(tmp_path, 2, *COMMAND, "-o", str(tmp_path / "out"))
    assert said.count("healing on") == 1
    assert (tmp_path / "out" / "moe_fair" / "heal.json").is_file()
    assert not (tmp_path / "out.calibrating").exists()
