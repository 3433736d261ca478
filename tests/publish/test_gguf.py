"""Unequal results padded to one number of experts, and llama.cpp's converter as the user has it.

The converter itself is llama.cpp's: `eval/serving/gguf.sh` runs it, and what it makes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import MODEL
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from moe_fair.cli import main
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.padding import plan_padding, write_padded

Fails = Callable[..., str]

# what a converter is called with, written to the file that it is told to make
CONVERTER = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
words = [folder.name, *sys.argv[2::2], sys.argv[5], str((folder / "config.json").is_file())]
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(" ".join(words))
"""


def unequal(folder: Path, kind: str, **settings: object) -> Path:
    """A tiny model whose layers keep different experts."""
    model = tiny_model(kind, **settings)
    for p in (*model.parameters(), *model.buffers()):
        if p.dim() == 1 and p.numel() == 12:  # a router's bias, which is zero by itself
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(folder / "model")
    source = Checkpoint(str(folder / "model"))
    kept = {
        b.name: sorted({(5 * i + n) % 12 for i in range(5 + n)})
        for n, b in enumerate(source.blocks)
    }
    write_model(source, kept, folder / "out")
    return folder / "out"


def logits(folder: Path, own: bool) -> torch.Tensor:
    ids = torch.arange(3, 99).view(2, 48)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=own
    ).eval()
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v3", "gpt_oss", "minimax_m2"])
def test_a_padded_result_is_a_stock_checkpoint_that_gives_the_same(
    tmp_path: Path, kind: str
) -> None:
    groups = {"n_group": 1, "topk_group": 1} if kind in ("glm4_moe", "deepseek_v3") else {}
    out = unequal(tmp_path, kind, **groups)
    found = plan_padding(out)
    before, after = found.bytes
    (tmp_path / "padded").mkdir()
    write_padded(found, tmp_path / "padded")
    config = json.loads((tmp_path / "padded/config.json").read_text())
    assert not {"auto_map", "moe_fair", "per_layer_config"} & config.keys()
    assert found.experts == max(
        json.loads((out / "config.json").read_text())["moe_fair"]["experts"].values()
    )
    stored = [f.stat().st_size for f in (tmp_path / "padded").glob("*.safetensors")]
    assert before < after <= sum(stored)
    assert sorted(p.name for p in (tmp_path / "padded").iterdir() if p.suffix != ".json") == [
        "model.safetensors"
    ]
    padded, own = logits(tmp_path / "padded", own=False), logits(out, own=True)
    assert torch.allclose(padded, own, atol=1e-6)
    assert not torch.allclose(own, logits(tmp_path / "model", own=False), atol=1e-4)


def test_what_cannot_be_padded(tmp_path: Path) -> None:
    out = unequal(tmp_path, "glm4_moe", n_group=1, topk_group=1)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"n_group": 4}))
    with pytest.raises(ValueError, match="pick groups of experts first"):
        plan_padding(out)
    with pytest.raises(ValueError, match="no selection bias"):
        plan_padding(unequal(tmp_path / "other", "qwen2_moe"))


@pytest.fixture
def converter(tmp_path: Path) -> Path:
    path = tmp_path / "convert.py"
    path.write_text(CONVERTER)
    return path


def test_the_converter_is_driven(
    tmp_path: Path, converter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = tmp_path / "made.gguf", ("--converter", str(converter), "-o")
    assert export(MODEL, *asked, file, "--outtype", "q8_0") == 0
    assert file.read_text().split()[0] == MODEL.name
    assert "q8_0" in file.read_text()
    out = unequal(tmp_path, "glm4_moe", n_group=1, topk_group=1)
    capsys.readouterr()
    assert export(out, *asked, file, "--pad") == 0
    assert "padded to 7 experts in every layer: " in capsys.readouterr().err
    assert file.read_text().endswith("True")  # it was given the padded folder
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def export(out: Path, *more: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["export", str(out), "--to", "gguf", *map(str, more)])
    return int(stop.value.code or 0)


def test_refused_before_anything(
    tmp_path: Path, converter: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made.gguf"
    asked = ("--to", "gguf", "--converter", converter, "-o", file)
    out = unequal(tmp_path, "glm4_moe", n_group=1, topk_group=1)
    line = fails("export", out, *asked)
    assert "one number of experts for all layers" in line
    assert "give --pad (7 experts in every layer, " in line
    assert "--for llama.cpp (equal counts)" in line
    other = unequal(tmp_path / "other", "qwen2_moe")
    line = fails("export", other, *asked)
    assert "--pad" not in line
    assert "--for llama.cpp (equal counts)" in line
    assert "--pad cannot help: " in fails("export", other, *asked, "--pad")
    assert "have 60 experts already" in fails("export", MODEL, *asked, "--pad")
    assert "--to onnx: gguf is the one format" in fails("export", MODEL, "--to", "onnx")
    assert "config.json cannot be read" in fails("export", tmp_path, *asked)
    assert "is a folder, a link or a device" in fails("export", MODEL, *asked[:4], "-o", tmp_path)
    assert "no folder that can be" in fails("export", MODEL, *asked[:4], "-o", tmp_path / "a" / "b")
    assert "no such file" in fails("export", MODEL, "--to", "gguf", "--converter", tmp_path / "c")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert "no convert_hf_to_gguf.py in it" in fails("export", MODEL, "--to", "gguf")
    monkeypatch.delenv("LLAMA_CPP")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "github.com/ggml-org/llama.cpp" in fails("export", MODEL, "--to", "gguf")
    assert not file.exists()


def test_the_converter_is_found_and_its_failure_told(
    tmp_path: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, file = tmp_path / "convert_hf_to_gguf.py", tmp_path / "made.gguf"
    script.write_text(CONVERTER + "\nraise NotImplementedError('BPE pre-tokenizer')\n")
    script.chmod(0o755)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    for name, value in (("LLAMA_CPP", tmp_path), ("PATH", f"{tmp_path}{os.pathsep}/usr/bin")):
        with monkeypatch.context() as inside:
            inside.setenv(name, str(value))
            line = fails("export", MODEL, "--to", "gguf", "-o", file)
        assert "converter failed: NotImplementedError: BPE pre-tokenizer; to see all: " in line
    assert [p.name for p in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]
