"""Merged experts repaired: from the merged layer on, in both engines, resumed, packed, on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flow import original
from packing import fp8
from places import CALIBRATION, MODEL
from safetensors.torch import load_file
from test_merge import kept_in_all, run
from test_ream import collect
from test_repair import batches, load
from tiny import tiny_model

from moe_fair.core.plan import Plan
from moe_fair.core.recipe import Recipe
from moe_fair.engines.layers import LayeredModel
from moe_fair.engines.loaded import LoadedLayers
from moe_fair.engines.resident import ResidentEngine
from moe_fair.engines.streaming import StreamingEngine
from moe_fair.moe.block_recorder import BlockRecorder
from moe_fair.moe.blocks import find_blocks
from moe_fair.moe.checkpoint_source import Checkpoint
from moe_fair.moe.checkpoint_writer import write_model
from moe_fair.moe.engine_choice import start_layerwise
from moe_fair.moe.layer_repair import LayerRepair
from moe_fair.moe.merge import write_merged
from moe_fair.moe.repacking import Repacking
from moe_fair.moe.repair import Repairer
from moe_fair.moe.routed_output import read_down
from moe_fair.pipelines import moe as pipeline

KINDS = ["qwen2_moe", "gpt_oss"]


def merged(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Plan]:
    """A tiny checkpoint and the plan of merging a third of its experts; tensors lie beside."""
    tiny_model(kind).to(dtype).save_pretrained(folder / "model")
    source = Checkpoint(str(folder / "model"))
    model = original(source)
    statistics = collect(source, model, ResidentEngine(model))
    statistics.metadata |= {"size": vars(source.size), "calibration": {}}
    plan = pipeline.plan(statistics, Recipe(total=kept_in_all(source), reduce="ream"))
    write_merged(source, plan, folder / "merged")
    return source, plan


def walk(
    engine: Any, plan: Plan, folder: Path, name: str, kind: str = "refit"
) -> list[LayerRepair]:
    (folder / name).mkdir(exist_ok=True)
    repairer = Repairer(
        engine, plan.kept, "refit", folder=folder / name, key="k", merged=folder / "merged"
    )
    # one domain: fits on random tokens help no other, and would not be taken
    return repairer.run([replace(b, domain=0) for b in batches()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_repair_goes_on_from_merged_experts_and_is_written_as_it_ran(
    kind: str, tmp_path: Path
) -> None:
    source, plan = merged(kind, tmp_path)
    write_model(source, plan.kept, tmp_path / "plain", merged=tmp_path / "merged")
    model, plain = load(tmp_path / "model"), load(tmp_path / "plain")
    done = walk(StreamingEngine(LoadedLayers(model)), plan, tmp_path, "repaired")
    assert any(d.repair == "refit" and d.after < d.before for d in done)
    # the first layer sees the same in both models: its error is that of the merged experts
    first, whole = find_blocks(plain)[0], find_blocks(load(tmp_path / "model"))[0]
    assert done[0].name == first.name
    assert len(done) == len(plan.groups)
    wanted, got = _routed(load(tmp_path / "model"), whole.layer), _routed(plain, first.layer)
    error = float((wanted - got).square().sum() / wanted.square().sum())
    assert done[0].before == pytest.approx(error, rel=1e-4)

    layered = LayeredModel(
        source.path, source.config, dtype=torch.float32, device=torch.device("cpu")
    )
    assert walk(StreamingEngine(layered), plan, tmp_path, "streamed") == done
    names = sorted(f.name for f in (tmp_path / "repaired").iterdir())
    check_same(tmp_path / "repaired", tmp_path / "streamed")

    # killed after the first layers: the rest is the same
    (tmp_path / "killed").mkdir()
    for n in names[:-2]:
        (tmp_path / "killed" / n).write_bytes((tmp_path / "repaired" / n).read_bytes())
    again = load(tmp_path / "model")
    assert walk(StreamingEngine(LoadedLayers(again)), plan, tmp_path, "killed") == done
    check_same(tmp_path / "repaired", tmp_path / "killed")

    write_model(
        source, plan.kept, tmp_path / "out", merged=tmp_path / "merged",
        repaired=tmp_path / "repaired",
    )  # fmt: skip
    loaded, ids = load(tmp_path / "out"), batches()[0].input_ids
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    # what the repair did not touch is what merging left
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert a.keys() == b.keys()
    differ = {n for n in a if not torch.equal(a[n], b[n])}
    assert differ
    assert all("down_proj" in n for n in differ)


def check_same(one: Path, other: Path) -> None:
    """Both hold the same tensors, bit for bit."""
    for file in one.iterdir():
        a, b = load_file(file), load_file(other / file.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a), file.name


def _routed(model: Any, layer: int) -> torch.Tensor:
    """The routed output on the tokens of the sequences that judge, of the layer's block."""
    [block] = [b for b in find_blocks(model) if b.layer == layer]
    watch, found = BlockRecorder(block), []
    for batch in batches():
        with torch.no_grad(), watch:
            model(batch.input_ids, attention_mask=batch.mask)
        judge = (batch.sequence_ids % 5 == 4).unsqueeze(1) & batch.mask.bool()
        found.append(watch.y.view(*batch.mask.shape, -1)[judge])
    return torch.cat(found)


