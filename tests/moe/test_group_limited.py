"""Group-limited routing: how few experts it can work with, and what is said of fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import MODEL
from tiny import tiny_model
from transformers import AutoTokenizer

from moe_fair.core.recipe import Recipe
from moe_fair.moe.blocks import MoeBlock, find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.surgery import check_kept
from moe_fair.pipelines.checks import check_plan_settings

# groups, groups that are picked, experts in each, top k
SHAPES = [(4, 2, 4, 4), (4, 3, 4, 4), (4, 4, 4, 2), (8, 4, 4, 8), (2, 1, 8, 6)]


def block(shape: tuple[int, int, int, int], kind: str = "deepseek_v3") -> MoeBlock:
    groups, picked, each, top_k = shape
    model = tiny_model(
        kind, n_group=groups, topk_group=picked, n_routed_experts=groups * each,
        num_local_experts=groups * each, num_experts_per_tok=top_k,
    )  # fmt: skip
    return find_blocks(model)[-1]


def routed(found: MoeBlock, each: int) -> torch.Tensor:
    """Ids [T, K] that the router picks with so many experts left in every group."""
    router, run = found.router, found.num_experts // found.n_group
    kept = [g * run + i for g in range(found.n_group) for i in range(each)]
    for owner, name, dim in found.routed:
        old = getattr(owner, name)
        cut = old.detach().index_select(dim, torch.tensor(kept))
        setattr(owner, name, torch.nn.Parameter(cut) if name in owner._parameters else cut)
    router.num_experts = len(kept)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * 30
    with torch.no_grad():
        return router(x)[-1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_floor_is_the_fewest_that_every_choice_of_groups_can_serve(
    shape: tuple[int, int, int, int],
) -> None:
    """Against the family's own router: at the floor every token gets its top k from the groups."""
    groups, picked, _, top_k = shape
    floor = block(shape).floor()
    each = floor // groups
    assert floor == each * groups
    ids = routed(block(shape), each)
    assert ids.shape[-1] == top_k
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert all(len({i // each for i in row}) <= picked for row in ids.tolist())
    try:  # one fewer in every group: the router breaks, or leaves the groups that it has picked
        fewer = routed(block(shape), each - 1)
    except RuntimeError:
        return
    assert any(len({i // (each - 1) for i in row}) > picked for row in fewer.tolist())


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grouped")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tiny_model("deepseek_v3", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "target", [("--experts", 4), ("--total", 12), ("--ratio", 0.8), ("--size", "1K")], ids=str
)
def test_a_target_below_the_floor_says_why(
    grouped: Path, tmp_path: Path, fails: Callable[..., str], target: tuple[str, object]
) -> None:
    said = fails("prune", grouped, *target, "--length", 64, "-o", tmp_path / "out")
    assert (
        "the router first picks some of 4 groups of experts, and each group must keep 2: those "
        "picked must hold its top k, and a group is judged by its best two"
    ) in said
    assert target[0] in said
    assert not (tmp_path / "out").exists()


def test_without_groups_the_router_needs_its_top_k(
    tmp_path: Path, fails: Callable[..., str]
) -> None:
    for target in (("--experts", 3), ("--total", 20), ("--ratio", 0.95), ("--size", "1K")):
        said = fails("prune", MODEL, *target, "-o", tmp_path / "out")
        assert target[0] in said
        assert "the router picks top 4" in said


def test_the_floor_itself_is_allowed(grouped: Path) -> None:
    source = Checkpoint(str(grouped))
    plan = check_plan_settings(Recipe(experts=8), source)
    assert [len(g.kept) for g in plan.groups] == [8] * len(plan.groups)


def test_a_plan_below_the_floor_is_refused(grouped: Path) -> None:
    """One of each of four groups is the top 4, but of the two groups that are picked only two."""
    found = Checkpoint(str(grouped)).blocks[0]
    check_kept(found, [0, 1, 4, 5, 8, 9, 12, 13])
    with pytest.raises(ValueError, match=r"1 experts kept in each of 4 groups, .* keep 2 in each"):
        check_kept(found, [0, 4, 8, 12])
