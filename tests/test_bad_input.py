"""Bad input: one clear line, exit code 2, and no model loaded where that can be helped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import CALIBRATION, MODEL
from transformers import LlamaConfig, LlamaForCausalLM

from moe_fair.cli import main
from moe_fair.moe.checkpoint_source import Checkpoint

ALL = "=0,".join(sorted(f.stem for f in CALIBRATION.iterdir()))
TEXT = ["-c", str(CALIBRATION), "--samples", "4", "--length", "32"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights fails the test."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--experts", "3"], "--experts 3: the router picks top 4; choose 4 to 60"),
        (["--experts", "61"], "--experts 61: the model has no more; choose 4 to 60"),
        (["--experts", "0"], "choose 4 to 60"),
        (["--experts", "-1"], "choose 4 to 60"),
        (["--experts", "abc"], "--experts 'abc': Invalid value"),
        (["--experts", "nan"], "--experts must be a finite number, not nan"),
        (["--tolerance", "inf"], "--tolerance must be a finite number, not inf"),
        (["--experts", "40.3"], "nearest are 40.1667 and 40.3333"),
        ([], "exactly one target"),
        (["--experts", "40", "--ratio", "0.5"], "give one target, not --experts and --ratio"),
        (["--ratio", "1.5"], "not between 0 and 1"),
        (["--total", "20"], "can keep 24 to 360"),
        (["--size", "12 apples"], "write parameters as 8B"),
        (["--size", "1M"], "out of reach"),
        (["--experts", "40", "--method", "raep"], "did you mean 'reap'"),
        (["--experts", "40", "--removal", "frequenzy"], "did you mean 'frequency'"),
        (["--experts", "40", "--allocate", "tdo"], "did you mean 'tod'"),
        (["--experts", "40", "--no-taylor"], "--no-taylor leaves out"),
        (["--tolerance", "0.1", "--method", "reap"], "needs a budget"),
        (["--experts", "40", "--multiple-of", "7"], "the nearest are 238 and 245"),
        (["--experts", "40", "--min-experts", "61"], "layers have 60 experts"),
        (["--experts", "40", "--device", "cuda:0"], "no CUDA device"),
        (["--experts", "40", "--device", "moon"], "--device moon"),
        (["--experts", "40", "--dtype", "float33"], "none of auto"),
        (["--experts", "40", "--engine", "steam"], "none of auto, resident, streaming"),
        (["--experts", "40", "--max-memory", "7B"], "write bytes as"),
        (["--experts", "40", "--length", "9999"], "the model's 1024 positions"),
        (["--experts", "40", "--samples", "0"], "--samples 0 is below 1"),
        (["--experts", "40", "--weights", "python"], "write domain=weight"),
        (["--experts", "40", "--weights", "pyton=0"], "domain 'pyton' (did you mean 'python'?)"),
        (["--experts", "40", "--weights", f"{ALL}=0"], "every weight is 0"),
        (["--experts", "40", "--wrong"], "No such option"),
    ],
)  # fmt: skip
def test_settings(fails: Callable[..., str], tmp_path: Path, given: list[str], said: str) -> None:
    assert said in fails("prune", MODEL, "-o", tmp_path / "out", *TEXT, *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("short", "too little text for one sample of 32 tokens"),
        (
            '{"body": 1}\n',
            'neither "text" nor "messages" nor other known ones; its fields are body',
        ),
        ('{"text": "a"}\n{"text": \n', "1 row skipped, the first: "),
        ('{"text": \n', "line 1: not JSON"),
        ("[1]\n", "line 1: expected an object"),
    ],
)
def test_calibration_files(
    fails: Callable[..., str], tmp_path: Path, content: str, said: str
) -> None:
    name = "text.txt" if content in ("", "short") else "text.jsonl"
    (tmp_path / name).write_text(content)
    run = ["prune", MODEL, "-o", tmp_path / "out", "--experts", "40", "--length", "32"]
    assert said in fails(*run, "-c", tmp_path / name)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("a=:2", "names no text"),
        (f"{CALIBRATION}:0", "must be above 0"),
        (str(MODEL.parent.parent / "docs"), "no .txt, .jsonl, .json, .csv, .parquet file"),
        (str(MODEL / "config.json"), 'neither "text" nor "messages"'),
        (str(MODEL / "model.safetensors"), "must be one of .txt"),
        ("someone/some-dataset@train", "--calibration name=path/to/text.jsonl"),
    ],
)
def test_calibration_sources(
    fails: Callable[..., str], tmp_path: Path, source: str, said: str
) -> None:
    assert said in fails("prune", MODEL, "-o", tmp_path / "out", "--experts", 40, "-c", source)


@pytest.mark.usefixtures("no_model")
def test_models(fails: Callable[..., str], tmp_path: Path) -> None:
    run = lambda m: fails("prune", m, "-o", tmp_path / "out", "--experts", 40, *TEXT)  # noqa: E731
    dense = tmp_path / "dense"
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(dense)
    assert "llama: no routed experts found" in run(dense)
    assert "no such directory" in run(tmp_path / "nothing")
    assert "no such local directory, and the Hub did not give it" in run("someone/some-model")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in run(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "config.json cannot be used" in run(tmp_path / "empty")
    assert "no model given" in fails("prune", "-o", tmp_path / "out", "--experts", 40)


def copy_of_model(folder: Path) -> Path:
    shutil.copytree(MODEL, folder)
    return folder


@pytest.mark.usefixtures("no_model")
def test_broken_weights(fails: Callable[..., str], tmp_path: Path) -> None:
    run = lambda m: fails("prune", m, "-o", tmp_path / "out", "--experts", 40, *TEXT)  # noqa: E731
    short = copy_of_model(tmp_path / "short") / "model.safetensors"
    data = short.read_bytes()
    short.write_bytes(data[:-1000])
    assert "1,000 bytes are missing" in run(tmp_path / "short")
    short.write_bytes(data[:5])
    assert "not a whole safetensors file" in run(tmp_path / "short")
    short.write_bytes(data[:8] + b"x" * 100 + data[108:])
    assert "header cannot be read" in run(tmp_path / "short")
    short.unlink()
    assert "model.safetensors is missing" in run(tmp_path / "short")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (tmp_path / "short" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside the checkpoint" in run(tmp_path / "short")


@pytest.mark.slow
@pytest.mark.usefixtures("no_model")
def test_another_models_statistics_and_plans(
    fails: Callable[..., str], tmp_path: Path, statistics_folder: Path
) -> None:
    other = copy_of_model(tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit of one weight
    (other / "model.safetensors").write_bytes(bytes(weights))
    out = ["-o", tmp_path / "out"]
    said = fails("prune", other, "--stats", statistics_folder, "--experts", 40, *out)
    assert "made from another model" in said
    with pytest.raises(SystemExit, match="0"):
        main(["plan", str(statistics_folder), "--experts", "40", "-o", str(tmp_path / "p.json")])
    assert "made from another model" in fails("prune", other, "--plan", tmp_path / "p.json", *out)
    both = ["--plan", tmp_path / "p.json", "--stats", statistics_folder]
    assert "not both" in fails("prune", MODEL, *both, *out)
    again = fails("prune", MODEL, "--plan", tmp_path / "p.json", "--experts", 40, *out)
    assert "met its own target" in again
    assert "no statistics at" in fails("plan", tmp_path / "none", "--experts", 40)
    (tmp_path / "statistics.safetensors").write_bytes(b"nothing")
    assert "cannot be read as a statistics file" in fails("plan", tmp_path, "--experts", 40)
    assert "not a moe_fair statistics file" in fails(
        "plan", MODEL / "model.safetensors", "--total", 9
    )


@pytest.mark.usefixtures("no_model")
def test_outputs(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = ["prune", MODEL, "--experts", 40, *TEXT, "-o"]
    assert "is not empty" in fails(*run, tmp_path / "full")
    assert "is a file" in fails(*run, tmp_path / "full" / "file")
    assert "is not empty" in fails("calibrate", MODEL, *TEXT, "-o", tmp_path / "full")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: x\nexpert: 40\n", "no setting 'expert' (did you mean 'experts'?)"),
        ("experts: forty\n", "--experts must be a number, not 'forty'"),
        ("samples: 1.5\n", "--samples must be a whole number"),
        ("samples: true\n", "--samples must be a whole number"),
        ("calibration: 3\n", "--calibration must be text or a list of texts"),
        ("weights: {python: -1}\n", "not a weight of 0 or more"),
        ("weights: {no: 1}\n", "the domain False is no text; put it in quotes"),
        ("seed: null\n", "--seed has no value"),
        ("experts: [\n", "is not YAML"),
        ("- a\n", "holds no settings"),
        ("experts: 40\nratio: 0.5\n", "give one target"),
    ],
)
def test_recipes(fails: Callable[..., str], tmp_path: Path, text: str, said: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert said in fails("prune", MODEL, "--recipe", recipe, "-o", tmp_path / "out")
    assert "no recipe at" in fails("prune", MODEL, "--recipe", "none.yaml", "-o", tmp_path / "out")


def test_a_fault_of_ours_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Checkpoint, "blocks", property(lambda _: 1 / 0))
    with pytest.raises(SystemExit, match="1"):
        main(["calibrate", str(MODEL), "-o", str(tmp_path / "out")])
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        main(["calibrate", str(MODEL), "-o", str(tmp_path / "out"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("no_model")
def test_a_full_disk_is_met_before_anything_is_measured(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**7))
    said = fails("prune", MODEL, "--experts", 40, *TEXT, "-o", tmp_path / "out")
    assert "0.0 GB are free" in said
    assert list(tmp_path.iterdir()) == []
