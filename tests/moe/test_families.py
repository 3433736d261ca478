"""Every fused family of transformers: calibrated, cut, saved, loaded, generating.

The families are the registry's, so a new one in transformers is met here at once. Each either
passes everything or is refused, before anything is measured, with the reason that stands in
`eval/families.json`; the table in docs/models.md is made from that file (`eval/families_table.py`).
One family of each structure is checked, of each kind of experts in full (see `structures`);
`-m nightly` checks the rest of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from flow import (
    check_counterfactual,
    check_cut,
    check_generation,
    check_naive,
    check_streaming,
    check_trial,
)
from moe.structures import ALIKE, EXPERTS, structure
from places import EVAL, RECORD, older_than, streamed
from tiny import fused_families, tiny_model
from transformers import CONFIG_MAPPING, __version__

from moe_fair.core.recipe import Recipe
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.pipelines.moe import open_model

OLD = {k: why for k, why in RECORD["served_from"].items() if older_than(why["transformers"])}
REFUSED: dict[str, dict[str, str]] = RECORD["refused"] | OLD
# softmax; sigmoid with bias in groups; biased, transposed experts; a correction bias on the block
QUICK = ("mixtral", "deepseek_v3", "gpt_oss", "minimax_m2")


def _unknown(kind: str) -> list[Any]:
    """A mark that says so where this transformers has no such type."""
    if kind in CONFIG_MAPPING:
        return []
    return [pytest.mark.skip(reason=f"transformers {__version__} has no model type {kind}")]


SLOW, NIGHTLY = pytest.mark.slow, pytest.mark.nightly
# what this registry has, and what the record's has: what is missing in one of them is seen
SERVED = sorted({*fused_families(), *RECORD["served"]} - set(REFUSED))


def _families(full: Collection[str]) -> list[Any]:
    """All of them; those outside `full` every night."""
    marks = {k: [] if k in QUICK else [SLOW] if k in full else [SLOW, NIGHTLY] for k in SERVED}
    return [pytest.param(k, marks=[*_unknown(k), *marks[k]]) for k in SERVED]


ONE_A_STRUCTURE, ONE_A_KIND_OF_EXPERTS = map(_families, (ALIKE, EXPERTS))


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return _saved(request.param, tmp_path_factory.mktemp(request.param))


def _saved(kind: str, folder: Path) -> Checkpoint:
    tiny_model(kind).save_pretrained(folder)
    return Checkpoint(str(folder))


@pytest.mark.parametrize("checkpoint", ONE_A_STRUCTURE, indirect=True)
def test_streaming_statistics_are_the_resident_ones(checkpoint: Checkpoint) -> None:
    if not streamed(checkpoint.config.model_type):
        with pytest.raises(ValueError, match="hands the next more than hidden states"):
            check_streaming(checkpoint)
    else:
        check_streaming(checkpoint)


@pytest.mark.parametrize("checkpoint", ONE_A_KIND_OF_EXPERTS, indirect=True)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_statistics_equal_a_naive_loop(checkpoint: Checkpoint, implementation: str) -> None:
    check_naive(checkpoint, implementation)


@pytest.mark.parametrize("checkpoint", ONE_A_KIND_OF_EXPERTS, indirect=True)
@pytest.mark.slow
def test_without_each_expert(checkpoint: Checkpoint) -> None:
    check_counterfactual(checkpoint)


@pytest.mark.parametrize("checkpoint", ONE_A_KIND_OF_EXPERTS, indirect=True)
def test_trial_losses_are_those_of_masked_models(checkpoint: Checkpoint) -> None:
    if not streamed(checkpoint.config.model_type):
        with pytest.raises(ValueError, match="hands the next more than hidden states"):
            check_trial(checkpoint)
    else:
        check_trial(checkpoint)


@pytest.mark.parametrize("checkpoint", ONE_A_KIND_OF_EXPERTS, indirect=True)
def test_cut_alike_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    loaded = check_cut(checkpoint, tmp_path / "out", uniform=True)
    stock = checkpoint.config.model_type not in RECORD["never_stock"]
    assert (type(loaded).__name__ != "MoeFairForCausalLM") == stock
    check_generation(loaded)


@pytest.mark.parametrize("checkpoint", ONE_A_STRUCTURE, indirect=True)
def test_cut_unequally_saved_and_loaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    loaded = check_cut(checkpoint, tmp_path / "out", uniform=False)
    assert type(loaded).__name__ == "MoeFairForCausalLM"
    check_generation(loaded)


@pytest.mark.slow
@pytest.mark.nightly
def test_structures_are_what_the_models_say() -> None:
    of = {k: structure(tiny_model(k)) for k in SERVED if k in CONFIG_MAPPING}
    for first, others in ALIKE.items():
        assert {of[k] for k in (first, *others) if k in of} == {of[first]} if first in of else True
    assert len({of[k] for k in ALIKE if k in of}) == len([k for k in ALIKE if k in of])
    assert {k for first, others in ALIKE.items() for k in (first, *others)} >= of.keys()


@pytest.mark.parametrize("kind", [pytest.param(k, marks=_unknown(k)) for k in REFUSED])
def test_refused_before_anything_is_measured(kind: str, tmp_path: Path) -> None:
    _saved(kind, tmp_path)
    with pytest.raises(ValueError, match=re.escape(REFUSED[kind]["message"])):
        open_model(Recipe(model=str(tmp_path)))


@pytest.mark.skipif(__version__ != RECORD["transformers"], reason="another registry")
def test_the_record_is_of_this_registry() -> None:
    fused = set(fused_families())
    assert set(RECORD["served"]) == fused - set(REFUSED)
    assert set(RECORD["resident_only"]) | set(RECORD["served_from"]) <= set(RECORD["served"])


def test_the_docs_show_the_record() -> None:
    sys.path.insert(0, str(EVAL))
    from families_table import replaced, table

    page = (EVAL.parent / "docs" / "models.md").read_text()
    assert replaced(page, table(RECORD)) == page
