"""A pruned checkpoint runs only what it may, and says what is wrong with it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vision.architectures import images

from moe_fair.vision import load_pruned
from moe_fair.vision.checkpoint import save_pruned
from moe_fair.vision.graph import logits
from moe_fair.vision.load import build, find_processor
from moe_fair.vision.proof import find_groups, uneven_plan
from moe_fair.vision.source import open_source
from moe_fair.vision.surgery import cut, cuts_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    source = open_source("moe_fair.vision.zoo:resnet20(width=4)")
    groups = find_groups(source.model, images(2)).groups
    cuts = cuts_of(groups, uneven_plan(groups))
    cut(source.model, cuts)
    save_pruned(source.model, source, [cuts], tmp_path)
    return tmp_path


def change(folder: Path, **values: object) -> None:
    record = json.loads((folder / "pruned.json").read_text())
    (folder / "pruned.json").write_text(json.dumps({**record, **values}))


def test_history_is_plain_json(folder: Path) -> None:
    record = json.loads((folder / "pruned.json").read_text())
    module, side, ids = record["history"][0][0]
    assert (module, side) == ("conv1", "out")
    assert ids == sorted(ids)
    assert record["preprocessing"]["size"] == 32
    with torch.no_grad():
        assert logits(load_pruned(folder), images()).shape == (4, 10)


def test_unknown_code_runs_only_where_it_is_trusted(folder: Path) -> None:
    base = {"kind": "function", "module": "vision.architectures", "function": "built",
            "arguments": ["resnet20"], "keywords": {}}  # fmt: skip
    change(folder, base=base)
    with pytest.raises(ValueError, match="wants to run vision"):
        load_pruned(folder)
    with pytest.raises(ValueError, match=r"another's|does not fit|cannot take"):
        load_pruned(folder, trust_remote_code=True)  # runs, and is another width


def test_neighbours_of_trusted_modules_are_not_trusted() -> None:
    for module in ("moe_fair.vision.zoo.os", "timm.models", "torchvision.models.resnet", "os"):
        base = {"kind": "function", "module": module, "function": "system",
                "arguments": ["true"], "keywords": {}}  # fmt: skip
        with pytest.raises(ValueError, match="wants to run"):
            build(base, trusted=False)


def test_a_checkpoint_fetches_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_fair.vision import zoo

    seen: list[dict] = []

    def downloads(width: int, **keywords: object) -> torch.nn.Module:
        seen.append(keywords)
        return zoo.resnet20(width=width)

    monkeypatch.setattr(zoo, "downloads", downloads, raising=False)
    given = {"pretrained": True, "weights": "x", "num": 1}
    base = {"kind": "function", "module": "moe_fair.vision.zoo", "function": "downloads",
            "arguments": [4], "keywords": given}  # fmt: skip
    build(base, trusted=False)
    build(base, trusted=True)
    assert seen == [{"num": 1}, given]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"format": "other/9"}, "not a record of cuts that this version reads"),
        ({"base": {"kind": "pickle"}}, "unknown base 'pickle'"),
        ({"history": [[["conv9", "out", [0]]]]}, "no layer 'conv9'"),
        ({"history": [[["conv1", "up", [0]]]]}, "side in, out, heads, norm, not 'up'"),
        ({"history": []}, "does not fit the model"),
    ],
)
def test_broken_records(folder: Path, values: dict, said: str) -> None:
    change(folder, **values)
    with pytest.raises(ValueError, match=said):
        load_pruned(folder)


def test_missing_or_damaged_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no pruned image model"):
        load_pruned(tmp_path / "nothing")
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="does not fit"):
        load_pruned(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights at"):
        load_pruned(folder)


def test_weights_by_their_place_are_not_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`resnet18("DEFAULT")` downloads as `resnet18(weights="DEFAULT")` does."""
    asked = []

    def model(name: str, pretrained: bool = False) -> torch.nn.Module:
        asked.append((name, pretrained))
        return torch.nn.Linear(2, 2)

    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=model))
    base = {
        "kind": "function", "module": "timm", "function": "create_model",
        "arguments": ["a", True], "keywords": {},
    }  # fmt: skip
    with pytest.raises(ValueError, match="asks for other weights than its own"):
        build(base, trusted=False)
    assert asked == []
    build({**base, "arguments": ["a"], "keywords": {"pretrained": True}}, trusted=False)
    build(base, trusted=True)
    assert asked == [("a", False), ("a", True)]


def test_transformers_is_not_left_to_ask_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody said whether code may run, it asks, and takes `y` from a pipe as well."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    mark = tmp_path / "mark"
    (tmp_path / "c.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass C: pass\n")
    code = {"model_type": "theirs", "auto_map": {"AutoConfig": "c.C", "AutoImageProcessor": "c.C"}}
    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_text(json.dumps(code))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        build({"kind": "transformers", "class": "ViTModel"}, trusted=False, folder=tmp_path)
    assert find_processor(str(tmp_path)) is None
    assert not mark.exists()
