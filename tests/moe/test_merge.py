"""Merging: clusters against a naive linkage, weights against a sum by hand, the checkpoint left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flow import DOMAINS, collect, original
from places import CALIBRATION, MODEL
from safetensors.torch import load_file, save_file
from scipy.cluster.hierarchy import fcluster, linkage
from tiny import tiny_model
from torch import Tensor

from moe_fair.cli import main
from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.core.units import Statistics
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.merge import clusters, write_merged
from moe_fair.pipelines import moe as pipeline

# per-expert matrices with a shared expert; fused, transposed and with biases; groups and a bias of
# the choice; packed rows of all experts; experts of a family's own module
KINDS = ["qwen2_moe", "gpt_oss", "deepseek_v3", "mixtral", "dbrx", "llama4_text"]
SIZES: dict[str, Any] = {
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 12,
            "moe_top_k": 4, "moe_normalize_expert_weights": 1.0},
    },
}  # fmt: skip
SMALL = [
    "-c", str(CALIBRATION), "--samples", "8", "--length", "64", "--batch-size", "4",
    "--no-taylor", "--no-counterfactual",
]  # fmt: skip


def naive(output: np.ndarray, count: int) -> set[frozenset[int]]:
    """Average linkage by its definition: the mean distance over all pairs of two clusters."""
    found = [{i} for i in range(len(output))]
    while len(found) > count:
        pairs = [
            (np.mean([np.linalg.norm(output[i] - output[j]) for i in a for j in b]), x, y)
            for x, a in enumerate(found)
            for y, b in enumerate(found[:x])
        ]
        _, x, y = min(pairs)
        found[y] |= found.pop(x)
    return {frozenset(c) for c in found}


@pytest.mark.parametrize("count", [1, 3, 7, 12])
def test_clusters_equal_a_naive_linkage_and_scipys(count: int) -> None:
    output = torch.randn(12, 5, generator=torch.Generator().manual_seed(count)).double()
    got = {frozenset(c) for c in clusters(output, count)}
    assert got == naive(output.numpy(), count)
    distances = [
        float(((output[i] - output[j]) ** 2).sum().sqrt())
        for i in range(12)
        for j in range(i + 1, 12)
    ]
    labels = fcluster(linkage(distances, "average"), count, "maxclust")
    assert got == {frozenset(np.flatnonzero(labels == c).tolist()) for c in set(labels)}


def test_equal_experts_still_make_as_many_clusters_as_asked() -> None:
    assert len(clusters(torch.zeros(6, 3), 4)) == 4


def test_no_cluster_crosses_a_routing_group() -> None:
    output = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    output[6] = output[0]  # nearest of all, in another run
    found = clusters(output, 6, blocks=3)
    assert sorted(i for c in found for i in c) == list(range(12))
    runs = [{i // 4 for i in c} for c in found]
    assert all(len(r) == 1 for r in runs)
    assert sorted(r.pop() for r in runs) == [0, 0, 1, 1, 2, 2]


def merged(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Plan]:
    """A tiny checkpoint, its statistics and the plan of merging a third of its experts away."""
    tiny_model(kind, **SIZES.get(kind, {})).to(dtype).save_pretrained(folder / "model")
    source = Checkpoint(str(folder / "model"))
    model = original(source)
    statistics = collect(source, model, ResidentEngine(model))
    statistics.metadata |= {"size": {"parameters": 10**9, "bytes": 10**9}, "calibration": {}}
    plan = pipeline.plan(statistics, Recipe(total=kept_in_all(source), reduce="merge"))
    return source, statistics, plan


def kept_in_all(source: Checkpoint) -> int:
    return sum(max(g.floor, g.size * 2 // 3 // g.blocks * g.blocks) for g in source.groups)


def expert_parts(state: dict[str, Tensor], block: Any) -> dict[str, list[Tensor]]:
    """Tensor of the experts in the model -> its rows of each expert."""
    found = {}
    for name, _ in block.experts.named_parameters():
        t = state[f"{block.name}.{block.path(block.experts, name)}"]
        found[name] = list(t.chunk(block.num_experts))
    return found


def check_router(
    block: Any, kept: list[int], before: dict[str, Tensor], after: dict[str, Tensor]
) -> None:
    """The router goes on as the representatives' own."""
    for axis in block.routed:
        name = f"{block.name}.{block.path(axis.module, axis.tensor)}"
        if name in before:
            rows = before[name].index_select(axis.dim, torch.tensor(kept))
            assert torch.equal(after[name], rows)


