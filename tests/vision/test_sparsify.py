"""`moe-fair vision sparsify` from its arguments to a folder that loads elsewhere, bitwise."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from places import ROOT
from processes import python
from safetensors.torch import load_file, save_file
from vision.architectures import lively, small

from moe_fair.cli import main
from moe_fair.core.manifest import write_manifest
from moe_fair.pipelines import sparse as pipeline
from moe_fair.pipelines.verify import verify
from moe_fair.vision import load_pruned
from moe_fair.vision.sparse.layers import find_layers, zeros
from moe_fair.vision.sparse.settings import SparseSettings

NET = "vision.architectures:small"
QUICK = ["--samples", "12", "--batch-size", "12", "--image-size", "16"]


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["vision", "sparsify", *map(str, arguments)])
    assert not stop.value.code


def failing(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Exit code 2 and one line; returns it."""
    with pytest.raises(SystemExit) as stop:
        main(["vision", "sparsify", *map(str, arguments)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2, lines
    assert lines[-1].startswith("moe-fair: error: "), lines
    assert not any("Traceback" in x for x in lines)
    return lines[-1]


def digest(model: torch.nn.Module) -> str:
    """Of every tensor, and of the output on fixed images."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    x = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    with torch.no_grad():
        out = model(x)
    found.update(getattr(out, "logits", out).numpy().tobytes())
    return found.hexdigest()


def elsewhere(code: str) -> str:
    """What a fresh process prints; it sees this file as `made`."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    here = {**os.environ, "PYTHONPATH": paths}
    done = python("-c", f"import test_sparsify as made\n{code}", env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.parametrize("allocate", ["lamp", "rr", "tod"])
def test_the_command(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], allocate: str
) -> None:
    out = tmp_path / "out"
    run(NET, "--data", pictures, "--sparsity", ".8", "--allocate", allocate, *QUICK, "-o", out)
    screen = capsys.readouterr().out
    result = json.loads((out / "moe_fair" / "result.json").read_text())
    model = load_pruned(out, trust_remote_code=True)
    layers, _ = find_layers(model, torch.zeros(2, 3, 16, 16))
    empty = zeros(model, layers)
    total = sum(x.size for x in layers)
    assert sum(empty.values()) == round(0.8 * total) == result["sparsity"]["zeros"]
    assert {x["name"]: x["weights"] - x["kept"] for x in result["layers"]} == empty
    assert all(x["sparsity"] == empty[x["name"]] / x["weights"] for x in result["layers"])
    assert f"{round(0.8 * total):,} of {total:,} weights are zero" in screen
    for x in result["layers"]:
        assert f"{x['kept']:,}" in next(s for s in screen.splitlines() if s.startswith(x["name"]))
        assert (allocate == "rr") == ("rr" in x)
        assert x["shift"] == "bias" or x["shift"] in dict(model.named_modules())
    page = (out / "moe_fair" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (">RR</th>" in page) == (allocate == "rr")
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "pruned.json", "moe_fair"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_saved_and_loaded_elsewhere_bitwise(pictures: Path, tmp_path: Path) -> None:
    given = {"model": NET, "data": str(pictures), "sparsity": 0.9, "samples": 12}
    done = pipeline.sparsify(SparseSettings.of({**given, "image_size": 32}), tmp_path / "out")
    here = load_pruned(done.output, trust_remote_code=True)
    code = (
        "from moe_fair.vision import load_pruned\n"
        f"print(made.digest(load_pruned({str(done.output)!r}, trust_remote_code=True)))"
    )
    assert elsewhere(code) == digest(here)
    again = pipeline.sparsify(SparseSettings.of({**given, "image_size": 32}), tmp_path / "again")
    files = [(p.output / "model.safetensors").read_bytes() for p in (done, again)]
    assert files[0] == files[1]


@pytest.mark.slow  # a process that imports transformers
def test_a_transformers_model_loads_with_transformers(pictures: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    lively("resnet18").save_pretrained(folder)
    run(folder, "--data", pictures, "--sparsity", ".9", "--allocate", "erk", *QUICK, "-o", out)
    code = (
        "from transformers import AutoModelForImageClassification as Auto\n"
        f"print(made.digest(Auto.from_pretrained({str(out)!r}).eval()))"
    )
    assert elsewhere(code) == digest(load_pruned(out))


def test_without_repair_what_stays_is_bitwise_the_original(pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = small().state_dict()
    save_file(trained, tmp_path / "w.safetensors")
    run(NET, "--weights", tmp_path / "w.safetensors", "--data", pictures, "--sparsity", ".6",
        "--repair", "none", *QUICK, "-o", tmp_path / "out")  # fmt: skip
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        same = tensor == trained[name]
        assert bool((same | (tensor == 0)).all()), name
    result = json.loads((tmp_path / "out" / "moe_fair" / "result.json").read_text())
    assert "shift" not in result["layers"][0]
    assert result["top1"]["pruned"] == result["top1"]["final"]


@pytest.mark.slow
def test_a_pruned_and_a_sparse_model_go_on(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = (tmp_path / n for n in ("first", "second", "third"))
    with pytest.raises(SystemExit):
        main(["vision", "prune", NET, "--data", str(pictures), "--ratio", ".3", "--removal", "l1",
              "--allocate", "uniform", *QUICK, "-o", str(first)])  # fmt: skip
    more = ["--data", pictures, "--trust-remote-code", *QUICK[:4]]
    run(first, *more, "--sparsity", ".5", "-o", second)
    run(second, *more, "--sparsity", ".9", "--json", "-o", third)
    out = capsys.readouterr().out
    result = json.loads(out[out.rindex('{\n "output"') :])
    share = result["sparsity"]["zeros"] / result["sparsity"]["weights"]
    assert share == pytest.approx(0.9, abs=1e-3)
    assert json.loads((third / "pruned.json").read_text())["history"]
    masks = [load_file(p / "model.safetensors") for p in (second, third)]
    for name, tensor in masks[0].items():
        if tensor.dim() > 1:
            assert not masks[1][name][tensor == 0].any()
    line = failing(capsys, third, *more, "--sparsity", ".5", "-o", tmp_path / "fourth")
    assert "the model is sparser already" in line


def test_labels_do_not_matter(pictures: Path, tmp_path: Path) -> None:
    """Another numbering of the classes gives the same weights."""
    other = tmp_path / "pictures"
    for part in ("train", "test"):
        for old, new in zip(("blue", "green", "red"), "bca", strict=True):
            (other / part / new).mkdir(parents=True)
            for file in (pictures / part / old).iterdir():
                (other / part / new / file.name).write_bytes(file.read_bytes())
    files = []
    for name, data in (("a", pictures), ("b", other)):
        given = {"model": NET, "data": str(data), "sparsity": 0.8, "samples": 100}
        settings = SparseSettings.of({**given, "allocate": "tod", "image_size": 16})
        files.append(
            load_file(pipeline.sparsify(settings, tmp_path / name).output / "model.safetensors")
        )
    for name, tensor in files[0].items():
        assert torch.equal(tensor == 0, files[1][name] == 0)
        torch.testing.assert_close(tensor, files[1][name])  # sums in another order


@pytest.mark.slow
def test_a_killed_run_leaves_no_output(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": NET, "data": str(pictures), "sparsity": 0.5, "samples": 12}
    stock = pipeline.write_document

    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_document", stops)
    with pytest.raises(KeyboardInterrupt):
        pipeline.sparsify(SparseSettings.of(given), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(pipeline, "write_document", stock)
    pipeline.sparsify(SparseSettings.of(given), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --sparsity, here or in a --recipe"),
        (["--sparsity", "1"], "--sparsity 1 is not between 0 and 1"),
        (["--sparsity", "nan"], "--sparsity nan is not between 0 and 1"),
        (["--sparsity", ".99999"], "layers, each of which keeps one: the highest is 0.9"),
        (["--sparsity", ".5", "--allocate", "erg"], "did you mean 'erk'?"),
        (["--sparsity", ".5", "--repair", "varianz"], "did you mean 'variance'?"),
        (["--sparsity", ".5", "--shrinkage", "-1"], "--shrinkage -1 is not 0 or more"),
        (["--sparsity", ".5", "--shrinkage", "nan"], "--shrinkage nan is not 0 or more"),
        (["--sparsity", ".5", "--repair", "none", "--shrinkage", "0"], "there is no repair"),
        (["--sparsity", ".5", "--samples", "1"], "--samples 1 is below 2"),
        (["--sparsity", ".5", "--mean", "a"], "write numbers with commas"),
        (["--sparsity", ".5", "--weights", "no.safetensors"], "no weights at no.safetensors"),
        (["--sparsity", ".5", "--device", "quantum"], "--device quantum"),
    ],
)
def test_bad_options(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    line = failing(capsys, NET, "--data", pictures, *QUICK, *arguments, "-o", tmp_path / "out")
    assert said in line, line
    assert not (tmp_path / "out").exists()


def test_bad_models_and_outputs(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", pictures, "--sparsity", ".5", *QUICK]
    assert "no model" in failing(capsys, "no.module:f", *given, "-o", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "not empty" in failing(capsys, NET, *given, "-o", tmp_path / "full")
    broken = small().state_dict()
    broken["conv1.weight"][0] = torch.inf
    save_file(broken, tmp_path / "w.safetensors")
    line = failing(
        capsys, NET, "--weights", tmp_path / "w.safetensors", *given, "-o", tmp_path / "out"
    )
    assert "conv1.weight holds values that are not finite" in line
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsty: 0.5")
    line = failing(capsys, NET, *given, "--recipe", recipe, "-o", tmp_path / "out")
    assert "no setting 'sparsty' (did you mean 'sparsity'?)" in line


def test_the_recipe_is_accepted() -> None:
    from moe_fair.cli.vision import _written

    recipe = ROOT / "recipes" / "vision" / "digits-sparse.yaml"
    assert SparseSettings.of(_written(recipe, SparseSettings)).sparsity > 0.9
    assert "moe-fair vision sparsify --recipe digits-sparse -o" in recipe.read_text()


def test_verify_counts_the_zeros(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(NET, "--data", pictures, *QUICK, "--sparsity", 0.8, "-o", out)
    assert verify(out).ok  # files alone: the model is code of its own
    found = verify(out, trust_remote_code=True)
    assert [(c.name, c.ok) for c in found.checks] == [("files", True), ("model", True)]
    weights = load_file(out / "model.safetensors")
    [*_, layer] = json.loads((out / "moe_fair" / "result.json").read_text())["layers"]
    flat = weights[f"{layer['name']}.weight"].flatten()
    flat[int((flat == 0).nonzero()[0])] = 1.0
    save_file(weights, out / "model.safetensors")
    assert "files: model.safetensors has" in verify(out).wrong
    write_manifest(out)
    said = f"{layer['name']}: {layer['kept'] + 1:,} weights are left, not {layer['kept']:,}"
    assert said in verify(out, trust_remote_code=True).wrong
