"""The table of engines, what `--for` makes of it, and plans that keep to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from moe_fair.core.allocate import allocators
from moe_fair.core.allocate.climb import climb, totals
from moe_fair.core.engine_facts import (
    NO,
    NOT_RUN,
    RUN,
    Layout,
    engines,
    verdict,
    verdicts,
    wanted,
)
from moe_fair.core.layout import (
    layout_of,
    parallel_sizes,
    read_layout,
    tensor_parallel_sizes,
)
from moe_fair.core.plan import ModelSize, Plan, Target, make_plan
from moe_fair.core.ranking import rank
from moe_fair.core.units import Scores, UnitGroup
from moe_fair.report.document import Text
from moe_fair.report.serving import serving

KERNEL = [1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 320, 384, 448, 512, 576]
OTHERS = {"not run", "refused"}


def test_the_table_says_nothing_that_is_not_known_to_its_reader() -> None:
    """The same keys everywhere; a list of types has a source, and what is refused a reason."""
    for name, facts in engines().items():
        assert facts.keys() - {"counts", "most", "widths", "expert_parallel"} == {
            "title", "tested", "serve", "types", "equal", "unequal",
        }, name  # fmt: skip
        assert {"versions", "by"} <= facts["tested"].keys() <= {"versions", "by", "date"}
        assert facts["types"]["others"] in OTHERS
        assert facts["types"]["source"]
        assert "{out}" in facts["serve"]
        for form in ("equal", "unequal"):
            own = facts[form]
            assert ("run" in own) != ("refused" in own), (name, form)
            if "refused" in own:
                assert own["refused"]
            elif own["run"] != "all":
                has = facts["types"].get("has", own["run"])
                assert {*own["run"]} <= {*has}, name
                # what was run was run by something, some day
                assert not own["run"] or "date" in facts["tested"]
        for rule in facts.get("counts", []):
            assert rule["source"]
            assert rule["where"]
            assert rule["allowed"] == sorted({*rule["allowed"]})
        assert facts.get("expert_parallel", {"source": "-"})["source"]
        for rule in facts.get("widths", []):
            assert rule["source"]
            assert rule["multiple"] > 1


def test_verdicts() -> None:
    unequal = Layout("qwen2_moe", (40, 33), equal=False)
    found = {v.engine: v for v in verdicts(unequal, "OUT")}
    assert (found["vllm"].serves, found["vllm"].command) == (RUN, "vllm serve OUT")
    assert "moe-fair-vllm" in found["vllm"].by
    assert (found["llama.cpp"].serves, found["llama.cpp"].command) == (NO, "")
    assert verdict("vllm", Layout("qwen2_moe", (40,), True, {}, quantised=True), "O").serves == (
        NOT_RUN
    )
    assert verdict("vllm", Layout("some_moe", (40,), equal=True), "O").serves == NOT_RUN
    router = verdict("vllm", Layout("deepseek_v4", (160, 128), equal=False), "OUT")
    assert router.serves == NO
    assert "a layer has 160 experts" in router.why
    assert verdict("vllm", Layout("deepseek_v4", (192, 128), equal=False), "OUT").serves != NO


def test_widths_are_said() -> None:
    layout = Layout("qwen2_moe", (8,), True, {"hidden_size": 2048, "moe_intermediate_size": 1408})
    [note] = verdict("llama.cpp", layout, "OUT").notes
    assert (
        note == "K-quants (Q4_K and others) want multiples of 256, not moe_intermediate_size 1408"
    )


def test_devices_that_share_heads_and_widths() -> None:
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 1536}
    layout = Layout("qwen3_moe", (128,), True, sizes, heads=32)
    assert tensor_parallel_sizes(layout) == [1, 2, 4, 8, 16, 32]
    assert tensor_parallel_sizes(layout, 128) == [1, 2, 4]  # 12 groups
    odd = replace(layout, widths={**sizes, "moe_intermediate_size": 1408})
    assert tensor_parallel_sizes(odd) == [1, 2, 4, 8, 16, 32]
    assert tensor_parallel_sizes(odd, 128) == [1]  # 11 groups
    for missing in (replace(layout, heads=0), replace(layout, widths={"hidden_size": 2048})):
        assert tensor_parallel_sizes(missing) == []
    said = [b.text for b in serving(odd, "OUT") if isinstance(b, Text)]
    assert any("tensor parallel, with weights quantised in groups of 128" in x for x in said)


def test_layouts_of_configs(tmp_path: Path) -> None:
    plain = {"model_type": "qwen2_moe", "num_experts": 60, "hidden_size": 128}
    assert layout_of(plain) == Layout("qwen2_moe", (60,), True, {"hidden_size": 128})
    ours = {**plain, "moe_fair": {"experts": {"a": 40, "b": 30}}}
    assert layout_of(ours).counts == (40, 30)
    assert not layout_of(ours).equal
    assert parallel_sizes(layout_of(ours)) == [1, 2, 5, 10]
    layered = {**plain, "per_layer_config": {"0": {"num_experts": 5}, "1": {"num_experts": 7}}}
    assert layout_of(layered).counts == (5, 7)
    nested = {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}}
    assert layout_of(nested).counts == (16,)
    inner = {"model_type": "qwen3_vl_moe", "text_config": {"num_experts": 128}}
    assert layout_of(inner).counts == (128,)
    assert layout_of(inner).model_type == "qwen3_vl_moe"
    assert layout_of({**plain, "quantization_config": {"bits": 4}}).quantised
    with pytest.raises(ValueError, match="no mixture of experts"):
        layout_of({"model_type": "llama"})
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no settings"):
        read_layout(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert read_layout(tmp_path) == layout_of(plain)


def test_what_engines_want() -> None:
    assert wanted(["vllm"], "qwen2_moe", 60) == wanted([], "qwen2_moe", 60)
    router = wanted(["vllm"], "deepseek_v4", 256)
    assert router.counts == {n for n in KERNEL if n <= 256}
    assert not router.equal
    assert wanted(["vllm", "llama.cpp"], "deepseek_v4", 256).equal
    assert wanted(["vllm:ep=8"], "qwen2_moe", 60).counts == {8, 16, 24, 32, 40, 48, 56}
    assert wanted(["vllm:ep=3"], "deepseek_v4", 256).counts == {192}
    with pytest.raises(ValueError, match="--for vllm:ep=64,mlx: no number of experts"):
        wanted(["vllm:ep=64", "mlx"], "qwen2_moe", 60)
    for name in ("vllm:tp=2", "vllm:ep=0", "vllm:ep=x", "vllm:ep=", "vllm:"):
        with pytest.raises(ValueError, match=f"--for {name}: write vllm, or vllm:ep=8 for eight"):
            wanted([name], "qwen2_moe", 60)
    with pytest.raises(ValueError, match="whether mlx shares experts between devices is not"):
        wanted(["mlx:ep=2"], "qwen2_moe", 60)
    shared = verdict("vllm:ep=4", Layout("qwen2_moe", (40, 33), equal=False), "OUT")
    assert (shared.engine, shared.serves) == ("vllm", NO)
    assert shared.why == "a layer has 33 experts, which 4 devices do not divide"
    with pytest.raises(ValueError, match=r"no engine 'vlm' \(did you mean 'vllm'\?\)"):
        wanted(["vlm"], "qwen2_moe", 60)


def groups_of(sizes: list[int], floor: int = 1, multiple: int = 1) -> tuple[UnitGroup, ...]:
    return tuple(
        UnitGroup(f"g{i}", i, n, floor, 10, 20, multiple=multiple) for i, n in enumerate(sizes)
    )


def data(groups: tuple[UnitGroup, ...], seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    rows = {g.name: draw.normal(size=(3, g.size)) for g in groups}
    return {
        "costs": {g.name: np.sort(draw.random(g.size + 1)) for g in groups},
        "inputs": {n: {"rows": r, "gram": r.T @ r} for n, r in rows.items()},
    }


def scores(groups: tuple[UnitGroup, ...], seed: int) -> Scores:
    draw = torch.Generator().manual_seed(seed)
    return Scores("u", {g.name: torch.rand(g.size, generator=draw).double() for g in groups})


# counts between which steps differ
UNEVEN = [
    (groups_of([9, 6]), {1, 2, 4, 8}),
    (groups_of([12, 12, 7]), {1, 3, 4, 7, 12}),
    (groups_of([12, 8], multiple=2), {2, 3, 6, 8, 12}),
]


@pytest.mark.parametrize(("groups", "counts"), UNEVEN, ids=str)
def test_totals_and_climbs_between_uneven_counts(
    groups: tuple[UnitGroup, ...], counts: set[int]
) -> None:
    """Against every combination of depths; steep and flat costs reach every total."""
    found = rank(groups, scores(groups, 0), scores(groups, 1), counts=counts)
    sums = sorted({sum(map(int, c)) for c in product(*(r.depths for r in found))})
    assert totals(found) == sums
    for rate in (1, -1):
        for total in sums:
            index = climb(found, total, lambda g, i, rate=rate: (rate * found[g].depths[i], g))
            assert sum(int(r.depths[i]) for r, i in zip(found, index, strict=True)) == total
    size = sum(g.size for g in groups)
    for rule in allocators():
        for total in sums:
            made = make_plan(
                groups, scores(groups, 0), scores(groups, 1), target=Target(total=size - total),
                allocator=rule, before=ModelSize(1000, 2000), counts=counts, **data(groups, 0),
            )  # fmt: skip
            assert sum(g.depth for g in made.groups) == total
            assert {len(g.kept) for g in made.groups} <= counts


def targets(sizes: list[int], rule: str) -> st.SearchStrategy[Target]:
    """Those that can be within reach of layers of these sizes, and of the allocator."""
    whole = sum(sizes)
    reached = [
        st.integers(1, max(sizes)).map(lambda n: Target(mean_kept=n)),
        st.integers(1, whole).map(lambda n: Target(total=n)),
        st.floats(0, 0.9).map(lambda q: Target(ratio=q)),
        st.integers(100, 3000).map(lambda n: Target(parameters=n)),
    ]
    alone = [st.floats(0, 1).map(lambda a: Target(tolerance=a))] if rule == "tod" else []
    return st.one_of(*reached, *alone)


def takes(name: str, kind: str) -> bool:
    """An engine does not refuse the type as such."""
    try:
        wanted([name], kind, 40)
    except ValueError:
        return False
    return True


NAMED = [*sorted(engines()), "vllm:ep=2", "vllm:ep=3", "vllm:ep=8"]
TAKEN = {
    kind: [name for name in NAMED if takes(name, kind)]
    for kind in ("deepseek_v4", "qwen2_moe", "some_moe")
}


@st.composite
def asked(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
    """Engines, a model's type and layers, and what to keep of it."""
    kind = draw(st.sampled_from(sorted(TAKEN)))
    sizes = draw(st.lists(st.integers(4, 40), min_size=1, max_size=5))
    rule = draw(st.sampled_from(sorted(allocators())))
    names = st.lists(st.sampled_from(TAKEN[kind]), min_size=1, max_size=3, unique=True)
    return {
        "names": draw(names), "kind": kind, "sizes": sizes, "floor": draw(st.integers(1, 4)),
        "rule": rule, "target": draw(targets(sizes, rule)), "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(asked())
def test_every_plan_that_is_made_for_an_engine_is_served_by_it(problem: dict[str, Any]) -> None:
    check_served(**problem)


def check_served(
    names: list[str], kind: str, sizes: list[int], floor: int, rule: str, target: Target, seed: int
) -> None:
    groups = groups_of(sizes, floor)
    try:
        held = wanted(names, kind, max(sizes))
        made = make_plan(
            groups, scores(groups, seed), scores(groups, seed + 1), target=target, allocator=rule,
            before=ModelSize(5000, 9000), counts=held.counts, equal=held.equal,
            **data(groups, seed),
        )  # fmt: skip
    except ValueError:  # said why; no plan is made
        assume(False)
        raise
    layout = Layout(kind, tuple(len(g.kept) for g in made.groups), equal=made.uniform)
    assert [v.why for n in names if (v := verdict(n, layout, "OUT")).serves == NO] == []


@pytest.mark.parametrize(
    ("target", "kept"),
    [(Target(mean_kept=5), 5), (Target(total=10), 5), (Target(ratio=0.3), 6),
     (Target(parameters=950), 5)],
)  # fmt: skip
def test_equal_counts_whatever_the_allocator(target: Target, kept: int) -> None:
    groups = groups_of([8, 8])
    made = _equal(groups, target)
    assert [len(g.kept) for g in made.groups] == [kept, kept]


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Target(mean_kept=5.5), "--experts 5.5: .* is 5 and 6"),
        (Target(total=11), "--total 11: .* is 10 and 12"),
        (Target(ratio=0.95), "--ratio 0.95 is out of reach: .* 1 is the fewest"),
        (Target(tolerance=0.5), "--tolerance gives every layer a number of its own"),
        (Target(parameters=3), "--size 3 parameters is out of reach: with 1 units in every layer"),
    ],
)
def test_budgets_that_equal_counts_cannot_meet(target: Target, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        _equal(groups_of([8, 8]), target)


def _equal(groups: tuple[UnitGroup, ...], target: Target) -> Plan:
    return make_plan(
        groups, scores(groups, 0), scores(groups, 1), target=target, allocator="global",
        before=ModelSize(1010, 2000), equal=True,
    )  # fmt: skip