def check_runs(result: Any) -> None:
    """Logits of some tokens are finite."""
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(result(input_ids=ids).logits).all())


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_a_sum_by_hand_in_stock_transformers(
    kind: str, tmp_path: Path
) -> None:
    source, statistics, plan = merged(kind, tmp_path)
    assert plan.merges
    assert plan.uniform
    write_merged(source, plan, tmp_path / "merged")
    write_model(source, plan.kept, tmp_path / "out", repaired=tmp_path / "merged")
    result = original(Checkpoint(str(tmp_path / "out")))
    before, after = original(source).state_dict(), result.state_dict()
    alone = 0
    for block, group in zip(source.blocks, plan.groups, strict=True):
        tokens = statistics.sums[block.name]["tokens"].sum(0)
        mean = statistics.sums[block.name]["output"].sum(0) / tokens.clamp(min=1).unsqueeze(1)
        found = clusters(mean, len(group.kept), block.n_group)
        [new_block] = [b for b in Checkpoint(str(tmp_path / "out")).blocks if b.name == block.name]
        old, new = expert_parts(before, block), expert_parts(after, new_block)
        for place, kept in enumerate(group.kept):
            [members] = [c for c in found if kept in c]
            assert tokens[kept] == tokens[members].max()
            for name, parts in old.items():
                if len(members) == 1:
                    assert torch.equal(new[name][place], parts[kept]), name
                    alone += 1
                    continue
                by_hand = sum(float(tokens[m]) * parts[m].double() for m in members)
                by_hand = by_hand / float(tokens[members].sum())
                torch.testing.assert_close(new[name][place].double(), by_hand, rtol=1e-6, atol=1e-8)
        check_router(block, group.kept, before, after)
    assert alone
    check_runs(result)


def test_a_cluster_of_one_keeps_its_bytes_and_sums_are_rounded_once(tmp_path: Path) -> None:
    source, _, plan = merged("qwen2_moe", tmp_path, torch.bfloat16)
    write_merged(source, plan, tmp_path / "merged")
    write_model(source, plan.kept, tmp_path / "out", repaired=tmp_path / "merged")
    old = load_file(tmp_path / "model" / "model.safetensors")
    new = load_file(tmp_path / "out" / "model.safetensors")
    seen = {"alone": 0, "merged": 0}
    for group in plan.groups:
        for place, kept in enumerate(group.kept):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"{group.name}.experts.{{}}.{part}.weight"
                got, shares = new[name.format(place)], group.merged.get(str(kept))
                assert got.dtype == torch.bfloat16
                if shares is None:
                    seen["alone"] += 1
                    assert torch.equal(got, old[name.format(kept)])
                    continue
                seen["merged"] += 1
                by_hand = sum(s * old[name.format(m)].double() for m, s in shares.items())
                # via float32: a tie of bfloat16 may fall to the other side
                torch.testing.assert_close(got.double(), by_hand, rtol=2**-8, atol=0)
    assert all(seen.values())


def test_experts_that_no_token_reached_count_equally(tmp_path: Path) -> None:
    source, statistics, _ = merged("mixtral", tmp_path)
    for sums in statistics.sums.values():
        sums["tokens"].zero_()
        sums["output"].zero_()
    plan = pipeline.plan(statistics, Recipe(total=kept_in_all(source), reduce="merge"))
    for group in plan.groups:
        for shares in group.merged.values():
            assert list(shares.values()) == [1 / len(shares)] * len(shares)