def test_the_fit_is_drawn_to_the_merged_weights(tmp_path: Path) -> None:
    """Not to those of the expert that they take the place of."""
    source, plan = merged("qwen2_moe", tmp_path)
    write_model(source, plan.kept, tmp_path / "plain", merged=tmp_path / "merged")
    model, plain = load(tmp_path / "model"), load(tmp_path / "plain")
    whole = {b.name: read_down(b.experts) for b in find_blocks(model)}
    done = walk(StreamingEngine(LoadedLayers(model)), plan, tmp_path, "repaired")
    near, far = 0.0, 0.0
    for d, group, new, old in zip(
        done, plan.groups, find_blocks(model), find_blocks(plain), strict=True
    ):
        at = [group.kept.index(int(k)) for k in group.merged]
        if d.repair == "none" or not at:
            continue
        w = read_down(new.experts)[at]
        near += float((w - read_down(old.experts)[at]).square().sum())
        far += float((w - whole[d.name][[group.kept[i] for i in at]]).square().sum())
    assert 0 < near < far


def test_where_no_fit_helps_the_merged_layer_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_fair.moe import layer_fit

    monkeypatch.setattr(layer_fit, "ROUNDING", 1e9)  # no error is one
    source, plan = merged("qwen2_moe", tmp_path)
    model = load(tmp_path / "model")
    done = walk(StreamingEngine(LoadedLayers(model)), plan, tmp_path, "repaired")
    assert all(d.repair == "none" for d in done)
    for name in ("plain", "out"):
        repaired = tmp_path / "repaired" if name == "out" else None
        write_model(
            source, plan.kept, tmp_path / name, merged=tmp_path / "merged", repaired=repaired
        )
    files = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "out")]
    assert files[0] == files[1]


def test_bfloat16_experts_that_stay_alone_keep_their_bytes(tmp_path: Path) -> None:
    source, plan = merged("qwen2_moe", tmp_path, torch.bfloat16)
    model = load(tmp_path / "model", torch.bfloat16)
    walk(StreamingEngine(LoadedLayers(model)), plan, tmp_path, "repaired")
    write_model(
        source, plan.kept, tmp_path / "out", merged=tmp_path / "merged",
        repaired=tmp_path / "repaired",
    )  # fmt: skip
    old, new = (load_file(tmp_path / n / "model.safetensors") for n in ("model", "out"))
    seen = 0
    for group in plan.groups:
        for place, kept in enumerate(group.kept):
            for part in ("gate_proj", "up_proj"):
                name = f"{group.name}.experts.{{}}.{part}.weight"
                same = torch.equal(new[name.format(place)], old[name.format(kept)])
                assert same == (str(kept) not in group.merged)
                seen += same
    assert seen


@pytest.mark.slow
def test_packed_weights_are_judged_as_they_are_written(tmp_path: Path) -> None:
    fp8(tmp_path / "model")
    source = Checkpoint(str(tmp_path / "model"))
    model = source.load("float32", "cpu").eval()
    statistics = collect(source, model, ResidentEngine(model))
    statistics.metadata |= {"size": vars(source.size), "calibration": {}}
    plan = pipeline.plan(statistics, Recipe(total=kept_in_all(source), reduce="ream"))
    write_merged(source, plan, tmp_path / "merged")
    for kind in ("refit", "distill"):
        (tmp_path / kind).mkdir()
        engine = start_layerwise(source, "resident", "float32", "cpu", lambda w, i, b: iter(b))
        done = Repairer(
            engine, plan.kept, kind, folder=tmp_path / kind, key="k",
            repacking=Repacking(source, plan.kept), merged=tmp_path / "merged",
        ).run(batches())  # fmt: skip
        assert any(d.repair == kind or d.epoch for d in done)
        write_model(
            source, plan.kept, tmp_path / f"{kind}-out", merged=tmp_path / "merged",
            repaired=tmp_path / kind,
        )  # fmt: skip
        found = Checkpoint(str(tmp_path / f"{kind}-out")).load("float32", "cpu").state_dict()
        for name, p in engine.model.state_dict().items():
            assert torch.equal(found[name], p), name


@pytest.mark.slow
@pytest.mark.nightly
def test_the_command_merges_repairs_and_heals_in_one_go_as_from_a_plan(tmp_path: Path) -> None:
    one, stats, plan, two, healed = (
        tmp_path / n for n in ("one", "stats", "plan.json", "two", "healed")
    )
    text = ["-c", CALIBRATION, "--samples", 20, "--length", 64, "--batch-size", 4]
    run("prune", MODEL, "--experts", 45, *text, "--reduce", "ream", "--repair", "refit", "-o", one)
    run("calibrate", MODEL, *text, "--for", "reap,ream", "-o", stats)
    run("plan", stats, "--experts", 45, "--reduce", "ream", "-o", plan)
    run("prune", MODEL, "--plan", plan, "--batch-size", 4, "--repair", "refit", "-o", two)
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    config = json.loads((one / "config.json").read_text())
    assert config["num_experts"] == 45
    assert "auto_map" not in config
    done = json.loads((one / "moe_fair" / "repair.json").read_text())
    assert any(d["repair"] == "refit" for d in done)
    assert "(REAM)" in (one / "moe_fair" / "plan.json").read_text()
    run("prune", MODEL, "--plan", plan, "--heal", 256, "-o", healed)
    assert (healed / "moe_fair" / "heal.json").exists()
    loaded = original(Checkpoint(str(healed)))
    ids = batches()[0].input_ids
    assert bool(torch.isfinite(loaded(input_ids=ids).logits).all())
