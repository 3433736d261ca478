"""The examples of docs/extending.md, installed as that page says and used as it says."""

from __future__ import annotations

import configparser
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from places import CALIBRATION, MODEL, ROOT

import moe_fair
from moe_fair.core.allocate import allocators
from moe_fair.core.units import Statistics
from moe_fair.engines.resident import ResidentEngine
from moe_fair.moe import criteria as criteria_package
from moe_fair.moe.blocks import find_blocks, standard_block
from moe_fair.moe.calibration_text import CalibrationSet
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.collector import ExpertCollector
from moe_fair.moe.families import families
from moe_fair.moe.repairs import repairs
from moe_fair.moe.statistics import collecting
from moe_fair.moe.statistics import families as statistics_families
from moe_fair.moe.statistics import statistics as statistic_names

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = dict(re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
GROUP = "project.entry-points."
REGISTRIES = (
    criteria_package.criteria,
    allocators,
    repairs,
    families,
    statistics_families,
    statistic_names,
)


def project() -> dict[str, dict[str, str]]:
    """The tables of the page's pyproject.toml, which are simple enough for this."""
    read = configparser.ConfigParser()
    read.read_string(BLOCKS["pyproject.toml"])
    return {n.replace('"', ""): {k: v.strip('"') for k, v in read[n].items()} for n in read}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    """A package with the page's files and entry points, as an installer leaves it."""
    site = tmp_path_factory.mktemp("site")
    name, version = project()["project"]["name"], project()["project"]["version"]
    found = site / f"{name.replace('-', '_')}-{version}.dist-info"
    found.mkdir()
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for table, points in project().items():
        if table.startswith(GROUP):
            lines += [f"[{table.removeprefix(GROUP)}]", *(f"{k} = {v}" for k, v in points.items())]
    (found / "entry_points.txt").write_text("\n".join(lines) + "\n")
    names = [name for name in BLOCKS if name.endswith(".py")]
    for name in names:
        (site / name).write_text(BLOCKS[name])
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    for registry in REGISTRIES:
        registry.cache_clear()
    modules = [Path(name).stem for name in names]
    yield {m: importlib.import_module(m) for m in modules}
    sys.path.remove(str(site))
    for module in modules:
        del sys.modules[module]
    for registry in REGISTRIES:
        registry.cache_clear()


def test_every_example_is_installed(installed: dict[str, ModuleType]) -> None:
    tables = [points for table, points in project().items() if table.startswith(GROUP)]
    points = [module for table in tables for module in table.values()]
    assert sorted(points) == sorted(installed)
    assert PAGE.count("```python") == len(installed)


def test_the_criterion_is_a_method(
    installed: dict[str, ModuleType], statistics_folder: Path
) -> None:
    statistics = Statistics.load(statistics_folder)
    plan = moe_fair.plan(statistics, ratio=0.25, method="peaked")
    assert (plan.removal, plan.allocator) == ("peaked", "uniform")
    for group, planned in zip(statistics.groups, plan.groups, strict=True):
        sums = {k: v.sum(0).numpy() for k, v in statistics.sums[group.name].items()}
        with np.errstate(invalid="ignore", divide="ignore"):
            score = np.nan_to_num(sums["gated_norm_sq"] / sums["gated_norm"])
        stays = np.argsort(score, kind="stable")[group.size // 4 :]
        assert planned.kept == sorted(stays.tolist())


def test_the_allocator_meets_its_total_evenly(
    installed: dict[str, ModuleType], statistics_folder: Path
) -> None:
    plan = moe_fair.plan(statistics_folder, experts=40, method="reap", allocate="even-mass")
    assert plan.allocator == "even-mass"
    assert sum(len(g.kept) for g in plan.groups) == 40 * len(plan.groups)
    lost = []
    for g in plan.groups:
        score = np.array(g.removal)
        gone = sorted(set(range(g.size)) - set(g.kept))
        # with one expert more, the layer would have lost more than any layer has
        more = score[gone].sum() + np.delete(score, gone).min()
        lost.append((score[gone].sum() / score.sum(), more / score.sum()))
    assert max(now for now, _ in lost) <= min(then for _, then in lost) + 1e-9
    with pytest.raises(ValueError, match="even-mass needs a budget"):
        moe_fair.plan(statistics_folder, tolerance=0.1, allocate="even-mass")


@pytest.mark.slow
def test_the_repair_folds_a_factor(installed: dict[str, ModuleType], tmp_path: Path) -> None:
    settings = {"experts": 30, "method": "reap", "calibration": str(CALIBRATION), "samples": 16,
                "length": 64, "repair": "shrunk-scale"}  # fmt: skip
    done = moe_fair.prune(MODEL, tmp_path / "out", **settings)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(p, dtype="float32")
        for p in (MODEL, tmp_path / "out")
    ]
    factors = []
    for before, after, plan in zip(*map(find_blocks, models), done.plan.groups, strict=True):
        w, new = (b.experts.down_proj.detach().double() for b in (before, after))
        w = w[plan.kept]
        a = float((w * new).sum() / w.square().sum())
        torch.testing.assert_close(new, a * w, atol=4e-3 * float(w.abs().max()), rtol=0)  # bfloat16
        factors.append(a)
    assert any(abs(a - 1) > 0.01 for a in factors)  # half of the experts are gone


def test_the_family_sees_what_structure_shows(installed: dict[str, ModuleType]) -> None:
    config = transformers.AutoConfig.from_pretrained(MODEL)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.mlp.__class__ = type("ExampleMoeBlock", (type(layer.mlp),), {})
    found = find_blocks(model)
    assert found == [standard_block(b.name, b.block) for b in found]
    assert len(found) == len(model.model.layers)


def test_the_statistic_is_collected(installed: dict[str, ModuleType]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    blocks = find_blocks(model)
    text = CalibrationSet(("a",), tuple((list(range(i, i + 20)), 0) for i in (3, 40)))
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {b.name: [] for b in blocks}
    for b in blocks:
        b.experts.register_forward_pre_hook(
            lambda module, given, name=b.name: seen[name].append(given[:2])
        )
    engine = ResidentEngine(model)
    with torch.no_grad():
        for batch in text.batches(2):
            model(input_ids=batch.input_ids)
    wanted = {b.name: torch.zeros(b.num_experts, dtype=torch.float64) for b in blocks}
    for b in blocks:
        for x, ids in seen[b.name]:
            for t, e in ((i // ids.shape[1], e) for i, e in enumerate(ids.flatten().tolist())):
                gate, up = (b.experts.gate_up_proj[e] @ x[t]).chunk(2)
                f = b.experts.down_proj[e] @ (b.experts.act_fn(gate) * up)
                wanted[b.name][e] += f.detach().abs().max().double()
    groups = Checkpoint(str(MODEL)).groups
    with ExpertCollector(blocks, groups, ("a",), collecting({"peak"})) as collector:
        engine.run(text.batches(2), collector, backward=False)
    found = collector.statistics()
    assert set(found.sums[blocks[0].name]) == {"peak"}
    for name, sums in wanted.items():
        torch.testing.assert_close(found.sums[name]["peak"][0], sums, rtol=1e-5, atol=1e-7)
