"""Every fused family of transformers: calibrated, cut, saved, loaded, generating.

The families are the registry's, so a new one in transformers is met here at once. Each either
passes everything or is refused, before anything is measured, with the reason that stands in
`families.json`; the README's table is made from that file (`eval/families_table.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flow import check_cut, check_generation, check_naive, check_streaming
from tiny import fused_families, tiny_model

from moe_fair.moe.load import Checkpoint

# one of each way to route: softmax; sigmoid with bias in groups; biased and transposed experts;
# a correction bias on the block; hybrid layers
QUICK = ("mixtral", "deepseek_v3", "gpt_oss", "minimax_m2", "jamba")

FAMILIES = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in fused_families()
]


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param).save_pretrained(folder)
    return Checkpoint(str(folder))


def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    check_streaming(checkpoint)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint, implementation: str) -> None:
    check_naive(checkpoint, implementation)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "unequal"])
def test_cut_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path, uniform: bool) -> None:
    loaded = check_cut(checkpoint, tmp_path / "out", uniform)
    assert (type(loaded).__name__ == "MoeFairForCausalLM") != uniform
    check_generation(loaded)
