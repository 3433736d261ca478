"""The converter shim for llama.cpp against a stand-in for llama.cpp's own package.

`bash eval/serving/gguf.sh` runs it with llama.cpp itself.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from places import ROOT


class Stock:
    """A converter that copies one name of the number to another, as that of dots.llm1 does."""

    model_arch = "arch"

    def __init__(self, hparams: dict[str, Any]) -> None:
        self.hparams = hparams | {"num_experts": hparams["n_routed_experts"]}

    def modify_tensors(self, data: Any, name: str, bid: int | None) -> Iterator[Any]:
        if data is None:
            raise ValueError(name)
        yield name, self.hparams["num_experts"], self.hparams["n_routed_experts"]


def test_each_layer_is_converted_under_its_own_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conversion: Any = ModuleType("conversion")
    conversion.get_model_class = lambda name, mmproj=False: Stock
    monkeypatch.setitem(sys.modules, "conversion", conversion)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(ROOT / "serving/llama.cpp/convert_per_layer.py"))
    given = {"n_routed_experts": 8, "num_experts_per_tok": 8,
             "per_layer_config": {"1": {"n_routed_experts": 5}}}  # fmt: skip
    made = conversion.get_model_class("any")(given)
    before = dict(made.hparams)
    assert [*made.modify_tensors(0, "t", 1)] == [("t", 5, 5)]
    assert [*made.modify_tensors(0, "t", 0)] == [("t", 8, 8)]
    assert [*made.modify_tensors(0, "t", None)] == [("t", 8, 8)]
    with pytest.raises(ValueError, match="t"):
        [*made.modify_tensors(None, "t", 1)]
    assert made.hparams == before
    named = {"n_routed_experts": 8, "moe_fair": {"experts": {"model.layers.1.mlp": 5}}}
    made = conversion.get_model_class("any")(named)
    assert [*made.modify_tensors(0, "t", 1)] == [("t", 5, 5)]
    assert [*made.modify_tensors(0, "t", 11)] == [("t", 8, 8)]
    stock = conversion.get_model_class("any")({"n_routed_experts": 8})
    assert [*stock.modify_tensors(0, "t", 1)] == [("t", 8, 8)]
