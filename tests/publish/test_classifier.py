"""Image classifiers in formats that others read: written, read again there, the same outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moe_fair.cli import main
from moe_fair.publish.classifier import export_classifier
from moe_fair.vision.checkpoint import load_pruned, save_pruned
from moe_fair.vision.load import Source, build
from moe_fair.vision.preprocessing import Preprocessing
from moe_fair.vision.surgery import Cut, cut

HERE = "publish.test_classifier"


class Net(nn.Module):
    """A classifier that hands out a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.norm(self.first(x)).relu().mean((2, 3)))}


class OneAtATime(Net):
    """Looks at how many images there are."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = super().forward(x)
        return {"logits": out["logits"] * (1 if len(x) == 1 else 2)}


CUT: list[Cut] = [
    ("first", "out", [0, 2, 5]),
    ("norm", "out", [0, 2, 5]),
    ("head", "in", [0, 2, 5]),
]


def saved(folder: Path, name: str = "Net") -> Path:
    base = {"kind": "function", "module": HERE, "function": name, "arguments": [],
            "keywords": {}}  # fmt: skip
    torch.manual_seed(0)
    model = build(base, trusted=True)
    nn.init.normal_(model.norm.running_mean)  # type: ignore[arg-type, union-attr]
    cut(model, CUT)
    out = folder / "out"
    out.mkdir()
    pixels = Preprocessing(3, 16)
    save_pruned(model, Source(model, base, pixels, pixels, None, None), [CUT], out)
    return out


def onnx(file: Path, images: Tensor) -> np.ndarray:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    [only] = session.get_inputs()
    [found] = session.run(None, {only.name: images.numpy()})
    return np.asarray(found)


def program(file: Path, images: Tensor) -> np.ndarray:
    return torch.export.load(file).module()(images).detach().numpy()


def script(file: Path, images: Tensor) -> np.ndarray:
    with pytest.warns(DeprecationWarning, match="jit"):
        return torch.jit.load(file)(images).detach().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "ending", "read"),
    [("onnx", ".onnx", onnx), ("exported", ".pt2", program), ("torchscript", ".pt", script)],
)
def test_other_readers_give_the_outputs_of_the_checkpoint(
    tmp_path: Path, to: str, ending: str, read: Callable[[Path, Tensor], np.ndarray]
) -> None:
    out = saved(tmp_path)
    said: list[str] = []
    made = export_classifier(out, to, trust_remote_code=True, say=said.append)
    assert made.file == tmp_path / f"out{ending}"
    assert made.shape == ("batch", 3, 16, 16)
    assert not said
    images = torch.rand(5, 3, 16, 16)
    wanted = load_pruned(out, trust_remote_code=True)(images)["logits"].detach().numpy()
    assert np.abs(read(made.file, images) - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", f"out{ending}"]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["exported", "torchscript"])
def test_a_model_that_looks_at_their_number_takes_one_at_a_time(tmp_path: Path, to: str) -> None:
    said: list[str] = []
    out = saved(tmp_path, "OneAtATime")
    made = export_classifier(out, to, trust_remote_code=True, say=said.append)
    assert made.shape == (1, 3, 16, 16)
    assert [x.split(", since")[0] for x in said] == ["note: for one image at a time"]


def test_what_cannot_be_is_said_first(
    tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = saved(tmp_path)
    command = ["vision", "export", out]
    assert "--to tflite: choose from onnx, exported, torchscript" in fails(
        *command, "--to", "tflite"
    )
    assert "wants to run publish.test_classifier:Net" in fails(*command, "--to", "exported")
    trusted = [*command, "--trust-remote-code"]
    line = fails(*trusted, "--to", "exported", "-o", tmp_path)
    assert "is a folder, a link or a device" in line
    assert "no pruned image model at" in fails("vision", "export", tmp_path, "--to", "exported")
    monkeypatch.setattr("moe_fair.publish.classifier.find_spec", lambda name: None)
    assert 'pip install "moe_fair[onnx]"' in fails(*trusted, "--to", "onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_current_folder_is_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of one's own is found beside where the command is started."""
    (tmp_path / "net_beside.py").write_text("from publish.test_classifier import Net\n")
    out = saved(tmp_path)
    record = (out / "pruned.json").read_text()
    (out / "pruned.json").write_text(record.replace(HERE, "net_beside"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["vision", "export", "out", "--to", "torchscript", "--trust-remote-code"])
    assert stop.value.code == 0
    assert "takes batch × 3 × 16 × 16; its outputs are within" in capsys.readouterr().out
