"""`moe-fair verify` on what `moe-fair vision prune` wrote, whole and damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision.architectures import lively
from vision.test_vision_flow import settings

from moe_fair.cli import main
from moe_fair.core.manifest import MANIFEST, write_manifest
from moe_fair.pipelines import vision as pipeline
from moe_fair.pipelines.verify import verify

pytestmark = pytest.mark.slow  # whole runs, by and large


@pytest.fixture(scope="module")
def made(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, and the result pruned once more."""
    folder = tmp_path_factory.mktemp("verify")
    first, second = folder / "first", folder / "second"
    pipeline.prune(settings(pictures, steps=2, finetune_epochs=1), first)
    wanted = settings(pictures, model=str(first), trust_remote_code=True, image_size=None)
    pipeline.prune(wanted, second)
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "first", tmp_path / "out"))


def checked(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["verify", *map(str, arguments)])
    return int(stop.value.code or 0)


def change(out: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    write_manifest(out)


def record(out: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    found = json.loads((out / "pruned.json").read_text())
    edit(found)
    (out / "pruned.json").write_text(json.dumps(found))
    write_manifest(out)


def test_what_was_written_verifies(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, steps in (("first", "2 steps"), ("second", "1 step,")):
        assert checked(made / name, "--trust-remote-code") == 0
        said = capsys.readouterr().out
        assert steps in said
        assert "parameters, as planned, all finite" in said
        assert ": verified" in said
    listed = json.loads((made / "first" / MANIFEST).read_text())["files"]
    there = {
        p.relative_to(made / "first").as_posix() for p in (made / "first").rglob("*") if p.is_file()
    }
    assert set(listed) == there - {MANIFEST, "moe_fair/report.html"}


def test_code_of_its_own_is_not_run_unasked(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(out) == 0
    assert "not built: it runs code of its own" in capsys.readouterr().out


def test_a_transformers_result_is_built(pictures: Path, tmp_path: Path) -> None:
    lively("vit").save_pretrained(tmp_path / "vit")
    wanted = settings(pictures, model=str(tmp_path / "vit"), image_size=32, removal="l1",
                      allocate="uniform")  # fmt: skip
    pipeline.prune(wanted, tmp_path / "out")
    found = {c.name: c for c in verify(tmp_path / "out").checks}
    assert found["model"].ok is True
    assert list(found) == ["files", "cuts", "model"]


def test_one_bit_of_one_weight(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))
    assert checked(out, "--trust-remote-code") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "model.safetensors is not as it was written (sha256)" in said
    assert "does NOT verify" in said


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda o: (o / MANIFEST).unlink(), "removed, or pruned by an earlier version"),
        (lambda o: (o / "model.py").write_text(""), "model.py was not there"),
        (lambda o: (o / "moe_fair" / "plan-2.json").unlink(), "moe_fair/plan-2.json is missing"),
        (lambda o: record(o, lambda r: r["history"][1][0][2].pop()), "the plan of step 2 removes"),
        (lambda o: record(o, lambda r: r["history"].pop()), "2 plans and 1 steps of cuts"),
        (lambda o: record(o, lambda r: r.pop("base")), "not a record of cuts"),
        (lambda o: change(o, lambda t: t.pop("conv1.weight")), "does not fit the model"),
        (
            lambda o: change(o, lambda t: t["bn1.bias"].fill_(float("nan"))),
            "bn1.bias holds values",
        ),
    ],
)
def test_damage(out: Path, spoil: Callable[[Path], object], said: str) -> None:
    spoil(out)
    assert said in verify(out, trust_remote_code=True).wrong


def test_experts_are_not_compared(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from places import MODEL

    assert checked(out, "--against", MODEL) == 2
    assert "is an image classifier: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["report"], ["push", "a/b", "--dry-run"]])
def test_pages_and_cards_of_language_models_are_not_written_into_it(
    out: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    before = (out / "moe_fair" / "report.html").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([command[0], str(out), *command[1:]])
    assert "is an image classifier" in capsys.readouterr().err
    assert (out / "moe_fair" / "report.html").read_bytes() == before
    assert not (out / "README.md").exists()