def run(*arguments: object, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert stop.value.code == code


@pytest.mark.slow
def test_the_command_merges_in_one_go_as_from_a_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, stats, plan, two = (tmp_path / n for n in ("one", "stats", "plan.json", "two"))
    run("prune", MODEL, "--experts", 45, *SMALL, "--reduce", "merge", "-o", one)
    assert "are merged into" in capsys.readouterr().out
    run("calibrate", MODEL, *SMALL, "-o", stats)
    run("plan", stats, "--experts", 45, "--reduce", "merge", "-o", plan)
    run("prune", MODEL, "--plan", plan, "-o", two)
    for name in ("model.safetensors", "config.json", "moe_fair/plan.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert json.loads((one / "config.json").read_text())["num_experts"] == 45
    assert "auto_map" not in (one / "config.json").read_text()
    assert not (one / "moe_fair" / "repair.json").exists()
    assert not list(tmp_path.glob("*.calibrating"))
    # not what pruning the same experts would have left
    raw = json.loads(plan.read_text())
    for group in raw["groups"]:
        group["merged"] = {}
    plan.write_text(json.dumps(raw))
    run("prune", MODEL, "--plan", plan, "--repair", "none", "-o", tmp_path / "cut")
    cut, new = (load_file(p / "model.safetensors") for p in (tmp_path / "cut", one))
    assert cut.keys() == new.keys()
    differ = [n for n in cut if not torch.equal(cut[n], new[n])]
    assert differ
    assert all(".experts." in n for n in differ)


@pytest.mark.slow
def test_what_cannot_be_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stats, plan = tmp_path / "stats", tmp_path / "plan.json"
    run("calibrate", MODEL, *SMALL, "-o", stats)
    run("plan", stats, "--experts", 45, "--method", "reap", "-o", plan)
    merges = tmp_path / "merges.json"
    run("plan", stats, "--experts", 45, "--reduce", "merge", "-o", merges)
    cases = {
        "has no clusters": ["--plan", plan, "--reduce", "merge"],
        "merges experts in another way": ["--plan", merges, "--reduce", "ream"],
        "is none of prune, merge, ream": ["--stats", stats, "--experts", 45, "--reduce", "marge"],
    }  # fmt: skip
    for text, arguments in cases.items():
        capsys.readouterr()
        run("prune", MODEL, *arguments, "-o", tmp_path / "out", code=2)
        error = capsys.readouterr().err
        assert text in error
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists()


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    _, _, plan = merged("mixtral", tmp_path)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    raw = json.loads((tmp_path / "plan.json").read_text())
    group = next(g for g in raw["groups"] if g["merged"])
    kept = next(iter(group["merged"]))
    good = dict(group["merged"][kept])
    for bad in ({**good, "99": 0.1}, {m: s for m, s in good.items() if m != kept}):
        group["merged"][kept] = bad
        (tmp_path / "bad.json").write_text(json.dumps(raw))
        with pytest.raises(ValueError, match="merged"):
            Plan.load(tmp_path / "bad.json")


def test_another_layout_is_not_written(tmp_path: Path) -> None:
    source, _, plan = merged("qwen2_moe", tmp_path)
    write_merged(source, plan, tmp_path / "merged")
    for file in (tmp_path / "merged").iterdir():
        tensors = load_file(file)
        save_file({n: t * 2 if n.startswith("original") else t for n, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=r"another layout than the model.*--reduce prune"):
        write_model(source, plan.kept, tmp_path / "out", repaired=tmp_path / "merged")


def test_statistics_of_domains_are_weighed(tmp_path: Path) -> None:
    source, statistics, plan = merged("mixtral", tmp_path)
    assert isinstance(statistics, Statistics)
    recipe = Recipe(
        total=kept_in_all(source), reduce="merge", weights={DOMAINS[0]: 1.0, DOMAINS[1]: 0.0}
    )
    other = pipeline.plan(statistics, recipe)
    first = {g.name: g.merged for g in plan.groups}
    assert first != {g.name: g.merged for g in other.groups}
