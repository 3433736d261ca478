"""Plans, configs and statistics that somebody changed: one line, before weights are loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import CALIBRATION, MODEL

import moe_fair
from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.units import STATISTICS_FILE, Statistics
from moe_fair.moe.checkpoint_source import Checkpoint

TEXT = ["-c", CALIBRATION, "--samples", 4, "--length", 32]


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory, statistics_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    moe_fair.plan(statistics_folder, experts=40).save(path)
    return path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test: what is wrong must be seen before."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


def first(**change: Any) -> Callable[[dict], None]:
    return lambda p: p["groups"][0].update(change)


def moved(p: dict) -> None:
    """One expert of the first layer leaves, and one of the second stays instead."""
    a, b = p["groups"][:2]
    a["kept"] = a["kept"][1:]
    b["kept"] = sorted({*b["kept"], min(set(range(60)) - set(b["kept"]))})


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p["groups"].pop(), "its target"),
        (lambda p: p["groups"][0]["kept"].pop(), "its target"),
        (lambda p: p["after"].update(parameters=p["after"]["parameters"] + 1), "leave"),
        (lambda p: p["after"].update(bytes=p["before"]["bytes"] + 1), "more after"),
        (lambda p: p["before"].update(parameters=p["before"]["parameters"] + 1), "before"),
        (lambda p: p["groups"][0]["removal"].pop(), "59 removal scores of 60 units"),
        (lambda p: p["groups"][0]["removal"].__setitem__(3, "low"), "removal scores"),
        (lambda p: p["groups"][0]["removal"].__setitem__(3, True), "removal scores"),
        (lambda p: p["groups"][0]["removal"].__setitem__(3, float("nan")), "removal scores"),
        (first(removal="low"), "removal scores"),
        (first(protection=[1.0]), "1 protection scores of 60"),
        (first(size=61), "60 removal scores of 61 units"),
        (first(size=61, removal=[0.0] * 61), "size 61 in the plan, 60"),
        (first(layer=3), "layer"),
        (first(layer=-1), "layer"),
        (first(tod="x"), "tod"),
        (first(ceiling=0.5), "ceiling"),
        (first(null_depth=[]), "null_depth"),
        (first(name="model.layers.9.mlp"), "model.layers.9.mlp"),
        (lambda p: p.update(target={"mean_kept": 41}), "its target"),
        (lambda p: p.update(target={"total": 239}), "its target"),
        (lambda p: p.update(target={"mean_kept": 40, "total": 240}), "exactly one target"),
        (lambda p: p.update(target={"mean_kept": "40"}), "target"),
        (lambda p: p.update(target={"bytes": 5}), "its target"),
        (lambda p: p.update(target={"ratio": 0.1}), "its target"),
        (lambda p: p.update(expert_parallel=[1, 7]), "expert_parallel"),
        (lambda p: p.update(notes="x"), "notes"),
        (lambda p: p.update(allocator=5), "allocator"),
        (lambda p: p.update(tolerance="0"), "tolerance"),
        (lambda p: p.update(recipe=[]), "recipe"),
    ],
)  # fmt: skip
def test_plans(
    fails: Callable[..., str], tmp_path: Path, plan_file: Path, change: Callable, said: str
) -> None:
    raw = json.loads(plan_file.read_text())
    change(raw)
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    run = ["prune", MODEL, "--plan", tmp_path / "plan.json", "--repair", "none"]
    assert said in fails(*run, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_weights")
def test_too_few_for_the_router(fails: Callable[..., str], tmp_path: Path, plan_file: Path) -> None:
    """What a plan alone cannot know: the model says so."""
    raw = json.loads(plan_file.read_text())
    group = raw["groups"][0]
    gone = len(group["kept"]) - 3
    group["kept"] = group["kept"][:3]
    raw["target"], raw["expert_parallel"] = {"total": 240 - gone}, []
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    Plan.load(tmp_path / "plan.json")
    run = ["prune", MODEL, "--plan", tmp_path / "plan.json", "--repair", "none"]
    assert "the router picks top 4" in fails(*run, "-o", tmp_path / "out")


def test_a_plan_that_is_moved_by_hand_is_a_plan(tmp_path: Path, plan_file: Path) -> None:
    """Where the ids and the total are right, somebody may know better than the scores."""
    raw = json.loads(plan_file.read_text())
    moved(raw)
    raw["expert_parallel"] = []
    (tmp_path / "plan.json").write_text(json.dumps(raw))
    assert sum(map(len, Plan.load(tmp_path / "plan.json").kept.values())) == 240


def changed(folder: Path, **change: Any) -> Path:
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 100}, "vocab_size"),
        ({"vocab_size": 10**6}, "vocab_size"),
        ({"hidden_size": 48}, "embed_tokens"),
        ({"num_experts_per_tok": 0}, "top 0"),
        ({"num_experts_per_tok": -1}, "top -1"),
        ({"num_experts_per_tok": 61}, "top 61"),
    ],
)
def test_configs(
    fails: Callable[..., str], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    model = changed(tmp_path / "model", **change)
    assert said in fails("calibrate", model, *TEXT, "-o", tmp_path / "out")


@pytest.mark.usefixtures("no_weights")
def test_no_tokenizer(fails: Callable[..., str], tmp_path: Path) -> None:
    model = changed(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink(missing_ok=True)
    line = fails("calibrate", model, *TEXT, "-o", tmp_path / "out")
    assert "tokenizer" in line
    assert str(model) in line


@pytest.mark.usefixtures("no_weights")
def test_a_tokenizer_of_another_model(fails: Callable[..., str], tmp_path: Path) -> None:
    """Ids that the embedding does not have."""
    model = changed(tmp_path / "model")
    file = model / "tokenizer.json"
    raw = json.loads(file.read_text())
    vocab = raw["model"]["vocab"]
    raw["model"]["vocab"] = {t: i + 100_000 for t, i in vocab.items()}
    file.write_text(json.dumps(raw))
    line = fails("calibrate", model, *TEXT, "-o", tmp_path / "out")
    assert "token" in line
    assert "rows" in line


def flipped(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_statistics_with_a_flipped_byte(statistics_folder: Path, tmp_path: Path) -> None:
    whole = (statistics_folder / STATISTICS_FILE).read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / STATISTICS_FILE
    for i in range(25):
        file.write_bytes(whole)
        flipped(file, start + (len(whole) - start - 1) * i // 24)
        with pytest.raises(ValueError, match=r"not the bytes that were measured .*redo it"):
            Statistics.load(tmp_path)


def test_statistics_with_another_header(statistics_folder: Path, tmp_path: Path) -> None:
    whole = (statistics_folder / STATISTICS_FILE).read_bytes()
    at = whole.index(b'samples\\": 8') + len(b'samples\\": ')
    file = tmp_path / STATISTICS_FILE
    file.write_bytes(whole[:at] + b"9" + whole[at + 1 :])
    with pytest.raises(ValueError, match="not the bytes that were measured"):
        Statistics.load(tmp_path)


def test_statistics_of_before_there_was_a_digest(
    statistics_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (statistics_folder / STATISTICS_FILE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    about = json.loads(header["__metadata__"]["moe_fair"])
    assert len(about.pop("digest")) == 64
    header["__metadata__"]["moe_fair"] = json.dumps(about)
    text = json.dumps(header).encode()
    old = len(text).to_bytes(8, "little") + text + whole[8 + length :]
    (tmp_path / STATISTICS_FILE).write_bytes(old)
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(tmp_path), "--experts", "40"])
    assert "an earlier version, without a digest" in capsys.readouterr().err
    assert Statistics.load(tmp_path).digest == ""
